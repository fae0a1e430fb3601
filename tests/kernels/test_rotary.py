"""Rotary positions: against the plain truth in float64, forward and transposed, of halves and interleaved, on every
instruction set."""

import math
from itertools import product

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler.kernels import claim
from neuralforge.errors import KernelError
from neuralforge.graph import capture
from neuralforge.kernels import rotary as kernel
from neuralforge.kernels.rotary import reference, rotary

TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2]
"""Of x and of the tables."""
TOLERANCE = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 2**-8 + 2e-7}
"""Greatest error, relative to the sum of the two products' magnitudes."""

every_way = pytest.mark.parametrize(
    "way", list(product([False, True], repeat=2)), ids=["halves", "interleaved", "halves back", "interleaved back"]
)
"""Is it transposed, and is it interleaved?"""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def operands(shape, dtypes=TYPES[0], half=False):
    table = shape[-2], shape[-1] // 2 if half else shape[-1]
    return torch.randn(shape).to(dtypes[0]), *(torch.randn(table).to(dtypes[1]) for _ in range(2))


def check(x, cos, sin, way):
    y = rotary(x, cos, sin, *way)
    exact = reference(x.double(), cos.double(), sin.double(), *way)
    size = x.double().abs()
    other = reference(size, torch.zeros_like(cos), torch.ones_like(sin), *way).abs()  # of each pair
    bound = TOLERANCE[x.dtype] * (size * cos.double().abs().amax() + other * sin.double().abs().amax())
    assert y.shape == x.shape and y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()
    return y


@pytest.mark.parametrize("half", [False, True], ids=["whole tables", "half tables"])
@every_way
@pytest.mark.parametrize("dtypes", TYPES)
def test_against_float64(dtypes, way, half, isa):
    for shape in ((1, 2), (3, 6), (4, 28), (2, 5, 34), (3, 2, 7, 64), (2, 3, 1, 96), (1, 1, 300, 128), (2, 2, 3, 5, 32)):
        check(*operands(shape, dtypes, half), way)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_truth_is_a_rotation_of_complex_numbers(interleaved):
    x, angle = torch.randn(3, 5, 8).double(), torch.randn(5, 4).double()
    z = torch.view_as_complex(x.view(3, 5, 4, 2)) if interleaved else torch.complex(*x.chunk(2, -1))
    z = z * torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_real(z).flatten(2) if interleaved else torch.cat([z.real, z.imag], -1)
    whole = [t.repeat_interleave(2, -1) if interleaved else t.repeat(1, 2) for t in (angle.cos(), angle.sin())]
    for tables in ((angle.cos(), angle.sin()), whole):
        y = reference(x, *tables, interleaved=interleaved)
        assert torch.allclose(y, turned, atol=1e-14)
        assert torch.allclose(reference(y, *tables, transposed=True, interleaved=interleaved), x, atol=1e-14)


@every_way
@pytest.mark.parametrize("dtypes", TYPES[:3])
def test_strided_and_misaligned_operands(dtypes, way, isa):
    tight, cos, sin = operands((3, 4, 6, 20), dtypes)
    expected = rotary(tight, cos, sin, *way)
    apart = torch.full((3 * 4 * 6 * 40 + 1,), float("nan"), dtype=dtypes[0])[1:].view(3, 4, 6, 40)[..., 5:25].copy_(tight)
    heads = tight.transpose(1, 2).contiguous().transpose(1, 2)  # [B, T, H, K] in memory
    turned = tight.transpose(2, 3).contiguous().transpose(2, 3)
    for x in (apart, heads, turned, tight.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)):
        assert torch.equal(rotary(x, cos, sin, *way), expected)
    assert rotary(heads, cos, sin).stride() == heads.stride()
    wide = torch.stack([cos, sin], 1).contiguous()  # rows of a wider table, of columns in memory, and one for each batch
    for c, s in (wide.unbind(1), (cos.t().contiguous().t(), sin), (cos[None, None], sin.expand(3, 1, 6, 20))):
        assert torch.equal(rotary(tight, c, s, *way), expected)
    one = torch.ones((), dtype=dtypes[0]).expand(3, 4, 6, 20)  # the gradient of a sum
    assert torch.equal(rotary(one, cos, sin, *way), rotary(one.contiguous(), cos, sin, *way))


@every_way
def test_tables_for_each_batch_and_head(way, isa):
    x = torch.randn(2, 3, 7, 10)
    for shape in ((2, 1, 7, 10), (1, 3, 7, 5), (2, 3, 7, 10), (10,), (5,), (3, 1, 10)):
        check(x, torch.randn(shape), torch.randn(shape), way)


@every_way
@pytest.mark.parametrize("dtypes", TYPES[:3])
def test_into_given_memory(dtypes, way, isa):
    x, cos, sin = operands((2, 3, 7, 40), dtypes)
    expected = rotary(x, cos, sin, *way)
    wider = torch.full((7, 2, 3, 60), float("nan"), dtype=dtypes[0]).permute(1, 2, 0, 3)
    out = wider[..., 3:43]
    kernel.forward((out,), (x, cos, sin, *way), {})
    assert torch.equal(out, expected) and wider.isnan().sum() == wider.numel() // 3
    kernel.forward((x,), (x, cos, sin, *way), {})  # over its operand
    assert torch.equal(x, expected)
    if dtypes[0] == dtypes[1]:
        x, cos, sin = operands((7, 40), dtypes)
        for over in (1, 2):  # over a table
            tables = [cos.clone(), sin.clone()]
            kernel.forward((tables[over - 1],), (x, *tables, *way), {})
            assert torch.equal(tables[over - 1], rotary(x, cos, sin, *way))


@every_way
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (5, 0), (2, 3, 0)])
def test_empty(shape, way):
    assert rotary(*operands(shape), *way).shape == shape


@every_way
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_special_values_as_in_pytorch(value, way, isa):
    x, cos, sin = operands((5, 36))
    x[1, 7], x[2, 30], cos[3, 2], sin[4, 33] = value, value, value, value
    found, expected = rotary(x, cos, sin, *way), reference(x, cos, sin, *way)
    assert torch.allclose(found, expected, equal_nan=True)
    assert abs(value) == 1e38 or not found[1:].isfinite().all(-1).any()


@pytest.mark.parametrize("shape, table, other", [
    ((4, 7), (4, 7), (4, 7)), ((4, 6), (3, 6), (3, 6)), ((4, 6), (4, 6), (4, 3)), ((4, 6), (4, 1), (4, 1)),
    ((4, 6), (2, 4, 6), (2, 4, 6)), ((), (4, 6), (4, 6)),
])  # fmt: skip
def test_operands_that_do_not_fit(shape, table, other):
    for call in (rotary, nf.jit(rotary)):
        with pytest.raises(KernelError, match="rotary: x .*; expected x .* with an even K"):
            call(torch.randn(shape), torch.randn(table), torch.randn(other))


def test_without_a_compiler(monkeypatch):
    x, cos, sin = operands((2, 5, 8))
    expected = rotary(x, cos, sin)
    monkeypatch.setattr(kernel, "native", lambda *operands: False)
    assert torch.allclose(rotary(x, cos, sin), expected, atol=1e-6)


@every_way
@pytest.mark.parametrize("half", [False, True])
def test_registered_as_torch_operators(half, way):
    args = [x.requires_grad_() for x in operands((2, 3, 5, 8), half=half)]
    torch.library.opcheck(rotary, (*args, *way))
    exact = tuple(x.double().requires_grad_() for x in operands((2, 2, 3, 4), half=half))
    torch.autograd.gradcheck(lambda *x: rotary(*x, *way), exact)
    torch.autograd.gradgradcheck(lambda *x: rotary(*x, *way), exact)
    many = torch.func.vmap(lambda x, c, s: rotary(x, c, s, *way), in_dims=(1, None, 0))
    x, cos, sins = args[0].detach(), args[1].detach(), torch.randn(3, *args[2].shape)
    each = torch.stack([rotary(x[:, n], cos, sins[n], *way) for n in range(3)])
    assert torch.equal(many(x, cos, sins), each)


@every_way
@pytest.mark.parametrize("half", [False, True])
def test_derivatives_of_every_kind(half, way):
    args = operands((2, 3, 6), TYPES[3], half)
    f = lambda *x: rotary(*x, *way).sin().sum()
    nf.testing.check_grads(f, args, order=2)
    assert torch.allclose(nf.jit(nf.grad(f))(*args), nf.grad(f)(*args))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtypes", TYPES[:3])
def test_gradients_and_the_compiler(dtypes, interleaved, isa):
    x, cos, sin = operands((2, 3, 5, 34), dtypes)
    f = lambda x, cos, sin: rotary(x, cos, sin, interleaved=interleaved).float().sin().sum()
    exact = nf.grad(f)(x.double(), cos.double(), sin.double())
    bound = 1e-5 if x.dtype == torch.float32 else 0.06 if interleaved else 0.05  # rounding the result alone makes 0.053 of these numbers
    leaf = x.clone().requires_grad_()
    f(leaf, cos, sin).backward()
    for found in (nf.grad(f)(x, cos, sin), nf.jit(nf.grad(f))(x, cos, sin), leaf.grad):
        assert found.dtype == x.dtype
        assert torch.allclose(found.double(), exact, atol=bound)
    graph = capture(nf.grad(f), x, cos, sin).graph
    own = [eq for eq in graph.equations if eq.name == "neuralforge.rotary"]
    kernels = claim(graph)
    assert len(own) == 2 and all(kernels[eq].run is kernel.forward for eq in own)
