"""Each pass leaves the results as they were and removes what it says."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler.passes import (
    common_subexpressions,
    dead_code,
    fold_constants,
    simplify,
    transpose_products,
)
from neuralforge.graph import capture, verify


def run(graph, *tensors):
    return graph(*tensors)


def names(graph):
    return [eq.name for eq in graph.equations]


def same(before, after, *tensors):
    verify(after, types=True)
    for a, b in zip(before(*tensors), after(*tensors)):
        assert torch.equal(a, b)


def test_dead_code():
    x = torch.randn(3)
    graph = capture(lambda x: (x.exp().sum(), x + 1)[1], x).graph
    after = dead_code(graph)
    assert names(after) == ["aten.add.Tensor"]
    same(graph, after, x)


def test_common_subexpressions():
    x = torch.randn(3)
    graph = capture(lambda x: (x.exp() + x.exp() * 1, x * 1, x * 1.0), x).graph
    after = common_subexpressions(graph)
    assert names(after).count("aten.exp") == 1
    assert names(after).count("aten.mul.Tensor") == 3, "x * 1 and x * 1.0 are different programs"
    same(graph, after, x)


def test_random_operators_are_not_merged():
    graph = capture(lambda x: torch.rand_like(x) + torch.rand_like(x), torch.ones(3)).graph
    assert names(common_subexpressions(graph)).count("aten.rand_like") == 2


def test_fold_constants():
    x = torch.randn(4)
    weight = torch.ones(4)
    graph = capture(lambda x: x * torch.arange(4).cos() * torch.tensor(2.0) + weight.exp(), x).graph
    after = fold_constants(graph)
    assert "aten.arange.default" not in names(after) and "aten.cos" not in names(after)
    assert "aten.exp" in names(after), "the owner of a captured tensor may change it"
    same(graph, after, x)


def test_simplify_identities_and_view_chains():
    x = torch.randn(2, 3, 4)

    def f(x):
        y = x.detach().clone().to(torch.float32).reshape(2, 3, 4).view(6, 4).view(24).view(2, 3, 4)
        return y.transpose(1, 2).transpose(1, 2).expand(2, 3, 4).permute(0, 2, 1).permute(2, 0, 1) + 1

    graph = capture(f, x).graph
    after = dead_code(simplify(graph))
    assert names(after) == ["aten.permute", "aten.add.Tensor"]
    same(graph, after, x)


def test_simplify_keeps_what_changes_memory_layout():
    x = torch.randn(3, 4)
    graph = capture(lambda x: x.t().contiguous().view(-1) * 1, x).graph
    after = dead_code(simplify(graph))
    assert "aten.clone" in names(after)
    same(graph, after, x)


def test_transpose_products():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    graph = capture(lambda a, b: ((a @ b).t() + 1, (a @ b).transpose(0, 1)), a, b).graph
    after = dead_code(simplify(transpose_products(graph)))
    verify(after, types=True)
    assert [eq.name for eq in after.equations].count("aten.mm") == 2
    for x, y in zip(graph(a, b), after(a, b)):
        assert torch.allclose(x, y)
    converted = capture(lambda a, b: (a @ b).double().t() + 1, a, b).graph
    after = transpose_products(converted)
    verify(after, types=True)
    assert after.outputs[0].strides == (3, 1) and torch.allclose(converted(a, b)[0], after(a, b)[0])
    kept = capture(lambda a, b: [(p := a @ b).t() + 1, p], a, b).graph
    assert len(transpose_products(kept).equations) == len(kept.equations), "the product itself is used too"


@pytest.mark.parametrize("f", [
    lambda c: torch.view_as_real(c.conj().resolve_conj()) * 2,
    lambda c: torch.view_as_real(c.conj().imag.clone() + c),
    lambda c: c.conj().clone().real + c.conj().imag,
])  # fmt: skip
def test_copies_that_resolve_a_lazy_conjugate_stay(f):
    c = torch.randn(8, 4, dtype=torch.complex64)
    torch.testing.assert_close(nf.jit(f)(c), f(c))


def test_views_still_to_be_negated_are_what_kernels_read():
    def f(c, w):
        y = c.conj().imag
        return y.clone() * 2 + 1, torch._neg_view(c.real * 3) * 2, (y @ w).exp()

    c, w = torch.randn(8, 8, dtype=torch.complex64), torch.randn(8, 8)
    for found, expected in zip(nf.jit(f)(c, w), f(c, w)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_softmax_of_numbers_for_which_pytorch_has_none(dtype):
    def by_hand(x):
        e = x.exp()
        return e / e.sum(-1, keepdim=True), x + 1 - (x + 1).logsumexp(-1, keepdim=True), e.sum(-1)

    x = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for found, expected in zip(nf.jit(by_hand)(x), by_hand(x)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", [torch.var, torch.std])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (0, 2, 3), (1, 2), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"correction": 0}, {"correction": 2, "keepdim": True}])
def test_variances_over_any_dimensions(how, dim, options):
    x = torch.randn(5, 6, 7, 8, generator=torch.Generator().manual_seed(0)) * 3 + 100
    f = nf.jit(lambda x: how(x * 2, dim, **options) + 1)
    torch.testing.assert_close(f(x), (how(x.double() * 2, dim, **options) + 1).float(), rtol=2e-6, atol=2e-5)
    assert not any("std" in str(eq) for eq in f.programs[0].graph.equations)
    x -= 100
    gradient = nf.jit(nf.grad(lambda x: (how(x, dim, **options) ** 2).sum()))(x)
    exact = nf.grad(lambda x: (how(x, dim, **options) ** 2).sum())(x.double())
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-5, atol=1e-5)


def test_variances_of_too_few_numbers_are_as_in_pytorch():
    for x, dim in ((torch.randn(1, 4), 0), (torch.randn(3, 0), 1), (torch.randn(()), None)):
        torch.testing.assert_close(nf.jit(lambda x: x.var(dim))(x), x.var(dim), equal_nan=True)
    of_rows = lambda x: (x.exp() * 2).var(1, correction=3) * 2
    torch.testing.assert_close(nf.jit(of_rows)(x := torch.randn(40, 2)), of_rows(x))


OF_A_NUMBER = {
    "sum": lambda x: x.sum(0).sin(),
    "sum of a product": lambda x: (x * x).sum(-1),
    "softmax by hand": lambda x: (e := (x - x.amax(0, True)).exp()) / e.sum(0, True),
    "log_softmax by hand": lambda x: x - x.exp().sum(0, True).log(),
    "logsumexp": lambda x: x.logsumexp(0) - x * 2,
    "std": lambda x: x.std(0, correction=0),
    "mean": lambda x: x.mean(0) * 2,
    "max": lambda x: x.max(0).values * 2 + x.amin(-1),
    "norm": lambda x: x.norm() + torch.linalg.vector_norm(x, dim=0),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_reductions_of_a_single_number(name):
    f, x = OF_A_NUMBER[name], torch.tensor(1.3)
    torch.testing.assert_close(nf.jit(f)(x), f(x), equal_nan=True)
    torch.testing.assert_close(nf.jit(nf.grad(f))(x), nf.grad(f)(x), equal_nan=True)
