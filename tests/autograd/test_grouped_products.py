"""Products of groups, as mixtures of experts have them: values and derivatives against a product for each group."""

import pytest
import torch

import neuralforge as nf

ENDS = [4, 4, 12]  # the second group is empty


def by_hand(a, b):
    """In all the forms that torch.nn.functional.grouped_mm has."""
    parts = list(zip([0, *ENDS], ENDS))
    if a.dim() == 2 == b.dim():
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in parts])
    if a.dim() == 2:
        return torch.cat([a[i:j] @ b[n] for n, (i, j) in enumerate(parts)])
    if b.dim() == 2:
        return torch.cat([a[n] @ b[:, i:j] for n, (i, j) in enumerate(parts)], 1)
    return a @ b


FORMS = {
    "rows": ((12, 16), (3, 16, 24)),
    "columns": ((3, 16, 24), (24, 12)),
    "terms": ((16, 12), (12, 24)),
    "batches": ((3, 16, 24), (3, 24, 8)),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_of_groups(form):
    torch.manual_seed(0)
    a, b = (torch.randn(shape) for shape in FORMS[form])
    offs = None if form == "batches" else torch.tensor(ENDS, dtype=torch.int32)

    def loss(product, *operands):
        y = product(*operands)
        return (y.sin() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    grouped = lambda a, b: torch.nn.functional.grouped_mm(a, b, offs=offs)
    truth = nf.value_and_grad(lambda a, b: loss(by_hand, a, b), (0, 1))(a.double(), b.double())
    step = nf.value_and_grad(lambda a, b: loss(grouped, a, b), (0, 1))
    for found in (step(a, b), nf.jit(step)(a, b)):
        torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-5)
        for x, y in zip(found[1], truth[1]):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    tangents = torch.randn(a.shape), torch.randn(b.shape)
    _, found = nf.jvp(grouped, (a, b), tangents)
    _, truth = nf.jvp(by_hand, (a.double(), b.double()), tuple(t.double() for t in tangents))
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b", [torch.randn(3, 8, 24), torch.randn(3, 16, 24).bfloat16()], ids=["width", "dtype"])
def test_operands_that_do_not_fit(b):
    offs = torch.tensor(ENDS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"grouped_mm: torch.float32 \[12, 16\] by .*expected one dtype"):
        nf.jit(lambda a, b: torch.nn.functional.grouped_mm(a, b, offs=offs))(torch.randn(12, 16), b)
