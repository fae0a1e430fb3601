"""custom_vjp, custom_jvp, opaque functions."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

import neuralforge as nf
from neuralforge.errors import DifferentiationError
from neuralforge.graph import capture

pytestmark = pytest.mark.usefixtures("unoptimised")

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def sine_in_numpy():
    numpy_sin = nf.opaque(lambda x: torch.from_numpy(np.sin(x.numpy())), shape=torch.empty_like)
    numpy_cos = nf.opaque(lambda x: torch.from_numpy(np.cos(x.numpy())), shape=torch.empty_like)
    sin = nf.custom_vjp(lambda x: numpy_sin(x))
    sin.defvjp(lambda x: (numpy_sin(x), x), lambda x, g: (g * numpy_cos(x),))
    return sin


@both
def test_an_opaque_function_under_vmap(run):
    x, sin = f64(4, 3), sine_in_numpy()
    assert torch.allclose(run(nf.vmap(sin))(x), x.sin())
    assert torch.allclose(run(nf.vmap(lambda x, s: sin(x * s), (0, None)))(x, f64(3) * 0 + 2), (2 * x).sin())
    assert torch.allclose(run(nf.jacrev(sin))(x[0]), x[0].cos().diag())


@both
def test_an_opaque_function_may_return_a_tensor_or_a_tuple(run):
    single = lambda xs: xs if len(xs) > 1 else xs[0]
    double = nf.opaque(lambda *xs: single([2 * x for x in xs]), shape=lambda *xs: single(xs))
    x, y = f64(3), f64(2)
    for _ in range(2):
        assert torch.equal(run(double)(x), 2 * x)
        a, b = run(double)(x, y)
        assert torch.equal(a, 2 * x) and torch.equal(b, 2 * y)


def test_an_opaque_function_is_one_equation():
    graph = capture(sine_in_numpy(), f64(3)).graph
    assert len(graph.equations) == 1 and "opaque" in graph.equations[0].name


def test_closing_over_a_differentiated_tensor_is_refused():
    def loss(w, make, rule):
        f = make(lambda x: x * w)
        rule(f, w)
        return f(w.sin()).sum()

    reverse = lambda f, w: f.defvjp(lambda x: (x * w, None), lambda r, g: (g * w,))
    forward = lambda f, w: f.defjvp(lambda p, t: (p[0] * w, t[0] * w))
    w = f64(3)
    for make, rule in ((nf.custom_vjp, reverse), (nf.custom_jvp, forward)):
        with pytest.raises(DifferentiationError, match=r"closes over a differentiated tensor of shape \(3,\)"):
            nf.grad(loss)(w, make, rule)
    with pytest.raises(DifferentiationError, match="closes over a differentiated tensor"):
        nf.jvp(lambda w: loss(w, nf.custom_jvp, forward), (w,), (w,))

    def stopped(w):
        f = nf.custom_vjp(lambda x: x * nf.stop_gradient(w))
        f.defvjp(lambda x: (x * w.detach(), w.detach()), lambda r, g: (g * r,))
        return f(w.sin()).sum()

    assert torch.allclose(nf.grad(stopped)(w), w * w.cos())


@both
def test_rules_see_the_writes_before_and_inside_them(run):
    square = nf.custom_vjp(lambda x: x * x)

    def forward(x):
        kept, y = x * 1, x * x
        kept[0] = 7.0
        y.mul_(1.0)
        return y, (kept,)

    square.defvjp(forward, lambda r, g: (g * r[0],))
    triple = nf.custom_jvp(lambda x: x * 3)
    triple.defjvp(lambda p, t: (p[0] * 3, t[0] * 3))

    def written(f):
        def loss(x):
            y = x * 1
            y.mul_(2)
            z = f(y)
            z.add_(1)
            return z.sum()

        return loss

    x = f64(3)
    value, gradient = run(nf.value_and_grad(written(square)))(x)
    assert torch.allclose(value, (4 * x * x + 1).sum())
    assert torch.allclose(gradient, torch.cat([x.new_tensor([14.0]), 4 * x[1:]]))
    value, gradient = run(nf.value_and_grad(written(triple)))(x)
    assert torch.allclose(value, (6 * x + 1).sum()) and torch.equal(gradient, torch.full_like(x, 6))
    assert torch.allclose(nf.jvp(written(triple), (x,), (x,))[1], 6 * x.sum())


@both
def test_custom_jvp_of_trees_to_every_order(run):
    f = nf.custom_jvp(lambda d: {"a": d["x"] * d["y"], "i": d["x"].argmax(), "s": d["x"].sum()})
    rule = lambda d, t: {"a": d["x"] * t["y"] + d["y"] * t["x"], "i": None, "s": t["x"].sum()}
    f.defjvp(lambda p, t: (f(*p), rule(p[0], t[0])))
    ours = lambda x, y: (lambda o: (o["a"] * o["s"]).sum())(f({"x": x, "y": y}))
    plain = lambda x, y: (x * y * x.sum()).sum()
    x, y = f64(3), f64(3)
    assert torch.allclose(run(nf.hessian(ours))(x, y), nf.hessian(plain)(x, y))
    for a, b in zip(run(lambda x, y: nf.hvp(ours, (x, y), (y, x)))(x, y), nf.hvp(plain, (x, y), (y, x))):
        assert torch.allclose(a, b)


def test_wrong_tangents_are_refused():
    f = nf.custom_jvp(lambda x: x * 2)
    f.defjvp(lambda p, t: (p[0] * 2, t[0].sum()))
    for differentiate in (lambda x: nf.jvp(f, (x,), (x,)), nf.grad(lambda x: f(x).sum())):
        with pytest.raises(DifferentiationError, match=r"tangent of shape \(\) for an output of shape \(3,\)"):
            differentiate(f64(3))


KERNEL = """
void cube(const double *x, double *y, long n) { for (long i = 0; i < n; i++) y[i] = x[i] * x[i] * x[i]; }
void slope(const double *x, const double *g, double *y, long n) { for (long i = 0; i < n; i++) y[i] = 3 * x[i] * x[i] * g[i]; }
"""


def c_functions(folder):
    """`cube` with a rule for reverse mode and one that serves both modes, of functions in C called by pointer."""
    (folder / "kernel.c").write_text(KERNEL)
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", folder / "kernel.so", folder / "kernel.c"], check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))

    def call(name):
        def f(*tensors):
            tensors, out = [t.contiguous() for t in tensors], torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
            getattr(library, name)(*(ctypes.c_void_p(t.data_ptr()) for t in (*tensors, out)), ctypes.c_long(out.numel()))
            return out

        return nf.opaque(f, shape=lambda *tensors: torch.empty(tensors[0].shape, dtype=tensors[0].dtype))

    cube, slope = call("cube"), call("slope")
    reverse, its_slope = nf.custom_vjp(lambda x: cube(x)), nf.custom_vjp(lambda x, g: slope(x, g))
    reverse.defvjp(lambda x: (reverse(x), x), lambda x, g: (its_slope(x, g),))
    its_slope.defvjp(lambda x, g: (its_slope(x, g), (x, g)), lambda r, h: (6 * r[0] * r[1] * h, its_slope(r[0], h)))
    both_modes = nf.custom_jvp(lambda x: cube(x))
    both_modes.defjvp(lambda p, t: (both_modes(p[0]), 3 * p[0] ** 2 * t[0]))
    return reverse, both_modes


def test_c_functions_to_the_second_order(tmp_path):
    reverse, both_modes = c_functions(tmp_path)
    x = f64(4)
    for f in (reverse, nf.jit(reverse), nf.jit(lambda x: reverse(x.sin()) * x)):
        nf.testing.check_grads(f, (x,), order=2, modes=("rev",))
    for f in (both_modes, nf.jit(lambda x: both_modes(x.sin()) * x)):
        nf.testing.check_grads(f, (x,), order=2, modes=("fwd", "rev"))
    for f in (reverse, both_modes):
        second = lambda x, f=f: nf.grad(lambda x: nf.grad(lambda x: f(x).sum())(x).sum())(x)
        assert torch.allclose(nf.jit(second)(x), 6 * x)
        assert torch.allclose(nf.jit(nf.vmap(second))(x[:, None]), 6 * x[:, None])


def test_check_grads_finds_a_wrong_second_derivative(tmp_path):
    f = nf.custom_vjp(lambda x: x**3)
    f.defvjp(lambda x: (f(x), x), lambda x, g: (3 * nf.stop_gradient(x) ** 2 * g,))
    nf.testing.check_grads(f, (f64(4),), order=1, modes=("rev",))
    with pytest.raises(AssertionError, match="rev derivative of rev of f"):
        nf.testing.check_grads(f, (f64(4),), order=2, modes=("rev",))


def test_arguments_by_keyword():
    f = nf.custom_vjp(lambda x, scale: x * scale)
    f.defvjp(lambda x, scale: (x * scale, scale), lambda scale, g: (10 * g * scale, None))
    x = f64(3)
    assert nf.grad(lambda x: f(x, scale=3.0).sum())(x).tolist() == [30] * 3
    assert torch.equal(f(scale=2.0, x=x), 2 * x)
    by_keyword = nf.vmap(lambda x, k, n: x * k["k"] * n)(x, k={"k": x}, n=2)
    assert torch.allclose(by_keyword, 2 * x * x)


def test_wrong_opaque_functions():
    x = f64(3)
    wrong = nf.opaque(lambda x: x * 1, shape=lambda x: torch.empty(7))
    for run in (lambda f: f, nf.jit):
        with pytest.raises(DifferentiationError, match=r"returned \(3,\) torch.float64, and its shape .*\(7,\) torch.float32"):
            run(wrong)(x)
    with pytest.raises(DifferentiationError, match=r"test_custom\.py:\d+: .*was given 3 \(int\); expected tensors"):
        nf.opaque(lambda x, n: x * n, shape=lambda x, n: x)(x, 3)
    itself = nf.opaque(lambda x: x, shape=torch.empty_like)
    assert torch.equal(nf.jit(lambda x: itself(x).mul_(2))(x), 2 * x) and itself(x) is not x
