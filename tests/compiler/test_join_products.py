"""Sums of products of few rows are one product."""

import pytest
import torch

import neuralforge as nf

SUMS = {
    "of steps": lambda w, *x: sum((v @ w).tanh().sum() for v in x),
    "of a recurrence": lambda w, *x: recurrence(w, x).square().sum(),
    "two steps": lambda w, *x: (x[0] @ w).tanh().sum() + (x[1] @ w).sin().sum(),
    "and of the weight itself": lambda w, *x: sum((v @ w).tanh().sum() for v in x) + w.square().sum(),
    "of stacked steps": lambda w, *x: torch.stack([(v @ w).tanh() for v in x]).square().sum(),
}
APART = {
    "of many rows": lambda w, *x: sum((torch.cat([v] * 9) @ w).tanh().sum() for v in x),
    "one": lambda w, *x: (x[0] @ w).tanh().sum(),
}


def recurrence(w, x):
    h = torch.zeros_like(x[0] @ w)
    for v in x:
        h = (v @ w + h[:, : v.shape[1]] @ w).tanh()
    return h


@pytest.mark.parametrize("name", SUMS | APART)
def test_gradients(name, agree):
    torch.manual_seed(0)
    args = torch.randn(12, 24) / 4, *(torch.randn(3, 12) for _ in range(5))
    f = nf.value_and_grad((SUMS | APART)[name])
    agree(f, *args)
    rules = [made.rule for stage in nf.explain(f, *args).passes for made in stage.made]
    assert ("join_products" in rules) == (name in SUMS)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_of_pytorch(kind, names):
    """The gradients of a layer's weights are one product each, whatever the number of steps."""
    torch.manual_seed(0)
    layer, x = getattr(torch.nn, kind)(10, 24, 1).double(), torch.randn(7, 3, 10, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    f = nf.value_and_grad(lambda p, x: torch.func.functional_call(layer, p, (x,))[0].square().sum())
    loss, found = nf.jit(f)(params, x)
    (expected := layer(x)[0].square().sum()).backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    layer.float()
    given = {name: p.float() for name, p in params.items()}, x.float()
    products = sum(name.endswith(("mm", "sums")) or "product" in name for name in names(f, *given))
    assert products <= 2 * 7 + 4
