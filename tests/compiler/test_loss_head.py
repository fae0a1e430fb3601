"""A linear layer and its cross entropy become one operator, gradients included: found, equal, less memory."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.passes import loss_head
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture
from neuralforge.kernels import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.skipif(not cross_entropy.available(), reason="no C compiler")
N, D, V = 520, 16, 4100
TOGETHER = "neuralforge.linear_cross_entropy_with_gradients"

HEADS = {
    "linear": lambda x, w, b, t: F.cross_entropy(F.linear(x, w), t),
    "bias": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t),
    "batches": lambda x, w, b, t: F.cross_entropy(F.linear(x.view(4, -1, D), w).flatten(0, 1), t),
    "weight by hand": lambda x, w, b, t: F.cross_entropy(x @ w.t().contiguous(), t),
    "loss by hand": lambda x, w, b, t: ((y := x @ w.t()).logsumexp(1) - y.gather(1, t[:, None]).squeeze(1)).mean(),
    "ignored, scaled": lambda x, w, b, t: 8 * F.cross_entropy(F.linear(x, w, b), torch.where(t % 3 == 0, -100, t)),
}


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr(loss_head, "SMALL", {torch.float32: 1 << 23, torch.bfloat16: 1 << 22})
    monkeypatch.setattr(linear_cross_entropy, "ROWS", 256)
    monkeypatch.setattr(linear_cross_entropy, "LOGITS", 0)


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return torch.randn(N, D), torch.randn(V, D) / 4, torch.randn(V), torch.randint(0, V, (N,))


@pytest.mark.parametrize("f", HEADS.values(), ids=HEADS)
def test_found_and_equal(f, operands, names_and_results):
    step = nf.value_and_grad(f, argnums=(0, 1, 2) if f in (HEADS["bias"], HEADS["ignored, scaled"]) else (0, 1))
    names, results = names_and_results(step, *operands)
    assert names.count(TOGETHER) == 1 and "neuralforge.cross_entropy" not in names, names
    torch.testing.assert_close(results, step(*operands), rtol=1e-4, atol=1e-6)
    names, loss = names_and_results(f, *operands)
    assert "neuralforge.linear_cross_entropy" in names, names
    torch.testing.assert_close(loss, f(*operands), rtol=1e-5, atol=1e-6)


def lowered(f):
    def run(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return f(*args)

    return run


@pytest.mark.parametrize("name", ["linear", "bias", "batches"])
def test_autocast(name, operands):
    """Logits in bfloat16; the weight's gradient is summed up in float32 and never rounded."""
    wanted = (0, 1, 2) if name == "bias" else (0, 1)
    step, exact = nf.value_and_grad(lowered(HEADS[name]), argnums=wanted), nf.value_and_grad(HEADS[name], argnums=wanted)
    heads = [eq for eq in optimise(capture(step, *operands).graph).equations if eq.name == TOGETHER]
    assert len(heads) == 1 and heads[0].args[1].dtype == torch.bfloat16 and heads[0].outputs[3].dtype == torch.float32
    (loss, grads), (_, rounded), (want, truth) = nf.jit(step)(*operands), step(*operands), exact(*operands)
    assert abs(loss - want) < 0.01 * want
    for found, theirs, true in zip(grads, rounded, truth):
        assert found.dtype == torch.float32
        assert (found - true).norm() < 1.2 * (theirs - true).norm() < 0.05 * true.norm()


def test_weights_in_bfloat16(operands):
    """Their gradients are, too, but their sums aren't: below so many logits those would take as much memory."""
    x, w, b, t = operands
    step = nf.value_and_grad(HEADS["linear"], argnums=(0, 1))
    args = x.bfloat16(), w.bfloat16(), b, t
    heads = [eq for eq in optimise(capture(step, *args).graph).equations if eq.name == TOGETHER]
    assert len(heads) == 1
    (loss, grads), (want, truth) = nf.jit(step)(*args), step(*(v.float() if v.is_floating_point() else v for v in args))
    assert loss.dtype == torch.bfloat16 and abs(loss - want) < 0.01 * want
    for found, true in zip(grads, truth):
        assert found.dtype == torch.bfloat16 and (found - true).norm() < 0.05 * true.norm()


def test_left_alone_where_sums_in_float32_need_the_memory():
    args = torch.randn(N, 256).bfloat16(), torch.randn(V, 256).bfloat16(), torch.randint(0, V, (N,))
    step = nf.value_and_grad(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), argnums=(0, 1))
    assert TOGETHER not in [eq.name for eq in optimise(capture(step, *args).graph).equations]


LEFT_ALONE = {
    "cotangents of the losses": lambda x, w, b, t: F.cross_entropy(F.linear(x, w), t, reduction="none").square().mean(),
    "z-loss": lambda x, w, b, t: ((s := (y := x @ w.t()).logsumexp(1)) - y[torch.arange(N), t]).mean() + s.square().mean(),
    "logits read": lambda x, w, b, t: F.cross_entropy(y := F.linear(x, w), t) + y.mean(),
    "few logits": lambda x, w, b, t: F.cross_entropy(F.linear(x[:300], w), t[:300]),
}


@pytest.mark.parametrize("f", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_where_it_does_not_fit(f, operands):
    step = nf.value_and_grad(f, argnums=(0, 1))
    assert TOGETHER not in [eq.name for eq in optimise(capture(step, *operands).graph).equations]
    torch.testing.assert_close(nf.jit(step)(*operands), step(*operands), rtol=1e-4, atol=1e-5)


def test_the_logits_are_never_all_in_memory(operands, monkeypatch):
    step = nf.value_and_grad(HEADS["linear"], argnums=(0, 1))
    assert nf.explain(step, *operands).plan.peak_bytes < 0.75 * N * V * 4
    monkeypatch.setattr(linear_cross_entropy, "ROWS", N)
    assert nf.explain(step, *operands).plan.peak_bytes > N * V * 4
