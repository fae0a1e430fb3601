"""torch.autograd.Function inside our transforms."""

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd.function import once_differentiable

import neuralforge as nf
from neuralforge.errors import DifferentiationError

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class ScaledProduct(torch.autograd.Function):
    """A wrong derivative on purpose, a result saved, and a number as an argument; setup_context."""

    @staticmethod
    def forward(x, y, scale):
        return x.exp() * y * scale, x.argmax()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])
        ctx.scale = inputs[2]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, out = ctx.saved_tensors
        return 10 * g * out, g * x.exp() * ctx.scale if ctx.needs_input_grad[1] else None, None


class WithJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return 3 * t * ctx.saved_tensors[0].cos()


apply = ScaledProduct.apply  # bound before any transform


def product(x, y):
    return apply(x * 2, y, 0.5)[0].square().sum()


@pytest.fixture
def xy():
    torch.manual_seed(0)
    return torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)


def torchs(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return first, torch.autograd.grad(sum((g * g.detach().sin()).sum() for g in first), leaves)


@both
def test_the_functions_backward_is_the_rule_of_every_order(run, xy):
    first, second = torchs(product, *xy)
    gradient = nf.grad(product, (0, 1))
    for a, b in zip(run(gradient)(*xy), first):
        assert torch.allclose(a, b)
    along = tuple(g.detach().sin() for g in first)
    scalar = lambda *xy: sum((g * d).sum() for g, d in zip(gradient(*xy), along))
    for a, b in zip(run(nf.grad(scalar, (0, 1)))(*xy), second):
        assert torch.allclose(a, b)


@both
def test_straight_through_and_forward_mode(run, xy):
    x, t = xy
    for f in (lambda x: StraightThrough.apply(x * 3).sum(), nf.checkpoint(lambda x: StraightThrough.apply(x * 3).sum())):
        assert run(nf.grad(f))(x).tolist() == [3] * 4
    assert torch.equal(run(lambda x, t: nf.jvp(StraightThrough.apply, (x,), (t,))[1])(x, t), t)
    assert torch.allclose(run(lambda x, t: nf.jvp(WithJvp.apply, (x,), (t,))[1])(x, t), 3 * x.cos() * t)
    f = lambda x: (WithJvp.apply(x) * x).sum()
    hessian = run(nf.hessian(f))(x)
    assert torch.allclose(hessian, torch.diag(6 * x.cos() - 3 * x * x.sin()))
    assert torch.allclose(run(nf.vmap(nf.grad(lambda x: WithJvp.apply(x))))(x), 3 * x.cos())


def test_it_is_plain_where_nothing_is_differentiated(xy):
    leaf = xy[0].clone().requires_grad_()
    WithJvp.apply(leaf).sum().backward()
    assert torch.allclose(leaf.grad, 3 * xy[0].cos())
    assert torch.equal(nf.jit(WithJvp.apply)(xy[0]), xy[0].sin())
    jitted = nf.jit(lambda x: WithJvp.apply(x).sum())
    jitted(leaf).backward()
    assert torch.allclose(leaf.grad, 6 * xy[0].cos())


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_own_checkpoint(run, reentrant, xy):
    f = lambda x: torch.utils.checkpoint.checkpoint(lambda x: x.sin() * x, x, use_reentrant=reentrant).sum()
    assert torch.allclose(run(nf.grad(f))(xy[0]), xy[0].sin() + xy[0] * xy[0].cos())


def test_errors(xy):
    class Once(WithJvp):
        backward = staticmethod(once_differentiable(WithJvp.backward))

    class TooFew(WithJvp):
        backward = staticmethod(lambda ctx, g: ())

    class Shape(WithJvp):
        backward = staticmethod(lambda ctx, g: g[:2])

    class Dirty(WithJvp):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x

    x = xy[0]
    loss = lambda cls: lambda x: (cls.apply(x) * x).sum()
    assert torch.allclose(nf.grad(loss(Once))(x), nf.grad(loss(WithJvp))(x))
    for second in (nf.grad(lambda x: nf.grad(loss(Once))(x).sum()), lambda x: nf.linearize(Once.apply, x)[1](x)):
        with pytest.raises(DifferentiationError, match=r"test_torch_function\.py:\d+: a second derivative through Once"):
            second(x)
    with pytest.raises(DifferentiationError, match="returned 0 gradients for 1 arguments"):
        nf.grad(loss(TooFew))(x)
    with pytest.raises(DifferentiationError, match=r"shape \(2,\) for an argument of shape \(4,\)"):
        nf.grad(loss(Shape))(x)
    with pytest.raises(DifferentiationError, match="mark_dirty"):
        nf.grad(loss(Dirty))(x)
    with pytest.raises(DifferentiationError, match="Closing has a derivative rule of its own and closes over"):
        def closing(x):
            class Closing(torch.autograd.Function):
                forward = staticmethod(lambda ctx, y: y * x)
                backward = staticmethod(lambda ctx, g: g)

            return Closing.apply(x.sin()).sum()

        nf.grad(closing)(x)
