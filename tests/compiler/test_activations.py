"""Activations written out, in many ways, become the operators; what only looks like one doesn't."""

import math

import pytest
import torch

import neuralforge as nf

GELU = {
    "as in papers": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "factored": lambda x: x / 2 * (torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)) + 1.0),
    "by sigmoid": lambda x: x * torch.sigmoid(1.5957691216 * (x + 0.044715 * x.pow(3))),
    "erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erfc": lambda x: 0.5 * x * torch.erfc(-x * math.sqrt(0.5)),
}
SILU = {
    "sigmoid": lambda x: x * torch.sigmoid(x),
    "exp": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: x * (1 + torch.tanh(x / 2)) / 2,
}
OTHERS = {
    "another slope": lambda x: x * torch.sigmoid(1.702 * x),
    "a square": lambda x: x * x * torch.sigmoid(x),
    "of another": lambda x: x * torch.sigmoid(x.roll(1, -1)),
    "half": lambda x: 0.25 * x * (1 + torch.tanh(0.5 * x)),
}


def check(f, *args):
    step = nf.value_and_grad(lambda *args: f(*args).square().sum(), tuple(range(len(args))))
    (loss, grads), (want, truth) = nf.jit(step)(*args), step(*(x.double() for x in args))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for found, true in zip(grads, truth):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)
    made = [rewrite for stage in nf.explain(step, *args).passes for rewrite in stage.made]
    return {rewrite.reason for rewrite in made if rewrite.rule == "activations_by_hand"}


@pytest.mark.parametrize("name", GELU | SILU)
@pytest.mark.parametrize("after", ["alone", "linear"])
def test_found_and_equal(name, after):
    torch.manual_seed(0)
    f, x, w, b = (GELU | SILU)[name], torch.randn(40, 8), torch.randn(8, 24), torch.randn(24)
    found = check(f, x * 3) if after == "alone" else check(lambda x, w, b: f(x @ w + b), x, w, b)
    assert len(found) == 1 and found.pop().startswith("silu" if name in SILU else "gelu")


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name):
    torch.manual_seed(0)
    assert not check(OTHERS[name], torch.randn(40, 24))


def test_a_gate_beside_it_and_a_value_inside_that_others_read():
    torch.manual_seed(0)
    x, y = torch.randn(40, 24), torch.randn(40, 24)
    assert len(check(lambda x, y: x * torch.sigmoid(x) * y, x, y)) == 1
    check(lambda x, y: x * (s := torch.sigmoid(x)) * y + s, x, y)
