"""Products with epilogues: joined with what reads them, on every instruction set, they give what the parts give."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler import compiled
from neuralforge.compiler.planning import remat
from neuralforge.compiler.products.epilogue import join_epilogues
from neuralforge.kernels import matmul

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def joined(timed, joined_by):
    """The names of the joined equations, each pair being joined as if our kernel were the fastest."""
    timed("aten")
    return joined_by("join_epilogues")


def test_recomputed_under_a_memory_budget(joined, monkeypatch):
    """Together with its epilogue: the results have other names then."""
    monkeypatch.setattr(remat, "CHAIN", 0)  # or two cheap operators run again in its place
    torch.manual_seed(0)
    x, weights = torch.randn(128, 64), [torch.randn(64, 64) * 0.1 for _ in range(4)]

    def loss(weights):
        y = x + x.cumsum(0) * 0.01
        for w in weights[1:3]:
            y = F.silu(y) * (y @ w)
        return (y + y.cumsum(0) * 0.01).square().mean()

    step = nf.value_and_grad(loss)
    free = nf.jit(step)
    expected = free(weights)
    budget = free.programs[0].program.plan.peak_bytes // 2
    with pytest.raises(nf.errors.MemoryBudgetError) as refused:
        nf.jit(step, memory_budget=budget // 8)(weights)
    least = int(str(refused.value).split("at least memory_budget=")[1].split()[0].rstrip(".;,"))
    held = nf.jit(step, memory_budget=max(budget, least))
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(held(weights))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    again = [eq for eq in held.programs[0].graph.equations if eq.origin == "recomputed"]
    assert joined and any(eq.name.startswith("product_") for eq in again)


def same(f, *args, rtol=2e-5):
    found, truth = nf.jit(f)(*args), f(*(a.double() for a in args))
    for a, b in zip(found, truth):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("T, D, H", [(1, 8, 40), (37, 24, 65), (130, 50, 900)])
def test_feed_forward_and_its_gradient(joined, T, D, H):
    """Bias and GELU, residual and layer norm, and backward with the sums for biases: rows longer than a tile too."""

    def loss(x, w1, b1, w2, b2, g):
        h = F.gelu(F.linear(x, w1, b1))
        return (F.layer_norm(x + F.linear(h, w2, b2), (D,), g) ** 3).sum()

    torch.manual_seed(0)
    shapes = (2, T, D), (H, D), (H,), (D, H), (D,), (D,)
    args = [torch.randn(s) / (len(s) + 1) for s in shapes]
    same(lambda *a: nf.grad(loss, tuple(range(6)))(*a), *args, rtol=1e-4)
    if T > 1:
        assert {"product_fused_gelu", "product_fused_gelu_backward_sum"} <= set(joined)


def test_a_product_that_is_read_elsewhere_is_kept(joined):
    def f(x, w):
        h = x @ w.t()
        return torch.tanh(h) * 2, h, h.sum(0)

    torch.manual_seed(0)
    same(f, torch.randn(45, 30), torch.randn(70, 30))
    same(lambda x, w: f(x, w)[::2], torch.randn(3, 45, 30), torch.randn(70, 30))
    assert len(joined) == 2


def test_views_of_the_product(joined):
    torch.manual_seed(0)
    x, w, bias = torch.randn(4, 15, 20), torch.randn(48, 20), torch.randn(6, 1)
    heads = lambda x, w: F.linear(x, w).view(4, 15, 6, 8)
    same(lambda x, w, bias: (heads(x, w).relu() * 3,), x, w, bias)
    same(lambda x, w, bias: (heads(x, w).relu() * 3, F.linear(x, w).sum(1), heads(x, w)), x, w, bias)
    assert len(joined) == 2
    same(lambda x, w, bias: ((heads(x, w) + bias).relu() * 3,), x, w, bias)  # in rows of 8
    same(lambda x, w, bias: (F.linear(x, w).transpose(1, 2).exp() * 2,), x, w, bias)  # not as it lies
    assert len(joined) == 2


def test_what_the_group_reads_besides(joined):
    """A column, a row, a scalar, the product's own operand, and rows reduced."""

    def f(x, w, c, r, s):
        y = x @ w
        return (y * c + r - s * x).softmax(-1), (y.sigmoid() * x).amax(-1)

    torch.manual_seed(0)
    args = torch.randn(33, 33), torch.randn(33, 33), torch.randn(33, 1), torch.randn(33), torch.randn(())
    same(f, *args)
    assert joined


def test_in_place_of_a_donated_operand(joined):
    """An operand of the group may be overwritten, an operand of the product not."""
    torch.manual_seed(0)
    x, w, r = torch.randn(300, 300), torch.randn(300, 300) / 17, torch.randn(300, 300)
    truth = torch.relu(x @ w) + r, torch.relu(x @ w) * x
    first = nf.jit(lambda x, w, r: torch.relu(x @ w) + r, donate=2)(x, w, r.clone())
    second = nf.jit(lambda x, w: torch.relu(x @ w) * x, donate=0)(x.clone(), w)
    torch.testing.assert_close(first, truth[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, truth[1], rtol=1e-4, atol=1e-4)
    assert len(joined) == 2


def test_several_products_of_one_group(joined):
    """silu(x a) * (x b): the group is the epilogue of one of them."""
    torch.manual_seed(0)
    x, a, b = torch.randn(100, 40), torch.randn(40, 64), torch.randn(40, 64)
    same(lambda x, a, b: (F.silu(x @ a) * (x @ b),), x, a, b)
    assert len(joined) == 1


@pytest.mark.parametrize("T, D, H", [(5, 7, 40), (130, 50, 701), (50, 800, 133)])
def test_bfloat16_is_rounded_before_what_follows(joined, T, D, H):
    """The bits are those of the product by our kernel, and then the group."""
    def after(h, r):
        y = F.gelu(h)
        return y, h, torch.sigmoid(y.float() + r), (r * h).softmax(-1)

    torch.manual_seed(0)
    x, w, b = (torch.randn(s).bfloat16() for s in ((T, D), (H, D), (H,)))
    r = torch.randn(T, H)
    found = nf.jit(lambda x, w, b, r: after(F.linear(x, w, b), r))(x, w, b, r)
    assert len(joined) == 1
    for a, e in zip(found, nf.jit(after)(matmul.matmul(x, w.t(), b), r), strict=True):
        assert torch.equal(a, e)


def test_sums_of_columns_of_a_bfloat16_product(joined):
    torch.manual_seed(0)
    g, w, h = (torch.randn(s).bfloat16() for s in ((300, 40), (40, 90), (300, 90)))

    def f(g, w, h):
        d = torch.ops.aten.gelu_backward(g @ w, h)
        return d, d.sum(0)

    d, total = nf.jit(f)(g, w, h)
    assert len(joined) == 1
    assert torch.equal(d, nf.jit(torch.ops.aten.gelu_backward)(matmul.matmul(g, w), h))
    assert ((total.double() - d.double().sum(0)).abs() <= 2**-8 * d.double().abs().sum(0)).all()


def test_not_joined_where_our_kernel_is_slower(monkeypatch, timed):
    calls = []
    monkeypatch.setattr(compiled, "join_epilogues", lambda *args: calls.append(join_epilogues(*args)) or calls[-1])
    timed("aten", own=1.5, copy=0.1)
    same(lambda x, w: (torch.tanh(x @ w) * 2,), torch.randn(50, 20), torch.randn(20, 30))
    ((graph, kernels),) = calls
    assert not kernels


def test_the_last_of_the_rewrites_that_may_be_limited(joined):
    f, x, w = lambda x, w: torch.tanh(x @ w) * 2, torch.randn(50, 20), torch.randn(20, 30)
    for most, found in ((1, 0), (2, 1)):  # fusion is the first
        torch.testing.assert_close(nf.jit(f, max_rewrites=most)(x, w), f(x, w), rtol=1e-4, atol=1e-4)
        assert len(joined) == found
