"""vmap: axes, trees, nesting, randomness, errors."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import CaptureError

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


@both
def test_vmap_of_attention_and_of_cross_entropy(run):
    q, e, tokens = f64(3, 1, 2, 8, 4), f64(10, 4), torch.randint(0, 10, (3, 5))
    attend = nf.grad(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True).sin().sum())
    assert torch.allclose(run(nf.vmap(attend))(q), torch.stack([attend(x) for x in q]))
    embed = nf.grad(lambda e, t: F.cross_entropy(F.embedding(t, e) @ e.t(), t))
    assert torch.allclose(run(nf.vmap(embed, (None, 0)))(e, tokens), torch.stack([embed(e, t) for t in tokens]))


def test_vmap_of_an_empty_batch():
    out = nf.vmap(lambda x: {"y": x.sum() * 2, "z": x.expand(4, 3), "n": 1}, out_axes={"y": 0, "z": 1, "n": 0})(f64(0, 3))
    assert out["y"].shape == (0,) and out["z"].shape == (4, 0, 3) and out["n"] == 1


def test_vmap_sees_the_writes_before_it():
    def f(x):
        y = x * 1
        y[0] = 3.0
        return nf.vmap(torch.sin)(y).sum()

    x = f64(3)
    value, gradient = nf.value_and_grad(f)(x)
    assert torch.allclose(value, x[1:].sin().sum() + torch.tensor(3.0, dtype=torch.float64).sin())
    assert torch.allclose(gradient[1:], x[1:].cos()) and gradient[0] == 0


@both
def test_every_example_draws_its_own_random_numbers(run):
    out = run(nf.vmap(lambda x: x + torch.rand(())))(torch.zeros(100))
    assert out.unique().numel() == 100


def test_trees_of_output_axes():
    x = f64(4, 3)
    a, b = nf.vmap(lambda x: (x, x * 2), out_axes=(0, 1))(x)
    assert torch.equal(a, x) and torch.equal(b, 2 * x.t())
    with pytest.raises(CaptureError, match=r"out_axes=\(0, 1\) doesn't fit"):
        nf.vmap(torch.sin, out_axes=(0, 1))(x)


def tenfold():
    """Functions whose rules give ten times the derivative, so that it shows whether they are used."""
    reverse = nf.custom_vjp(lambda x, d: (x.sin() * d["k"], x.argmax()))
    reverse.defvjp(
        lambda x, d: ((x.sin() * d["k"], x.argmax()), (x, d["k"])),
        lambda r, g: (10 * g[0] * r[0].cos() * r[1], {"k": 10 * g[0] * r[0].sin()}),
    )
    both_modes = nf.custom_jvp(lambda x, d: (x.sin() * d["k"], x.argmax()))
    rule = lambda x, k, dx, dk: 10 * (x.cos() * k * dx + x.sin() * dk)
    both_modes.defjvp(lambda p, t: (both_modes.f(*p), (rule(p[0], p[1]["k"], t[0], t[1]["k"]), None)))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x, k)
            return x.sin() * k, x.argmax()

        @staticmethod
        def backward(ctx, g, _):
            x, k = ctx.saved_tensors
            return 10 * g * x.cos() * k, 10 * g * x.sin()

    return reverse, both_modes, lambda x, d: Function.apply(x, d["k"])


@both
@pytest.mark.parametrize("which", [0, 1, 2], ids=["custom_vjp", "custom_jvp", "autograd.Function"])
def test_rules_of_the_users_own_inside_vmap(run, which):
    f = tenfold()[which]
    x, k = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def example(x, k):
        y = x * 2
        return (f(y, {"k": k.exp()})[0] * y).sum() + f(k, {"k": k})[0].sum()

    batched = lambda x, k: nf.vmap(example, (0, None))(x, k).sum()
    one_by_one = lambda x, k: sum(example(row, k) for row in x)
    found, expected = run(nf.grad(batched, (0, 1)))(x, k), nf.grad(one_by_one, (0, 1))(x, k)
    assert torch.allclose(found[0], expected[0]) and torch.allclose(found[1], expected[1])
    nested = lambda x, k: nf.vmap(lambda k: nf.vmap(example, (1, None), 0)(x.t(), k))(torch.stack([k, k])).sum() / 2
    assert torch.allclose(run(nf.grad(nested))(x, k), expected[0])
    second = lambda f: lambda x, k: nf.grad(lambda x: nf.grad(f)(x, k).sin().sum())(x)
    assert torch.allclose(run(second(batched))(x, k), second(one_by_one)(x, k))
    if which == 1:
        along = lambda f: lambda x, k: nf.jvp(f, (x, k), (x.cos(), k.cos()))[1]
        assert torch.allclose(run(along(batched))(x, k), along(one_by_one)(x, k))


def test_a_rule_that_closes_over_what_is_batched_is_refused():
    def example(x):
        f = nf.custom_vjp(lambda y: y * x)
        f.defvjp(lambda y: (y * x, None), lambda r, g: (g * x,))
        return f(x.sin())

    with pytest.raises(CaptureError, match="closes over a tensor of shape"):
        nf.grad(lambda x: nf.vmap(example)(x).sum())(torch.randn(3))


@both
def test_derivatives_of_scattering_and_of_complex_numbers(run):
    def writes(x):
        y = torch.stack([x, x.sin()])
        y[1:].mul_(2)
        y[0] = x * x
        return y.sum()

    complex_ = lambda x: nf.grad(lambda x: torch.complex(x, x.cos()).exp().abs())(x)
    scatter = lambda x: torch.select_scatter(torch.stack([x, x]), x * x, 0, -1).sum()
    x = f64(4)
    for f in (writes, complex_, scatter):
        one_by_one = lambda x, f=f: sum(f(row) for row in x)
        assert torch.allclose(run(nf.grad(lambda x, f=f: nf.vmap(f)(x).sum()))(x), nf.grad(one_by_one)(x))


def test_transforms_inside_torch_func_are_refused_and_the_reverse_works():
    x = f64(3)
    cube = lambda x: (x**3).sum()
    for outer in (torch.func.grad(lambda x: nf.grad(cube)(x).sum()), torch.func.vmap(nf.grad(lambda x: x**3))):
        with pytest.raises(CaptureError, match=r"test_vmap\.py:\d+: a transform of neuralforge inside one of torch.func"):
            outer(x)
    assert torch.allclose(torch.func.grad(nf.jit(cube))(x), 3 * x**2), "nf.jit runs its function there"
    assert torch.allclose(nf.grad(lambda x: torch.func.grad(cube)(x).sum())(x), 6 * x)
