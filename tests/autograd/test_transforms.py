"""grad, value_and_grad, vjp, jvp, hvp: values against torch.autograd, nesting, pytrees, errors."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import neuralforge as nf
from neuralforge.errors import DifferentiationError
from neuralforge.graph import capture, verify

pytestmark = pytest.mark.usefixtures("unoptimised")

D, HEADS, VOCABULARY = 16, 4, 11


def model(p, tokens):
    """A small transformer that touches layer norm, RMS norm, attention, GELU, SiLU, embedding and cross entropy."""
    x = F.embedding(tokens, p["e"])
    B, T, _ = x.shape
    for _ in range(2):
        h = F.layer_norm(x, (D,), p["g"], p["b"])
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in F.linear(h, p["qkv"], p["qb"]).split(D, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D) @ p["o"]
        h = F.rms_norm(x, (D,), p["g"]) @ p["up"]
        x = x + (F.gelu(h, approximate="tanh") * F.silu(h)) @ p["up"].T
    return F.cross_entropy((x @ p["e"].T).flatten(0, 1), tokens.flatten())


@pytest.fixture
def problem():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64) * 0.3
    params = {
        "g": make(D), "b": make(D), "qkv": make(3 * D, D), "qb": make(3 * D), "o": make(D, D), "up": make(D, 4 * D),
        "e": make(VOCABULARY, D),
    }  # fmt: skip
    direction = {k: torch.randn_like(v) for k, v in params.items()}
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    return params, direction, tokens


def torch_derivatives(params, direction, tokens):
    """Loss, gradient and Hessian-vector product by torch.autograd's own double backward."""
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(leaves, tokens)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(grads, direction.values()))
        products = torch.autograd.grad(along, list(leaves.values()))
    return loss.detach(), dict(zip(params, (g.detach() for g in grads))), dict(zip(params, products))


def close(a, b, tolerance=1e-10):
    for key in a:
        scale = b[key].abs().max().clamp(min=1e-3)
        assert ((a[key] - b[key]).abs().max() / scale) < tolerance, key


def test_gradient_of_a_transformer(problem):
    params, direction, tokens = problem
    loss, grads, _ = torch_derivatives(*problem)
    value, found = nf.value_and_grad(model)(params, tokens)
    assert torch.allclose(value, loss, rtol=1e-12)
    close(found, grads)


def test_every_way_to_a_second_derivative(problem):
    params, direction, tokens = problem
    _, _, expected = torch_derivatives(*problem)
    f = lambda p: model(p, tokens)
    close(nf.hvp(f, (params,), (direction,))[0], expected)  # forward over reverse

    def along(p):
        return sum((g * d).sum() for g, d in zip(nf.grad(f)(p).values(), direction.values()))

    close(nf.grad(along)(params), expected)  # reverse over reverse
    close(nf.grad(lambda p: nf.jvp(f, (p,), (direction,))[1])(params), expected)  # reverse over forward
    twice = nf.jvp(lambda p: nf.jvp(f, (p,), (direction,))[1], (params,), (direction,))[1]  # forward over forward
    assert torch.allclose(twice, sum((e * d).sum() for e, d in zip(expected.values(), direction.values())))


def test_second_derivative_captured_and_compiled(problem):
    params, direction, tokens = problem
    _, _, expected = torch_derivatives(*problem)
    product = lambda p, d: nf.hvp(lambda p: model(p, tokens), (p,), (d,))[0]
    graph = capture(product, params, direction).graph
    verify(graph, types=True)
    close(dict(zip(params, graph(*params.values(), *direction.values()))), expected)
    close(nf.jit(product)(params, direction), expected)


def test_third_derivative():
    x = torch.randn(5, dtype=torch.float64)
    f = lambda x: (x.sin() * x.exp()).sum()
    third = nf.grad(lambda x: nf.grad(lambda x: nf.grad(f)(x).sum())(x).sum())(x)
    assert torch.allclose(third, 2 * x.exp() * (x.cos() - x.sin()))


def test_inner_and_outer_variables_are_told_apart():
    # d/dx [x * d/dy (x + y)] = 1: confusing the two perturbations gives 2 (Siskind & Pearlmutter 2005).
    x = torch.tensor(3.0)
    one = torch.tensor(1.0)
    inner = lambda x: nf.jvp(lambda y: x + y, (one,), (one,))[1]
    assert nf.jvp(lambda x: x * inner(x), (x,), (one,))[1] == 1
    assert nf.grad(lambda x: x * nf.grad(lambda y: x + y)(one))(x) == 1


def test_argnums_aux_and_unused_inputs():
    f = lambda a, b, c: ((a * b).sum(), {"b": b})
    a, b, c = torch.ones(3), torch.full((3,), 2.0), torch.ones(2)
    (loss, aux), (ga, gc) = nf.value_and_grad(f, argnums=(0, 2), has_aux=True)(a, b, c)
    assert loss == 6 and aux["b"] is b
    assert ga.tolist() == [2, 2, 2] and gc.tolist() == [0, 0], "an unused input has a gradient of zeros"
    gradient, aux = nf.grad(f, has_aux=True)(a, b, c)
    assert gradient.tolist() == [2, 2, 2] and aux["b"] is b


def test_an_argument_used_twice_and_the_same_tensor_passed_twice():
    x = torch.tensor(3.0)
    assert nf.grad(lambda x: x * x + x)(x) == 7
    assert nf.grad(lambda a, b: a * b * b, argnums=(0, 1))(x, x) == (9, 18)


def test_modules_through_functional_call():
    layer = torch.nn.Linear(4, 3)
    params = dict(layer.named_parameters())
    x = torch.randn(5, 4)
    found = nf.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(params)
    layer(x).square().sum().backward()
    assert torch.allclose(found["weight"], layer.weight.grad) and torch.allclose(found["bias"], layer.bias.grad)
    assert not found["weight"].requires_grad, "torch.autograd takes no part"


def test_vjp_can_be_called_again_and_checks_its_cotangent():
    x = torch.randn(3)
    y, pullback = nf.vjp(lambda x: x.exp(), x)
    assert torch.equal(pullback(torch.ones(3))[0], y)
    assert torch.equal(pullback(torch.full((3,), 2.0))[0], 2 * y)
    with pytest.raises(DifferentiationError, match=r"cotangent of shape \(2,\) for an output of shape \(3,\)"):
        pullback(torch.ones(2))
    with pytest.raises(DifferentiationError, match="structure"):
        pullback((torch.ones(3),))


def test_stop_gradient():
    assert nf.grad(lambda x: x * nf.stop_gradient(x))(torch.tensor(3.0)) == 3


def test_in_place_writes_are_differentiated():
    def f(x):
        y = x * 2
        z = y.exp()
        y[0].mul_(10)
        y.add_(z)
        return (y * y).sum()

    x = torch.randn(4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = leaf * 2
    z = y.exp()
    scale = torch.tensor([10.0, 1, 1, 1], dtype=torch.float64)
    y = y * scale + z
    (y * y).sum().backward()
    assert torch.allclose(nf.grad(f)(x), leaf.grad)
    assert torch.allclose(nf.jit(nf.grad(f))(x), leaf.grad)


def test_a_write_to_an_outside_tensor_happens():
    seen = torch.zeros(2)

    def f(x):
        seen.add_(x.detach())
        return x.sum()

    nf.grad(f)(torch.ones(2))
    assert seen.tolist() == [1, 1]


def test_complex_follows_torch():
    x = torch.randn(4, dtype=torch.complex128)
    f = lambda x: (x * x.exp()).abs().sum()
    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    assert torch.allclose(nf.grad(f)(x), leaf.grad)


@pytest.mark.parametrize("wrapped", [lambda f: f, nf.jit], ids=["eager", "jitted"])
@pytest.mark.parametrize("f", [
    lambda z: z.real * z.imag, lambda z: z.conj().imag.sin(), lambda z: (z.conj() * z.sin()).abs(), lambda z: torch.view_as_real(z * z),
])  # fmt: skip
def test_numbers_still_to_be_conjugated_or_negated(f, wrapped):
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, dtype=torch.complex128, generator=generator) for _ in range(2))
    plain = lambda x: x.resolve_conj().resolve_neg()
    pulled = lambda z: nf.vjp(f, z)[1](torch._neg_view(f(z)))[0]
    for x, y in ((z.conj(), t.conj()), (z, t.conj()), (z.conj(), t)):
        expected = torch.func.jvp(f, (plain(x),), (plain(y),))[1]
        torch.testing.assert_close(wrapped(lambda x, y: nf.jvp(f, (x,), (y,))[1])(x, y), expected)
        expected = torch.func.vjp(f, plain(x))[1](-f(plain(x)))[0]
        torch.testing.assert_close(plain(wrapped(pulled)(x)), plain(expected))
    x, y = z.real.contiguous(), z.conj().imag
    assert y.is_neg()
    for g in (torch.sin, lambda x: (x.cumsum(0) * x).sum()):
        expected = torch.func.jvp(g, (x,), (plain(y),))[1]
        torch.testing.assert_close(wrapped(lambda x, y: nf.jvp(g, (x,), (y,))[1])(x, y), expected)


@pytest.mark.parametrize("wrapped", [lambda f: f, nf.jit], ids=["eager", "jitted"])
def test_writes_through_views_still_to_be_negated(wrapped):
    def f(z):
        z = z * 1
        view = z.conj().imag
        view[1:].mul_(view[:-1] + 2)
        return torch.view_as_real(z).sin().sum() + (torch._neg_view(z.real) * 2).square().sum()

    z = torch.randn(4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    value, gradient = wrapped(nf.value_and_grad(f))(z)
    torch.testing.assert_close((value, gradient), (f(z), torch.autograd.grad(f(x := z.clone().requires_grad_()), x)[0]))


def test_memory_is_freed_as_backward_goes():
    """After the pass, nothing of the tape is left but the results."""
    import gc
    import weakref

    kept = []

    def f(x):
        h = x.exp()
        kept.append(weakref.ref(h))
        return (h * h).sum()

    gc.disable()
    try:
        nf.grad(f)(torch.randn(4))
        assert kept[0]() is None
    finally:
        gc.enable()


def test_errors_name_the_line_and_the_mend():
    x = torch.ones(3)
    with pytest.raises(DifferentiationError, match=r"test_transforms\.py:\d+: .*one real scalar.*\(3,\).*\.sum\(\)"):
        nf.grad(lambda x: x * 2)(x)
    with pytest.raises(DifferentiationError, match="has_aux=True"):
        nf.grad(lambda x: (x.sum(), x))(x)
    with pytest.raises(DifferentiationError, match=r"a tensor of torch.int64.*floating-point"):
        nf.grad(lambda x: x.sum())(torch.ones(3, dtype=torch.int64))
    with pytest.raises(DifferentiationError, match=r"2\.0 \(float\)"):
        nf.grad(lambda x: x)(2.0)
    with pytest.raises(DifferentiationError, match="argnums=1 of a call with 1"):
        nf.grad(lambda x: x.sum(), argnums=1)(x)
    with pytest.raises(DifferentiationError, match="a tangent of shape"):
        nf.jvp(lambda x: x, (x,), (torch.ones(2),))


def test_missing_rule_says_how_to_write_one():
    @torch.library.custom_op("neuralforge_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(DifferentiationError, match=r'twice has neither.*@rule\("neuralforge_test::twice"\)'):
        nf.grad(lambda x: twice(x).sum())(torch.ones(2))


def test_numpy_is_refused_where_a_derivative_would_get_lost():
    x = torch.randn(3, dtype=torch.float64)
    for f in (lambda x: torch.from_numpy(np.sin(x.numpy())).sum(), lambda x: torch.as_tensor(np.asarray(x * 2)).sum()):
        with pytest.raises(DifferentiationError, match=r"test_transforms\.py:\d+: \.numpy\(\).*nf\.opaque.*detach"):
            nf.grad(f)(x)
    constant = nf.grad(lambda x: (x * torch.from_numpy(np.sin(x.detach().numpy()))).sum())(x)
    assert torch.allclose(constant, x.sin())


@dataclass
class Layer:
    weight: torch.Tensor
    name: str
    parts: list
    bias: torch.Tensor | None = None
    doubled: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.doubled = self.weight * 2 if isinstance(self.weight, torch.Tensor) else self.weight


@dataclass(frozen=True)
class Model:
    layers: tuple
    scale: torch.Tensor
    size: int = 3


@pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])
def test_dataclasses_and_none_are_trees(run):
    make = lambda: torch.randn(3, dtype=torch.float64)
    model = Model((Layer(make(), "a", [make()]), Layer(make(), "b", [make(), None], make())), make())

    def loss(m):
        a, b = m.layers
        assert a.name == "a" and m.size == 3 and a.bias is None
        return (a.weight * a.parts[0] * m.scale.exp() + b.weight.sin() * b.bias * b.parts[0]).sum()

    found = run(nf.grad(loss))(model)
    a, b = model.layers
    assert type(found) is Model and found.size == 3 and found.layers[0].name == "a"
    assert found.layers[0].bias is None and found.layers[1].parts[1] is None
    assert torch.allclose(found.layers[0].weight, a.parts[0] * model.scale.exp())
    assert torch.allclose(found.layers[1].bias, b.weight.sin() * b.parts[0])
    assert found.layers[0].doubled.tolist() == [0, 0, 0], "a field that isn't an argument, and isn't used"
    assert torch.allclose(run(lambda m: nf.jvp(loss, (m,), (m,))[1])(model), run(lambda m: inner(nf.grad(loss)(m), m))(model))
    rows = run(nf.vmap(lambda m: m.layers[0].weight * m.scale))(model)
    assert torch.allclose(rows, a.weight * model.scale)
    layer = Layer(make(), "c", [make()], make())
    optimizer = nf.optim.sgd(0.5)
    updates, _ = optimizer.update(nf.grad(lambda p: (p.weight**2).sum())(layer), optimizer.init(layer), layer)
    assert torch.allclose(nf.optim.apply_updates(layer, updates).weight, torch.zeros(3, dtype=torch.float64))


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b)) if x is not None)


@pytest.mark.parametrize("jacobian", [nf.jacrev, nf.jacfwd])
def test_none_in_jacobians(jacobian):
    x = torch.randn(3, dtype=torch.float64)
    found = jacobian(lambda d: d["x"] ** 2)({"x": x, "n": None})
    assert found["n"] is None and torch.allclose(found["x"], (2 * x).diag())


def test_what_is_no_input_is_named():
    x = torch.ones(3)
    with pytest.raises(DifferentiationError, match="a module \\(Linear\\).*functional_call"):
        nf.grad(lambda m: m(x).sum())(torch.nn.Linear(3, 3))
    for call in (lambda: nf.jvp(torch.sin, x, x), lambda: nf.hvp(lambda x: x.sin().sum(), x, x)):
        with pytest.raises(DifferentiationError, match=r"test_transforms\.py:\d+: primals are Tensor; expected a tuple.*\(x,\)"):
            call()
    with pytest.raises(DifferentiationError, match=r"3 \(int\)"):
        nf.hessian(lambda x: x * 2)(3)
