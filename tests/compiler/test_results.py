"""Results share memory where eager's do, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf


def apart(*tensors: torch.Tensor) -> bool:
    places = [t.untyped_storage().data_ptr() for t in tensors]
    return len(set(places)) == len(places)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x + 1, x + 1),
        lambda x: (x.clone(), x.clone()),
        lambda x: ((x + 1).clone(), x + 1),
        lambda x: ((x * 2)[:2], (x * 2)[1:]),
        lambda x: (torch.cat([x]), torch.cat([x[:, :0], x], 1)),
        lambda x: (x.clone().t(), x.to(torch.float32, copy=True)),
        lambda x: (torch.empty_like(x).copy_(x), x.clone().detach()),
        lambda x: (torch.arange(3), torch.arange(3)[:2], x.sum()),
        lambda x: (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
    ],
)
def test_copies_and_equal_results_are_the_callers_own(f):
    x = torch.arange(12.0).view(3, 4)
    jitted = nf.jit(f)
    for _ in range(2):  # what the first call gave away, and was written to, isn't what the second one gives
        found, expected = jitted(x), f(x)
        assert apart(x, *found)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            a.add_(1)
        assert torch.equal(x, torch.arange(12.0).view(3, 4))


def test_views_stay_views():
    x = torch.randn(4, 3)
    whole, turned, row = nf.jit(lambda x: (same(x), x.t(), x[1]))(x)
    assert whole.data_ptr() == turned.data_ptr() == x.data_ptr() and row.data_ptr() == x[1].data_ptr()
    first, second = nf.jit(lambda x: (x + 1).split(2))(x)
    assert not apart(first, second)


def test_a_state_made_of_the_callers_tensors_can_be_donated():
    weights = torch.ones(3)
    state = nf.jit(lambda w: {"weights": w.clone(), "best": w.clone()})(weights)
    state = nf.jit(lambda s: {"weights": s["weights"] * 2 + 1, "best": s["best"]}, donate=0)(state)
    assert weights.eq(1).all() and state["best"].eq(1).all() and state["weights"].eq(3).all()


def test_two_arguments_change_places():
    def swap(x, y):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)

    x, y = torch.zeros(3), torch.ones(3)
    nf.jit(swap)(x, y)
    assert x.eq(1).all() and y.eq(0).all()


@pytest.mark.parametrize("rows", [2, 3])
def test_elements_picked_by_indices_of_some_rows_only(rows):
    x, at = torch.randn(3, 4, dtype=torch.float64), torch.tensor([3, 0, 1])[:rows]
    for f in (
        lambda x, at: x[torch.arange(rows), at],
        lambda x, at: -x.log_softmax(-1)[torch.arange(rows), at].mean(),
        lambda x, at: x[tuple(torch.triu_indices(3, 4, 1))].sin(),
    ):
        torch.testing.assert_close(nf.jit(f)(x, at), f(x, at))


def test_a_number_less_a_tensor_is_no_loss():
    p, target = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(nf.jit(torch.logit)(p), torch.logit(p))
    found = nf.jit(nf.grad(lambda t, p: F.binary_cross_entropy(p, t)))(target, p)
    torch.testing.assert_close(found, (torch.log(1 - p) - torch.log(p)) / 5)


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (2, 3, 5)])
def test_factors_that_others_read(shape):
    """PyTorch's linalg.qr can't write its two results into parts of one memory."""
    a = torch.randn(shape)
    for f in (lambda a: torch.linalg.qr(a)[1] * 2, lambda a: tuple(x * 2 for x in torch.linalg.qr(a))):
        torch.testing.assert_close(nf.jit(f)(a), f(a))


def test_what_is_written_has_memory_of_its_own():
    """The conjugate of what is real is the argument itself."""

    def f(x):
        a, b = torch.empty_like(x), torch.empty_like(x)
        return torch.conj_physical(x, out=a), torch.conj_physical(x, out=b), (x * 2).conj_physical_()

    x = torch.randn(3)
    results = nf.jit(f)(x)
    assert len({t.data_ptr() for t in (x, *results)}) == 4
    for found, expected in zip(results, f(x), strict=True):
        assert torch.equal(found, expected)


NORMS = {
    "log_softmax": lambda x: x.log_softmax(1), "layer_norm": lambda x: F.layer_norm(x, x.shape[2:]), "group_norm": lambda x: F.group_norm(x, 1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True), "logsigmoid": F.logsigmoid,
    "batch_norm, evaluated": lambda x: F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])),
}  # fmt: skip


@pytest.mark.parametrize("f", NORMS.values(), ids=NORMS)
def test_operands_in_another_order(f):
    """PyTorch's operators don't all lay out what they make of such as their fakes say, nor as a given destination is."""
    for x in (torch.randn(4, 5, 6), torch.randn(6, 5, 4).transpose(0, 2), torch.randn(4, 6, 5).transpose(1, 2), torch.randn(5, 4, 6).transpose(0, 1)):
        forward = lambda x: (f(x * 2) * 3, f(x.transpose(0, 1)).sum(0))
        for g in (forward, nf.grad(lambda x: (f(x * 2).transpose(1, 2) ** 3).sum()), nf.grad(lambda x: f(x).transpose(0, 2).cumsum(0).cumsum(1).sum())):
            torch.testing.assert_close(nf.jit(g)(x), g(x), rtol=1e-4, atol=1e-4)
