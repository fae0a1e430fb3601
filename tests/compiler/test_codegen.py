"""Kernels with reductions inside: rows, columns and everything, against float64 truth on every instruction set; half
widths; special values; results that don't depend on threads; memory that may be written over."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.fusion import codegen
from neuralforge.compiler.fusion.fused import Fused
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture

aten = torch.ops.aten


def kernels(f, *args):
    return [eq.op for eq in optimise(capture(f, *args).graph).equations if isinstance(eq.op, Fused)]


@pytest.fixture
def one_kernel(optimised):
    """Runs a function, which must become one kernel."""

    def one_kernel(f, *args):
        graph, results = optimised(f, *args)
        assert sum(isinstance(eq.op, Fused) for eq in graph.equations) == 1, str(graph)
        return results

    return one_kernel


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


def rms_norm(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


def layer_norm_by_hand(x, w):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * w


GROUPS = {
    "softmax": lambda x, y, w: (x * 2 + w).softmax(-1),
    "log_softmax": lambda x, y, w: (x * 2).log_softmax(-1) * y,
    "softmax_backward": lambda x, y, w: aten._softmax_backward_data(x, y, -1, x.dtype) * 2,
    "log_softmax_backward": lambda x, y, w: aten._log_softmax_backward_data(x, y, -1, x.dtype) * 2,
    "logsumexp": lambda x, y, w: (x * 3).logsumexp(-1),
    "logsumexp kept": lambda x, y, w: x - 2 * x.logsumexp(-1, keepdim=True),
    "rms_norm": lambda x, y, w: rms_norm(x + y, w),
    "layer norm by hand": lambda x, y, w: layer_norm_by_hand(x + y, w),
    "layer_norm": lambda x, y, w: F.layer_norm(x + y, w.shape, w, w) * 2,
    "row sum and mean": lambda x, y, w: ((x * y).sum(-1), (x * y).mean(-1) * 2),
    "extrema": lambda x, y, w: (x * y).amax(-1) - (x * y).amin(-1, keepdim=False),
    "variance": lambda x, y, w: (x + y).var(-1) + 1,
    "column sum and mean": lambda x, y, w: (x * y, (x * y).sum(0), (x * y).mean(0)),
    "rows used again": lambda x, y, w: (x / x.sum(-1, keepdim=True)).exp().sum(-1, keepdim=True).log() * y,
    "all kinds of sums": lambda x, y, w: ((z := x.exp() * y).sum(), z.sum(-1), z.sum(0), z - z.amax(-1, keepdim=True)),
    "row through a view": lambda x, y, w: x * (y * x).sum(-1).unsqueeze(-1) + 1,
    "expanded row": lambda x, y, w: (x * y).mean(-1, keepdim=True).expand(x.shape) * y,
}
SHAPES = [(2, 2), (3, 5), (7, 16), (65, 33), (5, 257), (40, 384), (3, 4099), (2, 9000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_with_reductions(name, dtype, isa, one_kernel):
    torch.manual_seed(0)
    f, tolerance = GROUPS[name], 2e-5 if dtype == torch.float32 else 1e-12
    for shape in SHAPES:
        x, y, w = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.5, torch.randn(shape[-1], dtype=dtype)
        if name == "rows used again":
            x = x.abs() + 1
        found = one_kernel(f, x, y, w)
        for a, b in zip(tensors(found), tensors(f(x.double(), y.double(), w.double())), strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max()), shape


def test_layer_norm_backward(isa, one_kernel):
    torch.manual_seed(0)
    for shape in ((7, 33), (40, 384), (2, 3, 5)):
        g, x = torch.randn(shape), torch.randn(shape)
        w, b = torch.randn(shape[-1]), torch.randn(shape[-1])
        _, mean, rstd = aten.native_layer_norm(x, w.shape, w, b, 1e-5)
        f = lambda g, x, mean, rstd: aten.native_layer_norm_backward(g * 2, x, w.shape, mean, rstd, w, b, [True] * 3)
        for found, expected in zip(one_kernel(f, g, x, mean, rstd), f(g, x, mean, rstd), strict=True):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("row", [[1.0, float("nan"), 2.0], [float("inf"), 1.0, 2.0], [float("-inf")] * 3, [float("inf")] * 3,
                                 [float("-inf"), 0.0, 200.0], [1e38, -1e38, 0.0]])  # fmt: skip
def test_special_values_in_rows(row, isa, one_kernel):
    x = torch.tensor([row, [0.1, 0.2, 0.3]]).repeat(1, 9)
    for f in (lambda x: x.softmax(-1) * 1.0, lambda x: x.log_softmax(-1) * 1.0, lambda x: x.logsumexp(-1) * 1.0,
              lambda x: (x * 1.0).amax(-1), lambda x: (x * 1.0).amin(-1), lambda x: (x * 1.0).sum(-1)):  # fmt: skip
        found, expected = one_kernel(f, x), f(x)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True), (found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: (x * y + 1).tanh(),
        lambda x, y: (x.float() * y.float()).softmax(-1).to(x.dtype),
        lambda x, y: ((z := x * y).sum(-1), z.sum(0)),
        lambda x, y: torch.where(x > y, x, y * 0.5),
        lambda x, y: (x.float() * 1.001).to(x.dtype).float() * y,  # a conversion rounds, also inside a group
        lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, y), torch.addcmul(x, x, y, value=0.3), torch.addcdiv(x, y, y.abs() + 1)),
    ],
)
def test_half_widths_are_stored_so_and_computed_in_float(f, dtype, isa, one_kernel):
    torch.manual_seed(0)
    for shape in ((9, 35), (4, 128)):
        x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        found, eager = tensors(one_kernel(f, x, y)), tensors(f(x, y))
        exact = tensors(f(x.float(), y.float())) if all(t.dtype == dtype for t in eager) else eager
        for a, b, truth in zip(found, eager, exact, strict=True):
            assert a.dtype == b.dtype
            # at most a rounding of the result away from arithmetic in float
            step = torch.finfo(dtype).eps if a.dtype == dtype else 1e-6
            assert torch.allclose(a.float(), truth.float(), rtol=step, atol=step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_widths_are_compared_as_they_are_stored(dtype, isa, one_kernel):
    f = lambda x: ((y := x * 3.0), y <= 0.1, y == 0.1, y > 0.3, y.isinf(), y == float("inf"), y == y.to(dtype, copy=True))
    x = torch.tensor([0.1 / 3, 0.1, 0.2, torch.finfo(dtype).max, -1.0]).to(dtype)
    x = torch.cat([x, (torch.tensor([0.1]).to(dtype) / 3)])
    for found, expected in zip(one_kernel(f, x), f(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_widths_round_as_torch_does(dtype, isa):
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    half = bits.view(dtype)
    up = nf.jit(lambda x: x.float() * 1.0)(half)
    assert torch.equal(up.nan_to_num(7), half.float().nan_to_num(7)) and torch.equal(up.isnan(), half.isnan())
    torch.manual_seed(0)
    x = torch.cat([torch.randn(10_000) * 10.0 ** torch.randint(-9, 9, (10_000,)), half.float(), half.float() * 1.001])
    down = nf.jit(lambda x: (x * 1.0).to(dtype))(x)
    assert torch.equal(down.isnan(), x.isnan())
    assert torch.equal(down.nan_to_num(7), x.to(dtype).nan_to_num(7))


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(6, 4, 40).transpose(0, 1), torch.randn(40), torch.randn(4, 6, 1)),
        lambda: (torch.randn(4, 6, 80)[..., ::2], torch.randn(6, 1), torch.randn(4, 1, 1)),
        lambda: (torch.randn(4, 6, 1).expand(4, 6, 40), torch.randn(4, 6, 40), torch.randn(1)),
        lambda: (torch.randn(961)[1:].view(4, 6, 40), torch.randn(40), torch.randn(6, 40)),
    ],
)
def test_rows_of_strided_and_broadcast_operands(make, isa):
    torch.manual_seed(0)
    a, b, c = make()
    f = lambda a, b, c: ((a * b + c).contiguous() * 2).softmax(-1)
    assert torch.allclose(nf.jit(f)(a, b, c), f(a, b, c), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("threads_restored")
def test_sums_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, g = torch.randn(1003, 517), torch.randn(1003, 517)
    f = nf.jit(lambda x, g: ((p := x.softmax(-1) * g).sum(0), p.sum(-1), p.sum(), F.layer_norm(x * g, (517,))))
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(f(x, g))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_an_operand_is_written_over_only_after_its_last_reading():
    x = torch.randn(8, 64)
    # The maximum's loop reads x first, the last loop writes: x may go.
    softmax = kernels(lambda x: (x * 2).softmax(-1), x)[0]
    assert softmax.may_overwrite(softmax.graph.outputs[0], softmax.graph.inputs[0])
    # exp(x) is stored in the first loop and x read again in the second.
    both = kernels(lambda x: (e := x.exp() + 1, x * e.sum(-1, keepdim=True)), x)[0]
    first, second = both.graph.outputs
    assert not both.may_overwrite(first, both.graph.inputs[0]) and both.may_overwrite(second, both.graph.inputs[0])
    # Sums of columns, as long as an operand of theirs, are written at the end.
    columns = kernels(lambda x, w: (x * w).sum(0), x, torch.randn(64))[0]
    assert not columns.may_overwrite(columns.graph.outputs[0], columns.graph.inputs[1])
    # A square matrix whose rows' values are read as columns too.
    f = lambda s, x: (x * s).softmax(-1).sum(-1) + s
    s, x = torch.randn(64), torch.randn(64, 64)
    square = kernels(f, s, x)[0]
    assert not square.may_overwrite(square.graph.outputs[0], square.graph.inputs[0])
    for a, b in zip(tensors(nf.jit(f, donate=(0, 1))(s.clone(), x.clone())), tensors(f(s, x))):
        assert torch.allclose(a, b, rtol=1e-5)


def test_batched_groups_of_rows_of_different_sizes(one_kernel):
    f = lambda *xs: tuple((x * 2).softmax(-1).sum(0) for x in xs)
    xs = [torch.randn(n, n + 3) for n in (2, 7, 40, 300)]
    found = one_kernel(f, *xs)
    assert len(kernels(f, *xs)[0].parts) == 4
    for a, b in zip(found, f(*xs), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_no_more_files_than_cores(monkeypatch):
    """Each costs the compiler more than a small group does."""
    built = []
    monkeypatch.setattr(codegen, "_built", {})
    monkeypatch.setattr(codegen, "load_many", lambda sources: built.extend(sources) or [mock.Mock() for _ in sources])
    texts = [f"void KERNEL(void) {{ {n}; }}" for n in range(9)]
    assert list(codegen.functions(texts)) == texts
    assert len(built) == min(4, os.cpu_count())


def test_what_a_group_tells_of_itself():
    (op,) = kernels(lambda x: ((x * 2).softmax(-1) @ x.T), torch.randn(8, 64))
    assert op.why == "2 operators over 512 elements in rows of 64"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_keeps_its_sign_when_it_is_negative_zero(dtype, isa, one_kernel):
    for zero in (-0.0, 0.0):
        x, s = torch.ones(5, dtype=dtype), torch.tensor(zero, dtype=dtype)
        found = one_kernel(lambda x, s: torch.where(x > 2, x * 3, s) + s, x, s)
        assert (found.signbit() == s.signbit()).all()
