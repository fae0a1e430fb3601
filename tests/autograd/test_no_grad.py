"""torch.no_grad and its kin inside differentiated functions: constant to every derivative, as in torch.autograd."""

import pytest
import torch

import neuralforge as nf
from neuralforge.graph import gradient_mode

pytestmark = pytest.mark.usefixtures("unoptimised")

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def target(x):
    with torch.no_grad():
        y = x * 2
    return (x * y).sum()


def every_context(x):
    with torch.no_grad():
        with torch.enable_grad():
            z = x.exp()
        w = z * 2
    torch.set_grad_enabled(False)
    q = x.cos()
    torch.set_grad_enabled(True)
    with torch.set_grad_enabled(False):
        q = q + x
    with torch.inference_mode():
        i = x + 1
    return (torch.no_grad()(torch.sin)(x) * z + w * x * q * i.clone()).sum()


def write(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
        y[0].add_(1)
    return (y * y).sum()


def view_of_a_written_tensor(x):
    y = x * 2
    v = y[1:]
    y.mul_(2)
    with torch.no_grad():
        s = v.sum()
    return (v * v).sum() * s


def detached_in_place(x):
    y = x * 2
    y.detach_()
    z = (x * 3).detach_().mul_(2)
    y[1:].mul_(3)
    return (x * y * z).sum()


def power_of_a_number(x):
    """Its rule makes a tensor of the number, which torch detaches in place."""
    return (2**x + 10**x * x).sum()


FUNCTIONS = [target, every_context, write, view_of_a_written_tensor, detached_in_place, power_of_a_number]


def torchs_gradient(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, dtype=torch.float64)


@both
@pytest.mark.parametrize("f", FUNCTIONS)
def test_no_grad_is_honoured(f, run, x):
    expected = torchs_gradient(f, x)
    assert torch.allclose(run(nf.grad(f))(x), expected)
    assert torch.allclose(run(nf.grad(nf.checkpoint(f)))(x), expected)
    assert torch.allclose(run(lambda x, v: nf.jvp(f, (x,), (v,))[1])(x, x.cos()), (expected * x.cos()).sum())
    assert not gradient_mode.state.off and torch.is_grad_enabled()


@both
def test_no_grad_inside_vmap(run, x):
    batched = lambda x: nf.vmap(lambda row: every_context(row[None]) * row)(x).sum()
    expected = torch.stack([torchs_gradient(lambda row: every_context(row[None]) * row, row) for row in x])
    assert torch.allclose(run(nf.grad(batched))(x), expected)


@both
def test_a_derivative_taken_under_no_grad_is_a_constant_outside(run, x):
    def by_grad(x):
        with torch.no_grad():
            return (nf.grad(lambda y: (y**3).sum())(x)).clone()

    def by_jvp(x):
        with torch.no_grad():
            return nf.jvp(lambda y: y**3, (x,), (torch.ones_like(x),))[1]

    def by_tape(x):
        with torch.no_grad():
            with nf.GradientTape() as tape:
                tape.watch(x)
                y = (x**3).sum()
            return tape.gradient(y, x)

    def by_vmap(x):
        with torch.no_grad():
            return nf.vmap(nf.grad(lambda y: y**3))(x)

    for derivative in (by_grad, by_jvp, by_tape, by_vmap):
        assert torch.allclose(run(nf.grad(lambda x: (derivative(x) * x).sum()))(x), 3 * x**2)


def test_no_grad_around_a_transform_has_no_effect(x):
    expected = torchs_gradient(every_context, x)
    with torch.no_grad():
        assert torch.allclose(nf.grad(every_context)(x), expected)
        assert torch.allclose(nf.jit(nf.grad(every_context))(x), expected)
        assert gradient_mode.state.off
