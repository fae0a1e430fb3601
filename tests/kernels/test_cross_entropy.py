"""Cross entropy as a kernel: against its plain truth and PyTorch, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import KernelError
from neuralforge.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_with_gradient,
    reference,
    reference_backward,
    reference_with_gradient,
    with_gradient,
)

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("N, V", [(1, 1), (3, 5), (4, 16), (7, 97), (64, 1000), (5, 8192)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 2e-5), (torch.bfloat16, 2**-8)], ids=["float32", "bfloat16"])
def test_against_float64(N, V, scale, dtype, rtol):
    """The losses of bfloat16 logits are as exact as those of float32; the gradient is rounded once, to 8 bits."""
    torch.manual_seed(0)
    logits, target = (torch.randn(N, V) * scale).to(dtype), torch.randint(0, V, (N,))
    grad, grad_lse = torch.randn(N), torch.randn(N)
    target[0] = V - 1  # in the last vector
    if N > 2:
        target[1] = -100
    loss, lse = cross_entropy(logits, target)
    want = reference(logits.double(), target)
    assert loss.dtype == lse.dtype == torch.float32
    assert torch.allclose(loss.double(), want[0], rtol=1e-6, atol=1e-6)
    assert torch.allclose(lse.double(), want[1], rtol=1e-6, atol=1e-6)
    for more in (None, grad_lse):
        found = cross_entropy_backward(grad, logits, target, lse, more)
        double = None if more is None else more.double()
        expected = reference_backward(grad.double(), logits.double(), target, want[1], double)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, V", [(1, 1), (3, 5), (4, 16), (7, 97), (64, 1000), (5, 8192), (701, 8209)])
@pytest.mark.parametrize("of_lse", [False, True])
def test_with_gradient(N, V, dtype, of_lse):
    """Against float64, in memory of its own and in that of the logits; the largest case is written past the caches, from odd
    addresses."""
    torch.manual_seed(0)
    logits, target = (torch.randn(N, V) * 3).to(dtype), torch.randint(0, V, (N,))
    grad, grad_lse = torch.randn(N), torch.randn(N) if of_lse else None
    target[0], target[N // 2] = V - 1, 0
    if N > 2:
        target[1] = -100
    want = reference_with_gradient(grad.double(), logits.double(), target, grad_lse.double() if of_lse else None)
    place = torch.empty(N * V + 3, dtype=dtype)[3:].view(N, V)
    outputs = torch.empty(N), torch.empty(N), place
    with_gradient(outputs, (grad, logits, target, grad_lse), {})
    found = cross_entropy_with_gradient(grad, logits, target, grad_lse)
    with_gradient((*outputs[:2], logits), (grad, logits, target, grad_lse), {})
    for gradient in (place, logits):
        assert torch.equal(gradient, found[2])
    assert found[2].dtype == dtype
    torch.testing.assert_close([v.double() for v in found[:2]], list(want[:2]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2].double(), want[2], rtol=2e-5 if dtype == torch.float32 else 2**-8, atol=1e-6)


def test_with_gradient_of_other_types_and_strides():
    for logits in (torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 5).t()):
        target, grad = torch.tensor([0, -100, 6, 2, 2]), torch.randn(5, dtype=logits.dtype)
        found, want = (f(grad, logits, target) for f in (cross_entropy_with_gradient, reference_with_gradient))
        torch.testing.assert_close(found, want)


def test_nothing_and_strided_operands():
    assert cross_entropy(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))[0].shape == (0,)
    x, target = torch.randn(5, 7).t(), torch.randint(0, 5, (14,))[::2]
    loss, lse = cross_entropy(x, target)
    assert torch.allclose(loss, F.cross_entropy(x, target, reduction="none"), rtol=1e-5, atol=1e-6)
    x = x.contiguous()
    found = cross_entropy_backward(torch.ones(()).expand(7), x, target, lse)
    assert torch.allclose(found, cross_entropy_backward(torch.ones(7), x, target.contiguous(), lse))


def test_special_values_as_in_pytorch():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, inf, 1.0], [nan, 0, 0], [-inf, 0, 0], [-inf, -inf, -inf], [3e38, -3e38, 0]])
    for row, target in [(r, t) for r in rows for t in range(3)]:
        expected = F.cross_entropy(row[None], torch.tensor([target]))
        found = cross_entropy(row[None].contiguous(), torch.tensor([target]))[0][0]
        assert torch.allclose(found, expected, equal_nan=True), (row, target)
        gradient = cross_entropy_with_gradient(torch.ones(1), row[None].contiguous(), torch.tensor([target]))[2]
        x = row[None].clone().requires_grad_()
        expected = torch.autograd.grad(F.cross_entropy(x, torch.tensor([target])), x)[0]
        assert torch.allclose(gradient, expected, equal_nan=True), (row, target)


def test_a_target_out_of_range():
    with pytest.raises(KernelError, match="target 7 of row 1; expected 0 to 4"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 7]))
    with pytest.raises(KernelError, match="target -1 of row 0; expected 0 to 4"):
        cross_entropy_with_gradient(torch.ones(2), torch.randn(2, 5), torch.tensor([-1, 2]))


def test_derivatives():
    logits, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, -100, 5, 2])

    def f(x):
        loss, lse = cross_entropy(x, target)
        return (loss * torch.arange(1.0, 5)).sum() + (lse**2).sum()

    nf.testing.check_grads(f, (logits,), order=2)
    x = logits.float().requires_grad_()
    f(x).backward()
    torch.testing.assert_close(x.grad, nf.grad(f)(logits).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logits", [torch.randn(4, 7, dtype=torch.float64), torch.randn(7, 4).t()], ids=["float64", "by columns"])
def test_jitted_where_there_is_no_kernel(logits):
    target = torch.tensor([0, -100, 5, 2])
    step = nf.value_and_grad(lambda x: cross_entropy(x, target)[0].mean())
    torch.testing.assert_close(nf.jit(step)(logits), step(logits))
