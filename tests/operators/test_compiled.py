"""Torch custom operators that the compiler makes of plain definitions: against those in float64 and PyTorch's own, forward
and backward, on every instruction set."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge import operators
from neuralforge.compiler.fusion.fused import Fused
from neuralforge.compiler.pipeline import optimise
from neuralforge.graph import capture
from neuralforge.operators import adamw

own = torch.ops.neuralforge
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float64: 1e-13}
"""Greatest error, relative to the greatest number of the result."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def like_row(x):
    return torch.randn(x.shape[-1:]).to(x.dtype)


ARGUMENTS = {
    "layer_norm": lambda x: (x, like_row(x), like_row(x), 1e-3),
    "rms_norm": lambda x: (x, like_row(x), 1e-3),
    "softmax": lambda x: (x * 3,),
}
PYTORCH = {
    "layer_norm": lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
    "rms_norm": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
    "softmax": lambda x, dim=-1: x.softmax(dim),
}


def widened(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def with_gradients(f, args, g):
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [a for a in leaves if isinstance(a, torch.Tensor)], g)]


def check(name, args, isa=None):
    y = getattr(own, name)(*args)
    g = torch.randn(y.shape).to(y.dtype)
    for f in (getattr(operators, name).truth, PYTORCH[name]):
        expected = with_gradients(f, widened(args), g.double())
        for a, b in zip(with_gradients(getattr(own, name), args, g), expected):
            assert a.shape == b.shape and a.dtype == y.dtype
            assert (a.double() - b).abs().max() <= TOLERANCE[a.dtype] * max(1, b.abs().max()), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_against_float64_and_pytorch(name, dtype, isa):
    for shape in ((1, 2), (3, 6), (2, 5, 34), (3, 2, 7, 64)):
        check(name, ARGUMENTS[name](torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_strided_and_misaligned_operands(name, dtype, isa):
    x = torch.randn(1 + 4 * 6 * 20).to(dtype)
    for strided in (x[1:].view(4, 6, 20), x[1:].view(4, 6, 20)[..., 3:15], x[1:].view(6, 4, 20).transpose(0, 1), x[:20].expand(4, 6, 20)):
        check(name, ARGUMENTS[name](strided))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_empty(name, shape):
    args = ARGUMENTS[name](torch.randn(shape))
    x = args[0].detach().requires_grad_()
    y = getattr(own, name)(x, *args[1:])
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax"])
def test_special_values_as_in_pytorch(name, value, isa):
    x = torch.randn(3, 40)
    x[1, 7], x[2] = value, value
    args = ARGUMENTS[name](x)
    found, expected = getattr(own, name)(*args), PYTORCH[name](*args)
    if value == 1e30:  # whose square overflows; PyTorch's layer norm has another formula
        found, expected = found[:1], expected[:1]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_softmax_of_another_dimension(dim):
    x = torch.randn(5, 9, 17, requires_grad=True)
    y, g = own.softmax(x, dim), torch.randn(5, 9, 17)
    assert torch.allclose(y, x.softmax(dim), atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(f(x, dim), x, g)[0] for f in (own.softmax, torch.softmax)), atol=1e-6)


def test_parameters_that_are_left_out_or_frozen():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    for args, plain in (
        ((x,), F.layer_norm(x, (8,))), ((x, w), F.layer_norm(x, (8,), w)), ((x, None, w), F.layer_norm(x, (8,), None, w)),
    ):  # fmt: skip
        g = torch.randn(3, 8)
        assert torch.allclose(own.layer_norm(*args), plain, atol=1e-6)
        found, expected = torch.autograd.grad(own.layer_norm(*args), x, g)[0], torch.autograd.grad(plain, x, g)[0]
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_registered_as_torch_operators(name):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in ARGUMENTS[name](torch.randn(2, 3, 8))]
    torch.library.opcheck(getattr(operators, name), tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args))
    rows = torch.func.vmap(lambda x: getattr(own, name)(x, *args[1:]))(args[0].detach())
    assert torch.allclose(rows, getattr(own, name)(*args), atol=1e-6)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_derivatives_of_every_kind(name):
    args = ARGUMENTS[name](torch.randn(2, 4, dtype=torch.float64))
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    numbers = args[len(tensors) :]
    f = lambda *x: getattr(own, name)(*x, *numbers).sin().sum()
    nf.testing.check_grads(f, tuple(tensors), order=2)
    expected = nf.grad(f)(*tensors)
    assert torch.allclose(nf.jit(nf.grad(f))(*tensors), expected)


def test_in_a_program_the_definition_is_fused_with_its_surroundings():
    x, w = torch.randn(6, 40), torch.randn(40)
    f = lambda x, w: own.rms_norm(x * 2 + 1, w).relu()
    equations = optimise(capture(f, x, w).graph).equations
    assert len(equations) == 1 and isinstance(equations[0].op, Fused)
    assert torch.allclose(nf.jit(f)(x, w), F.rms_norm(x * 2 + 1, (40,), w, 1e-6).relu(), atol=1e-5)


def test_several_threads_at_once():
    args = [ARGUMENTS["layer_norm"](torch.randn(n + 1, 48)) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda a: own.layer_norm(*a), args * 4))
    for a, y in zip(args * 4, found):
        assert torch.allclose(y, PYTORCH["layer_norm"](*a), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw(dtype, isa):
    shapes = [(7, 5), (33,), (), (0, 3), (64, 64)]
    params, grads, m = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(3))
    v = [torch.rand(s).to(dtype) for s in shapes]
    before = [[x.double() for x in xs] for xs in (params, grads, m, v)]
    homes = [x.data_ptr() for xs in (params, m, v) for x in xs]
    for step, lr in ((0, 0.1), (1, 0.01)):
        expected = adamw.reference(*before, step, lr, weight_decay=0.1)
        own.adamw_(params, grads, m, v, step, lr, weight_decay=0.1)
        for found, exact in zip((params, m, v), expected):
            for a, b in zip(found, exact):
                assert a.dtype == dtype and torch.allclose(a.double(), b, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
        before = [expected[0], before[1], *expected[1:]]
    assert homes == [x.data_ptr() for xs in (params, m, v) for x in xs]
    torch.library.opcheck(operators.adamw_, (params, grads, m, v, 3, 0.1), test_utils=("test_schema", "test_faketensor"))


def test_adamw_as_torchs():
    params = [torch.randn(9, 5), torch.randn(4)]
    leaves = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(leaves, 1e-2, weight_decay=0.2)
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(4):
        grads = [torch.randn_like(p) for p in params]
        for leaf, g in zip(leaves, grads):
            leaf.grad = g
        optimizer.step()
        own.adamw_(params, grads, m, v, step, 1e-2, weight_decay=0.2)
    for p, leaf in zip(params, leaves):
        assert torch.allclose(p, leaf, rtol=1e-5, atol=1e-6)
