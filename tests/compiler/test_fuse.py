"""Fused groups: every operator against float64 truth on every instruction set, odd shapes and strides, special
values, random programs, and what is grouped with what."""

from contextlib import suppress
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import neuralforge as nf
from neuralforge.compiler.fusion import codegen
from neuralforge.compiler.fusion.batch import batch
from neuralforge.compiler.fusion.fuse import fuse
from neuralforge.compiler.fusion.fused import Fused
from neuralforge.compiler.pipeline import optimise
from neuralforge.errors import KernelError
from neuralforge.graph import capture, verify


def fused_parts(f, *args):
    return [eq.op for eq in optimise(capture(f, *args).graph).equations if isinstance(eq.op, Fused)]


@pytest.fixture
def native(optimised):
    """Runs a function as fused native code; fails if anything of it is left unfused."""

    def native(f, *args):
        graph, found = optimised(f, *args)
        assert all(isinstance(eq.op, Fused) for eq in graph.equations), str(graph)
        interpreted = graph(*args)
        for a, b in zip(found if isinstance(found, tuple) else (found,), interpreted):
            assert a.dtype == b.dtype and a.shape == b.shape
        return found

    return native


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 0.5])
UNARY = {
    "neg": lambda x: -x, "reciprocal": torch.reciprocal, "square": torch.square, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "exp": torch.exp, "log": torch.log, "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid, "sin": torch.sin,
    "cos": torch.cos, "abs": torch.abs, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "cube": lambda x: x**3, "root": lambda x: x**0.5,
    "inverse_square": lambda x: x**-2, "power": lambda x: x**1.7, "rsub": lambda x: 2 - x, "add_alpha": lambda x: torch.add(x, x, alpha=3),
    "sub_alpha": lambda x: torch.sub(x, 2.0, alpha=3), "gelu_backward": lambda x: torch.ops.aten.gelu_backward(x * 0.5, x),
    "gelu_tanh_backward": lambda x: torch.ops.aten.gelu_backward(x * 0.5, x, approximate="tanh"),
    "silu_backward": lambda x: torch.ops.aten.silu_backward(x * 0.5, x),
    "maximum": lambda x: torch.maximum(x, x * -0.5), "minimum": lambda x: torch.minimum(x, x * -0.5),
    "where": lambda x: torch.where(x > 0.3, x, x * 2), "masked_fill": lambda x: x.masked_fill(x <= 0, 7.0),
    "logic": lambda x: torch.where((x > 0).logical_and(x < 1).logical_or((x == -1).logical_not()), x, -x),
    "expm1": torch.expm1, "log1p": torch.log1p, "exp2": torch.exp2, "log2": torch.log2, "sign": torch.sign, "floor": torch.floor,
    "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round, "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp_min": lambda x: x.clamp_min(0.25), "clamp_max": lambda x: x.clamp(max=0.25), "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": lambda x: F.softplus(x, 2.0, 5.0), "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.7),
    "addcmul": lambda x: torch.addcmul(x, x, x + 1, value=0.5), "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3), "tanh_backward": lambda x: torch.ops.aten.tanh_backward(x, x * 0.5),
    "sigmoid_backward": lambda x: torch.ops.aten.sigmoid_backward(x, x * 0.5),
    "threshold_backward": lambda x: torch.ops.aten.threshold_backward(x, x + 1, 0.5),
    "isnan": lambda x: torch.where(x.isnan(), 1.0, x), "isinf": lambda x: torch.where(x.isinf(), 1.0, x),
    "xor": lambda x: torch.where((x > 0).logical_xor(x < 1), x, -x), "not": lambda x: torch.where(~(x > 0), x, -x),
    "double": lambda x: (x.double() * 1.5).float(), "mask_as_number": lambda x: (x != 0).to(x.dtype) * x,
}  # fmt: skip


def group_of(name):
    return lambda x: UNARY[name](x) * 1.0 + 0.0  # so that there are two at least, which is a group


@cache
def code(dtype):
    """Of all operators: compiled together it takes a third less time than one by one."""
    graphs = [optimise(capture(group_of(name), torch.ones(1003, dtype=dtype)).graph) for name in UNARY]
    return [codegen.source(eq.op.layouts[0]) for graph in graphs for eq in graph.equations if isinstance(eq.op, Fused)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNARY)
def test_operators(name, dtype, isa, native):
    with suppress(KernelError):  # each tells for itself
        codegen.functions(code(dtype))
    f = group_of(name)
    torch.manual_seed(0)
    x = torch.randn(1003, dtype=dtype) * 3
    found, expected = native(f, x), f(x.double()).double()
    tolerance = 4e-6 if dtype == torch.float32 else 1e-13
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    special = SPECIAL.to(dtype)
    if "lu" in name:  # where ATen's own vector and scalar code differ at the ends of the range
        special = special[special.abs().nan_to_num(0) < 1e30]
    found, expected = native(f, special), f(special)
    assert torch.equal(found.isnan(), expected.isnan())
    finite = ~expected.isnan()
    big = torch.finfo(dtype).max
    clip = lambda t: t[finite].double().clamp(-2 * big if dtype == torch.float32 else -big, big)
    assert torch.allclose(clip(found), clip(expected), rtol=1e-5, atol=1e-37)


ZEROS = {
    **{name: UNARY[name] for name in ("neg", "tanh", "erf", "sin", "abs", "gelu", "silu", "expm1", "log1p", "sign", "floor", "trunc", "clamp")},
    "relu6": F.relu6, "below 0": lambda x: x.clamp(max=0.0), "above 0": lambda x: x.clamp_min(0), "0 to 1": lambda x: x.clamp(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_of_zeros(dtype, isa, native):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0] * 9, dtype=dtype)
    f = lambda x: tuple(g(x * 1.0) * 1.0 for g in ZEROS.values())
    for name, found, expected in zip(ZEROS, native(f, x), f(x), strict=True):
        assert torch.equal(found.signbit(), expected.signbit()), name


@pytest.mark.parametrize("shape", [(), (1,), (7,), (16,), (17,), (3, 5), (33, 65), (2, 3, 129), (4097,), (5, 4096), (70_001,)])
def test_shapes_and_sums(shape, isa):
    f = lambda x, y: ((x * y).exp() + x, (x * y - 1).square().sum(), (x + y).sum())
    torch.manual_seed(0)
    x, y = torch.rand(shape), torch.rand(shape)
    for found, expected in zip(nf.jit(f)(x, y), f(x.double(), y.double())):
        assert found.shape == expected.shape
        assert torch.allclose(found.double(), expected, rtol=2e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.rand(4, 6, 8), torch.rand(8), torch.rand(6, 1)),
        lambda: (torch.rand(4, 6, 8), torch.rand(()), torch.rand(4, 1, 8)),
        lambda: (torch.rand(8, 6, 4).permute(2, 1, 0), torch.rand(6, 8), torch.rand(4, 6, 8)),
        lambda: (torch.rand(4, 6, 16)[:, :, ::2], torch.rand(4, 12, 8)[:, ::2], torch.rand(1, 6, 8).expand(4, 6, 8)),
        lambda: (torch.rand(4, 6, 8, dtype=torch.float64), torch.rand(8), torch.rand(6, 8) > 0.5),
        lambda: (torch.rand(4, 6, 8), torch.arange(8), torch.rand(6, 1)),
        lambda: (torch.rand(193)[1:].view(4, 6, 8), torch.rand(9)[1:], torch.rand(7)[1:].view(6, 1)),
        lambda: (torch.rand(0, 6, 8), torch.rand(8), torch.rand(6, 1)),
    ],
)
def test_broadcast_strided_mixed_and_misaligned(make, isa):
    torch.manual_seed(0)
    a, b, c = make()
    f = lambda a, b, c: (a * b + c * 2, (a - b).exp().sum())
    for found, expected in zip(nf.jit(f)(a, b, c), f(a, b, c)):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-5)


def test_integers_and_masks():
    f = lambda n, m: (n * 3 + 2 - n, (n + 1 > 2).logical_and(m), torch.where(m, n, n + 5))
    n, m = torch.arange(-50, 50), torch.rand(100) > 0.5
    for found, expected in zip(nf.jit(f)(n, m), f(n, m)):
        assert torch.equal(found, expected)


def test_truth_values_are_compared_as_zero_and_one(isa):
    f = lambda a, b: [op(a.logical_not(), c) for op in (torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne) for c in (b, True, 0.5)]
    a, b = torch.rand(100) > 0.5, torch.rand(100) > 0.5
    for found, expected in zip(nf.jit(f)(a, b), f(a, b)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_different_sizes(dtype, isa, native):
    """What is small doesn't drown in what is great, and what comes out in range isn't out of it on the way."""
    great, small = torch.finfo(dtype).max ** 0.6, torch.tensor([1.0, -0.1, 3.0, 0.0], dtype=dtype)
    f = lambda x, y: (
        *(torch.lerp(x * 1.0, y, w) for w in (0.9, 1.0, 1.0 + y, 0.2)), torch.addcmul(y * 1.0, x, x, value=great**-0.5),
        torch.addcdiv(y * 1.0, x, 1 / x, value=great**-0.5),
    )  # fmt: skip
    x = torch.full_like(small, great)
    for found, expected in zip(native(f, x, small), f(x, small)):
        assert torch.allclose(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("threads_restored")
def test_sums_do_not_depend_on_the_number_of_threads():
    x = torch.rand(1_000_003)
    f = nf.jit(lambda x: (x * x).sum())
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(f(x))
    assert found[0] == found[1] == found[2]


def test_what_is_grouped():
    x = torch.rand(8, 8)
    chain = fused_parts(lambda x: (x.exp() + 1).log() * x, x)
    assert [len(op.graph.equations) for op in chain] == [4]
    # The product in between needs the first part and feeds the last: one group would be a cycle.
    around = fused_parts(lambda x: (y := x.exp() + 1, (y @ y + y).tanh())[1], x)
    assert [len(op.graph.equations) for op in around] == [2, 2]
    two_shapes = fused_parts(lambda x: (x.exp() + 1, x[0].exp() + 1), x)
    assert [len(op.parts) for op in two_shapes] == [2], "not one group, but one kernel for both"
    diamond = fused_parts(lambda x: (a := x.exp(), b := x.log(), a * b + (a - b).tanh())[2], x)
    assert [len(op.graph.equations) for op in diamond] == [6]


def test_an_optimizer_over_many_parameters_is_one_kernel():
    optimizer = nf.optim.adamw(1e-3, weight_decay=0.1)
    params = {f"p{i}": torch.randn(i + 1, 7) for i in range(20)}
    grads = {k: torch.randn_like(v) for k, v in params.items()}
    chained = nf.optim.chain(nf.optim.clip_by_global_norm(1.0), optimizer)
    state = chained.init(params)

    def step(g, s, p):
        updates, s = chained.update(g, s, p)
        return nf.optim.apply_updates(p, updates), s

    parts = fused_parts(step, grads, state, params)
    assert max(len(op.parts) for op in parts) == 20
    expected = step(grads, state, params)
    found = nf.jit(step, donate=(1, 2))(grads, *(torch.utils._pytree.tree_map(torch.clone, t) for t in (state, params)))
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_dependent_groups_of_equal_structure_stay_apart():
    def f(x, w):
        for _ in range(3):
            x = (x.exp() + 1) @ w
        return x

    x, w = torch.rand(4, 4), torch.rand(4, 4) * 0.1
    graph = batch(fuse(capture(f, x, w).graph))
    verify(graph)
    assert sum(isinstance(eq.op, Fused) for eq in graph.equations) == 3
    assert torch.allclose(nf.jit(f)(x, w), f(x, w), rtol=1e-5)


def written(a, b):
    """Through views of what others read as well."""
    whole = a.clone(memory_format=torch.contiguous_format)
    whole.t()[1:].add_(b[1:, ::2].sum() * 0.1)
    whole.view(-1)[5::7] = b.diagonal()[1:]
    return whole + a.tanh()


STEPS = {
    "add": lambda a, b: a + b * 0.5, "mul": lambda a, b: a * b.tanh(), "sub": lambda a, b: a - b, "tanh": lambda a, b: a.tanh(),
    "exp": lambda a, b: (a * 0.1).tanh().exp(), "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "sum": lambda a, b: a.tanh().sum() * 0.01 + b * 0.1, "row": lambda a, b: a * b[0] * 0.1, "mm": lambda a, b: (a @ b * 0.1).tanh(),
    "view": lambda a, b: a.reshape(-1).view(6, 6) + b, "t": lambda a, b: a.t() - b, "softmax": lambda a, b: (a * 0.1 + b).softmax(-1) * 2,
    "log softmax": lambda a, b: a.t().log_softmax(-1) * 0.1, "norm": lambda a, b: F.layer_norm(a.t(), (6,)).t() + b,
    "batch norm": lambda a, b: F.batch_norm(a.t(), None, None, b[0], b[1], True).t(),
    "other rows": lambda a, b: a.reshape(6, 2, 3).sigmoid().mean(2).softmax(1).repeat(1, 3) * b,
    "truths": lambda a, b: torch.where((a > b) <= (b > 0.1), a, b) + ((a < 0.5) == (b < 0.2)) * 0.5,
    "strided": lambda a, b: (a * 0.5).contiguous().as_strided((5, 6), (6, 1), 3).sum(0) * 0.1 + b, "few": lambda a, b: a[:, 2:4].var(-1) * 0.01 + b,
    "lerp": lambda a, b: torch.lerp(a, b, b.tanh()), "addcmul": lambda a, b: torch.addcmul(a, a.tanh(), b, value=0.3), "written": written,
}  # fmt: skip


@st.composite
def programs(draw):
    """A list of (operator, operand indices) over a growing list of values; some operands are broadcast."""
    steps = []
    for n in range(draw(st.integers(2, 25))):
        kind = draw(st.sampled_from(sorted(STEPS)))
        pick = lambda: draw(st.integers(0, n + 2))
        steps.append((kind, pick(), pick()))
    return steps


def run_program(steps, inputs):
    values = list(inputs)
    for kind, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        values.append(STEPS[kind](a, b))
    return values[2:], values[-1].sum()


@settings(deadline=None, max_examples=25)
@given(programs())
def test_random_programs_agree_with_eager(steps):
    torch.manual_seed(0)
    inputs = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    expected = torch.utils._pytree.tree_leaves(run_program(steps, inputs))
    f = lambda a, b: run_program(steps, [a, b])
    for donate in ((), (0, 1)):
        found = nf.jit(f, donate=donate)(*(x.clone() for x in inputs))
        for a, b in zip(torch.utils._pytree.tree_leaves(found), expected):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_equal_code_is_one_function():
    groups = [op for n in (5, 50) for op in fused_parts(lambda x: x.exp() + 1, torch.rand(n))]
    assert codegen.source(codegen.Layout(groups[0].parts[0])) == codegen.source(codegen.Layout(groups[1].parts[0]))


def test_operands_in_another_order_are_copied_first():
    a, b = torch.randn(300, 200), torch.randn(200, 300)
    f = nf.jit(lambda a, b: ((a + b.t()) * 2 - a.sigmoid(), (b.t() * a).sum()))
    for found, expected in zip(f(a, b), ((a + b.t()) * 2 - a.sigmoid(), (b.t() * a).sum())):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    names = [eq.name for eq in f.programs[0].graph.equations]
    assert names.count("aten.clone") == 1
    small = nf.jit(lambda a, b: a + b.t())
    small(a[:20, :20], b[:20, :20])
    assert "aten.clone" not in [eq.name for eq in small.programs[0].graph.equations]


NORMALISING = {
    "softmax": lambda x: x.softmax(1), "log_softmax": lambda x: x.log_softmax(1), "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[1:]), "by its sum": lambda x: x / x.sum(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("columns", [8, 10])
@pytest.mark.parametrize("name", NORMALISING)
def test_rows_of_what_rows_become(name, columns):
    """Scores pooled over places, then normalised over channels: rows of another length than those pooled."""
    torch.manual_seed(0)
    f = lambda x: NORMALISING[name](x.exp().mean(2))
    for step in (lambda x: (f(x),), nf.value_and_grad(lambda x: f(x).square().sum())):
        x = torch.randn(4, 8, columns)
        for found, truth in zip(nf.jit(step)(x), step(x.double()), strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
