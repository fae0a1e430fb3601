"""jacrev, jacfwd, hessian, linearize, vmap, custom rules, opaque functions, checkpointing, GradientTape, check_grads:
alone, nested in one another, eagerly and compiled."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import CaptureError, DifferentiationError
from neuralforge.graph import capture

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- jacobians


@both
@pytest.mark.parametrize("jacobian", [nf.jacrev, nf.jacfwd])
def test_jacobians_equal_torchs(jacobian, run):
    w, x = f64(3, 4), f64(4)
    f = lambda w, x: (w @ x).tanh().outer(x[:2])
    expected = torch.func.jacrev(f, argnums=(0, 1))(w, x)
    found = run(jacobian(f, argnums=(0, 1)))(w, x)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected))
    assert torch.allclose(run(jacobian(f))(w, x), expected[0])


@pytest.mark.parametrize("jacobian", [nf.jacrev, nf.jacfwd])
def test_jacobians_of_pytrees(jacobian):
    p = {"a": f64(2), "b": [f64(3)]}
    f = lambda p: (p["a"].sum() * p["b"][0], {"s": p["a"].exp()})
    found = jacobian(f)(p)
    assert found[0]["a"].shape == (3, 2) and found[0]["b"][0].shape == (3, 3) and found[1]["s"]["b"][0].shape == (2, 3)
    assert torch.allclose(found[1]["s"]["a"], p["a"].exp().diag())


@both
def test_hessian(run):
    x = f64(5)
    f = lambda x: (x.outer(x).sin().sum() + x.prod()).exp()
    assert torch.allclose(run(nf.hessian(f))(x), torch.func.hessian(f)(x))


@both
def test_gradient_of_a_hessian(run):
    x = f64(3)
    f = lambda x: nf.hessian(lambda x: (x**4).sum())(x).sum()
    assert torch.allclose(run(nf.grad(f))(x), 24 * x)


def test_linearize():
    w, x = f64(3, 3), f64(3)
    f = lambda w, x: {"y": (w @ x).tanh()}
    out, push = nf.linearize(f, w, x)
    for _ in range(2):
        tangents = f64(3, 3), f64(3)
        expected, moved = nf.jvp(f, (w, x), tangents)
        assert torch.allclose(push(*tangents)["y"], moved["y"]) and torch.allclose(out["y"], expected["y"])


# ---- vmap


@both
def test_vmap_of_a_gradient_is_per_example_gradients(run):
    w, x, y = f64(4), f64(6, 4), f64(6)
    loss = lambda w, x, y: ((w * x).sum() - y).square()
    found = run(nf.vmap(nf.grad(loss), in_axes=(None, 0, 0)))(w, x, y)
    expected = torch.stack([nf.grad(loss)(w, a, b) for a, b in zip(x, y)])
    assert torch.allclose(found, expected)


@both
def test_gradient_of_a_vmap(run):
    w, x = f64(4, 3), f64(6, 4)
    f = lambda w: nf.vmap(lambda row: (row @ w).softmax(-1))(x).square().sum()
    assert torch.allclose(run(nf.grad(f))(w), nf.grad(lambda w: (x @ w).softmax(-1).square().sum())(w))


def test_vmap_axes_trees_and_nesting():
    a, b = f64(2, 5), f64(5, 3)
    f = lambda d: {"y": d["a"] * 2 + d["b"].sum(), "n": 1}
    out = nf.vmap(f, in_axes=({"a": 1, "b": 0},), out_axes=1)({"a": a, "b": b})
    assert torch.allclose(out["y"], a * 2 + b.sum(1)) and out["n"] == 1
    outer = nf.vmap(nf.vmap(torch.dot, (None, 0)), (0, None))
    assert torch.allclose(outer(a, b.t()), a @ b)


def test_vmap_errors():
    with pytest.raises(CaptureError, match=r"different sizes \[2, 3\]"):
        nf.vmap(torch.add)(f64(2), f64(3))
    with pytest.raises(CaptureError, match="axes of nothing"):
        nf.vmap(torch.add, (None, None))(f64(2), f64(2))
    with pytest.raises(CaptureError, match=r"axis 3 of a tensor of shape \(2,\)"):
        nf.vmap(torch.sin, 3)(f64(2))
    with pytest.raises(CaptureError, match="doesn't fit 2 arguments"):
        nf.vmap(torch.add, (0,))(f64(2), f64(2))


# ---- custom rules


@both
def test_custom_vjp(run):
    @nf.custom_vjp
    def f(x, d):
        return x.sin() * d["k"]

    f.defvjp(lambda x, d: (f.f(x, d), (x, d["k"])), lambda r, g: (10 * g * r[0].cos() * r[1], {"k": None}))
    x, k = f64(3), f64(3)
    assert torch.allclose(f(x, {"k": k}), x.sin() * k)
    found = run(nf.grad(lambda x, k: f(x * 2, {"k": k}).sum(), argnums=(0, 1)))(x, k)
    assert torch.allclose(found[0], 20 * (2 * x).cos() * k), "the rule is used, not the true derivative"
    assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
    second = run(nf.grad(lambda x: nf.grad(lambda x: f(x, {"k": k}).sum())(x).sum()))(x)
    assert torch.allclose(second, -10 * x.sin() * k), "second derivatives go through the rule"


def test_custom_vjp_that_returns_its_argument():
    @nf.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda r, g: (g.clamp(-1, 1),))
    x = f64(4)
    assert torch.allclose(nf.grad(lambda x: (clip(x) * 5 + x).sum())(x), torch.full((4,), 2.0, dtype=torch.float64))


@both
def test_custom_jvp_serves_both_modes(run):
    @nf.custom_jvp
    def f(x, y):
        return x.exp() * y

    f.defjvp(lambda p, t: (f.f(*p), 3 * p[0].exp() * p[1] * t[0] + p[0].exp() * t[1]))
    x, y, t = f64(3), f64(3), f64(3)
    assert torch.allclose(run(lambda x, t: nf.jvp(lambda x: f(x, y), (x,), (t,))[1])(x, t), 3 * x.exp() * y * t)
    dx, dy = run(nf.grad(lambda x, y: f(x, y).sum(), argnums=(0, 1)))(x, y)
    assert torch.allclose(dx, 3 * x.exp() * y) and torch.allclose(dy, x.exp())
    second = run(nf.grad(lambda x: nf.grad(lambda x: f(x, y).sum())(x).sum()))(x)
    assert torch.allclose(second, nf.grad(lambda x: (3 * x.exp() * y).sum())(x))


@both
def test_an_opaque_numpy_function_with_a_rule(run):
    numpy_sin = nf.opaque(lambda x: torch.from_numpy(np.sin(x.numpy())), shape=torch.empty_like)
    numpy_cos = nf.opaque(lambda x: torch.from_numpy(np.cos(x.numpy())), shape=torch.empty_like)
    sin, cos = nf.custom_vjp(lambda x: numpy_sin(x)), nf.custom_vjp(lambda x: numpy_cos(x))
    sin.defvjp(lambda x: (numpy_sin(x), x), lambda x, g: (g * cos(x),))
    cos.defvjp(lambda x: (numpy_cos(x), x), lambda x, g: (-g * sin(x),))
    x = f64(4)
    assert torch.allclose(run(lambda x: sin(x * 2))(x), (2 * x).sin())
    assert torch.allclose(run(nf.grad(lambda x: sin(x * 2).sum()))(x), 2 * (2 * x).cos())
    with pytest.raises(DifferentiationError, match="has neither a derivative rule"):
        nf.grad(lambda x: numpy_sin(x).sum())(x)
    nf.testing.check_grads(lambda x: sin(x * 2) * x, (x,), order=1, modes=("rev",))


def test_custom_rule_errors():
    f = nf.custom_vjp(lambda x: x * 2)
    x = f64(3)
    with pytest.raises(DifferentiationError, match="no rule yet"):
        f(x)
    f.defvjp(lambda x: (x * 2, None), lambda r, g: g)
    with pytest.raises(DifferentiationError, match="must return a tuple of 1 cotangents"):
        nf.grad(lambda x: f(x).sum())(x)
    f.defvjp(lambda x: (x * 2, None), lambda r, g: (g[:2],))
    with pytest.raises(DifferentiationError, match=r"shape \(2,\) for an argument of shape \(3,\)"):
        nf.grad(lambda x: f(x).sum())(x)
    with pytest.raises(DifferentiationError, match="Use nf.custom_jvp"):
        nf.jvp(f, (x,), (x,))


# ---- checkpointing


def layer(p, x):
    h = F.dropout(F.gelu(x @ p["up"]), 0.3)
    return x + nf.checkpoint_name(h, "hidden") @ p["down"]


@both
@pytest.mark.parametrize("policy", [None, nf.save_products, nf.save_only("hidden")], ids=["nothing", "products", "names"])
def test_checkpointing_changes_nothing(run, policy):
    params = [{"up": f64(8, 16), "down": f64(16, 8)} for _ in range(3)]
    x = f64(5, 8)

    def loss(params, x, block):
        for p in params:
            x = block(p, x)
        return x.square().mean()

    results = []
    for block in (layer, nf.checkpoint(layer, policy)):
        torch.manual_seed(1)
        results.append(run(nf.value_and_grad(lambda p, x: loss(p, x, block), argnums=(0, 1)))(params, x))  # noqa: B023
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, results)):
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12)


def test_second_order_through_a_checkpoint():
    f = lambda x: nf.checkpoint(lambda x: (x.sin() * x).exp())(x).sum()
    plain = lambda x: (x.sin() * x).exp().sum()
    x, v = f64(4), f64(4)
    assert torch.allclose(nf.hvp(f, (x,), (v,))[0], nf.hvp(plain, (x,), (v,))[0])
    assert torch.allclose(nf.hessian(f)(x), nf.hessian(plain)(x))


def test_checkpointing_keeps_less():
    """Eagerly: what the first run made is gone before backward. Captured: it is computed twice, and the peak falls."""
    seen = []

    def block(x):
        h = x.exp()
        seen.append(weakref.ref(h))
        return (h * h).sin()

    gc.disable()
    try:
        tape_alive = []

        def loss(x):
            y = nf.checkpoint(block)(x)
            tape_alive.append(seen[0]() is not None)
            return y.sum()

        nf.grad(loss)(f64(10))
        assert tape_alive == [False]
    finally:
        gc.enable()

    def deep(block):
        def loss(x):
            for _ in range(6):
                x = block(x)
            return x.sum()

        return nf.grad(loss)

    def wide(x):
        for _ in range(4):
            x = torch.tanh(x @ torch.ones(64, 64)) + x.cumsum(0) * 0.01
        return x

    x = torch.randn(256, 64)
    plain, light = (nf.explain(deep(b), x) for b in (wide, nf.checkpoint(wide)))
    assert light.plan.peak_bytes < 0.6 * plain.plan.peak_bytes
    assert any(eq.origin == "recomputed" for eq in capture(deep(nf.checkpoint(wide)), x).graph.equations)


# ---- the imperative tape


def test_gradient_tape():
    x, y = f64(3), f64(3)
    with nf.GradientTape() as tape:
        tape.watch({"x": x, "y": y})
        z = (x * y.exp()).sum()
    dx, dy = tape.gradient(z, (x, y))
    assert torch.allclose(dx, y.exp()) and torch.allclose(dy, x * y.exp())
    with pytest.raises(DifferentiationError, match="persistent=True"):
        tape.gradient(z, x)


def test_gradient_tape_persistent_and_unwatched():
    x, other = f64(3), f64(2)
    with nf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        a, b = (x * x).sum(), x.sin()
    assert torch.allclose(tape.gradient(a, x), 2 * x) and torch.allclose(tape.gradient([a, b], x), 2 * x + x.cos())
    with pytest.raises(DifferentiationError, match=r"shape \(2,\) that wasn't watched"):
        tape.gradient(a, other)
    with pytest.raises(DifferentiationError, match="torch.int64"):
        tape.watch(torch.arange(3))


def test_nested_gradient_tapes():
    x = f64(3)
    with nf.GradientTape() as outer:
        outer.watch(x)
        with nf.GradientTape() as inner:
            inner.watch(x)
            y = (x**3).sum()
        first = inner.gradient(y, x)
    assert torch.allclose(first, 3 * x**2) and torch.allclose(outer.gradient(first, x), 6 * x)


# ---- checking


def test_check_grads_finds_a_wrong_rule():
    x = f64(4)
    nf.testing.check_grads(lambda x: x.sin() * x.sum(), (x,), order=3)
    nf.testing.check_grads(lambda d: {"y": (d["z"] * d["z"].exp()).sum()}, ({"z": torch.randn(3, dtype=torch.complex128)},))
    wrong = nf.custom_jvp(lambda x: x.sin())
    wrong.defjvp(lambda p, t: (p[0].sin(), 1.01 * p[0].cos() * t[0]))
    for modes in (("fwd",), ("rev",)):
        with pytest.raises(AssertionError, match="central differences give"):
            nf.testing.check_grads(wrong, (x,), modes=modes)
    with pytest.raises(AssertionError, match="float64"):
        nf.testing.check_grads(torch.sin, (torch.ones(2),))
