"""Cross entropy of a linear layer, chunk by chunk, against its plain truth."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import KernelError
from neuralforge.kernels import linear_cross_entropy as kernel

CASES = [(1, 1, 1), (7, 5, 11), (64, 16, 33), (130, 24, 500), (0, 4, 5)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "ROWS", 32)
    monkeypatch.setattr(kernel, "LOGITS", 0)


def operands(N, D, V, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    target = torch.randint(0, V, (N,))
    target[::5] = -100
    x, weight, b = torch.randn(N, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    return x.to(dtype), weight.to(dtype), target, b.to(dtype) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_truth(case, dtype, tolerance, bias, monkeypatch):
    x, weight, target, b = operands(*case, dtype, bias)
    wide_x, wide_weight, wide_b = (None if v is None else v.double() for v in (x, weight, b))
    grad, grad_lse = torch.randn(case[0]), torch.randn(case[0])
    grad, grad_lse = (g.double() if dtype == torch.float64 else g for g in (grad, grad_lse))
    close = lambda found, want: torch.testing.assert_close(
        [v.double() for v in found], list(want), rtol=tolerance, atol=tolerance * case[0] ** 0.5
    )
    found = kernel.linear_cross_entropy(x, weight, target, b)
    losses, lse = kernel.reference(wide_x, wide_weight, target, wide_b)
    close(found, (losses, lse))
    for more in (None, grad_lse):
        want = kernel.reference_backward(
            grad.double(), wide_x, wide_weight, target, lse, wide_b, None if more is None else more.double()
        )
        close(kernel.linear_cross_entropy_backward(grad, x, weight, target, found[1], b, more), want)
    together = kernel.linear_cross_entropy_with_gradients(grad, x, weight, target, b)
    close(together, kernel.reference_with_gradients(grad.double(), wide_x, wide_weight, target, wide_b))
    assert all(v.dtype == dtype for v in together[2:])
    monkeypatch.setattr(kernel, "PART", 7)
    wide = kernel.linear_cross_entropy_with_gradients(grad, x, weight, target, b, wide=True)
    assert wide[3].dtype == wide[0].dtype
    close(wide, kernel.reference_with_gradients(grad.double(), wide_x, wide_weight, target, wide_b))


@pytest.mark.parametrize("own", [True, False])
def test_any_product_and_any_strides(own, monkeypatch):
    if not own:
        monkeypatch.setattr(kernel.matmul, "native", lambda *operands: False)
    x, weight, target, b = operands(70, 12, 40)
    want = kernel.reference_with_gradients(torch.ones(70), x, weight, target, b)
    turned = lambda matrix: matrix.t().contiguous().t()
    for by_x, by_weight in ((x, turned(weight)), (turned(x), weight)):
        found = kernel.linear_cross_entropy_with_gradients(torch.ones(()).expand(70), by_x, by_weight, target, b)
        assert found[3].stride() == by_weight.stride()
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_not_a_number_as_in_pytorch():
    x, weight, target, _ = operands(40, 8, 12)
    x[3, 2], x[35, 0] = float("nan"), float("inf")
    found = kernel.linear_cross_entropy(x, weight, target)[0]
    want = F.cross_entropy(x @ weight.t(), target, reduction="none")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_target_out_of_range():
    x, weight, target, _ = operands(40, 8, 12)
    target[38] = 12
    with pytest.raises(KernelError, match="target 12 of row 38; expected 0 to 11"):
        kernel.linear_cross_entropy(x, weight, target)


def test_derivatives():
    x, weight, target, b = operands(6, 3, 5, torch.float64)
    f = lambda x, w, b: (kernel.linear_cross_entropy(x, w, target, b)[0] * torch.arange(1.0, 7)).sum()
    nf.testing.check_grads(f, (x, weight, b), order=2)
    leaves = [v.clone().requires_grad_() for v in (x, weight, b)]
    f(*leaves).backward()
    torch.testing.assert_close([v.grad for v in leaves], list(nf.grad(f, argnums=(0, 1, 2))(x, weight, b)))
