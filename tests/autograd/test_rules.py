"""Rules where PyTorch's operator database doesn't look: fused attention's second order, unused and extra outputs,
completed bases, and how rules are written."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import neuralforge as nf
from neuralforge.autograd.rules import Derivative, Joint, diagonal, rule
from neuralforge.autograd.rules.table import definitions, rules
from neuralforge.errors import DifferentiationError

pytestmark = pytest.mark.usefixtures("unoptimised")

aten = torch.ops.aten


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(math.prod(shape)))


def second_order(f, xs, direction):
    """Gradients in xs of <direction, gradient of sum(sin(f))>, by neuralforge and by torch."""
    loss = lambda xs: f(*xs).sin().sum()
    ours = nf.grad(lambda xs: sum((g * d).sum() for g, d in zip(nf.grad(loss)(xs), direction)))(xs)
    leaves = [x.clone().requires_grad_() for x in xs]
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    return ours, torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, direction)), leaves)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_flash_attention_second_order(mask, kv_heads):
    q, k, v = make(2, 4, 5, 8), make(2, kv_heads, 7, 8), make(2, kv_heads, 7, 8) * 0.5
    if mask == "causal":
        k, v = k[:, :, :5], v[:, :, :5]
    attn_mask = {"bool": torch.rand(5, 7) > 0.2, "float": make(2, 1, 5, 7)}.get(mask)
    if mask == "bool":
        attn_mask[:, 0] = True  # no row without a key
    attend = lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=mask == "causal", enable_gqa=kv_heads != 4, scale=0.3
    )
    ours, expected = second_order(attend, [q, k, v], [make(*x.shape) for x in (q, k, v)])
    torch.testing.assert_close(ours, list(expected))


def test_flash_attention_mask_has_a_gradient():
    q, k, v, mask = make(2, 4, 5, 8), make(2, 4, 7, 8), make(2, 4, 7, 8) * 0.5, make(1, 4, 5, 7)
    attend = lambda q, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours, expected = second_order(attend, [q, mask], [make(2, 4, 5, 8), make(1, 4, 5, 7)])
    torch.testing.assert_close(ours, list(expected))


def test_flash_attention_of_a_query_that_sees_nothing():
    q, k, v = make(2, 4, 5, 8), make(2, 4, 7, 8), make(2, 4, 7, 8) * 0.5
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1] = False
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours, expected = second_order(attend, [q, k, v], [make(*x.shape) for x in (q, k, v)])
    torch.testing.assert_close(ours, list(expected))
    assert (nf.jvp(attend, (q, k, v), (q, k, v))[1][:, :, 1] == 0).all()


def test_flash_attention_log_sum_exp():
    """The second result of the operator has a derivative too."""
    q, k, v = make(1, 2, 3, 4), make(1, 2, 5, 4), make(1, 2, 5, 4)
    ours = nf.grad(lambda q, k: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1].sin().sum(), (0, 1))(q, k)
    plain = nf.grad(lambda q, k: (q @ k.mT / 2).logsumexp(-1).sin().sum(), (0, 1))(q, k)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_layer_norm_statistics(output):
    x, w, b = make(3, 5), make(5), make(5)
    plain = (
        lambda x: (x - x.mean(-1, keepdim=True)) * plain[2](x) * w + b,
        lambda x: x.mean(-1, keepdim=True),
        lambda x: (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt(),
    )
    fused = lambda x: torch.native_layer_norm(x, [5], w, b, 1e-5)[output]
    hessian_rows = lambda f: nf.grad(lambda x: (nf.grad(lambda x: f(x).sin().sum())(x) * make(3, 5)).sum())(x)
    torch.testing.assert_close(nf.grad(lambda x: fused(x).sin().sum())(x), nf.grad(lambda x: plain[output](x).sin().sum())(x))
    torch.testing.assert_close(hessian_rows(fused), hessian_rows(plain[output]))
    torch.testing.assert_close(nf.jvp(fused, (x,), (make(3, 5),))[1], nf.jvp(plain[output], (x,), (make(3, 5),))[1])


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_svd_completed_basis(shape):
    """The projector on the null space depends on the completing vectors only, and not on how they are chosen."""
    a, m = make(*shape), make(5, 5)

    def projector(a):
        u, _, vh = torch.linalg.svd(a, full_matrices=True)
        rest = u[:, 3:] if shape[0] > 3 else vh[3:].mH
        return ((rest @ rest.mH) * m).sum()

    def plain(a):
        a = a if shape[0] > 3 else a.mH
        return ((torch.eye(5, dtype=a.dtype) - a @ torch.linalg.inv(a.mH @ a) @ a.mH) * m).sum()

    torch.testing.assert_close(nf.grad(projector)(a), nf.grad(plain)(a))
    torch.testing.assert_close(nf.jvp(projector, (a,), (make(*shape),)), nf.jvp(plain, (a,), (make(*shape),)))


def test_product_with_zeros_second_order():
    """scatter_reduce("prod"): the second derivative at a single zero, which PyTorch doesn't have."""
    x = torch.tensor([2.0, 0.0, 5.0, 3.0, 7.0], dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 1])
    f = lambda x: torch.ones(2, dtype=x.dtype).scatter_reduce(0, index, x, "prod").sum()
    g = lambda x: x[0] * x[1] * x[2] + x[3] * x[4]
    hessian = lambda f: torch.stack([nf.grad(lambda x, i=i: nf.grad(f)(x)[i])(x) for i in range(5)])
    torch.testing.assert_close(hessian(f), hessian(g))


@pytest.mark.filterwarnings("ignore:var.. degrees of freedom")
@pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])
def test_variance_without_degrees_of_freedom(run):
    """Where it is not a number, so are its derivatives."""
    for shape, dim, correction in (((4, 1), 1, 1), ((1,), None, 1), ((3, 1), 1, 2)):
        variance = lambda x: torch.var(x, dim, correction=correction)  # noqa: B023
        assert run(nf.grad(lambda x: variance(x).sum()))(make(*shape)).isnan().all()  # noqa: B023
        assert run(lambda x: nf.jvp(variance, (x,), (x,))[1])(make(*shape)).isnan().all()  # noqa: B023


@pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("spread", [torch.var_mean, torch.std_mean])
def test_spreads_with_means(spread, dtype, run):
    """Numbers whose sum float16 can't hold have a mean all the same."""
    x = (torch.arange(4000).view(2, 2000) % 7 + 50).to(dtype)
    for options in ({}, {"dim": 1}, {"dim": (0,), "correction": 0, "keepdim": True}):
        f = lambda x: sum((k + 1) * y.abs().double().square().sum() for k, y in enumerate(spread(x, **options)))  # noqa: B023
        found, leaf = run(nf.value_and_grad(f))(x), x.clone().requires_grad_()
        truth = f(leaf), torch.autograd.grad(f(leaf), leaf)[0]
        torch.testing.assert_close(found, truth, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])
def test_definitions_that_convert_half_precision(run):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    f = lambda x: (torch.renorm(x, 2, 0, 1.0).float() ** 2 * torch.arange(5)).sum()
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(run(nf.grad(f))(x), torch.autograd.grad(f(leaf), leaf)[0], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("choose", [torch.fmax, torch.fmin, torch.maximum, torch.minimum])
def test_choices_beside_nan(choose):
    nan = math.nan
    xs = torch.tensor([1.0, 2, nan, 3, 2, nan]), torch.tensor([1.0, nan, nan, 2, 3, 2])
    leaves = [x.clone().requires_grad_() for x in xs]
    truth = torch.autograd.grad(choose(*leaves).sum(), leaves)
    torch.testing.assert_close(nf.grad(lambda a, b: choose(a, b).sum(), (0, 1))(*xs), truth)


EDGES = {
    "xlogy": torch.xlogy, "xlog1py": torch.special.xlog1py, "xlogy of a number": lambda x, b: torch.xlogy(x, 2) + torch.xlogy(0, b),
    "entr": lambda x, b: torch.special.entr(x) * b, "sinc": lambda x, b: x.sinc() * b,
    "std": lambda x, b: x.expand(3, 6).std(0) * b, "std_mean": lambda x, b: sum(torch.std_mean(x.expand(2, 6).exp(), 0, keepdim=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_where_a_plain_formula_gives_nan(name):
    f = EDGES[name]
    xs = torch.tensor([0.0, 0, 0, 1, 0.5, 2]), torch.tensor([0.0, 2, -0.5, 1, -1, 3])
    leaves = [x.clone().requires_grad_() for x in xs]
    truth = torch.autograd.grad(f(*leaves).sum(), leaves, materialize_grads=True)
    for run in (lambda g: g, nf.jit):
        found = run(nf.grad(lambda x, b: f(x, b).sum(), (0, 1)))(*xs)
        torch.testing.assert_close(found, truth, equal_nan=True)


def test_index_fill_counts_a_repeated_index_once():
    x, value = make(4), torch.tensor(2.0, dtype=torch.float64)
    g = nf.grad(lambda v: x.index_fill(0, torch.tensor([1, 1, 3]), v).sum())(value)
    assert g.item() == 2


@pytest.fixture
def table():
    before = dict(rules), dict(definitions)
    yield
    for live, saved in zip((rules, definitions), before):
        live.clear()
        live.update(saved)


def test_joint_is_told_what_is_wanted(table):
    seen = []

    @rule("mul", forward=False)
    def mul(y, a, b):
        def vjp(gs, wanted):
            seen.append(wanted)
            return gs[0] * b, gs[0] * a

        return Joint(vjp)

    x, c = make(3), make(3)
    torch.testing.assert_close(nf.grad(lambda x: (x * c).sum())(x), c)
    torch.testing.assert_close(nf.grad(lambda x: (x * x).sum())(x), 2 * x)
    assert seen == [(True, False), (True, True)]


def test_a_rule_for_an_own_operator(table):
    with torch.library._scoped_library("nf_test", "FRAGMENT") as library:
        library.define("cube(Tensor x) -> Tensor")
        library.impl("cube", lambda x: x * x * x, "CompositeExplicitAutograd")
        cube = torch.ops.nf_test.cube
        with pytest.raises(DifferentiationError, match="nf_test.cube has neither a derivative rule nor a definition"):
            nf.grad(lambda x: cube(x).sum())(make(3))
        rule("nf_test::cube")(lambda y, x: diagonal(lambda: 3 * x * x))
        torch.testing.assert_close(nf.grad(lambda x: cube(x).sum())(make(3)), 3 * make(3) ** 2)
        torch.testing.assert_close(nf.jvp(cube, (make(3),), (make(3),))[1], 3 * make(3) ** 3)


def test_a_rule_that_stops_short_is_an_error(table):
    rule("mul")(lambda y, a, b: Derivative(lambda g: g * b, lambda t: t * b))
    with pytest.raises(DifferentiationError, match="covers 1 arguments, and argument 1 depends"):
        nf.grad(lambda x: (2 * x * x).sum())(make(3))


def test_class_weights_have_no_derivative():
    logits, weight = make(3, 4).log_softmax(-1), make(4).abs()
    with pytest.raises(DifferentiationError, match="nll_loss_forward covers 2 arguments"):
        nf.grad(lambda w: F.nll_loss(logits, torch.tensor([0, 1, 3]), w))(weight)
