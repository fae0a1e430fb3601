"""Random networks in float32: what the passes and kernels make of a training step, against its operators one by one.

A network is drawn from the pieces that transformers are written in, library calls and plain arithmetic alike, at odd
sizes, so that every pattern, fusion, layout and kernel meets every other.
"""

import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import neuralforge as nf

ACTIVATIONS = {
    "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu, "tanh": torch.tanh,
    "relu squared": lambda x: F.relu(x).square(), "softplus": F.softplus,
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "swish by hand": lambda x: x / (1 + torch.exp(-x)),
}  # fmt: skip
NORMS = {
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    "rms": lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-5) + b,
    "layer by hand": lambda x, w, b: (c := x - x.mean(-1, keepdim=True)) / (c.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b,
    "rms by hand": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b,
}


def future(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def by_hand(q, k, v):
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(future(q.shape[-2]), -math.inf)
    return scores.softmax(-1) @ v


def by_masks(q, k, v):
    """The first key stays, and none of the others where two masks hide them."""
    scores, at = q @ k.mT / math.sqrt(q.shape[-1]), torch.arange(q.shape[-2])
    scores = scores + 0.1 * (at - at[:, None]).to(q.dtype)
    scores = scores.masked_fill(future(q.shape[-2]), -1e9).masked_fill(at % 3 == 1, -math.inf)
    return (scores + torch.where(at % 4 == 2, -1e9, 0.0)).softmax(-1) @ v


def by_sums(q, k, v):
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bhsk->bhtk", torch.softmax(scores, dim=-1), v)


ATTENTION = {
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=~future(q.shape[-2])),
    "by hand": by_hand, "by sums": by_sums, "by masks": by_masks,
}  # fmt: skip
LOSSES = {
    "cross entropy": F.cross_entropy,
    "sum of squares": lambda x, t: x.square().mean() + 0 * t.sum(),
    "by logsumexp": lambda x, t: (x.logsumexp(-1) - x.gather(-1, t[:, None]).squeeze(-1)).mean(),
    "smoothed": lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
    "some ignored": lambda x, t: F.cross_entropy(x, torch.where(t % 3 == 0, -100, t), reduction="sum") / len(t),
    "z-loss": lambda x, t: F.cross_entropy(x, t) + 1e-2 * x.logsumexp(-1).square().mean(),
}

block = st.one_of(
    st.tuples(st.just("norm"), st.sampled_from(sorted(NORMS))),
    st.tuples(st.just("feed-forward"), st.sampled_from(sorted(ACTIVATIONS)), st.booleans()),
    st.tuples(st.just("gated"), st.sampled_from(sorted(ACTIVATIONS)), st.booleans()),
    st.tuples(st.just("attention"), st.sampled_from(sorted(ATTENTION)), st.booleans(), st.booleans()),
    st.tuples(st.just("recurrence")),
    st.tuples(st.just("rotary")),
    st.tuples(st.just("scale")),
)
networks = st.tuples(st.lists(block, min_size=1, max_size=6), st.sampled_from(sorted(LOSSES)), st.booleans())
sizes = st.tuples(st.integers(1, 3), st.integers(1, 19), st.sampled_from([1, 2, 3]), st.sampled_from([2, 4, 8, 10]), st.integers(2, 37))


class Weights:
    """Weights made as a network first asks for them; the same ones whenever it runs again."""

    def __init__(self, given=None):
        self.made, self.given, self.generator, self.count = [], given, torch.Generator().manual_seed(0), 0

    def __call__(self, *shape):
        if self.given is None:
            self.made.append(torch.randn(shape, generator=self.generator) / math.sqrt(shape[-1]))
            return self.made[-1]
        self.count += 1
        return self.given[self.count - 1]


def run(network, heads, weight, x_BTD, target_N, V):
    blocks, loss, tied = network
    (B, T, D), x = x_BTD.shape, x_BTD
    for kind, *how in blocks:
        if kind == "norm":
            x = NORMS[how[0]](x, 1 + weight(D), weight(D))
        elif kind == "feed-forward":
            up, bias = weight(2 * D + 1, D), weight(2 * D + 1)
            hidden = F.linear(x, up, bias) if how[1] else x @ up.t() + bias
            x = x + F.linear(ACTIVATIONS[how[0]](hidden), weight(D, 2 * D + 1))
        elif kind == "gated":
            if how[1]:  # one projection for both
                gate, let_through = F.linear(x, weight(2 * D, D)).chunk(2, -1)
            else:
                gate, let_through = x @ weight(D, D), F.linear(x, weight(D, D))
            x = x + (ACTIVATIONS[how[0]](gate) * let_through) @ weight(D, D)
        elif kind == "recurrence":
            h, across, along, states = torch.zeros_like(x[:, 0]), weight(2 * D, D), weight(2 * D, D), []
            for t in range(T):
                keep, new = (F.linear(x[:, t], across) + F.linear(h, along)).split(D, -1)
                h = keep.sigmoid() * h + new.tanh()
                states.append(h)
            x = x + torch.stack(states, 1)
        elif kind == "attention":
            before, x = x, F.rms_norm(x, (D,))  # else scores grow to where float32 can't tell weights apart
            if how[1]:  # one projection for all three
                q, k, v = F.linear(x, weight(3 * D, D), weight(3 * D)).split(D, -1)
            else:
                q, k, v = (F.linear(x, weight(D, D)) for _ in range(3))
            q, k, v = (y.view(B, T, heads, -1).transpose(1, 2) for y in (q, k, v))
            y = ATTENTION[how[0]](q, k, v).transpose(1, 2).reshape(B, T, D)
            x = (before if how[2] else x) + F.linear(y, weight(D, D), weight(D))
        elif kind == "rotary":
            angle = torch.outer(torch.arange(T), 10.0 ** -torch.arange(0, D, 2) / D).repeat(1, 2)[:, :D]
            a, b = x[..., : D // 2], x[..., D // 2 :]
            x = x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()
        else:
            x = x * weight(1) + x.mean(1, keepdim=True)
    table = weight(V, D)
    logits = F.linear(x, table if tied else weight(V, D)).reshape(B * T, V)
    return LOSSES[loss](logits, target_N)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(([("norm", "layer"), ("attention", "causal", True, True), ("norm", "rms"), ("feed-forward", "gelu", True)], "cross entropy", False), (2, 17, 2, 8, 31))
@example(([("attention", "by masks", False, True), ("attention", "by masks", True, False)], "cross entropy", False), (2, 13, 2, 8, 5))
@example(([("rotary",), ("attention", "by hand", False, True), ("gated", "silu", True), ("recurrence",)], "by logsumexp", True), (1, 16, 3, 10, 2))
@given(networks, sizes)
def test_optimised_steps_agree_with_plain_ones(network, size):
    B, T, heads, width, V = size
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(B, T, heads * width, generator=generator), torch.randint(0, V, (B * T,), generator=generator)
    run(network, heads, first := Weights(), x, target, V)

    def loss(weights, x, target):
        return run(network, heads, Weights(weights), x, target, V)

    def step(weights, x, target):
        value, (grads, dx) = nf.value_and_grad(loss, (0, 1))(weights, x, target)
        norm = sum(g.square().sum() for g in grads).sqrt()
        return value, norm, dx, [w - 0.1 * g / (norm + 1e-6) for w, g in zip(weights, grads)]

    flat = lambda result: [*result[:3], *result[3]]
    assume(all(t.isfinite().all() for t in flat(step(first.made, x, target))))  # written so, some overflow
    truth = step([w.double() for w in first.made], x.double(), target)
    for found in (nf.jit(step)(first.made, x, target), nf.jit(step, donate=0)([w.clone() for w in first.made], x, target)):
        for a, b in zip(flat(found), flat(truth), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-5 * max(1, b.abs().max().item()))
