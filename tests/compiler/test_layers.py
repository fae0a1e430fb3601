"""Layers written out become the operators that have kernels."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf

LINEAR = {
    "matrix": (lambda x, w, b: x @ w + b, (7, 5)),
    "bias first": (lambda x, w, b: b + x @ w, (7, 5)),
    "batches": (lambda x, w, b: x @ w + b, (2, 3, 7, 5)),
    "transposed weight": (lambda x, w, b: x @ w.t().contiguous().t() + b, (2, 7, 5)),
    "transposed batches": (lambda x, w, b: x.transpose(0, 1) @ w + b, (2, 7, 5)),
    "by F.linear": (lambda x, w, b: F.linear(x.transpose(0, 1), w.t(), b), (2, 7, 5)),
    "rows in another order": (lambda x, w, b: (x @ w).view(2, 7, 6).transpose(0, 1) + b, (14, 5)),
    "rows of rows in another order": (lambda x, w, b: (x @ w).permute(2, 0, 1, 3).flatten(1, 2) + b, (2, 3, 4, 5)),
    "columns of transposed batches": (lambda x, w, b: x.transpose(1, 2) @ w + b, (3, 5, 7)),
    "a batch of one": (lambda x, w, b: torch.bmm(x[None], w[None]) + b, (7, 5)),
    "by einsum": (lambda x, w, b: torch.einsum("tbk,kn->btn", x, w) + b, (2, 7, 5)),
    "repeated by hand": (lambda x, w, b: torch.bmm(x, w.expand(2, 5, 6)) + b, (2, 7, 5)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_by_hand(name, agree):
    layer, shape = LINEAR[name]
    torch.manual_seed(0)
    args = torch.randn(shape), torch.randn(5, 6), torch.randn(6)
    f = nf.grad(lambda *args: layer(*args).sin().sum(), (0, 1, 2))
    agree(f, *args)
    forward = lambda *args: (layer(*args),)
    ran = agree(forward, *args)
    assert "aten.addmm" in ran and "aten.add" not in ran


NOT_LINEAR = {
    "bias of rows": (lambda x, w, b: x @ w + b[:, None], 7, 6),
    "square, bias of rows": (lambda x, w, b: x @ w + b[:, None], 6, 6),
    "rows and columns changed": (lambda x, w, b: (x @ w).view(6, 7) + b, 7, 6),
    "transposed": (lambda x, w, b: (x @ w).t() + b, 7, 6),
    "columns among the rows": (lambda x, w, b: (x @ w).view(2, 6, 6).permute(1, 0, 2).transpose(0, 2) + b[:6], 12, 6),
    "the product is read by others": (lambda x, w, b: (x @ w + b[:6]) * (x @ w), 7, 6),
    "a single number": (lambda x, w, b: (x[:1] @ w[:, :1]).view(()) + b[:1], 7, 6),
    "twice": (lambda x, w, b: torch.add(x @ w, b, alpha=2), 7, 6),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_not_a_linear_layer(name, agree):
    f, rows, columns = NOT_LINEAR[name]
    torch.manual_seed(0)
    args = torch.randn(rows, 5), torch.randn(5, columns), torch.randn(columns if name == "twice" else rows)
    wrapped = lambda *args: (f(*args),)
    assert "aten.addmm" not in agree(wrapped, *args)


LAYERS = {
    "by hand": lambda x, w, b: x @ w + b,
    "transposed batches": lambda x, w, b: x.transpose(0, 1) @ w + b,
    "rows moved": lambda x, w, b: (x.transpose(0, 1).flatten(0, 1) @ w + b).unflatten(0, (7, 2)).transpose(0, 1),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_several_layers_of_one_operand(name, given, agree, timed):
    """A linear layer's derivative by its weight doesn't tell which layer of that operand it belongs to."""
    timed("aten", own=3.0)  # products that take in what reads them have other names
    torch.manual_seed(0)
    layer = LAYERS[name]
    args = torch.randn(2, 7, 5), torch.randn(3, 5, 6), torch.randn(3, 6)

    def f(x, w, b):
        q, k, v = (layer(x if given else x.sin(), *wb) for wb in zip(w.unbind(), b.unbind()))
        return (q.sin() * k.exp() * v.square()).sum()

    for which in ((0, 1, 2), (1, 2), (2,), (0,)):
        step = nf.grad(f, which)
        found = agree(step, *args)
        assert found.count("aten.addmm") == 3 and "aten.bmm" not in found, found


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (2,)], ids=str)
def test_recurrent_layers_by_hand(rows, buffer, agree):
    """The input is a bias, of which the gradient may be that of the result as it is."""

    def f(x, w):
        h, states = torch.zeros(*rows, 5, dtype=x.dtype), []
        kept = torch.zeros(4, *rows, 5, dtype=x.dtype)
        for t in range(4):
            h = torch.tanh(h @ w + x[t])
            states.append(h)
            kept[t] = h
        return ((kept if buffer else torch.stack(states)).exp() * 2).sum()

    torch.manual_seed(0)
    for which in ((0, 1), (0,), (1,)):
        agree(nf.grad(f, which), torch.randn(4, *rows, 5), torch.randn(5, 5))


@pytest.mark.parametrize("shape", [(3, 5, 6), (1, 5, 6)], ids=str)
def test_batches_by_matrices(shape, agree):
    """A matrix for each is no linear layer, and neither is one repeated otherwise."""
    torch.manual_seed(0)
    args = torch.randn(3, 7, 5), torch.randn(shape), torch.randn(6)
    f = lambda x, w, b: (torch.bmm(x, w.repeat(3 // w.shape[0], 1, 1)) + b, torch.bmm(w.mT.expand(3, 6, 5), x.mT), x.expand(2, 3, 7, 5) @ w)
    agree(f, *args)
    agree(nf.grad(lambda *args: sum(y.sin().sum() for y in f(*args)), (0, 1, 2)), *args)


ROWS = {
    "there and back": lambda x, w: (x.transpose(0, 1).flatten(0, 1) @ w).unflatten(0, (7, 2)).transpose(0, 1),
    "heads put together": lambda x, w: (x.unflatten(2, (5, 1)).permute(1, 0, 3, 2).reshape(14, 5) @ w).view(7, 2, 6).transpose(0, 1),
    "back otherwise": lambda x, w: (x.transpose(0, 1).flatten(0, 1) @ w).unflatten(0, (2, 7)).transpose(0, 1),
    "there alone": lambda x, w: (x.transpose(0, 1).flatten(0, 1) @ w).unflatten(0, (7, 2)),
    "and read by others": lambda x, w: (y := (x.transpose(0, 1).flatten(0, 1) @ w).unflatten(0, (7, 2))).transpose(0, 1) * y.sum(),
    "with the columns": lambda x, w: (x.transpose(0, 1).flatten(0, 1) @ w).unflatten(0, (7, 2)).permute(1, 2, 0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_moved_rows(name, bias, agree):
    torch.manual_seed(0)
    args = torch.randn(2, 7, 5), torch.randn(5, 6), torch.randn(6)
    f = lambda x, w, b: (ROWS[name](x.sin(), w) + b if bias and name != "with the columns" else ROWS[name](x.sin(), w),)
    agree(f, *args)
    agree(nf.grad(lambda *args: f(*args)[0].sin().sum(), (0, 1)), *args)
    rewrites = {rewrite.rule for stage in nf.explain(f, *args).passes for rewrite in stage.made}
    assert ("products_of_moved_rows" in rewrites) == (name in ("there and back", "heads put together"))


def test_a_bias_of_another_type_is_added_in_that_type():
    args = torch.randn(7, 5).bfloat16(), torch.randn(5, 6).bfloat16(), torch.randn(6)
    f = lambda x, w, b: x @ w + b
    assert nf.jit(f)(*args).dtype == torch.float32
    torch.testing.assert_close(nf.jit(f)(*args), f(*args), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(4,), (2, 6), (2, 0)], ids=str)
def test_embedding_by_index(shape, agree):
    torch.manual_seed(0)
    weight, at = torch.randn(9, 5), torch.randint(-9, 9, shape)
    f = nf.value_and_grad(lambda weight, at: weight[at].sin().sum())
    assert {"aten.embedding", "aten.embedding_dense_backward"} <= set(agree(f, weight, at)) or 0 in shape


@pytest.mark.parametrize("outside", [9, -10])
def test_indices_out_of_range_are_refused(outside):
    with pytest.raises(IndexError):
        nf.jit(lambda weight, at: weight[at] * 2)(torch.randn(9, 5), torch.tensor([1, outside]))


def test_tangents_of_linear_layers(agree):
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
