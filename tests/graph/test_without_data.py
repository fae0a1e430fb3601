"""Functions of PyTorch that ask for numbers which they don't need, under nf.jit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neuralforge as nf


def moved(x, i):
    y = x * 1
    part = y[i]
    part.add_(1)
    i = i.add_(1)
    part.mul_(2)
    y[0] = 5
    return y, part * 1


def shifted(x, i):
    y = x * 1
    y[i, 1:] = y[0, :-1].clone()
    column = y[:, i]
    y.mul_(3)
    return y, column


def through_views(x, i):
    y = x * 1
    y[i][1:].copy_(y[0][1:].clone() * x.sum())
    y[..., i] += 2
    y[None, :, i] *= 3
    y[i, i] = x.sum()
    return (y,)


def among_others(x, i):
    rows = torch.tensor([0, 2])
    return x[i, [0, 1]], x[rows, i], x[i, None, :2], x[None, ..., i], x[:, i][i], x[..., i, :], x[1:, i.int()], x[i.to(torch.int8)]


@pytest.mark.parametrize("f", [moved, shifted, through_views, among_others])
@pytest.mark.parametrize("i", [0, 1, -1])
def test_a_tensor_of_one_integer_as_an_index(f, i):
    x, i = torch.randn(3, 4, dtype=torch.float64), torch.tensor(i)
    for found, expected in zip(nf.jit(f)(x, i.clone()), f(x, i.clone()), strict=True):
        assert torch.equal(found, expected)
    total = lambda x, i: sum((part * part).sum() for part in f(x, i))
    wanted = x.clone().requires_grad_()
    total(wanted, i.clone()).backward()
    torch.testing.assert_close(nf.jit(nf.grad(total))(x, i.clone()), wanted.grad)
    push = nf.jit(lambda x, i: nf.jvp(lambda x: total(x, i), (x,), (torch.ones_like(x),))[1])
    torch.testing.assert_close(push(x, i.clone()), wanted.grad.sum())


def test_indices_of_tables_and_arguments():
    table = nn.Parameter(torch.randn(3, 4))
    read = nf.jit(lambda i: table[i] * 1)
    assert all(torch.equal(read(torch.tensor(i)), table[i]) for i in (2, 0, -1))
    with pytest.raises(IndexError):
        read(torch.tensor(3))

    def write(x, i):
        x[i] = 7
        x[i].add_(1)
        return x.sum()

    x, y = torch.ones(3, 4), torch.ones(3, 4)
    assert nf.jit(write)(x, torch.tensor(1)) == write(y, torch.tensor(1)) == 40
    assert torch.equal(x, y)
    rows = nf.jit(nf.vmap(lambda x, i: x[i] * 2))
    assert rows(torch.arange(12.0).view(3, 4), torch.tensor([1, 2, 3])).tolist() == [2, 12, 22]
    rows = nf.jit(lambda x, i: torch.func.vmap(lambda x, i: x[i] * 2)(x, i))
    assert rows(torch.arange(12.0).view(3, 4), torch.tensor([1, 2, 3])).tolist() == [2, 12, 22]


def test_narrow_from_a_tensor():
    def f(x, i):
        part = x.narrow(0, i, 2)
        part.mul_(3)
        return torch.narrow(x, -1, i, 2), part * 1

    for i in (0, 1, -2):
        x, y = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4)
        found, expected = nf.jit(f)(x, torch.tensor(i)), f(y, torch.tensor(i))
        assert all(map(torch.equal, (*found, x), (*expected, y)))


def test_a_known_index_makes_a_view():
    graph = nf.graph.capture(lambda x: x[torch.tensor(1)] * 2, torch.ones(2, 3)).graph
    assert "aten.select" in str(graph)


LENGTHS = {"tensors": (torch.tensor([6, 2]), torch.tensor([3, 2])), "lists": ([6, 5], [3, 2]), "tuples": ((6, 2), (3, 2))}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_loss(lengths, zero_infinity, reduction):
    targets = torch.tensor([[1, 2, 3], [4, 4, 1]])  # (4, 4) doesn't fit into 2

    def loss(x, *lengths):
        return F.ctc_loss(x.log_softmax(-1), targets, *lengths, reduction=reduction, zero_infinity=zero_infinity).sum()

    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    expected = loss(x, *LENGTHS[lengths])
    expected.backward()
    found = nf.jit(nf.value_and_grad(loss))(x.detach(), *LENGTHS[lengths])
    torch.testing.assert_close(found, (expected.detach(), x.grad), equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_loss_of_one_sequence_and_of_targets_in_a_row(reduction):
    x, targets = torch.randn(6, 2, 5), torch.tensor([1, 2, 3, 4, 4, 1])
    for given in ((x[:, 0], targets[:3], torch.tensor(6), torch.tensor(3)), (x, targets, torch.tensor([6, 5]), torch.tensor([4, 2]))):
        f = lambda x, *rest: F.ctc_loss(x.log_softmax(-1), *rest, reduction=reduction)
        torch.testing.assert_close(nf.jit(f)(*given), f(*given))


@pytest.mark.parametrize("var", [torch.rand(3, 4), torch.rand(3), torch.rand(3, 1), 0.5], ids=["each", "row", "column", "number"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gaussian_nll_loss(var, reduction):
    loss = lambda x, var: F.gaussian_nll_loss(x, x * 2 + 1, var, full=True, eps=0.3, reduction=reduction).sum()
    given = [torch.randn(3, 4).requires_grad_(), var.clone().requires_grad_() if isinstance(var, torch.Tensor) else var]
    expected = loss(*given)
    wanted = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad(expected, [given[i] for i in wanted])
    found = nf.jit(nf.value_and_grad(loss, argnums=tuple(wanted)))(given[0].detach(), var)
    torch.testing.assert_close(found, (expected.detach(), grads))


def test_results_written_to_out():
    x = torch.randn(3, 4)

    def f(x, rank, rows, parts):
        torch.linalg.matrix_rank(x, out=rank)
        torch.unbind_copy(x, out=rows)
        torch.split_with_sizes_copy(x, [1, 3], 1, out=parts)
        return rank + 1

    made = lambda: (torch.tensor(0), [torch.zeros(4) for _ in range(3)], [torch.zeros(3, 1), torch.zeros(3, 3)])
    rank, rows, parts = given = made()
    assert nf.jit(f)(x, *given) == 4 and rank == 3
    assert torch.equal(torch.stack(rows), x) and torch.equal(torch.cat(parts, 1), x)


def test_deep_copies():
    """Each tensor once, apart from what it is a copy of, and constant to derivatives."""
    bias, layer = torch.ones(3), nn.Linear(3, 3)

    def f(x):
        both, other = copy.deepcopy([x, {"x": x, "bias": bias}]), copy.deepcopy(layer)
        both[0].mul_(2)
        other.bias.data.add_(1)
        return both[1]["x"] + both[1]["bias"] * x + other(x)

    x, before = torch.randn(3), layer.bias.clone()
    torch.testing.assert_close(nf.jit(f)(x), x * 2 + x + layer(x) + 1)
    assert torch.equal(layer.bias, before)
    torch.testing.assert_close(nf.jit(nf.grad(lambda x: f(x).sum()))(x), 1 + layer.weight.detach().sum(0))


def test_batch_norm_that_averages_over_all_batches():
    plain = nn.BatchNorm2d(3, momentum=None)
    jitted = nf.jit(other := copy.deepcopy(plain))
    for n in (2, 3, 2):
        x = torch.randn(n, 3, 4, 4)
        torch.testing.assert_close(jitted(x), plain(x))
        torch.testing.assert_close(dict(other.named_buffers()), dict(plain.named_buffers()))
    assert other.num_batches_tracked == 3
