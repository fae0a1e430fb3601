"""Attention written out becomes flash attention, in each of the ways it is written: same values, same gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.passes.rewrites import Rewrites
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture
from neuralforge.kernels import attention

FORWARD, BACKWARD = "neuralforge.flash_attention", "neuralforge.flash_attention_backward"
B, H, G, T, S, K = 2, 4, 2, 7, 7, 5
INF = float("inf")

pytestmark = pytest.mark.skipif(not attention.available(), reason="no C compiler")


def heads(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def grouped():
    return [heads(B, H, T, K)[0], *heads(B, G, S, K)[1:]]


def plain(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(K)).softmax(-1) @ v


def masked_fill_of_tril(q, k, v):
    s = q @ k.mT * K**-0.5
    return F.softmax(s.masked_fill(torch.tril(torch.ones(T, S)) == 0, -INF), dim=-1) @ v


def masked_before_scaling(q, k, v):
    s = (q @ k.mT).masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min)
    return (s / 3).softmax(-1) @ v


def where_of_positions(q, k, v):
    at = torch.arange(T)
    return torch.where(at[:, None] >= at, (q / 2) @ k.mT, -1e9).softmax(-1) @ v


def where_not(q, k, v):
    hidden = ~torch.ones(1, 1, T, S).bool().tril()
    return torch.where(hidden, torch.tensor(-INF), q @ k.mT).softmax(3) @ v


def added_mask(q, k, v):
    mask = torch.full((T, S), -INF).triu(diagonal=1)
    return (torch.matmul(q, k.transpose(2, 3)) + mask).softmax(-1) @ v


def window(q, k, v):
    ahead = torch.arange(S) - torch.arange(T)[:, None]
    return torch.where((ahead <= 0) & (ahead > -3), q @ k.mT, -INF).softmax(-1) @ v


def scaled_queries(q, k, v):
    return torch.matmul((q * K**-0.5), k.transpose(-1, -2)).float().softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def scale_of_a_tensor(q, k, v):
    return (q @ k.mT / torch.sqrt(torch.tensor(float(K)))).softmax(-1) @ v


def baddbmm(q, k, v):
    q, k, v = (x.reshape(B * H, -1, K) for x in (q, k, v))
    mask = torch.full((T, S), -INF).triu(1).expand(B * H, T, S)
    p = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=0.5).softmax(-1)
    return torch.bmm(p, v).view(B, H, T, K)


def transposed_out(q, k, v):
    return plain(q, k, v).transpose(1, 2).contiguous().view(B, T, H * K)


def by_einsum(q, k, v):
    p = torch.einsum("bthk,bshk->bhts", q, k).mul(0.4).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", p, v).flatten(2)


def repeated_keys(q, k, v):
    k, v = k.repeat_interleave(H // G, 1), v[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, S, K)
    return plain(q, k, v)


def grouped_by_einsum(q, k, v):
    q = q.view(B, G, H // G, T, K)
    return torch.einsum("bgrts,bgsk->bgrtk", torch.einsum("bgrtk,bgsk->bgrts", q, k).softmax(-1), v).reshape(B, H, T, K)


def grouped_by_broadcast(q, k, v):
    at = torch.arange(T)
    s = q.view(B, G, H // G, T, K) @ k[:, :, None].transpose(-2, -1)
    s = s + torch.where(at[:, None] >= at, 0, -INF)
    return (s.softmax(-1) @ v[:, :, None]).reshape(B, H, T, K)


def packed(x, w, _):
    """As in nanoGPT."""
    q, k, v = (x @ w).split(H * K, dim=2)
    q, k, v = (y.view(B, T, H, K).transpose(1, 2) for y in (q, k, v))
    s = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    s = s.masked_fill(torch.tril(torch.ones(T, T)).view(1, 1, T, T) == 0, -INF)
    return (F.softmax(s, dim=-1) @ v).transpose(1, 2).contiguous().view(B, T, H * K)


def stacked(x, w, _):
    q, k, v = (x @ w).view(B, T, 3, H, K).permute(2, 0, 3, 1, 4).unbind(0)
    return plain(q, k, v).transpose(1, 2).reshape(B, T, H * K)


projected = lambda: [torch.randn(B, T, 6), torch.randn(6, 3 * H * K), torch.ones(1)]
FORMS = [
    *((f, lambda: heads(B, H, T, K)) for f in (
        plain, masked_fill_of_tril, masked_before_scaling, where_of_positions, where_not, added_mask, window,
        scaled_queries, scale_of_a_tensor, baddbmm, transposed_out,
    )),
    (plain, lambda: heads(3, T, K)), (plain, lambda: heads(T, K)), (plain, lambda: heads(2, 1, 3, T, K)),
    (plain, lambda: [*heads(B, H, 3, K)[:1], *heads(B, H, 9, K)[1:]]),
    (by_einsum, lambda: heads(B, T, H, K)), (repeated_keys, grouped), (grouped_by_einsum, grouped),
    (grouped_by_broadcast, grouped), (packed, projected), (stacked, projected),
]  # fmt: skip


def names(f, *args):
    return [eq.name for eq in optimise(capture(f, *args).graph).equations]


@pytest.mark.parametrize("f, operands", FORMS, ids=[f.__name__ for f, _ in FORMS])
def test_found_and_equal(f, operands, names_and_results):
    torch.manual_seed(0)
    args = operands()
    found, out = names_and_results(f, *args)
    assert found.count(FORWARD) == 1 and "aten._softmax" not in found and "aten.bmm" not in found, found
    torch.testing.assert_close(out, f(*args), rtol=1e-5, atol=1e-5)
    which = (0, 1) if args[2].numel() == 1 else (0, 1, 2)
    step = nf.value_and_grad(lambda *args: f(*args).square().sum(), argnums=which)
    found, results = names_and_results(step, *args)
    assert found.count(FORWARD) == found.count(BACKWARD) == 1 and "aten.bmm" not in found, found
    torch.testing.assert_close(results, step(*args), rtol=1e-4, atol=1e-4)


def test_scaled_operands_are_no_steps_of_their_own():
    for f, scale in ((scaled_queries, K**-0.5), (lambda q, k, v: ((q / 4) @ (k * 3).mT * 2).softmax(-1) @ v, 1.5)):
        graph = optimise(capture(f, *heads(B, H, T, K)).graph)
        (flash,) = [eq for eq in graph.equations if eq.name == FORWARD]
        assert list(flash.args[:3]) == graph.inputs and flash.args[4] == pytest.approx(scale), str(graph)


@pytest.mark.parametrize("f", [
    lambda q, k, v: ((q := q * 0.3) @ k.mT).softmax(-1) @ v + q.sum(),
    lambda q, k, v: (q @ (k := k / 2).mT).softmax(-1) @ (v * k.exp()),
    lambda q, k, v: ((q * -1) @ (k * -0.5).mT).softmax(-1) @ v,
])  # fmt: skip
def test_scaled_operands_that_others_read(f, names_and_results):
    args = heads(B, H, T, K)
    step = nf.value_and_grad(lambda *args: f(*args).square().sum(), argnums=(0, 1, 2))
    for g in (f, step):
        found, out = names_and_results(g, *args)
        torch.testing.assert_close(out, g(*args), rtol=1e-4, atol=1e-4)
        assert FORWARD in found


def test_causal_masks_and_windows_known_beforehand_are_no_operands():
    for f in (masked_fill_of_tril, masked_before_scaling, where_of_positions, where_not, added_mask, baddbmm):
        graph = optimise(capture(f, *heads(B, H, T, K)).graph)
        (flash,) = [eq for eq in graph.equations if eq.name == FORWARD]
        assert flash.args[3] is True and len(flash.inputs) == 3, str(graph)
    (flash,) = [eq for eq in optimise(capture(window, *heads(B, H, T, K)).graph).equations if eq.name == FORWARD]
    assert flash.args[3] is True and 3 in flash.args


MASKS = {
    "bool for each batch": (torch.rand(B, 1, 1, S) > 0.4, lambda s, m: s.masked_fill(~m, -INF)),
    "zeros and ones": ((torch.rand(T, S) > 0.4).float(), lambda s, m: s.masked_fill(m == 0, -1e9)),
    "added": (torch.randn(1, H, T, S), lambda s, m: s + m),
    "added, infinite": (torch.zeros(T, S).masked_fill(torch.rand(T, S) > 0.6, -INF), lambda s, m: s + m),
    "added before heads are a dimension": (torch.randn(B * H, T, S), lambda s, m: (s.flatten(0, 1) + m).view(B, H, T, S)),
    "for each head, before that": (torch.randn(B * H, 1, S), lambda s, m: (s.flatten(0, 1) + m).view(B, H, T, S)),
    "added to groups": (torch.randn(B, 1, 1, 1, S), lambda s, m: (s.view(B, G, H // G, T, S) + m).view(B, H, T, S)),
    "bool for groups": (torch.rand(G, 1, T, S) > 0.4, lambda s, m: s.view(B, G, H // G, T, S).masked_fill(~m, -INF).view(s.shape)),
    "two": (torch.rand(B, 1, 1, S) > 0.4, lambda s, m: (s + torch.ones(T, S).triu(1) * -1e9).masked_fill(~m, -INF)),
    "one over the other": (torch.rand(B, 1, 1, S) > 0.4, lambda s, m: s.masked_fill(torch.ones(T, S).triu(1) > 0, -1e9).masked_fill(~m, -1e9)),
    "finite over infinite": (torch.rand(B, 1, 1, S) > 0.4, lambda s, m: (s + torch.full((T, S), -INF).triu(1)).masked_fill(~m, -1e9)),
}


@pytest.mark.parametrize("mask, apply", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("blind", [False, True], ids=["", "a query that sees nothing"])
def test_masks_that_are_operands(mask, apply, blind, names_and_results):
    mask = mask.clone()
    if not blind and mask.min() > -INF and mask.unique().numel() > 2:
        pass  # all is seen
    elif not blind:
        mask[..., 0] = 0 if mask.min() < 0 else 1
    elif blind and mask.shape[-2] > 1:
        mask[..., 2, :] = -INF if mask.min() < 0 else 0
    elif blind:
        mask[0], mask[1:, ..., 0] = (False, True) if mask.dtype == torch.bool else (-INF, 0.0)
    f = lambda q, k, v, mask: apply(q @ k.mT, mask).softmax(-1) @ v
    step = nf.value_and_grad(lambda *args: f(*args).square().sum(), argnums=(0, 1, 2))
    args = *heads(B, H, T, K), mask
    torch.testing.assert_close(nf.jit(f)(*args), f(*args), rtol=1e-5, atol=1e-5, equal_nan=True)
    names, found = names_and_results(step, *args)
    assert {FORWARD, BACKWARD} <= set(names)
    expected = step(*args)
    if not expected[0].isnan():  # else the loss tells
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_of_hidden_places_those_that_keep_their_scores_weigh_by_them():
    q, k, v = heads(B, H, T, K)
    shift = torch.zeros(B, 1, 1, S).index_fill(3, torch.arange(3), -3e4)  # the first queries see these alone
    f = lambda q, k, v, shift: ((q @ k.mT).masked_fill(torch.ones(T, S).triu(1) > 0, -1e9) + shift).softmax(-1) @ v
    assert FORWARD in names(f, q, k, v, shift)
    expected = f(*(x.double() for x in (q, k, v, shift)))
    torch.testing.assert_close(nf.jit(f)(q, k, v, shift), expected.float(), rtol=1e-5, atol=1e-5)


def entropy(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v + (p * p).sum()


LEFT_ALONE = {
    "weights are returned": lambda q, k, v: ((p := (q @ k.mT).softmax(-1)), p @ v),
    "weights are read": entropy,
    "softmax over queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "softly masked": lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(T, S).triu(1).bool(), -3.0).softmax(-1) @ v,
    "negative scale": lambda q, k, v: (-(q @ k.mT)).softmax(-1) @ v,
    "other widths": lambda q, k, v: (q @ k.mT).softmax(-1) @ v[..., :3],
    "transposed weights": lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v,
    "float64": lambda q, k, v: (q.double() @ k.double().mT).softmax(-1) @ v.double(),
}


@pytest.mark.parametrize("f", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_where_it_does_not_fit(f, names_and_results):
    args = heads(B, H, T, K)
    found, out = names_and_results(f, *args)
    assert FORWARD not in found
    torch.testing.assert_close(out, f(*args), rtol=1e-5, atol=1e-5)


def test_a_learned_bias_keeps_its_gradient():
    bias = torch.randn(H, T, S)
    step = nf.grad(lambda bias, q, k, v: ((q @ k.mT + bias).softmax(-1) @ v).square().sum(), argnums=(0, 1))
    args = bias, *heads(B, H, T, K)
    rewrites = Rewrites()
    graph = optimise(capture(step, *args).graph, rewrites)
    assert FORWARD not in [eq.name for eq in graph.equations]
    assert any(r.rule == "attention" and "result of the program" in r.reason for r in rewrites.refused)
    torch.testing.assert_close(nf.jit(step)(*args), step(*args), rtol=1e-5, atol=1e-5)


def test_checkpointed():
    f = nf.checkpoint(masked_fill_of_tril)
    step = nf.value_and_grad(lambda *args: f(*args).square().sum(), argnums=(0, 1, 2))
    args = heads(B, H, T, K)
    found = names(step, *args)
    assert found.count(FORWARD) == 2 and found.count(BACKWARD) == 1, "once more for the backward pass"
    torch.testing.assert_close(nf.jit(step)(*args), step(*args), rtol=1e-5, atol=1e-5)


def test_several_pullbacks():
    args = heads(B, H, T, K)

    def f(q, k, v):
        y, pull = nf.vjp(masked_fill_of_tril, q, k, v)
        return y, pull(torch.ones_like(y)), pull(y)

    found = names(f, *args)
    assert found.count(FORWARD) == 1 and found.count(BACKWARD) == 2
    torch.testing.assert_close(nf.jit(f)(*args), f(*args), rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    args = heads(1, 2, 3, 2)
    f = lambda q, k, v: plain(q, k, v).square().sum()
    hvp = lambda *args: nf.hvp(f, args, args)
    torch.testing.assert_close(nf.jit(hvp)(*args), hvp(*args), rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_length():
    def peak(T):
        args = [torch.empty(1, 2, T, 8) for _ in range(3)]
        mask = lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(T, T).tril() == 0, -INF).softmax(-1) @ v
        return nf.explain(nf.grad(lambda *args: mask(*args).square().sum(), argnums=(0, 1, 2)), *args).plan.peak_bytes

    assert peak(2048) < 2.2 * peak(1024)
