"""GradientTape: watching, nesting, freeing, in-place writes, errors."""

import weakref

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import DifferentiationError

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_gradient_inside_the_with_and_of_what_was_computed():
    x = f64(3)
    with nf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        h = x * x
        y = h.sin().sum()
        dx, dh = tape.gradient(y, (x, h))
        z = dx.square().sum()
    assert torch.allclose(dx, (x * x).cos() * 2 * x) and torch.allclose(dh, (x * x).cos())
    assert torch.allclose(tape.gradient(z, x), nf.grad(lambda x: (2 * x * (x * x).cos()).square().sum())(x))


@both
def test_a_tape_inside_other_transforms(run):
    def f(x):
        with nf.GradientTape() as tape:
            tape.watch(x)
            y = (x * x.exp()).sum()
        return tape.gradient(y, x)

    x = f64(3)
    assert torch.allclose(run(f)(x), x.exp() * (1 + x))
    assert torch.allclose(run(nf.grad(lambda x: f(x).sum()))(x), x.exp() * (2 + x))
    assert torch.allclose(run(nf.vmap(f))(x[:, None])[:, 0], x.exp() * (1 + x))


def test_writes_are_followed_inside_and_refused_if_they_outlast_the_tape():
    x, b = f64(3), f64(3)

    def temporary(x):
        y = x * 2
        y.add_(1)
        return y.exp()

    with nf.GradientTape() as tape:
        tape.watch(x)
        y = temporary(x).sum()
    assert torch.allclose(tape.gradient(y, x), 2 * (2 * x + 1).exp())
    with pytest.raises(DifferentiationError, match=r"test_gradient_tape\.py:\d+: .*shape \(3,\) was written in place"):
        with nf.GradientTape() as tape:
            tape.watch(x)
            y = (x * b).sum()
            b.add_(1)
    with pytest.raises(ZeroDivisionError):
        with nf.GradientTape():
            b.add_(1)
            raise ZeroDivisionError


def test_module_parameters_and_the_memory_of_a_tape():
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    params = dict(layer.named_parameters())
    with nf.GradientTape() as tape:
        tape.watch(params)
        h = layer(x)
        kept = weakref.ref(h)
        y = h.square().sum()
        del h
    found = tape.gradient(y, params)
    assert kept() is None, "freed as it goes"
    layer(x).square().sum().backward()
    for name, p in params.items():
        assert torch.allclose(found[name], p.grad)
