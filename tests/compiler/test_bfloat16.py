"""torch.autocast inside nf.jit and nf.value_and_grad: PyTorch's semantics, float32 weights and gradients, products and
kept activations in bfloat16, whether or not the CPU has instructions for it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import neuralforge as nf
from neuralforge.compiler.pipeline import optimise
from neuralforge.compiler.products import candidates
from neuralforge.compiler.products.candidates import PRODUCTS
from neuralforge.graph import capture
from neuralforge.models import ModelConfig, build, next_token_loss

aten = torch.ops.aten


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(48, 48), nn.LayerNorm(48)  # under autocast the norm's input is bfloat16
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)
        self.head = nn.Linear(48, 33, bias=False)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def case(kind):
    """A model, its data, and loss(params, *data)."""
    torch.manual_seed(0)
    if kind == "mlp":
        model, data = MLP(), (torch.randn(64, 48), torch.randint(0, 33, (64,)))
        return model, data, lambda params, x, y: F.cross_entropy(functional_call(model, params, (x,)), y)
    config = {
        "gpt2": ModelConfig("gpt2", 97, 40, 48, 2, 3, 3, 96),
        "llama": ModelConfig("llama", 97, 40, 48, 2, 6, 3, 80, tie_embeddings=False),
    }[kind]
    model, tokens = build(config, 0), torch.randint(0, 97, (2, 41))
    return model, (tokens,), lambda params, t: next_token_loss(functional_call(model, params, (t[:, :-1],)), t[:, 1:])


def lowered(loss):
    def with_autocast(params, *data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(params, *data)

    return with_autocast


def weights(model, dtype=torch.float32):
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def by_torch(loss, params, data):
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss(params, *data)
    return value.detach(), dict(zip(params, torch.autograd.grad(value, list(params.values()))))


def in_float64(kind):
    model, data, loss = case(kind)
    data = [x.double() if x.is_floating_point() else x for x in data]
    return by_torch(loss, weights(model.double(), torch.float64), data)


def distance(found, truth):
    """Of each gradient, relative to its norm."""
    return {name: ((found[name].double() - g).norm() / g.norm()).item() for name, g in truth.items()}


@pytest.mark.parametrize("kind", ["mlp", "gpt2", "llama"])
def test_capture_is_what_autocast_does(kind):
    """Before any optimisation: the same operators in the same types, so the same bits forward."""
    model, data, loss = case(kind)
    params = weights(model)
    captured = capture(nf.value_and_grad(lowered(loss)), params, *data)
    value, *grads = captured.graph(*params.values(), *data)
    expected, expected_grads = by_torch(lowered(loss), params, data)
    assert torch.equal(value, expected)
    products = [eq for eq in captured.graph.equations if eq.op in PRODUCTS]
    assert products and all(v.dtype == torch.bfloat16 for eq in products for v in (*eq.inputs, *eq.results))
    for name, g in zip(params, grads):
        assert g.dtype == torch.float32
        error = (g - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error < 1e-2, f"{name}: {error}"


@pytest.mark.parametrize("kind", ["mlp", "gpt2", "llama"])
def test_gradients_as_near_the_truth_as_pytorchs(kind, isa):
    model, data, loss = case(kind)
    params = weights(model)
    value, grads = nf.jit(nf.value_and_grad(lowered(loss)))(params, *data)
    (theirs, their_grads), (truth, true_grads) = by_torch(lowered(loss), params, data), in_float64(kind)
    assert abs(value - truth) <= max(2 * abs(theirs - truth), 2e-3 * truth)
    ours, limit = distance(grads, true_grads), distance(their_grads, true_grads)
    for name in params:
        assert grads[name].dtype == torch.float32
        assert ours[name] <= 1.3 * limit[name] + 2e-3, f"{name}: {ours[name]}, PyTorch {limit[name]}"


def test_each_weight_is_converted_once(isa):
    model, data, loss = case("gpt2")
    params = weights(model)
    graph = optimise(capture(nf.value_and_grad(lowered(loss)), params, *data).graph)
    given = set(graph.inputs[: len(params)])
    inner = [e for eq in graph.equations for e in (eq.op.graph.equations if hasattr(eq.op, "graph") else [eq])]
    converted = [eq.args[0] for eq in inner if eq.op is aten._to_copy.default and eq.args[0] in given]
    assert len(converted) == len(set(converted))
    assert converted


def test_without_a_compiler_products_are_made_in_float32_where_the_cpu_has_no_other(monkeypatch):
    """PyTorch's own code for bfloat16 takes 25 times as long there."""
    seen = []
    monkeypatch.setattr(candidates, "has_bfloat16", lambda: False)
    monkeypatch.setattr(candidates.matmul, "available", lambda dtype: False)
    made = candidates.in_float32
    monkeypatch.setattr(candidates, "in_float32", lambda eq: (kernel := made(eq)) and seen.append(eq.op) or kernel)
    x, w, b, y = (torch.randn(s).bfloat16() for s in ((9, 5), (5, 5), (5,), (9, 5)))
    batches = x.expand(2, 9, 5), w.expand(2, 5, 5)
    for f, args in [
        (torch.mm, (x, w)), (torch.addmm, (b, x, w)), (torch.addmm, (y, x, w)), (torch.bmm, batches),
        (partial(torch.addmm, alpha=0.5, beta=2), (y, x, w)), (torch.baddbmm, (y, *batches)),
    ]:  # fmt: skip
        found, truth = nf.jit(f)(*args), f(*(a.double() for a in args))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), truth, rtol=2**-7, atol=2**-7)
    assert len(seen) == 6


def test_logits_are_never_float32(isa):
    """F.cross_entropy takes float32 under autocast; the kernel reads bfloat16."""
    logits, target = torch.randn(64, 97).bfloat16(), torch.randint(0, 97, (64,))
    f = nf.value_and_grad(lowered(F.cross_entropy))
    graph = optimise(capture(f, logits, target).graph)
    assert not any(v.dtype == torch.float32 and v.fake.dim() == 2 for eq in graph.equations for v in eq.results)
    (value, grad), x = nf.jit(f)(logits, target), logits.float().requires_grad_()
    F.cross_entropy(x, target).backward()
    torch.testing.assert_close(value, F.cross_entropy(x, target).detach())
    torch.testing.assert_close(grad, x.grad.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w, b: aten.native_layer_norm(x, [16], w, b, 1e-5),
        lambda x, w, b: aten.native_layer_norm(x, [16], None, b, 1e-5),
        lambda x, w, b: aten.native_layer_norm(x, [16], w.to(x.dtype), b.to(x.dtype), 1e-5),
        lambda x, w, b: aten.native_group_norm(x.view(2, 4, 16), w[:4], b[:4], 2, 4, 16, 2, 1e-5),
        lambda x, w, b: aten.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5),
        lambda x, w, b: aten._native_batch_norm_legit(x, w, b, w.clone(), b.clone(), True, 0.1, 1e-5),
    ],
)
def test_statistics_of_norms_have_the_types_they_have_eagerly(norm, dtype):
    args = torch.randn(8, 16).to(dtype), torch.rand(16), torch.rand(16)
    expected, found = norm(*args), nf.jit(norm)(*args)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_a_region_without_autocast_stays_float32():
    x, w = torch.randn(8, 8), torch.randn(8, 8)

    def f(w, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
            with torch.autocast("cpu", enabled=False):
                z = x @ w
        return y, z

    y, z = nf.jit(f)(w, x)
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    torch.testing.assert_close(z, x @ w)


def test_a_step_follows_eager_autocast(isa):
    model, data, loss = case("gpt2")
    optimizer = nf.optim.adamw(1e-2, (0.9, 0.95), 1e-8, 0.1)

    @nf.jit(donate=0)
    def step(state, *data):
        value, grads = nf.value_and_grad(lowered(loss))(state["params"], *data)
        updates, new = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": nf.optim.apply_updates(state["params"], updates), "optimizer": new}, value

    params = weights(model)
    state = {"params": {n: p.clone() for n, p in params.items()}, "optimizer": optimizer.init(params)}
    theirs = {n: p.clone().requires_grad_() for n, p in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), 1e-2, (0.9, 0.95), 1e-8, 0.1)
    for _ in range(8):
        state, value = step(state, *data)
        expected = lowered(loss)(theirs, *data)
        adamw.zero_grad()
        expected.backward()
        adamw.step()
        assert abs(value - expected.item()) < 2e-2 * expected.item()
    assert expected < 4.0


def test_activations_take_half_the_memory(isa, monkeypatch):
    """Planned peak of forward and backward, less the gradients, which are float32 either way."""
    monkeypatch.setattr(candidates.Choices, "get", lambda self, key, measure: "aten")  # or the peak depends on times
    config = ModelConfig("gpt2", 256, 128, 64, 4, 4, 4, 256)
    model, tokens = build(config, 0), torch.randint(0, 256, (8, 129))
    loss = lambda params, t: next_token_loss(functional_call(model, params, (t[:, :-1],)), t[:, 1:])
    params = weights(model)
    grads = sum(p.nbytes for p in params.values())
    peaks = []
    for f in (loss, lowered(loss)):
        compiled, _ = nf.jit(nf.value_and_grad(f)).lookup((params, tokens), {})
        peaks.append(compiled.program.plan.peak_bytes - grads)
    assert peaks[1] < 0.65 * peaks[0], peaks


def test_autocast_around_a_jitted_function():
    """Its casts are captured; what is made of the graph, and run, isn't cast again."""
    inner = lambda x, w: (x @ w).float() @ w.float()
    x, w = torch.randn(9, 5), torch.randn(5, 5)

    def f(x, w):
        with torch.autocast("cpu", enabled=False):
            exact = inner(x, w)
        return exact, (x @ w) * torch.ones(5)

    jitted = nf.jit(f)
    for given in (x, x, x.clone().requires_grad_()):  # torch.autograd's follow another way
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exact, narrow = jitted(given, w)
            expected = f(given, w)
        assert exact.dtype == torch.float32 and torch.allclose(exact, expected[0], rtol=1e-5, atol=1e-5)
        assert narrow.dtype == expected[1].dtype and torch.allclose(narrow, expected[1], rtol=2e-2, atol=2e-2)
