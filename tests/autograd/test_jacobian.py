"""jacrev, jacfwd, hessian, linearize: alone, nested, eagerly and compiled."""

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import DifferentiationError

pytestmark = pytest.mark.usefixtures("unoptimised")

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_a_jacobian_of_a_scalar_of_nothing_and_with_keywords():
    x = f64()
    for jacobian in (nf.jacrev, nf.jacfwd):
        assert torch.allclose(jacobian(torch.sin)(x), x.cos())
        assert jacobian(lambda x: x * 2)(f64(0)).shape == (0, 0)
        assert torch.equal(jacobian(lambda x, k: x * k)(f64(2), k=3.0), 3 * torch.eye(2, dtype=torch.float64))
    assert torch.allclose(nf.hessian(torch.sin)(x), -x.sin())


@both
def test_jacobians_see_the_writes_before_them(run):
    def f(x):
        mask = torch.zeros(3, dtype=torch.float64)
        mask[1:] = 1
        y = x * 1
        y[0] = 5.0
        g = lambda z: z.sin() * mask * y
        return nf.jacrev(g)(x).sum() + nf.jacfwd(g)(x).sum()

    x = f64(3)
    expected = nf.grad(lambda x: 2 * (x.cos() * x)[1:].sum())(x)
    assert torch.allclose(run(nf.grad(f))(x), expected)


@both
def test_linearize_compiled_differentiated_and_complex(run):
    x, t = f64(3), f64(3)
    f = lambda x: torch.fft.fft(x.sin() * x)
    push = lambda x, t: nf.linearize(f, x)[1](t)
    assert torch.allclose(run(push)(x, t), nf.jvp(f, (x,), (t,))[1])
    real = lambda x: torch.view_as_real(push(x, t)).square().sum()
    expected = nf.grad(lambda x: torch.view_as_real(nf.jvp(f, (x,), (t,))[1]).square().sum())(x)
    assert torch.allclose(run(nf.grad(real))(x), expected)


def test_jacobian_errors():
    z = torch.randn(2, dtype=torch.complex128)
    with pytest.raises(DifferentiationError, match="argument of torch.complex128.*view_as_real"):
        nf.jacfwd(torch.sin)(z)
    with pytest.raises(DifferentiationError, match="result of torch.complex128"):
        nf.jacrev(torch.fft.fft)(f64(2))
    with pytest.raises(DifferentiationError, match="torch.int64"):
        nf.linearize(lambda x: x.argmax(), f64(2))
    with pytest.raises(DifferentiationError, match="argnums=1"):
        nf.hessian(torch.sum, 1)(f64(2))
