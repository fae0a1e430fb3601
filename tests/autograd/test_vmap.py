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
