"""Checkpointing: the same numbers from less memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import DifferentiationError
from neuralforge.graph import capture

pytestmark = pytest.mark.usefixtures("unoptimised")

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(p, x):
    h = F.dropout(F.gelu(x @ p["up"]), 0.3)
    return x + nf.checkpoint_name(h, "hidden") @ p["down"]


@both
@pytest.mark.parametrize("policy", [None, nf.save_products, nf.save_only("hidden")], ids=["nothing", "products", "names"])
def test_checkpointing_changes_nothing(run, policy):
    params = [{"up": f64(8, 16), "down": f64(16, 8)} for _ in range(3)]
    x = f64(5, 8)

    def loss(params, x, block):
        for p in params:
            x = block(p, x)
        return x.square().mean()

    results = []
    for block in (layer, nf.checkpoint(layer, policy)):
        torch.manual_seed(1)
        results.append(run(nf.value_and_grad(lambda p, x: loss(p, x, block), argnums=(0, 1)))(params, x))  # noqa: B023
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, results)):
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12)


def test_second_order_through_a_checkpoint():
    f = lambda x: nf.checkpoint(lambda x: (x.sin() * x).exp())(x).sum()
    plain = lambda x: (x.sin() * x).exp().sum()
    x, v = f64(4), f64(4)
    assert torch.allclose(nf.hvp(f, (x,), (v,))[0], nf.hvp(plain, (x,), (v,))[0])
    assert torch.allclose(nf.hessian(f)(x), nf.hessian(plain)(x))


def test_checkpointing_keeps_less():
    """Eagerly: what the first run made is gone before backward. Captured: it is computed twice, and the peak falls."""
    seen = []

    def block(x):
        h = x.exp()
        seen.append(weakref.ref(h))
        return (h * h).sin()

    gc.disable()
    try:
        tape_alive = []

        def loss(x):
            y = nf.checkpoint(block)(x)
            tape_alive.append(seen[0]() is not None)
            return y.sum()

        nf.grad(loss)(f64(10))
        assert tape_alive == [False]
    finally:
        gc.enable()

    def deep(block):
        def loss(x):
            for _ in range(6):
                x = block(x)
            return x.sum()

        return nf.grad(loss)

    def wide(x):
        for _ in range(4):
            x = torch.tanh(x @ torch.ones(64, 64)) + x.cumsum(0) * 0.01
        return x

    x = torch.randn(256, 64)
    plain, light = (nf.explain(deep(b), x) for b in (wide, nf.checkpoint(wide)))
    assert light.plan.peak_bytes < 0.6 * plain.plan.peak_bytes
    assert any(eq.origin == "recomputed" for eq in capture(deep(nf.checkpoint(wide)), x).graph.equations)


def stack(block, params, x):
    for p in params:
        x = block(p, x)
    return x.square().mean()


@both
@pytest.mark.parametrize("policy", [None, nf.save_products, lambda op, name: True], ids=["nothing", "products", "all"])
def test_attention_convolution_and_random_operators(run, policy):
    def f(q, w, x, k):
        h = F.layer_norm(F.scaled_dot_product_attention(q @ w, q, q, is_causal=True, dropout_p=0.3), (4,))
        c = F.dropout2d(F.batch_norm(F.conv2d(x, k), None, None, training=True), 0.2)
        c = F.alpha_dropout(F.rrelu(c, training=True), 0.2, training=True)
        return h.sin().sum() + torch.einsum("bchw,bdhw->bcd", c, c).softmax(-1).square().sum()

    args = f64(2, 2, 8, 4), f64(4, 4), f64(2, 3, 6, 6), f64(4, 3, 3, 3)
    block = nf.checkpoint(f, policy)
    both = run(nf.value_and_grad(lambda *a: block(*a) * block(*a), argnums=(0, 1, 2, 3)))
    direction = [torch.randn_like(x) for x in args]

    def at(step):
        torch.manual_seed(3)
        return both(*[x + step * d for x, d in zip(args, direction)])

    slope = (at(1e-6)[0] - at(-1e-6)[0]) / 2e-6
    assert torch.allclose(sum((g * d).sum() for g, d in zip(at(0.0)[1], direction)), slope, rtol=1e-6)


def test_products_of_other_operators_are_kept_too():
    own, aten = torch.ops.neuralforge, torch.ops.aten
    q, x, w, target = f64(1, 2, 4, 8), f64(4, 8), f64(5, 8), torch.tensor([0, 4, 2, 1])
    groups, ends = torch.randn(2, 8, 8, dtype=torch.bfloat16), torch.tensor([1, 4], dtype=torch.int32)
    for f, given, products in (
        (lambda q: own.flash_attention(q, q, q)[0].sin(), q, {own.flash_attention: 1}),
        (lambda x: own.linear_cross_entropy(x, w, target)[0].sin(), x, {own.linear_cross_entropy: 1}),
        (lambda x: own.matmul(x, w.t()).sin(), x, {aten.mm: 2}),  # forward and backward
        (lambda x: aten._grouped_mm(x, groups, ends).sin(), x.bfloat16(), {aten._grouped_mm: 2}),
    ):
        block = nf.checkpoint(f, nf.save_products)
        equations = capture(nf.grad(lambda x: block(x).sum()), given).graph.equations  # noqa: B023
        found = [eq.op.overloadpacket for eq in equations]
        assert {op: found.count(op) for op in products} == products and own.matmul not in found


@both
def test_closures(run):
    w, x, v = f64(3, 3), f64(3), f64(3, 3)

    def loss(block):
        inner = lambda w: block(lambda h: (h @ w.t()).tanh())(x @ w)
        return lambda w: block(lambda h: (h @ w).sin() * w[0])(inner(w)).sum()

    ours, plain = loss(nf.checkpoint), loss(lambda f: f)
    assert torch.allclose(run(nf.grad(ours))(w), nf.grad(plain)(w))
    assert torch.allclose(run(lambda w: nf.hvp(ours, (w,), (v,))[0])(w), nf.hvp(plain, (w,), (v,))[0])
    twice = lambda f: nf.grad(lambda w: nf.grad(f)(w).square().sum())
    assert torch.allclose(run(twice(ours))(w), twice(plain)(w))
    assert torch.allclose(run(nf.hessian(ours))(w), nf.hessian(plain)(w))


@both
def test_writes_before_inside_and_after(run):
    def loss(block):
        def f(x):
            h, mask = x * 1, torch.zeros(3, dtype=torch.float64)
            mask[1:] = 1
            h[0] = h[1] * h[2]
            tail = h[1:]
            h.mul_(2)

            def inner(y):
                z = y.exp()
                z.mul_(y)
                z[0] = 1.0
                return z.sin() * tail.sum() * h * mask

            z = block(inner)(h)
            z.add_(x)
            return z.sum()

        return f

    x = f64(3)
    a, b = run(nf.value_and_grad(loss(nf.checkpoint)))(x), nf.value_and_grad(loss(lambda f: f))(x)
    assert torch.allclose(a[0], b[0]) and torch.allclose(a[1], b[1])


def test_a_write_to_an_outside_tensor_happens_once():
    seen, x = torch.zeros(3, dtype=torch.float64), f64(3)

    def f(y):
        seen.add_(y.detach())
        return y.sin() * seen

    found = nf.grad(lambda x: nf.checkpoint(f)(x * 2).sum())(x)
    assert torch.equal(seen, 2 * x) and torch.allclose(found, 2 * (2 * x).cos() * 2 * x)
    with pytest.raises(DifferentiationError, match="writes in place to a differentiated tensor"):
        nf.grad(lambda x: nf.checkpoint(lambda y: y.mul_(2).sin())(x * 1).sum())(x)


@both
@pytest.mark.parametrize("policy", [None, nf.save_products], ids=["nothing", "products"])
def test_modules_whose_parameters_functional_call_swaps(run, policy):
    block = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(4), torch.nn.ReLU(inplace=True))
    x = f64(6, 4)

    class Model(torch.nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.blocks, self.wrap = torch.nn.ModuleList(block() for _ in range(3)), wrap

        def forward(self, x):
            for b in self.blocks:
                x = self.wrap(b)(x)
            return x

    results = []
    for wrap in (lambda f: f, lambda f: nf.checkpoint(f, policy)):
        torch.manual_seed(2)
        model = Model(wrap).double()
        params = {k: p.detach() * 2 for k, p in model.named_parameters()}
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        loss = lambda p, b: torch.func.functional_call(model, {**p, **b}, (x,)).square().sum()
        results.append((run(nf.value_and_grad(loss))(params, buffers), buffers))
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, results)):
        assert torch.allclose(a, b), "running statistics included"


def test_a_second_run_that_differs_is_refused():
    runs = []

    def f(x):
        runs.append(1)
        return F.dropout(x, 0.5) if len(runs) == 1 else x * torch.randn(3, dtype=torch.float64)

    with pytest.raises(DifferentiationError, match="did something else when it was run again"):
        nf.grad(lambda x: nf.checkpoint(f)(x).sum())(f64(3))

    class Swapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 3).double()

        def forward(self, x):
            return nf.checkpoint(lambda x: self.inner(x))(self.inner(x))

    model, x = Swapped(), f64(2, 3)
    params = {k: p.detach() * 2 for k, p in model.named_parameters()}
    with pytest.raises(DifferentiationError, match="must read the same tensors"):
        nf.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)


@pytest.mark.parametrize("names", [(), ("a",), ("b",), ("a", "b")])
def test_nested_checkpoints_with_names(names):
    inner = nf.checkpoint(lambda x: nf.checkpoint_name(x.sin(), "a") * x, nf.save_only("a"))
    f = lambda x: nf.checkpoint_name(inner(x), "b").exp() * nf.checkpoint_name(x.cos(), "a")
    x = f64(3)
    expected = nf.grad(lambda x: ((x.sin() * x).exp() * x.cos()).sum())(x)
    assert torch.allclose(nf.grad(lambda x: nf.checkpoint(f, nf.save_only(*names))(x).sum())(x), expected)


@both
def test_nested_checkpoints_draw_the_same(run):
    def loss(block):
        drop = lambda x: F.dropout(x.exp(), 0.5)
        return lambda x: block(lambda x: block(lambda x: block(drop)(x.sin()) * x)(F.dropout(x, 0.5)))(x).sum()

    x, results = f64(50), []
    for block in (lambda f: f, nf.checkpoint):
        torch.manual_seed(1)
        results.append(run(nf.grad(loss(block)))(x))
    assert torch.allclose(*results)


def test_a_named_value_stays_in_the_plan():
    """Under jit, what a policy keeps costs memory: nothing < a name < no checkpoint."""
    params = [{"up": torch.randn(32, 128), "down": torch.randn(128, 32)} for _ in range(8)]
    x = torch.randn(64, 32)
    blocks = (nf.checkpoint(layer), nf.checkpoint(layer, nf.save_only("hidden")), layer)
    peaks = [nf.explain(nf.grad(lambda p: stack(b, p, x)), params).plan.peak_bytes for b in blocks]
    assert peaks[0] < peaks[1] < peaks[2]
