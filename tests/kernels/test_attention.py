"""Flash attention against its plain truth in float64, on every instruction set of this CPU, and as PyTorch does at the
edges."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

import neuralforge as nf
from neuralforge.compiler.attention import claim_attention
from neuralforge.compiler.executor import Program
from neuralforge.compiler.kernels import Kernel
from neuralforge.errors import KernelError
from neuralforge.graph import capture
from neuralforge.kernels import attention, native, toolchain
from neuralforge.kernels.attention import (
    flash_attention,
    flash_attention_backward,
    reference,
    reference_backward,
)
from neuralforge.kernels.attention.reference import wide
from neuralforge.kernels.native import long, pointer
from neuralforge.testing import check_grads

TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 5e-6, torch.float64: 1e-12}
"""Greatest error, relative to the greatest number of the result (or to 1, if that is less)."""


pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(params=["AMX", "BFLOAT16_DOT", "float32"])
def unit(request, isa, monkeypatch):
    """What multiplies bfloat16: AMX, dot products of vectors (also where they are slow) or float32 arithmetic."""
    if not {"AMX": toolchain.has_amx(), "BFLOAT16_DOT": toolchain.has_bfloat16(), "float32": True}[request.param]:
        pytest.skip(f"this CPU, or {isa}, has no {request.param}")
    monkeypatch.setattr(native, "has_amx", lambda: request.param == "AMX")
    monkeypatch.setattr(native, "fast_dot", lambda: request.param == "BFLOAT16_DOT")
    known = attention._NATIVE[torch.bfloat16]
    fresh = native.Native(known.path, *known.headers, defines=known.defines)
    assert request.param == "float32" or f"#define {request.param}\n" in fresh.source
    monkeypatch.setitem(attention._NATIVE, torch.bfloat16, fresh)


def operands(B, H, G, T, S, K, dtype=torch.float32):
    """q, k, v, and gradients of the output and of the log-sum-exp."""
    shapes = (B, H, T, K), (B, G, S, K), (B, G, S, K), (B, H, T, K), (B, H, T)
    return [torch.randn(shape).to(wide(dtype) if len(shape) == 3 else dtype) for shape in shapes]


def compare(found, expected, dtype=torch.float32):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected):
        assert a.shape == b.shape and a.dtype == (wide(dtype) if name == "lse" else dtype)
        finite = b.isfinite()
        assert torch.equal(torch.where(finite, 0, a.double()), torch.where(finite, 0, b)), name
        bound = TOLERANCE[dtype] * max(1, torch.where(finite, b.abs(), 0).amax().item() if b.numel() else 1)
        error = torch.where(finite, (a.double() - b).abs(), 0)
        assert not error.numel() or error.max() <= bound, f"{name}: {error.max()} > {bound}"


def run(q, k, v, g, g_lse, **options):
    out, lse = flash_attention(q, k, v, **options)
    return out, lse, *flash_attention_backward(g, q, k, v, out, lse, **options, g_lse=g_lse)


def truth(q, k, v, g, g_lse, **options):
    q, k, v, g, g_lse = (x.double() for x in (q, k, v, g, g_lse))
    if options.get("mask") is not None and options["mask"].dtype != torch.bool:
        options["mask"] = options["mask"].double()
    out, lse = reference(q, k, v, **options)
    return out, lse, *reference_backward(g, q, k, v, out, lse, **options, g_lse=g_lse)


@cache
def known(shape, dtype, options):
    """Operands of this shape, and the truth for these options (items of a dictionary): once for all instruction sets."""
    torch.manual_seed(0)
    x = operands(*shape, dtype)
    return x, truth(*x, **dict(options))


SHAPES = [  # B, H, G, T, S, K
    (1, 1, 1, 1, 1, 8), (2, 3, 3, 7, 7, 16), (1, 2, 1, 65, 65, 40), (2, 4, 2, 300, 300, 64), (7, 1, 1, 64, 64, 128),
    (1, 1, 1, 1, 130, 24), (1, 2, 2, 65, 300, 72), (1, 2, 2, 300, 65, 32), (2, 6, 1, 33, 130, 13), (1, 1, 1, 70, 70, 256),
    (1, 1, 1, 130, 7, 1), (1, 1, 1, 200, 95, 48),
]  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, is_causal):
    x, expected = known(shape, torch.float32, (("is_causal", is_causal),))
    compare(run(*x, is_causal=is_causal), expected)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": 21}, {"window": 1}, {"is_causal": True, "window": 100, "scale": -0.3}]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_against_float64(shape, options, unit):
    x, expected = known(shape, torch.bfloat16, tuple(options.items()))
    compare(run(*x, **options), expected, torch.bfloat16)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_bfloat16_in_any_layout(mask_dtype, unit):
    """Parts of one projection, a mask, dropout and a window, against the same in plain operators."""
    torch.manual_seed(0)
    B, H, T, K = 2, 3, 90, 24
    q, k, v = (x.transpose(1, 2) for x in torch.randn(B, T, 3, H, K).bfloat16().unbind(2))
    g, g_lse = torch.randn(B, H, K, T).bfloat16().transpose(2, 3), torch.randn(B, H, T)
    mask = torch.rand(T, T) > 0.3 if mask_dtype == torch.bool else torch.randn(T, T).to(mask_dtype)
    options = dict(mask=mask, window=40, dropout_p=0.2, seed=torch.tensor([5, 6]))
    assert attention.native(q, k, v, mask)
    compare(run(q, k, v, g, g_lse, **options), truth(q, k, v, g, g_lse, **options), torch.bfloat16)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("T, S", [(200, 200), (70, 300), (300, 70)])
def test_window(window, is_causal, T, S):
    options = {"is_causal": is_causal, "window": window}
    x, expected = known((2, 6, 3, T, S, 16), torch.float32, tuple(options.items()))
    compare(run(*x, **options), expected)


@pytest.mark.parametrize("kind", ["bool", "float", "broadcast"])
def test_mask(kind):
    torch.manual_seed(0)
    x = operands(2, 4, 2, 70, 90, 24)
    mask = {"bool": torch.rand(2, 1, 70, 90) > 0.5, "float": torch.randn(4, 70, 90), "broadcast": torch.randn(70, 1)}[kind]
    if kind == "bool":
        mask[1, 0, 5] = False  # a query that sees nothing
    for is_causal, scale in ((False, 0.3), (True, None)):
        found = run(*x, mask=mask, is_causal=is_causal, scale=scale)
        compare(found, truth(*x, mask=mask, is_causal=is_causal, scale=scale))
        if kind == "bool":
            assert (found[0][1, :, 5] == 0).all() and (found[2][1, :, 5] == 0).all()
            assert (found[1][1, :, 5] == -math.inf).all()


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 91, 16), (1, 2, 1, 300, 300, 8), (3, 6, 6, 1, 70, 24)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": 77}])
def test_dropout(shape, options):
    torch.manual_seed(0)
    x, seed = operands(*shape), torch.tensor([-(2**40) + 12345, 2**32 - 1])
    options = {**options, "dropout_p": 0.3, "seed": seed}
    first = run(*x, **options)
    compare(first, truth(*x, **options))
    for a, b in zip(first, run(*x, **options)):
        assert torch.equal(a, b), "the same seed and offset draw the same"
    assert torch.equal(first[1], flash_attention(*x[:3], **{**options, "dropout_p": 0.0, "seed": None})[1])
    for other in (seed + torch.tensor([1, 0]), seed + torch.tensor([1 << 32, 0]), seed - torch.tensor([0, 1])):
        assert not torch.equal(first[0], flash_attention(*x[:3], **{**options, "seed": other})[0])


PACKED = [  # lengths of queries and of keys, H, G, K
    ((1,), (1,), 1, 1, 8), ((5, 70, 1), (5, 70, 1), 4, 2, 24), ((130, 0, 3, 65), (7, 9, 0, 300), 2, 1, 40),
    ((64, 64, 128, 1, 1, 1, 1, 200), (64, 64, 128, 1, 1, 1, 1, 200), 2, 2, 13), ((0, 40, 0), (0, 33, 5), 3, 1, 16),
]  # fmt: skip


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@cache
def known_of_packed(lengths, dtype, options):
    """As `known`; the options with those that pack."""
    torch.manual_seed(0)
    T, S, H, G, K = lengths
    x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands(1, H, G, sum(T), sum(S), K, dtype)]
    options = {**dict(options), "q_starts": starts(T), "k_starts": starts(S)}
    if "dropout_p" in options:
        options["seed"] = torch.tensor([3, 4])
    return x, options, truth(*x, **options)


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float32), ({"is_causal": True}, torch.float32), ({"is_causal": True, "window": 7}, torch.float32),
        ({"window": 20, "dropout_p": 0.2}, torch.float32), ({}, torch.bfloat16), ({"is_causal": True}, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lengths", PACKED)
def test_packed_sequences(lengths, options, dtype):
    """Against the truth, and the same bits as each sequence by itself."""
    (T, S, *_), (x, packed, expected) = lengths, known_of_packed(lengths, dtype, tuple(options.items()))
    found = run(*x, **packed)
    compare(found, expected, dtype)
    if "dropout_p" in options:
        return
    of_queries, of_keys = [t.split(T, 2) for t in (x[0], x[3], x[4])], [t.split(S, 2) for t in x[1:3]]
    alone = [run(q, k, v, g, g_lse, **options) for q, g, g_lse, k, v in zip(*of_queries, *of_keys)]
    for name, whole, parts in zip(("out", "lse", "dq", "dk", "dv"), found, zip(*alone)):
        assert torch.allclose(whole, torch.cat(parts, 2), atol=TOLERANCE[dtype] * 10, rtol=TOLERANCE[dtype] * 10), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("threads_restored")
def test_packed_sequences_with_any_number_of_threads(threads):
    torch.manual_seed(0)
    x = operands(1, 1, 1, 300, 300, 16)
    torch.set_num_threads(threads)
    for lengths in ([300], [100, 200], [10] * 30):
        options = {"is_causal": True, "q_starts": starts(lengths), "k_starts": starts(lengths)}
        compare(run(*x, **options), truth(*x, **options))


def test_derivatives_of_packed_sequences():
    torch.manual_seed(0)
    q, k, v = operands(1, 2, 1, 7, 7, 4, torch.float64)[:3]
    at = starts([3, 0, 4])
    attend = lambda q, k, v: flash_attention(q, k, v, True, q_starts=at, k_starts=at)
    check_grads(attend, (q, k, v), order=2)
    x = [t.float() for t in (q, k, v)]
    loss = lambda *x: (attend(*x)[0] ** 2).sum()
    expected = nf.grad(loss, (0, 1, 2))(q, k, v)
    leaves = [t.clone().requires_grad_() for t in x]
    loss(*leaves).backward()
    for found in (nf.grad(loss, (0, 1, 2))(*x), nf.jit(nf.grad(loss, (0, 1, 2)))(*x), [t.grad for t in leaves]):
        for a, b in zip(found, expected):
            assert (a.double() - b).abs().max() < 1e-5
    torch.library.opcheck(flash_attention, (*leaves, True, None, None, None, 0.0, None, at, at))


@pytest.mark.parametrize(
    "q_starts, k_starts, message",
    [
        ([0, 3, 8], None, "expected q_starts and k_starts"), ([0, 3, 8], [0, 8], "expected q_starts and k_starts"),
        ([0, 3, 7], [0, 3, 8], r"q_starts \[0, 3, 7\]; expected numbers that ascend from 0 to 8"),
        ([0, 3, 8], [0, 9, 8], r"k_starts \[0, 9, 8\]; expected numbers that ascend from 0 to 8"),
        ([1, 3, 8], [0, 3, 8], "q_starts"), ([0.0, 3.0, 8.0], [0, 3, 8], "torch.float32"),
    ],
)  # fmt: skip
def test_starts_that_do_not_fit(q_starts, k_starts, message):
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(KernelError, match=message):
        flash_attention(x, x, x, q_starts=torch.tensor(q_starts), k_starts=None if k_starts is None else torch.tensor(k_starts))


def test_exponential_to_two_ulp():
    source = attention._NATIVE[torch.float32].source
    run = "\nvoid run(float *x, long n) { for (long i = 0; i < n; i += L) store_f(x + i, exp2_f(load_f(x + i))); }"
    x = torch.cat([torch.linspace(-125.9, 1, 2**18), torch.tensor([0.0, 1, -1, -126, -127, -math.inf, math.nan, -1e30] * 2)])
    y = x.clone()
    toolchain.load(source + run, "exp2").run(pointer(y), long(len(y)))
    expected = x.double().exp2()
    normal = x >= -126
    ulp = 2.0 ** (expected[normal].log2().floor() - 23)
    assert ((y[normal].double() - expected[normal]).abs() / ulp).max() <= 2
    assert (y[x < -126] == 0).all() and y[x.isnan()].isnan().all()
    assert (y[(x == x.round()) & normal] == expected[(x == x.round()) & normal]).all(), "whole powers are exact"


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.usefixtures("threads_restored")
def test_few_heads_and_many_threads(threads):
    torch.manual_seed(0)
    x = operands(1, 2, 1, 200, 260, 24)
    torch.set_num_threads(threads)
    for options in ({"is_causal": True}, {}, {"is_causal": True, "window": 30}):
        first = run(*x, **options)
        compare(first, truth(*x, **options))
        for a, b in zip(first, run(*x, **options)):
            assert torch.equal(a, b), "the same bits every time"


def test_parts_of_one_projection_in_place():
    torch.manual_seed(0)
    B, T, H, K = 2, 70, 3, 24
    memory = torch.full((2, B * T * 3 * H * K + 2), math.nan)
    x_BTD, d_BTD = (m[1:-1].view(B, T, 3 * H * K) for m in memory)  # not aligned to vectors, nothing around it
    x_BTD.normal_()
    heads = lambda x: [part.view(B, T, H, K).transpose(1, 2) for part in x.split(H * K, -1)]
    (q, k, v), gradients = heads(x_BTD), heads(d_BTD)
    g, g_lse = torch.randn(B, H, T, K), torch.randn(B, T, H).transpose(1, 2)
    out, lse = torch.empty(B, T, H, K).transpose(1, 2), torch.empty(B, T, H).transpose(1, 2)
    attention.forward((out, lse), (q, k, v, True), {})
    attention.backward(gradients, (g, q, k, v, out, lse, True), {"g_lse": g_lse})
    compare((out, lse, *gradients), truth(q, k, v, g, g_lse, is_causal=True))
    assert memory[:, 0].isnan().all() and memory[:, -1].isnan().all()


def test_other_layouts():
    torch.manual_seed(0)
    q, k, v, g, g_lse = operands(2, 2, 2, 20, 30, 16)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    one = torch.ones(()).expand(2, 2, 20, 16)  # the gradient of a sum
    compare(run(*odd, one, g_lse), truth(q, k, v, one, g_lse))
    shared = k[:, :1].expand(2, 2, 30, 16)
    compare(run(q, shared, shared, g, g_lse), truth(q, shared, shared, g, g_lse))


@pytest.mark.parametrize("shape", [(0, 2, 2, 5, 5, 8), (2, 2, 2, 0, 5, 8), (2, 2, 2, 5, 0, 8), (1, 0, 0, 5, 5, 8)])
def test_empty(shape):
    x = operands(*shape)
    compare(run(*x, is_causal=True), truth(*x, is_causal=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, 30.0])
def test_any_scale(scale):
    torch.manual_seed(0)
    q, k, v, g, g_lse = operands(1, 1, 1, 90, 90, 16)
    # Great scores carry their rounding error: a float32's relative error times the score.
    tolerance = 2e-6 * max(1, abs(scale) * 30)
    for a, b in zip(run(q, k, v, g, g_lse, scale=scale), truth(q, k, v, g, g_lse, scale=scale)):
        assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("is_causal", [False, True])
def test_special_values_as_in_pytorch(value, which, is_causal):
    """A query whose result PyTorch's operator makes finite has that result; one that sees the special value hasn't."""
    torch.manual_seed(0)
    x = [torch.randn(1, 1, 70, 16) for _ in range(3)]
    x[which][0, 0, 40, 3] = value
    found, expected = flash_attention(*x, is_causal)[0], F.scaled_dot_product_attention(*x, is_causal=is_causal)
    finite = expected.isfinite()
    assert torch.allclose(found[finite], expected[finite], atol=1e-5)
    touched = slice(40, 41) if which == 0 else slice(40 if is_causal else 0, None)
    assert torch.equal(found[:, :, touched].isfinite(), expected[:, :, touched].isfinite())
    out, lse = flash_attention(*x, is_causal)
    gradients = flash_attention_backward(torch.ones_like(out), *x, out, lse, is_causal)
    aten = torch.ops.aten
    plain = aten._scaled_dot_product_flash_attention_for_cpu(*x, 0.0, is_causal)
    plain = aten._scaled_dot_product_flash_attention_for_cpu_backward(torch.ones_like(out), *x, *plain, 0.0, is_causal)
    for a, b in zip(gradients, plain):
        both = a.isfinite() & b.isfinite()
        assert torch.allclose(a[both], b[both], atol=1e-4)
    if math.isnan(value):
        assert gradients[0][:, :, touched].isnan().all() and plain[0][:, :, touched].isnan().all()


def test_without_a_compiler(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "available", lambda dtype: False)
    monkeypatch.setattr(attention, "forward", None)
    x = operands(2, 4, 2, 9, 9, 8)
    compare(run(*x, is_causal=True), truth(*x, is_causal=True))


def test_float64_runs_the_truth():
    x = operands(1, 2, 1, 5, 6, 4, torch.float64)
    compare(run(*x, window=3), truth(*x, window=3), torch.float64)


def test_registered_as_torch_operators():
    torch.manual_seed(0)
    q, k, v, g, g_lse = operands(1, 4, 2, 20, 30, 8)
    out, lse = flash_attention(q, k, v)
    torch.library.opcheck(flash_attention, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), True, None, 9))
    torch.library.opcheck(flash_attention_backward, tuple(x.detach() for x in (g, q, k, v, out, lse)))


@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_gradients_under_torch_autograd_and_nf_grad(used):
    torch.manual_seed(0)
    q, k, v, g, g_lse = operands(2, 4, 2, 20, 30, 8)

    def loss(attend, q, k, v):
        out, lse = attend(q, k, v, True, None, 12, None, 0.2, torch.tensor([3, 4]))
        terms = {"out": (out * g.to(out)).sum(), "lse": (lse * g_lse.to(lse)).sum()}
        return sum(terms.values()) if used == "both" else terms[used]

    expected = torch.func.grad(lambda *x: loss(reference, *x), (0, 1, 2))(*(x.double() for x in (q, k, v)))
    by_nf = nf.grad(lambda *x: loss(flash_attention, *x), (0, 1, 2))(q, k, v)
    compiled = nf.jit(nf.grad(lambda *x: loss(flash_attention, *x), (0, 1, 2)))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    loss(flash_attention, *leaves).backward()
    for found in (by_nf, compiled, [x.grad for x in leaves]):
        for name, a, b in zip("qkv", found, expected):
            assert (a.double() - b).abs().max() < 1e-5, name


def test_higher_derivatives():
    torch.manual_seed(0)
    q, k, v = operands(1, 2, 1, 3, 4, 2, torch.float64)[:3]
    mask, seed = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 2])
    check_grads(lambda q, k, v: flash_attention(q, k, v, True, 0.7, None, mask, 0.2, seed), (q, k, v), order=2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_claims_pytorchs_operators_in_a_graph(grouped, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, 16).transpose(1, 2) for h in (4, 2 if grouped else 4, 2 if grouped else 4))
    mask = torch.randn(40, 40) if masked else None

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, scale=0.3, enable_gqa=grouped).sin().sum()

    step = nf.value_and_grad(f, (0, 1, 2))
    captured = capture(step, q, k, v)
    equations = captured.graph.equations
    kernels = {eq: Kernel(run) for eq in equations if (run := claim_attention(eq)) is not None}
    assert set(kernels) == {eq for eq in equations if "flash_attention" in eq.name} and len(kernels) == 2
    found = Program(captured.graph, kernels, {}, [])(q, k, v)
    for a, b in zip(found, tree_flatten(step(q, k, v))[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_claimed():
    q = torch.randn(1, 2, 8, 16)
    for x, options in ((q.double(), {}), (q, {"dropout_p": 0.5})):
        graph = capture(lambda x, o=options: F.scaled_dot_product_attention(x, x, x, **o), x).graph
        assert not any(claim_attention(eq) for eq in graph.equations)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((1, 2, 3, 8), (1, 2, 3, 4)), {}, "expected \\[B, H, T, K\\], and \\[B, G, S, K\\] twice"),
        (((1, 3, 3, 8), (1, 2, 3, 8)), {}, "the heads of q must be a multiple"),
        (((1, 2, 3, 8), (1, 2, 3, 8)), {"window": 0}, "window=0; expected 1"),
        (((1, 2, 3, 8), (1, 2, 3, 8)), {"dropout_p": 0.1}, "dropout_p=0.1 without a seed; expected 0 without one"),
        (((1, 2, 3, 8), (1, 2, 3, 8)), {"dropout_p": 0.1, "seed": torch.tensor([1.0])}, "expected int64 \\[2\\]"),
        (((1, 2, 3, 8), (1, 2, 3, 8)), {"mask": torch.ones(4, 3)}, "mask \\[4, 3\\]; expected what broadcasts to \\[1, 2, 3, 3\\]"),
    ],
)
def test_shapes_that_do_not_fit(shapes, options, message):
    q, k = map(torch.randn, shapes)
    with pytest.raises(KernelError, match=message):
        flash_attention(q, k, k, **options)
