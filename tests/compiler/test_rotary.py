"""Rotary positions in the forms they are written in become one kernel, forward and backward: same values, same gradients."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture
from neuralforge.kernels import rotary as kernel
from neuralforge.models import llama
from neuralforge.models.config import ModelConfig

ROTARY = "neuralforge.rotary"
B, H, T, K = 2, 3, 5, 8

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no C compiler")


def rotate_half(x):
    """As transformers has it."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def chunked(x, cos, sin):
    return llama.rotate(x, cos, sin)


def sliced(x, cos, sin):
    return (x * cos[None].unsqueeze(1)) + (rotate_half(x) * sin[None].unsqueeze(1))


def for_each_batch(x, cos, sin):
    cos, sin = (t.expand(B, T, K).unsqueeze(1) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def the_other_way_round(x, cos, sin):
    a, b = x.split(K // 2, dim=3)
    return sin * torch.cat([-b, a], 3) + cos * x


def split_with_sizes(x, cos, sin):
    a, b = x.split([K // 2, K // 2], -1)
    return torch.cat([b.neg(), a], -1).mul(sin).add(x.mul(cos))


def by_parts(x, cos, sin):
    """As GPT-NeoX's and others' have it, with tables of half the width."""
    cos, sin = cos[:, : K // 2], sin[:, : K // 2]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_parts_backwards(x, cos, sin):
    """As nanochat has it, of [B, T, H, K]."""
    cos, sin = cos[None, :, None, : K // 2], sin[None, :, None, : K // 2]
    x = x.transpose(1, 2)
    x1, x2 = x[..., : K // 2], x[..., K // 2 :]
    y1 = x1 * cos + x2 * sin
    y2 = x1 * (-sin) + x2 * cos
    return torch.cat([y1, y2], 3).to(x.dtype).transpose(1, 2)


def halves_unbound(x, cos, sin):
    """As lucidrains has it."""
    a, b = x.unflatten(-1, (2, K // 2)).unbind(-2)
    return x * cos + torch.cat((-b, a), -1) * sin


def interleaved(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, : K // 2], sin[:, : K // 2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def interleaved_backwards(x, cos, sin):
    x = x.transpose(1, 2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, : K // 2], sin[:, None, : K // 2]
    return torch.stack([b * sin + a * cos, b * cos - a * sin], 4).flatten(-2).transpose(1, 2)


def of_one_table(x, cos, sin):
    """As torchtune has it, of [B, T, H, K]."""
    table = torch.view_as_real(torch.complex(cos[:, : K // 2], sin[:, : K // 2])).view(1, T, 1, K // 2, 2)
    x = x.transpose(1, 2)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    turned = torch.stack([
        pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
        pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
    ], -1)  # fmt: skip
    return turned.flatten(3).type_as(x).transpose(1, 2)


def rotate_every_two(x):
    """As GPT-J has it in transformers."""
    x1, x2 = x[:, :, :, ::2], x[:, :, :, 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def every_two(x, cos, sin):
    cos, sin = (torch.repeat_interleave(t[None, None, :, : K // 2], 2, 3) for t in (cos, sin))
    return (x * cos) + (rotate_every_two(x) * sin)


def every_two_unbound(x, cos, sin):
    """As lucidrains has it, with another angle for each number."""
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).view(x.shape) * sin


def as_complex(x, table, also=lambda z: 0):
    """As Meta's Llama has it."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table
    return torch.view_as_real(z).flatten(3).type_as(x) + also(z)


def by_complex_numbers(x, cos, sin):
    table = torch.complex(cos[:, : K // 2], sin[:, : K // 2]).view(1, T, 1, K // 2)
    return as_complex(x.transpose(1, 2), table).transpose(1, 2)


FORMS = [chunked, sliced, for_each_batch, the_other_way_round, split_with_sizes, by_parts, by_parts_backwards, halves_unbound]
INTERLEAVED = [interleaved, interleaved_backwards, of_one_table, every_two, every_two_unbound]


def in_float32(x, cos, sin):
    wide = x.float()
    return (wide * cos + rotate_half(wide) * sin).to(x.dtype)


def in_float32_by_promotion(x, cos, sin):
    return (x * cos + rotate_half(x) * sin).type_as(x)


def operands(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(B, T, H * K), torch.randn(H * K, H * K).to(dtype) / 5, torch.randn(T, K), torch.randn(T, K)


def step_of(form, dtype=torch.float32):
    """Heads of a product, twice, turned, and the gradient of the weight."""

    def loss(w, x, cos, sin):
        heads = lambda x: (x.to(dtype) @ w).view(B, T, H, K).transpose(1, 2)
        return (form(heads(x), cos, sin) * form(heads(x.cos()), cos, sin)).float().square().sum()

    return nf.value_and_grad(loss)


def names(f, *args):
    return [eq.name for eq in optimise(capture(f, *args).graph).equations]


def assert_found(found, count):
    left = [name for name in found if any(part in name for part in ("cat", "neg", "split", "slice_", "select_", "as_complex"))]
    assert found.count(ROTARY) == count and not left, found


@pytest.mark.parametrize("form", FORMS + INTERLEAVED)
def test_found_and_equal(form, names_and_results):
    x, w, cos, sin = operands()
    step = step_of(form)
    found, results = names_and_results(step, w, x, cos, sin)
    assert_found(found, 4)
    torch.testing.assert_close(results, step(w, x, cos, sin), rtol=1e-5, atol=1e-4)


IN_BFLOAT16 = [sliced, by_parts_backwards, interleaved, every_two]


@pytest.mark.parametrize("form", [in_float32, in_float32_by_promotion, of_one_table, by_complex_numbers, *IN_BFLOAT16])
def test_in_bfloat16(form, names_and_results):
    """No further from the same step in float32 than PyTorch is, rounding by rounding."""
    x, w, cos, sin = operands(torch.bfloat16)
    if form in IN_BFLOAT16:
        cos, sin = cos.bfloat16(), sin.bfloat16()
    step = step_of(form, torch.bfloat16)
    names, found = names_and_results(step, w, x, cos, sin)
    assert_found(names, 4)
    eager = step(w, x, cos, sin)
    exact = step_of(form)(w.float(), x.bfloat16().float(), cos.float(), sin.float())
    for a, b, truth in zip(found, eager, exact):
        assert a.dtype == b.dtype
        assert (a - truth).abs().max() <= 1.1 * (b - truth).abs().max() + 1e-2 * truth.abs().max()


@pytest.mark.parametrize("form", [in_float32, in_float32_by_promotion, of_one_table, by_complex_numbers])
def test_the_same_bits_as_pytorch_but_for_fused_multiply_add(form):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(B, H, T, K).bfloat16(), torch.randn(2, T, K).bfloat16().float()  # products are exact
    x, cos, sin = (t.to(torch.float8_e5m2).to(t.dtype) for t in (x, cos, sin))
    assert ROTARY in names(form, x, cos, sin)
    assert torch.equal(nf.jit(form)(x, cos, sin), form(x, cos, sin))


TRAINED = {
    "whole": chunked, "half": by_parts, "negated": lambda x, cos, sin: by_parts(x, cos, -sin), "interleaved": interleaved,
    "of one table": of_one_table, "every two": every_two_unbound,
}  # fmt: skip


@pytest.mark.parametrize("form", TRAINED.values(), ids=TRAINED)
def test_trained_tables(form):
    """Of two calls, as the gradient of x alone doesn't tell which one it is of."""
    x, _, cos, sin = operands()

    def loss(cos, sin, x):
        q = x.view(B, T, H, K).transpose(1, 2)
        return (form(q, cos, sin).sin() * form(q.exp(), cos, sin)).sum()

    step = nf.grad(loss, argnums=(0, 1, 2))
    assert form not in (chunked, every_two_unbound) or ROTARY in names(step, cos, sin, x)
    torch.testing.assert_close(nf.jit(step)(cos, sin, x), step(cos, sin, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [chunked, interleaved, of_one_table, every_two])
def test_second_derivatives(form):
    x, w, cos, sin = operands()
    hvp = lambda x, cos, sin: nf.hvp(lambda x: form(x.view(B, T, H, K).transpose(1, 2), cos, sin).sin().sum(), (x,), (x,))
    torch.testing.assert_close(nf.jit(hvp)(x, cos, sin), hvp(x, cos, sin), rtol=1e-5, atol=1e-4)


def test_as_many_tables_as_rows():
    """Which is x and which the table isn't told apart: it makes no difference."""
    x, cos, sin = torch.randn(1, 1, T, K), *torch.randn(2, T, K)
    step = nf.grad(lambda x, cos, sin: of_one_table(x, cos, sin).sin().sum(), argnums=(0, 1, 2))
    torch.testing.assert_close(nf.jit(step)(x, cos, sin), step(x, cos, sin), rtol=1e-5, atol=1e-5)


def test_tables_that_are_conjugated_lazily():
    x, table = torch.randn(B, H, T, K).bfloat16(), torch.randn(T, K // 2, dtype=torch.complex64)
    for form in (as_complex, lambda x, table: as_complex(x, table.conj())):
        for given in (table, table.conj()):
            assert ROTARY in names(form, x, given)
            torch.testing.assert_close(nf.jit(form)(x, given), form(x, given))


def stacked(x, c, s, first=slice(None, None, 2), second=slice(1, None, 2), sign=1, dim=-1):
    a, b, c, s = x[..., first], x[..., second], c[:, : K // 2], s[:, : K // 2]
    return torch.stack([a * c - b * s, sign * (b * c) + a * s], dim).flatten(-2)


LEFT_ALONE = {
    "float64": lambda x, c, s: chunked(x.double(), c, s),
    "the other sign": lambda x, c, s: x * c + torch.cat([x[..., K // 2 :], -x[..., : K // 2]], -1) * s,
    "halves in place": lambda x, c, s: x * c + torch.cat([-x[..., : K // 2], x[..., K // 2 :]], -1) * s,
    "unequal parts": lambda x, c, s: x * c + torch.cat([-x[..., 3:], x[..., :3]], -1) * s,
    "another dimension": lambda x, c, s: x * c + torch.cat([-x[:, :, :, 4:], x[:, :, :, :4]], 0)[: x.shape[0]].repeat(1, 1, 1, 2) * s,
    "another x": lambda x, c, s: (x + 1) * c + rotate_half(x) * s,
    "a difference": lambda x, c, s: x * c - rotate_half(x) * s,
    "scaled": lambda x, c, s: torch.add(x * c, rotate_half(x) * s, alpha=2),
    "a product is read": lambda x, c, s: (x * c + rotate_half(x) * s) * (x * c).sum(),
    "the halves are read": lambda x, c, s: (r := rotate_half(x), (x * c + r * s) + r.exp())[1],
    "parts of the same sign": lambda x, c, s: torch.cat([x[..., :4] * c[:, :4] - x[..., 4:] * s[:, :4], x[..., 4:] * c[:, :4] - x[..., :4] * s[:, :4]], -1),
    "parts of other tables": lambda x, c, s: torch.cat([x[..., :4] * c[:, :4] - x[..., 4:] * s[:, :4], x[..., 4:] * c[:, 4:] + x[..., :4] * s[:, :4]], -1),
    "parts stacked": lambda x, c, s: torch.cat([x[..., :4] * c[:, :4] - x[..., 4:] * s[:, :4], x[..., 4:] * c[:, :4] + x[..., :4] * s[:, :4]], -2),
    "one angle for all": lambda x, c, s: x * c[0, 0] + rotate_half(x) * s[0, 0],
    "interleaved parts of the other sign": lambda x, c, s: stacked(x, c, s, sign=-1),
    "interleaved parts the other way round": lambda x, c, s: stacked(x, c, s, slice(1, None, 2), slice(None, None, 2)),
    "one part twice": lambda x, c, s: stacked(x, c, s, second=slice(None, None, 2)),
    "interleaved parts made halves": lambda x, c, s: stacked(x, c, s, dim=-2),
    "halves interleaved": lambda x, c, s: stacked(x, c, s, slice(None, K // 2), slice(K // 2, None)),
    "every fourth": lambda x, c, s: stacked(x.repeat(1, 1, 1, 2), c, s, slice(None, None, 4), slice(1, None, 4)),
    "interleaved parts joined": lambda x, c, s: x * c + torch.cat([-x[..., 1::2], x[..., ::2]], -1) * s,
    "halves stacked": lambda x, c, s: x * c + torch.stack([-x[..., K // 2 :], x[..., : K // 2]], -1).flatten(-2) * s,
    "every two of the other sign": lambda x, c, s: x * c - rotate_every_two(x) * s,
    "every two of another x": lambda x, c, s: (x + 1) * c + rotate_every_two(x) * s,
    "rows of two": lambda x, c, s: (t := x[:2, :2, :2, :4], t * c[:2, :4] + torch.stack((-t.view(2, 2, 2, 2, 2)[1], t.view(2, 2, 2, 2, 2)[0]), -1).view(t.shape) * s[:2, :4])[1],
    "scalars": lambda x, c, s: x.mean() * c.mean() + x.sum().exp().neg() * s.mean(),
    "complex numbers not rounded": by_complex_numbers,
    "complex numbers of one angle": lambda x, c, s: as_complex(x.bfloat16(), torch.complex(c[0, 0], s[0, 0])),
    "complex numbers that are read": lambda x, c, s: as_complex(x.bfloat16(), torch.complex(c[:, :4], s[:, :4]), lambda z: z.abs().sum()),
    "angles for each number": lambda x, c, s: x[0] * (c + x) + rotate_half(x[0]) * (s + x),
}


@pytest.mark.parametrize("form", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_where_it_does_not_fit(form, names_and_results):
    _, _, cos, sin = operands()
    x = torch.randn(B, H, T, K)
    step = nf.value_and_grad(lambda x: form(x, cos, sin).sum())
    found, results = names_and_results(step, x)
    assert ROTARY not in found
    torch.testing.assert_close(results, step(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_our_llama(precision, names_and_results):
    """Queries and keys of each layer, forward and backward; of other counts of heads."""
    torch.manual_seed(0)
    model = llama.Llama(ModelConfig("llama", 50, 16, 32, 2, 4, 2, 48))
    params = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 50, (2, 11))

    def loss(params, tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return torch.func.functional_call(model, params, (tokens,)).float().logsumexp(-1).mean()

    step = nf.value_and_grad(loss)
    found, results = names_and_results(step, params, tokens)
    assert_found(found, 2 * 2 * 2)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(results, step(params, tokens), rtol=tolerance, atol=tolerance)
