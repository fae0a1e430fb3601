"""Gradients of biases are made by the products that make the weights', where nothing else has read the gradient."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.products import candidates

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def own_products(monkeypatch):
    monkeypatch.setattr(candidates.Choices, "get", lambda self, key, measure: "own")
    monkeypatch.setattr(candidates.Choices, "save", lambda self: None)


def pulled(layer):
    """The gradients of the layer's operands, given that of its result."""
    return lambda g, *args: nf.vjp(layer, *args)[1](g)


def check(f, *args):
    """Against float64. The names of what runs."""
    for found, truth in zip(nf.jit(f)(*args), f(*(x.double() for x in args))):
        assert found.shape == truth.shape
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    return [row.name for row in nf.explain(f, *args).rows]


def operands(*shape, columns=37, inner=23):
    torch.manual_seed(0)
    return torch.randn(*shape, columns), torch.randn(*shape, inner), torch.randn(columns, inner), torch.randn(columns)


@pytest.mark.parametrize("shape", [(1,), (50,), (3, 400), (2, 3, 7)], ids=str)
def test_a_linear_layer(shape):
    names = check(pulled(F.linear), *operands(*shape))
    assert "product_and_sums" in names and "aten.sum.dim_IntList" not in names


def test_many_rows_and_columns():
    assert "product_and_sums" in check(pulled(F.linear), *operands(1500, columns=700, inner=40))


def test_written_out():
    assert "product_and_sums" in check(pulled(lambda x, w, b: x @ w.t() + b), *operands(5, 60))


def test_of_attention():
    def attention(x, w, b):
        q, k, v = F.linear(x, w, b).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    args = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(48, 16) / 4, torch.randn(48)
    names = check(pulled(attention), *args)
    assert "product_and_sums" in names and "aten.sum.dim_IntList" not in names


OTHERS = {
    "all": lambda g, x: (g.t() @ x, g.sum()),
    "rows": lambda g, x: (g.t() @ x, g.sum(1)),
    "of another": lambda g, x: (g.t() @ x, (g * 2).sum(0)),
    "needed by the product": lambda g, x: (g.t() @ (x * g.sum(0).sum()),),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name):
    g, x, _, _ = operands(37)
    assert "product_and_sums" not in check(OTHERS[name], g, x)


def test_nan_and_infinity():
    g, x, w, b = operands(50)
    g[3, 2], g[4, 5] = float("nan"), float("inf")
    dw, db = nf.jit(lambda g, x: (g.t() @ x, g.sum(0)))(g, x)
    assert torch.equal(db.isnan(), g.sum(0).isnan()) and torch.equal(db.isinf(), g.sum(0).isinf())
    assert torch.equal(dw.isnan(), (g.t() @ x).isnan())
