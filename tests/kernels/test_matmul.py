"""The matrix product as a kernel: against float64 and PyTorch, on every instruction set."""

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import KernelError
from neuralforge.kernels.matmul import available, forward, matmul, native, reference

pytestmark = pytest.mark.usefixtures("isa")
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8}
"""Of the result, relative to it, beside those of sums in float32."""


@pytest.fixture(params=ROUNDING, ids=str)
def dtype(request, isa):
    if not available(request.param):
        pytest.skip(f"no {request.param} products here")
    return request.param


def check_of(a, b, bias=None):
    """The check of products of these, in any layout, against float64: K + 1 roundings of partial sums, in any order, are below
    |a| |b| K eps / 2 (Higham 2002, 3.5), and the result's own is one. That is far above what is seen."""
    wide = [None if t is None else t.double() for t in (a, b, bias)]
    truth, largest = reference(*wide), reference(*(None if t is None else t.abs() for t in wide))
    sums = largest * (a.shape[-1] + 2) * 2**-24
    bound = sums + (truth.abs() + sums) * ROUNDING[a.dtype] + 1e-30

    def check(found):
        assert found.dtype == a.dtype and found.shape == truth.shape
        assert ((found.double() - truth).abs() <= bound).all()

    return check


def check(found, a, b, bias=None):
    check_of(a, b, bias)(found)


def random(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def layouts(t):
    """The matrix in several layouts: by rows, by columns, misaligned, every second row and column, broadcast."""
    rows, columns = t.shape[-2:]
    yield t
    yield t.mT.contiguous().mT
    yield t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    yield t.new_empty(*t.shape[:-2], 2 * rows, 3 * columns)[..., ::2, ::3].copy_(t)


SIZES = [(1, 1, 1), (14, 32, 4), (15, 33, 5), (3, 100, 385), (113, 7, 771), (230, 129, 50), (5, 1600, 9)]


@pytest.mark.parametrize("M, N, K", SIZES)
def test_against_float64(M, N, K, dtype):
    a, b, bias = random(dtype, (M, K), (K, N), N)
    assert native(a, b, bias)
    checks = [(c, check_of(a, b, c)) for c in (None, bias)]
    for x in layouts(a):
        for y in layouts(b):
            for c, right in checks:
                found = matmul(x, y, c)
                assert found.is_contiguous()
                right(found)


def test_long_sums_and_several_shares_of_packed_operands(dtype):
    for M, N, K in [(20, 70, 9001), (20, 2500, 1400)]:
        a, b, bias = random(dtype, (M, K), (K, N), N)
        check(matmul(a, b, bias), a, b, bias)


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_batches(batch, dtype):
    a, b, bias = random(dtype, (batch, 19, 40), (batch, 40, 35), 35)
    right = check_of(a, b, bias)
    for x in layouts(a):
        for y in layouts(b):
            right(matmul(x, y, bias))
    check(matmul(a, b[0].expand(batch, 40, 35)), a, b[:1])


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)])
def test_nothing(shape, dtype):
    M, N, K = shape
    a, b, bias = random(dtype, (M, K), (K, N), N)
    check(matmul(a, b), a, b)
    check(matmul(a, b, bias), a, b, bias)
    check(matmul(a.expand(4, M, K), b.expand(4, K, N)), a.expand(4, M, K), b.expand(4, K, N))


def test_nan_and_infinity_stay_in_their_row_and_column(dtype):
    for at, value in [((3, 2), float("nan")), ((16, 40), float("inf")), ((0, 0), -float("inf"))]:
        a, b = torch.ones(17, 41, dtype=dtype), torch.ones(41, 37, dtype=dtype)
        a[at] = value
        b[at[1], 5] = 0
        truth = a.float() @ b.float()
        assert torch.equal(torch.isnan(matmul(a, b)), torch.isnan(truth))
        assert torch.equal(torch.isinf(matmul(a, b)), torch.isinf(truth))
        assert torch.equal(torch.isnan(matmul(b.t(), a.t())), torch.isnan(truth.t()))


@pytest.mark.parametrize("share", [0.001, 0.05, 1])
def test_many_numbers_that_are_not_finite(share, dtype):
    """Wherever they meet, in operands of several blocks; the rest keeps its accuracy."""
    a, b = random(dtype, (70, 900), (900, 300))
    for x, value in ((a, float("nan")), (a, float("inf")), (b, -float("inf")), (b, float("nan"))):
        x[torch.rand(x.shape) < share / 100] = value
    if share == 1:
        a[:] = b[:] = float("nan")
    truth, found = a.double() @ b.double(), matmul(a, b)
    finite = truth.abs() < torch.finfo(dtype).max
    assert torch.equal(torch.isnan(found), torch.isnan(truth))
    largest = a.double().abs() @ b.double().abs()
    bound = largest * 902 * 2**-24 + truth.abs() * ROUNDING[dtype]
    assert ((found.double() - truth).abs() <= bound)[finite].all() and not torch.isfinite(found[~finite]).any()


def test_results_beyond_the_largest_number_and_below_the_normal_ones(dtype):
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    a = torch.tensor([[most, most], [least, 0]], dtype=dtype)
    found = matmul(a, torch.tensor([[1, 0.5, 0], [1, 0, 0]], dtype=dtype))
    assert torch.isinf(found[0, 0]) and found[1, 0] == least and not found[:, 2].any()
    assert 0 <= found[1, 1] <= least / 2
    a, b = random(dtype, (40, 50), (50, 60))
    a[3, 7] = a[39, 49] = most
    check(matmul(a, b * 1e-3), a, b * 1e-3)
    assert torch.equal(matmul(a[:3, :1] * 1e21, b[:1] * 1e21).abs(), torch.full((3, 60), torch.inf, dtype=dtype))
    for size in (1e16, 1e-16):
        x, y = a[:3] * size, b * size
        check(matmul(x, y), x, y)


def test_into_any_destination(dtype):
    a, b, bias = random(dtype, (29, 11), (11, 45), 45)
    for c in (None, bias):
        for out in layouts(torch.empty(29, 45, dtype=dtype)):
            whole = out._base if out._base is not None else out
            whole.fill_(1000)
            forward((out,), (a, b, c), {})
            check(out, a, b, c)
            assert (whole == 1000).sum() == whole.numel() - out.numel()  # and nothing else was written to


@pytest.mark.parametrize("M, N, K", [*SIZES, (20, 70, 9000), (5, 6, 0)])
def test_added_to_what_is_there(M, N, K, dtype):
    a, b, before = random(dtype, (M, K), (K, N), (M, N))
    truth = before.double() + a.double() @ b.double()
    sums = a.double().abs() @ b.double().abs() * (K + 2) * 2**-24
    for out in layouts(before):
        out = out.clone(memory_format=torch.preserve_format)
        forward((out,), (a, b), {}, add=True)
        rounded = (truth.abs() + before.abs()) * (2**-22 + 2 * ROUNDING[dtype])
        assert ((out.double() - truth).abs() <= sums + rounded).all()


@pytest.mark.parametrize("M, N, K", [*SIZES, (20, 70, 9000), (40, 30, 0)])
def test_with_sums_of_rows(M, N, K):
    a, b = random(torch.float32, (M, K), (K, N))
    for x in layouts(a):
        out, sums = torch.full((M, N), 9.0), torch.full((M + 1,), 9.0)
        forward((out,), (x, b), {}, sums=sums[:M])
        check(out, a, b)
        bound = a.double().abs().sum(1) * (K + 1) * 2**-24
        assert ((sums[:M].double() - a.double().sum(1)).abs() <= bound).all() and sums[M] == 9


def test_other_types_take_the_reference():
    for dtype in (torch.float64, torch.float16):
        a, b = random(dtype, (4, 5), (5, 6))
        assert not native(a, b)
        assert torch.equal(matmul(a, b), a @ b)


def test_operands_that_do_not_fit():
    with pytest.raises(KernelError, match=r"a \[2, 3\], b \[4, 5\]; expected \[M, K\], \[K, N\]"):
        matmul(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(KernelError, match=r"bias \[4\]"):
        matmul(torch.ones(2, 3), torch.ones(3, 5), torch.ones(4))
    with pytest.raises(KernelError, match="float64 and torch.float32|float32 and torch.float64"):
        matmul(torch.ones(2, 3), torch.ones(3, 5, dtype=torch.float64))


def test_derivatives():
    torch.manual_seed(0)
    a, b, bias = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (6, 3), (3,)))
    f = lambda a, b, bias: (matmul(a, b, bias) ** 2).sum()
    nf.testing.check_grads(f, (a, b, bias), order=2)
    operands = [t.float().requires_grad_() for t in (a, b, bias)]
    f(*operands).backward()
    for t, g in zip(operands, nf.grad(f, (0, 1, 2))(a, b, bias)):
        torch.testing.assert_close(t.grad, g.float(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(matmul, [t.float().requires_grad_() for t in (a, b, bias)])


def test_jitted(dtype):
    a, b, bias = random(dtype, (40, 30), (30, 50), 50)
    check(nf.jit(matmul)(a, b, bias), a, b, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_jitted_in_types_without_a_kernel(dtype):
    a, b, bias = torch.randn(5, 7, dtype=dtype), torch.randn(7, 6, dtype=dtype), torch.randn(6, dtype=dtype)
    torch.testing.assert_close(nf.jit(matmul)(a, b, bias), matmul(a, b, bias))
