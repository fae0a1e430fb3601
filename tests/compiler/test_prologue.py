"""Products with prologues: groups that make their factors as they are packed, on every instruction set, give what they give apart."""

import math

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.kernels import matmul

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def joined(timed, joined_by):
    """The names of the joined equations, all products being ours."""
    timed("own")
    return joined_by("join_prologues")


def same(f, *args, rtol=1e-5):
    found, truth = nf.jit(f)(*args), f(*(a.double() for a in args))
    torch.testing.assert_close(found.double(), truth, rtol=rtol, atol=rtol * float(truth.abs().max()))


SIZES = [(2, 2, 2), (37, 24, 65), (130, 500, 90), (300, 900, 700)]
FORMS = {
    "left": lambda x, row, w: (torch.tanh(x) * row + 1) @ w,
    "right": lambda x, row, w: w.T @ (torch.tanh(x) * row + 1).T,
    "left, transposed": lambda x, row, w: (torch.tanh(x) * row + 1).T @ w[:1].expand(len(x), -1).contiguous(),
    "both": lambda x, row, w: (torch.tanh(x) * row + 1) @ (w * 2 + 0.5),
    "bias": lambda x, row, w: torch.addmm(row[:1].expand(w.shape[1]), torch.tanh(x) * row + 1, w),
    "itself": lambda x, row, w: (y := torch.tanh(x) * row) @ y.T,
    "and an epilogue": lambda x, row, w: F.silu((torch.tanh(x) * row + 1) @ w) * 2,
}


@pytest.mark.parametrize("M, K, N", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_forms(joined, M, K, N, form):
    torch.manual_seed(0)
    same(FORMS[form], torch.randn(M, K), torch.randn(K), torch.randn(K, N))
    assert any("tanh" in name and "_into_" in name for name in joined)


def test_a_value_for_each_row_and_views_in_between(joined):
    torch.manual_seed(0)
    x, scale, w = torch.randn(4, 30, 50), torch.randn(4, 30, 1), torch.randn(50, 20)
    same(lambda x, scale, w: (torch.sin(x) * scale).view(120, 50) @ w, x, scale, w)
    assert joined == ["fused_sin_mul_into_mm"]


def test_casts_of_weights(joined):
    """Forward and backward, where our kernel multiplies bfloat16."""
    torch.manual_seed(0)
    x, w, b = torch.randn(70, 90), torch.randn(130, 90) * 0.1, torch.randn(130)

    def loss(w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(torch.sin(F.linear(x, w, b)) @ w, w).float().square().mean()

    step = nf.value_and_grad(loss, (0, 1))
    for a, truth in zip(torch.utils._pytree.tree_leaves(nf.jit(step)(w, b)), torch.utils._pytree.tree_leaves(step(w, b))):
        torch.testing.assert_close(a, truth, rtol=2e-2, atol=2e-2 * float(truth.abs().max()))
    assert sum("to_copy" in name for name in joined) >= 2 or not matmul.available(torch.bfloat16)


def test_numbers_that_are_not_finite(joined):
    torch.manual_seed(0)
    x, w = torch.randn(40, 60), torch.randn(60, 50)
    x[3, 5], x[7, 59], w[11, 2] = math.nan, math.inf, -math.inf
    f = lambda x, w: (x * 2 + 1) @ (w * 2 - 1)
    torch.testing.assert_close(nf.jit(f)(x, w), f(x, w), rtol=1e-5, atol=1e-4, equal_nan=True)
    assert joined == ["fused_mul_add_fused_mul_sub_into_mm"]


def test_not_joined_where_something_else_reads_it(joined):
    x, w = torch.randn(40, 60), torch.randn(60, 50)
    f = lambda x, w: ((y := torch.tanh(x) + 1) @ w, y)
    for a, b in zip(nf.jit(f)(x, w), f(x, w)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not joined


def test_not_joined_where_it_would_be_made_over_and_over(joined):
    """Each of the products packs it, and it isn't cheap; a cheap one is made twice."""
    x, w = torch.randn(40, 60), torch.randn(60, 50)
    f = lambda x, w: ((y := F.gelu(x).sin().tanh()) @ w, y @ w.cos())
    torch.testing.assert_close(nf.jit(f)(x, w)[1], f(x, w)[1], rtol=1e-5, atol=1e-5)
    assert not any("gelu" in name for name in joined)
    g = lambda x, w: ((y := x * 2 + 1) @ w, y @ w.cos())
    torch.testing.assert_close(nf.jit(g)(x, w)[1], g(x, w)[1], rtol=1e-5, atol=1e-5)
    assert sum("mul_add" in name for name in joined) == 2


def test_memory_is_not_kept_longer_for_it(joined):
    """Three large values would live until the product in place of one."""
    x, w = torch.randn(300, 400), torch.randn(400, 50)

    def f(x, w):
        a, b, c = x.flip(1), x.flip(0, 1), x.flip(0)
        y = a + b * c
        return y @ w.cumsum(0)

    same(f, x, w, rtol=1e-4)
    assert not any("mul" in name for name in joined)


def test_activations_are_never_in_memory(joined):
    """Of a feed-forward network, which keeps what they are made of for their derivatives: forward and backward make them anew."""
    torch.manual_seed(0)
    x, weights = torch.randn(512, 64), [torch.randn(256, 64) * 0.1 if i % 2 == 0 else torch.randn(64, 256) * 0.1 for i in range(6)]

    def loss(weights):
        y = x
        for up, down in zip(weights[::2], weights[1::2]):
            y = y + F.linear(F.gelu(F.linear(y, up)), down)
        return y.square().mean()

    value, grads = nf.jit(nf.value_and_grad(loss))(weights)
    double = [w.double() for w in weights]
    x = x.double()
    truth, expected = nf.value_and_grad(loss)(double)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert sum("fused_gelu_into" in name for name in joined) == 6


def test_the_rewrites_may_be_limited(joined):
    f, x, w = lambda x, w: (torch.tanh(x) + 1) @ w, torch.randn(50, 20), torch.randn(20, 30)
    for most, found in ((1, 0), (2, 1)):  # fusion is the first
        torch.testing.assert_close(nf.jit(f, max_rewrites=most)(x, w), f(x, w), rtol=1e-4, atol=1e-4)
        assert len(joined) == found


def test_not_joined_where_the_epilogue_reads_it_too(joined):
    torch.manual_seed(0)
    same(lambda x, w: torch.tanh((y := x.sin() * 2) @ w / 40 + y), torch.randn(40, 40), torch.randn(40, 40))
    assert not joined
