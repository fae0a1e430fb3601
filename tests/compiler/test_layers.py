"""Layers written out become the operators that have kernels; stacks are concatenated in their places."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf


def names(f, *args):
    return [row.name for row in nf.explain(f, *args).rows]


def agree(f, *args):
    """Against float64, for values and gradients."""
    wide = [x.double() if x.is_floating_point() else x for x in args]
    for found, truth in zip(nf.jit(f)(*args), f(*wide)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


LINEAR = {
    "matrix": (lambda x, w, b: x @ w + b, (7, 5)),
    "bias first": (lambda x, w, b: b + x @ w, (7, 5)),
    "batches": (lambda x, w, b: x @ w + b, (2, 3, 7, 5)),
    "transposed weight": (lambda x, w, b: x @ w.t().contiguous().t() + b, (2, 7, 5)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_by_hand(name):
    layer, shape = LINEAR[name]
    torch.manual_seed(0)
    args = torch.randn(shape), torch.randn(5, 6), torch.randn(6)
    f = nf.grad(lambda *args: layer(*args).sin().sum(), (0, 1, 2))
    agree(f, *args)
    forward = lambda *args: (layer(*args),)
    agree(forward, *args)
    assert "aten.addmm" in names(forward, *args) and "aten.add" not in names(forward, *args)


NOT_LINEAR = {
    "bias of rows": (lambda x, w, b: x @ w + b[:, None], 7, 6),
    "square, bias of rows": (lambda x, w, b: x @ w + b[:, None], 6, 6),
    "rows and columns changed": (lambda x, w, b: (x @ w).view(6, 7) + b, 7, 6),
    "transposed": (lambda x, w, b: (x @ w).t() + b, 7, 6),
    "rows in another order": (lambda x, w, b: (x @ w).view(2, 7, 6).transpose(0, 1) + b[:6], 14, 6),
    "columns among the rows": (lambda x, w, b: (x @ w).view(2, 6, 6).permute(1, 0, 2).transpose(0, 2) + b[:6], 12, 6),
    "the product is read by others": (lambda x, w, b: (x @ w + b[:6]) * (x @ w), 7, 6),
    "a single number": (lambda x, w, b: (x[:1] @ w[:, :1]).view(()) + b[:1], 7, 6),
    "twice": (lambda x, w, b: torch.add(x @ w, b, alpha=2), 7, 6),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_not_a_linear_layer(name):
    f, rows, columns = NOT_LINEAR[name]
    torch.manual_seed(0)
    args = torch.randn(rows, 5), torch.randn(5, columns), torch.randn(columns if name == "twice" else rows)
    wrapped = lambda *args: (f(*args),)
    agree(wrapped, *args)
    assert "aten.addmm" not in names(wrapped, *args)


def test_a_bias_of_another_type_is_added_in_that_type():
    args = torch.randn(7, 5).bfloat16(), torch.randn(5, 6).bfloat16(), torch.randn(6)
    f = lambda x, w, b: x @ w + b
    assert nf.jit(f)(*args).dtype == torch.float32
    torch.testing.assert_close(nf.jit(f)(*args), f(*args), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(4,), (2, 6), (2, 0)], ids=str)
def test_embedding_by_index(shape):
    torch.manual_seed(0)
    weight, at = torch.randn(9, 5), torch.randint(-9, 9, shape)
    f = nf.value_and_grad(lambda weight, at: weight[at].sin().sum())
    agree(f, weight, at)
    assert {"aten.embedding", "aten.embedding_dense_backward"} <= set(names(f, weight, at)) or 0 in shape


@pytest.mark.parametrize("outside", [9, -10])
def test_indices_out_of_range_are_refused(outside):
    with pytest.raises(IndexError):
        nf.jit(lambda weight, at: weight[at] * 2)(torch.randn(9, 5), torch.tensor([1, outside]))


STACKS = {
    "first": lambda *parts: torch.stack(parts).exp(),
    "last": lambda *parts: torch.stack(parts, -1).exp(),
    "reordered": lambda *parts: torch.stack(parts).permute(1, 3, 0, 2).reshape(3, -1).exp(),
    "transposed, and read twice": lambda *parts: (x := torch.stack(parts, 1).permute(2, 0, 3, 1)).reshape(4, -1) * 2 + x.sum(),
    "a part of it": lambda *parts: torch.stack(parts)[:2].permute(1, 0, 2, 3).reshape(3, -1),
    "one": lambda part, *_: torch.stack([part]).permute(1, 0, 3, 2).reshape(-1),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    torch.manual_seed(0)
    args = [torch.randn(3, 4, 5) for _ in range(3)]
    f = lambda *parts: (STACKS[name](*(part.sin() for part in parts)),)
    agree(f, *args)
    agree(nf.grad(lambda *parts: STACKS[name](*parts).square().sum(), (0, 1, 2)), *args)
    if name == "reordered":
        assert "aten.stack" not in names(f, *args) and "aten.clone" not in names(f, *args)


def test_gradients_of_attention_stacked():
    def attention(x, weight):
        q, k, v = F.linear(x, weight).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).square().sum()

    torch.manual_seed(0)
    args = torch.randn(2, 9, 16) / 4, torch.randn(48, 16) / 4
    f = nf.grad(attention, (0, 1))
    agree(f, *args)
    assert not {"aten.stack", "aten.clone", "aten.cat"} & set(names(f, *args))


def test_tangents_of_linear_layers():
    """Their own linear layers have derivatives like those of the first ones, which are needed long before."""
    def loss(w, b, x):
        for _ in range(2):
            x = F.linear(x, w, b).tanh().view(2, 7, 5).relu().view(14, 5) + x
        return x.square().sum()

    def products(w, b, u, v, x):
        first = nf.grad(loss, (0, 1))(w, b, x + 1)
        slope = lambda w, b: nf.jvp(lambda w, b: loss(w, b, x), (w, b), (u, v))[1]
        return (*first, *nf.grad(slope, (0, 1))(w, b))

    torch.manual_seed(0)
    agree(products, torch.randn(5, 5), torch.randn(5), torch.randn(5, 5), torch.randn(5), torch.randn(14, 5))
