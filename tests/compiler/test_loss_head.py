"""Cross entropy as a kernel: against PyTorch, in the wild forms it is written in, and when it must not be claimed."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.pipeline import optimise
from neuralforge.errors import KernelError
from neuralforge.graph import capture
from neuralforge.kernels import toolchain
from neuralforge.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    reference,
    reference_backward,
)

NEURAL = "neuralforge.cross_entropy"


def names(f, *args):
    return [eq.name for eq in optimise(capture(f, *args).graph).equations]


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("NEURALFORGE_ISA", request.param)
    try:
        toolchain.isa()
    except toolchain.KernelError:
        pytest.skip(f"this CPU has no {request.param}")


@pytest.mark.parametrize("N, V", [(1, 1), (3, 5), (4, 16), (7, 97), (64, 1000), (5, 8192)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_against_float64(N, V, scale):
    torch.manual_seed(0)
    logits, target, grad = torch.randn(N, V) * scale, torch.randint(0, V, (N,)), torch.tensor(1.7)
    if N > 2:
        target[1] = -100
    loss, lse, count = cross_entropy(logits, target, -100)
    want = reference(logits.double(), target, -100)
    assert torch.allclose(loss.double(), want[0], rtol=1e-6, atol=1e-6) and count == want[2]
    assert torch.allclose(lse.double(), want[1], rtol=1e-6, atol=1e-6)
    found = cross_entropy_backward(grad, logits, target, lse, count, -100)
    expected = reference_backward(grad.double(), logits.double(), target, want[1], want[2], -100)
    assert torch.allclose(found.double(), expected, rtol=2e-5, atol=1e-7)


def test_special_values_as_in_pytorch():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, inf, 1.0], [nan, 0, 0], [-inf, 0, 0], [-inf, -inf, -inf], [3e38, -3e38, 0]])
    for row, target in [(r, t) for r in rows for t in range(3)]:
        expected = F.cross_entropy(row[None], torch.tensor([target]))
        found = cross_entropy(row[None].contiguous(), torch.tensor([target]), -100)[0]
        assert torch.allclose(found, expected, equal_nan=True), (row, target)
    assert cross_entropy(rows[:1], torch.tensor([-100]), -100)[0].isnan()


def test_found_and_equal_in_a_training_step():
    torch.manual_seed(0)
    x, w, target = torch.randn(6, 8), torch.randn(8, 11), torch.randint(0, 11, (6,))
    target[2] = -100

    def hand_written(x, w, target):
        return F.nll_loss((x @ w).log_softmax(-1), target)

    for f in (lambda x, w, t: F.cross_entropy(x @ w, t), hand_written):
        step = nf.value_and_grad(f, argnums=(0, 1))
        assert {NEURAL, NEURAL + "_backward"} <= set(names(step, x, w, target))
        assert NEURAL in names(f, x, w, target)
        expected, found = step(x, w, target), nf.jit(step)(x, w, target)
        assert torch.allclose(found[0], expected[0], rtol=1e-6)
        for a, b in zip(found[1], expected[1]):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, t: F.cross_entropy(x, t, reduction="sum"),
        lambda x, t: F.cross_entropy(x, t, weight=torch.arange(5.0)),
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
        lambda x, t: F.cross_entropy(x.double(), t),
        lambda x, t: F.cross_entropy(x.t().contiguous().t(), t),
        lambda x, t: (p := x.log_softmax(1), F.nll_loss(p, t) + p.exp().sum())[1],
    ],
)
def test_left_alone_where_it_does_not_fit(f):
    x, target = torch.randn(4, 5), torch.randint(0, 5, (4,))
    step = nf.value_and_grad(f)
    assert NEURAL not in names(step, x, target)
    for a, b in zip(nf.jit(step)(x, target), step(x, target)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_target_out_of_range():
    with pytest.raises(KernelError, match="target 7 of row 1; expected 0 to 4"):
        nf.jit(F.cross_entropy)(torch.randn(2, 5), torch.tensor([0, 7]))


def test_the_logits_memory_is_reused():
    x, w, target = torch.randn(64, 16), torch.randn(16, 4096), torch.randint(0, 4096, (64,))
    step = nf.value_and_grad(lambda w: F.cross_entropy((x @ w) * 1.0, target))
    plan = nf.explain(step, w).plan
    logits = 64 * 4096 * 4
    assert plan.arena_bytes < 1.5 * logits, "one buffer serves the logits and their gradient"
