"""Modules that change between calls of a jitted function: hooks, modules in them, what is registered late, methods other than forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import neuralforge as nf
from neuralforge.errors import CaptureError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])])
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.0)
        self.register_parameter("shift", None)

    def forward(self, x):
        return self.dropout(self.norm(self.encode(x)))

    def encode(self, x):
        x = self.layers[1][0](self.layers[0](x)) * (2 if self.training else 3)
        x = x if self.shift is None else x + self.shift
        return x * self.scale if "scale" in self._buffers else x


def hook(model):
    model.layers[0].register_forward_hook(lambda module, args, y: y * 10)


def another_hook(model):
    model.handle.remove()
    model.handle = model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


CHANGES = {
    "hook": hook,
    "another hook": another_hook,
    "layer": lambda model: setattr(model, "norm", nn.LayerNorm(4, elementwise_affine=False, bias=False)),
    "layer in a list": lambda model: model.layers.__setitem__(0, nn.Linear(4, 4)),
    "layer in a list in a list": lambda model: model.layers[1].__setitem__(0, nn.Linear(4, 4)),
    "parameter that was None": lambda model: setattr(model, "shift", nn.Parameter(torch.ones(4))),
    "buffer": lambda model: model.register_buffer("scale", torch.full((4,), 3.0)),
    "probability": lambda model: setattr(model.dropout, "p", 1.0),
    "mode": lambda model: model.eval(),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["forward", "encode"])
@pytest.mark.parametrize("change", CHANGES)
def test_is_seen(change, method, grad):
    model, x = Model().requires_grad_(grad), torch.randn(3, 4)
    model.handle = model.norm.register_forward_pre_hook(lambda module, args: (args[0] * -1,))
    call = model if method == "forward" else model.encode
    jitted = nf.jit(lambda x: call(x))
    for _ in range(2):
        for _ in range(2):
            torch.testing.assert_close(jitted(x), call(x))
        CHANGES[change](model)
    assert len(jitted.programs) <= 4, "each form plainly and, perhaps, for torch.autograd"


def test_backward_hooks_are_refused_where_torch_autograd_would_run_them():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    jitted = nf.jit(nn.Sequential(layer))
    torch.testing.assert_close(jitted(x), layer(x))
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(CaptureError, match="Linear has backward hooks"):
        jitted(x)
    with torch.no_grad():
        torch.testing.assert_close(jitted(x), layer(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda m: prune.random_unstructured(m, "weight", 0.5), nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_weights_that_hooks_compute_are_left_as_they_were(change, grad):
    change(model := nn.Linear(4, 4))
    before, jitted, x = model.weight, nf.jit(model), torch.randn(2, 4, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            found = jitted(x)
    assert model.weight is before
    if change is not nn.utils.spectral_norm:  # whose vectors go on in each call
        torch.testing.assert_close(found, model(x))
