"""Jitted functions inside ordinary PyTorch code."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import CaptureError, DifferentiationError


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


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_not_used_gets_none(create_graph):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)])

    def f(x, unused):
        h = model[0](x).sign() * x
        return model[1](h), model[2](h), unused

    inputs = [torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
    wanted = [*inputs, *model.parameters()]
    jitted = nf.jit(f)
    for pick in (lambda ys: ys[0].sum(), lambda ys: ys[1].sum(), lambda ys: ys[2].sum(), lambda ys: sum(y.sum() for y in ys)):
        found, expected = (
            torch.autograd.grad(pick(g(*inputs)), wanted, allow_unused=True, create_graph=create_graph) for g in (jitted, f)
        )
        assert [g is None for g in found] == [g is None for g in expected]
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


def test_derivatives_of_any_order():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    x, w = make(2, 3), make(3, 2)
    jitted = nf.jit(lambda x, w: (torch.tanh(x @ w), x.sin() * w.sum()))
    assert torch.autograd.gradcheck(jitted, (x, w)) and torch.autograd.gradgradcheck(jitted, (x, w))
    (g,) = torch.autograd.grad(nf.jit(torch.sin)(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(h.sum(), x)
    assert torch.allclose(third, -x.cos())


def test_second_derivatives_of_a_modules_own_parameters():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    found = []
    for f in (module, nf.jit(module)):
        grads = torch.autograd.grad(f(x).pow(4).sum(), list(module.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(module.parameters())))
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs)


def test_attention_which_torch_itself_cannot_differentiate_twice():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    attend = lambda q: F.scaled_dot_product_attention(q, q * 2, q.sin(), is_causal=True).square().sum()
    (g,) = torch.autograd.grad(nf.jit(attend)(q), q, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), q)
    assert torch.allclose(h, nf.grad(lambda q: nf.grad(attend)(q).sum())(q))


def test_a_second_derivative_of_random_numbers_is_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(DifferentiationError, match="draws random numbers"):
        torch.autograd.grad(nf.jit(lambda x: F.dropout(x.exp()).sum())(x), x, create_graph=True)


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


def test_cotangents_of_any_layout():
    torch.manual_seed(0)
    f = lambda x: (x.sin() * x).tanh()
    jitted, x, d = nf.jit(f), torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    layouts = [torch.randn(6, 5), torch.randn(5, 6).t(), torch.randn(5).expand(6, 5), torch.randn(12, 10)[::2, ::2]]
    for g in layouts:
        found = []
        for function in (jitted, f):
            first = torch.autograd.grad(function(x), x, g, create_graph=True)[0]
            found.append((torch.autograd.grad(function(x), x, g)[0], first, torch.autograd.grad(first, x, d)[0]))
        for ours, theirs in zip(*found):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_constants_written_before_backward_are_told_of():
    scale, x = torch.full((3,), 2.0), torch.randn(3, requires_grad=True)
    f = nf.jit(lambda x: (x * scale).sum())
    loss = f(x)
    scale.fill_(5)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=create_graph)
    assert torch.autograd.grad(f(x), x)[0].tolist() == [5, 5, 5]


def test_arguments_that_are_returned_are_views():
    w = torch.ones(3, requires_grad=True)
    for y in (*nf.jit(lambda x: (x, x))(w * 1), nf.jit(lambda: w)()):
        assert torch.autograd.grad(y.sum(), w, retain_graph=True)[0].tolist() == [1, 1, 1]
        with pytest.raises(RuntimeError, match="is a view"):
            y.mul_(2)
    assert w.tolist() == [1, 1, 1]


def test_outputs_that_are_expanded():
    x, d = torch.randn(4, requires_grad=True), torch.randn(3, 4)
    for f in (lambda x: x.sin().expand(3, 4), lambda x: x.sin().sum().expand(3, 4), lambda x: x.exp().unfold(0, 2, 1).sum().expand(3, 4)):
        for create_graph in (False, True):
            found = [torch.autograd.grad((g(x) * d).sum(), x, create_graph=create_graph)[0] for g in (nf.jit(f), f)]
            torch.testing.assert_close(*found)
        torch.testing.assert_close(*[torch.autograd.grad(g.square().sum(), x)[0] for g in found])
    assert torch.autograd.gradgradcheck(nf.jit(lambda x: x.sum()), x.detach().double().requires_grad_())


def test_constants_between_forward_and_backward_keep_their_strides():
    w, x = torch.randn(8, 8)[::2, ::2], torch.randn(3, 4, requires_grad=True)
    f = lambda x: (x @ w).tanh().square().sum()
    for h in (lambda grad, x: grad(f)(x).sin().sum(), lambda grad, x: (grad(f)(x) * w[:3] * w.t()[1:]).sum()):
        found = torch.autograd.grad(nf.jit(lambda x: h(nf.grad, x))(x), x)[0]  # noqa: B023
        torch.testing.assert_close(found, torch.func.grad(lambda x: h(torch.func.grad, x))(x.detach()))  # noqa: B023
