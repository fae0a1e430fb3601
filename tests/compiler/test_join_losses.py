"""Losses and their gradient become one operator where the cotangents don't depend on the losses."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.passes.rewrites import Rewrites
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture
from neuralforge.kernels import cross_entropy

pytestmark = pytest.mark.skipif(not cross_entropy.available(), reason="no C compiler")
TOGETHER = "neuralforge.cross_entropy_with_gradient"
N, V = 12, 37


def weighted(x, t, w):
    """The weights' sum comes after the losses."""
    losses = F.cross_entropy(x, t, reduction="none")
    return (losses * w).sum() / w.square().sum()


def two_of_the_same(x, t, w):
    return F.cross_entropy(x, t) + F.cross_entropy(x * 2, t)


def accuracy_too(x, t, w):
    """The logits are read once more after the losses."""
    y = x * 1.5
    loss = F.cross_entropy(y, t)
    return loss + (y.argmax(1) == t).float().mean()


def focal(x, t, w):
    losses = F.cross_entropy(x, t, reduction="none")
    return ((1 - (-losses).exp()) * losses).mean()


def hardest(x, t, w):
    return F.cross_entropy(x, t, reduction="none").topk(3).values.mean()


def drawn(x, t, w):
    """Draws happen in the order of the program."""
    losses, noise = F.cross_entropy(x, t, reduction="none"), torch.rand(N)
    return (losses * noise).sum()


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return torch.randn(N, V), torch.randint(0, V, (N,)), torch.rand(N)


def together(f, operands):
    return [eq.name for eq in optimise(capture(nf.value_and_grad(f), *operands).graph).equations].count(TOGETHER)


@pytest.mark.parametrize("f, count", [(weighted, 1), (two_of_the_same, 2), (accuracy_too, 1), (focal, 0), (hardest, 0)])
def test_found_and_equal(f, count, operands):
    assert together(f, operands) == count
    torch.testing.assert_close(nf.jit(nf.value_and_grad(f))(*operands), nf.value_and_grad(f)(*operands), rtol=1e-5, atol=1e-6)


def test_draws_stay_where_they_are(operands):
    assert together(drawn, operands) == 0
    results = []
    for step in (nf.value_and_grad(drawn), nf.jit(nf.value_and_grad(drawn))):
        torch.manual_seed(1)
        results.append(step(*operands))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_explained(operands):
    rewrites = Rewrites()
    optimise(capture(nf.value_and_grad(lambda x, t, w: weighted(x, t, w) + focal(2 * x, t, w)), *operands).graph, rewrites)
    made, refused = ([r for r in found if r.rule == "join_losses"] for found in (rewrites.made, rewrites.refused))
    assert [r.reason for r in made] == [f"{N} rows of {V}"]
    assert [r.reason for r in refused] == ["the cotangents of the losses depend on the losses"]
