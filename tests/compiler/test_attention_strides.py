"""nn.MultiheadAttention and layers with it, which move rows and heads about, have nothing copied for that."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import neuralforge as nf

MOVED = {"clone", "cat", "stack", "bmm", "select_backward", "slice_backward"}


class Attention(nn.Module):
    """`kind`: of itself, or across to memory; with `need_weights` PyTorch writes it out."""

    def __init__(self, kind: str, batch_first: bool, width: int = 24):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 3, batch_first=batch_first)
        self.kind = kind

    def forward(self, x, memory):
        other = x if self.kind != "across" else memory
        return x + self.inner(x, other, other, need_weights=self.kind == "written out")[0]


MODULES = {
    "attention": lambda: Attention("of itself", True),
    "attention, time first": lambda: Attention("of itself", False),
    "attention across": lambda: Attention("across", True),
    "attention written out": lambda: Attention("written out", True),
    "layer": lambda: nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True),
    "layer, norm first": lambda: nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=True),
}


def step(module):
    def step(params, x, memory):
        args = (x, memory) if isinstance(module, Attention) else (x,)
        return nf.value_and_grad(lambda p, *xs: functional_call(module, p, xs or args).sin().sum(), 0)(params)

    return step


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_copied(name, isa, ran):
    torch.manual_seed(0)
    module = MODULES[name]()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x, memory = torch.randn(4, 9, 24), torch.randn(4, 9, 24)
    jitted = nf.jit(step(module))
    loss, gradients = jitted(params, x, memory)
    wide = {name: p.double() for name, p in params.items()}
    true_loss, truth = step(module.double())(wide, x.double(), memory.double())
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), truth[key], rtol=1e-3, atol=1e-4)
    found = {name.removeprefix("aten.") for name in ran(jitted.programs[0])}
    if name != "attention across":  # the gradient of its weights is put together of two
        assert not found & MOVED, found & MOVED


def test_copies_that_others_read_stay():
    """A result of attention that is also read otherwise, and copies that are results."""

    def f(q, k, v):
        parts = torch.stack([q, k, v]).transpose(1, 2).contiguous()
        y = nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1) for part in parts.unbind()))
        return parts, y.transpose(1, 2).contiguous(), y.exp()

    torch.manual_seed(0)
    args = [torch.randn(2, 3, 9, 8) for _ in range(3)]
    for found, truth in zip(nf.jit(f)(*args), f(*(x.double() for x in args))):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


def test_attention_of_others_stays_as_it_is():
    """PyTorch's kernel, which float64 has, lays its results out as the queries are."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    picture = torch.randn(4, 24, 9, dtype=torch.float64)
    attend = lambda p, x: functional_call(module, p, (x, x, x), {"need_weights": False})[0]
    f = nf.value_and_grad(lambda p, x: (x + attend(p, x.sin().mT).mT).sin().sum(), (0, 1))
    (loss, (gradients, dx)), (true_loss, (truth, true_dx)) = nf.jit(f)(params, picture), f(params, picture)
    torch.testing.assert_close((loss, dx, *gradients.values()), (true_loss, true_dx, *truth.values()))
