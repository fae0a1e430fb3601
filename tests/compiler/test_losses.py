"""Cross entropy in the forms it is written in becomes one kernel: same values, same gradients."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.passes.rewrites import Rewrites
from neuralforge.compiler.pipeline import optimise
from neuralforge.errors import KernelError, NeuralForgeError
from neuralforge.graph import capture
from neuralforge.kernels import cross_entropy

FORWARD, BACKWARD = "neuralforge.cross_entropy", "neuralforge.cross_entropy_backward"
TOGETHER = "neuralforge.cross_entropy_with_gradient"
B, T, V = 3, 4, 11
N = B * T

pytestmark = pytest.mark.skipif(not cross_entropy.available(), reason="no C compiler")


def logsumexp_and_gather(x, t):
    return (x.logsumexp(-1) - x.gather(-1, t[:, None]).squeeze(-1)).mean()


def logsumexp_and_indices(x, t):
    return (torch.logsumexp(x, 1) - x[torch.arange(N), t]).sum() / N


def z_loss(x, t):
    lse = x.logsumexp(-1)
    return (lse - x[range(N), t]).mean() + 1e-2 * lse.square().mean()


def log_softmax_and_indices(x, t):
    return -x.log_softmax(-1)[torch.arange(N), t].mean()


def log_softmax_of_batches(x, t):
    p = F.log_softmax(x.view(B, T, V), dim=-1)
    return -p.gather(2, t.view(B, T).unsqueeze(-1)).mean()


def indices_of_batches(x, t):
    p = F.log_softmax(x.view(B, T, V), dim=-1)
    return -p[torch.arange(B)[:, None], torch.arange(T), t.view(B, T)].mean()


def softmax_and_one_hot(x, t):
    return -(torch.log(torch.softmax(x, -1)) * F.one_hot(t, V)).sum(-1).mean()


def one_hot_summed(x, t):
    return -(F.one_hot(t, V).float() * x.log_softmax(-1)).sum() / N


def everything_by_hand(x, t):
    e = torch.exp(x - x.max(1, keepdim=True).values)
    return -(e / e.sum(1, keepdim=True)).log()[torch.arange(N), t].mean()


def shifted_by_hand(x, t):
    x = x - x.amax(-1, keepdim=True)
    return -(x - x.exp().sum(-1, keepdim=True).log()).gather(-1, t.unsqueeze(-1)).mean()


def normalised(x, t):
    return F.nll_loss(x - x.logsumexp(1, keepdim=True), t)


def masked_by_hand(x, t):
    t = torch.where(torch.arange(N) % 3 == 0, -100, t)
    counts = t != -100
    picked = torch.gather(x.log_softmax(-1), -1, t.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counts).sum() / counts.sum()


def ignored(x, t):
    return F.cross_entropy(x, torch.where(torch.arange(N) % 3 == 0, -100, t))


def permuted(x, t):
    return F.cross_entropy(x.view(B, T, V).transpose(1, 2), t.view(B, T))


def permuted_images(x, t):
    return F.cross_entropy(x.view(B, 2, 2, V).permute(0, 3, 1, 2), t.view(B, 2, 2), reduction="sum")


def perplexity(x, t):
    return F.cross_entropy(x, t).exp()


FORMS = [
    F.cross_entropy, lambda x, t: F.cross_entropy(x, t, reduction="sum"), ignored, permuted, permuted_images, perplexity,
    lambda x, t: (F.cross_entropy(x, t, reduction="none") * torch.arange(N)).mean(),
    lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
    lambda x, t: F.cross_entropy(x, t, label_smoothing=0.2, reduction="sum"),
    logsumexp_and_gather, logsumexp_and_indices, z_loss, log_softmax_and_indices, log_softmax_of_batches,
    indices_of_batches, softmax_and_one_hot, one_hot_summed, everything_by_hand, shifted_by_hand, normalised,
    masked_by_hand,
]  # fmt: skip


def names(f, *args):
    return [eq.name for eq in optimise(capture(f, *args).graph).equations]


def operands(*shape):
    torch.manual_seed(0)
    return torch.randn(shape), torch.randint(0, shape[-1], shape[:-1])


@pytest.mark.parametrize("f", FORMS, ids=[f.__name__ for f in FORMS])
def test_found_and_equal(f, names_and_results):
    x, t = operands(N, V)
    for wrapped in (f, lambda x, t: f((x @ torch.eye(V)) * 1.0, t)):
        found, loss = names_and_results(wrapped, x, t)
        assert found.count(FORWARD) == 1 and not any("softmax" in name or "nll" in name for name in found), found
        torch.testing.assert_close(loss, wrapped(x, t), rtol=1e-5, atol=1e-6)
        step = nf.value_and_grad(wrapped)
        found, results = names_and_results(step, x, t)
        apart = f in (z_loss, perplexity)  # the losses' cotangents depend on the losses
        assert found.count(FORWARD) == found.count(BACKWARD) == apart and found.count(TOGETHER) == 1 - apart, found
        assert not any("softmax" in name or "scatter" in name or "index_put" in name for name in found), found
        torch.testing.assert_close(results, step(x, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", FORMS, ids=[f.__name__ for f in FORMS])
def test_bfloat16_logits(f):
    """Results have the types that PyTorch gives them; they are nearer to those of the same logits in float32."""
    x, t = operands(N, V)
    x = x.bfloat16()
    step = nf.value_and_grad(f)
    found, eager, exact = nf.jit(step)(x, t), step(x, t), step(x.float(), t)
    for a, b, truth in zip(found, eager, exact):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), truth, rtol=2e-2, atol=2e-2)


def test_the_kernel_reads_bfloat16_logits():
    x, t = operands(N, V)
    graph = optimise(capture(nf.value_and_grad(F.cross_entropy), x.bfloat16(), t).graph)
    kernels = {eq.name: eq for eq in graph.equations}
    assert kernels[TOGETHER].args[1].dtype == kernels[TOGETHER].outputs[2].dtype == torch.bfloat16


def test_all_targets_ignored():
    x, t = operands(N, V)
    assert nf.jit(F.cross_entropy)(x, torch.full_like(t, -100)).isnan()
    assert nf.jit(lambda x, t: F.cross_entropy(x, t, ignore_index=3, reduction="sum"))(x, torch.full_like(t, 3)) == 0


def one_hot_less(x, t):
    return x.logsumexp(-1) - (x * (t[:, None] == torch.arange(x.shape[-1]))).sum(-1)


def one_hot_times(x, t):
    return -(x.log_softmax(-1) * (t[:, None] == torch.arange(x.shape[-1]))).sum(-1)


@pytest.mark.parametrize("f", [one_hot_less, one_hot_times])
def test_a_one_hot_of_zeros(f):
    x, t = torch.randn(6, 120), torch.tensor([0, -1, 119, 120, -100, 3])
    step = nf.value_and_grad(lambda x, t: (f(x, t) * torch.arange(6)).sum())
    assert TOGETHER in names(step, x, t)
    torch.testing.assert_close(nf.jit(step)(x, t), step(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("f", [log_softmax_and_indices, logsumexp_and_indices])
def test_indices_from_the_end(f):
    x, t = torch.randn(N, 120), torch.arange(N) * 7 % 240 - 120
    t[0] = -100
    assert FORWARD in names(f, x, t)
    torch.testing.assert_close(nf.jit(f)(x, t), f(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summed", [lambda p: p.sum(0), lambda p: p.sum(1, dtype=torch.float64)], ids=["rows", "wider"])
def test_other_sums_beside_a_loss(summed):
    """Of as many rows as classes, the one over rows has the shape of that over classes, which label smoothing has."""
    x, t = operands(V, V)

    def f(x, t):
        p = x.log_softmax(1)
        return F.nll_loss(p, t), (summed(p) * torch.arange(V)).sum()

    for g in (f, nf.value_and_grad(lambda x, t: sum(f(x, t)))):
        torch.testing.assert_close(nf.jit(g)(x, t), g(x, t), rtol=1e-5, atol=1e-5)


def in_a_square(x, t, less):
    x, t = x[:9].view(3, 3, V), t[:9].view(3, 3, 1)
    return less(x.logsumexp(-1), x.gather(-1, t).squeeze(-1)).square().sum()


LEFT_ALONE = {
    "weights of classes": lambda x, t: F.cross_entropy(x, t, weight=torch.arange(float(V))),
    "float64": lambda x, t: F.cross_entropy(x.double(), t),
    "probabilities are read": lambda x, t: (p := x.log_softmax(1), F.nll_loss(p, t) + p.exp().sum())[1],
    "probabilities as targets": lambda x, t: F.cross_entropy(x, F.one_hot(t, V).float() * 0.9 + 0.1 / V),
    "other logits": lambda x, t: (x.logsumexp(-1) - (2 * x).gather(-1, t[:, None]).squeeze(-1)).mean(),
    "all picked together": lambda x, t: (x.logsumexp(-1) - (x * (t[:, None] == torch.arange(V))).sum()).square().sum(),
    "rows transposed": lambda x, t: in_a_square(x, t, lambda lse, picked: lse.t() - picked),
    "picks transposed": lambda x, t: in_a_square(x, t, lambda lse, picked: lse - picked.t()),
    "other dimension": lambda x, t: -x.log_softmax(0)[torch.arange(N), t].mean(),
    "rows out of order": lambda x, t: -x.log_softmax(1)[torch.arange(N).flip(0), t].mean(),
}


@pytest.mark.parametrize("f", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_where_it_does_not_fit(f):
    x, t = operands(N, V)
    step = nf.value_and_grad(f)
    assert FORWARD not in names(step, x, t)
    torch.testing.assert_close(nf.jit(step)(x, t), step(x, t), rtol=1e-5, atol=1e-5)


def test_of_a_strided_view():
    x, t = operands(V, N)[0], operands(N, V)[1]
    f = lambda x, t: F.cross_entropy(x.t(), t)
    assert TOGETHER in names(nf.grad(f), x, t)
    torch.testing.assert_close(nf.jit(nf.grad(f))(x, t), nf.grad(f)(x, t), rtol=1e-5, atol=1e-6)


def test_second_derivatives():
    x, t = operands(N, V)
    hvp = lambda x, t: nf.hvp(lambda x: logsumexp_and_gather(x, t), (x,), (x,))
    torch.testing.assert_close(nf.jit(hvp)(x, t), hvp(x, t), rtol=1e-4, atol=1e-5)


def test_a_target_out_of_range():
    with pytest.raises(KernelError, match="target 7 of row 1; expected 0 to 4"):
        nf.jit(F.cross_entropy)(torch.randn(2, 5), torch.tensor([0, 7]))


def test_no_more_rewrites_than_allowed(monkeypatch):
    x, t = operands(N, V)
    step = nf.value_and_grad(lambda x, t: F.cross_entropy(x, t) + logsumexp_and_gather(x * 2, t))
    graph = capture(step, x, t).graph
    every = Rewrites()
    optimise(graph, every)
    assert [r.rule for r in every.made][:2] == ["negative_log_likelihood", "picked_logits"]
    for limit in range(len(every.made) + 1):
        rewrites = Rewrites(limit)
        after = optimise(graph, rewrites)
        assert rewrites.made[:2] == every.made[: min(limit, 2)] and len(rewrites.made) <= limit
        torch.testing.assert_close(after(x, t), graph(x, t), rtol=1e-5, atol=1e-6)
    monkeypatch.setenv("NEURALFORGE_MAX_REWRITES", "0")
    assert FORWARD not in names(step, x, t)
    monkeypatch.setenv("NEURALFORGE_MAX_REWRITES", "many")
    with pytest.raises(NeuralForgeError, match="max_rewrites=many; expected"):
        names(step, x, t)


def test_the_logits_memory_is_reused():
    x, w, target = torch.randn(64, 16), torch.randn(16, 4096), torch.randint(0, 4096, (64,))
    step = nf.value_and_grad(lambda w: F.cross_entropy((x @ w) * 1.0, target))
    plan = nf.explain(step, w).plan
    logits = 64 * 4096 * 4
    assert plan.arena_bytes < 1.5 * logits, "one buffer serves the logits and their gradient"
