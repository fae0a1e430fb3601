"""Jitted functions inside ordinary PyTorch code."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import CaptureError


def test_gradients_flow_through_a_jitted_layer():
    torch.manual_seed(0)
    before, after = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
    w = torch.nn.Parameter(torch.randn(8, 8))
    f = lambda x, w: {"y": F.gelu(x @ w) + x, "arg": x.argmax(-1), "n": 3}
    jitted = nf.jit(f)
    x = torch.randn(5, 4)
    grads = []
    for function in (f, jitted, jitted):
        for p in (*before.parameters(), *after.parameters(), w):
            p.grad = None
        out = function(before(x), w)
        assert out["n"] == 3 and not out["arg"].requires_grad
        after(out["y"]).square().sum().backward()
        grads.append([p.grad.clone() for p in (*before.parameters(), *after.parameters(), w)])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_training_with_a_torch_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    names = [name for name, _ in model.named_parameters()]
    loss = nf.jit(lambda p, x, y: (torch.func.functional_call(model, dict(zip(names, p)), (x,)) - y).square().mean())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True).sin()
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(list(model.parameters()), x, y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.2 * values[0]


def test_only_what_requires_grad_gets_it():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    f = nf.jit(lambda a, b: a * b)
    f(a, b).sum().backward()
    assert torch.equal(a.grad, b) and b.grad is None
    with torch.no_grad():
        assert not f(a, b).requires_grad
    assert not f(b, b).requires_grad


def test_a_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(nf.jit(torch.sin)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(g.sum(), x)


def test_in_place_writes_are_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(CaptureError, match="writes in place to its arguments"):
        nf.jit(lambda x: x.mul_(2).sum())(x)


def test_a_jitted_module_trains_its_own_parameters():
    torch.manual_seed(0)
    before, module = torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    x = torch.randn(5, 3)
    grads = []
    for f in (module, jitted := nf.jit(module), jitted):
        before.zero_grad(), module.zero_grad()
        f(before(x)).square().sum().backward()
        grads.append([p.grad.clone() for p in (*before.parameters(), *module.parameters())])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jitted(torch.randn(5, 4)).requires_grad, "no argument requires grad, the parameters do"
    with torch.no_grad():
        assert not jitted(torch.randn(5, 4)).requires_grad


def test_unfreezing_a_parameter_compiles_anew():
    module, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    jitted = nf.jit(module)
    module.weight.requires_grad_(False)
    jitted(x).sum().backward()
    assert module.weight.grad is None and module.bias.grad is not None
    module.weight.requires_grad_(True)
    jitted(x).sum().backward()
    assert torch.allclose(module.weight.grad, x.sum(0).expand(3, 3))
