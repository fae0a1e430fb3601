"""The scale moves as torch.amp.GradScaler's, skipped updates leave no trace, and float16 training survives overflows."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge import optim
from neuralforge.errors import ConfigError


def bits(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [x.detach().contiguous().view(-1).view(torch.uint8).tolist() for x in leaves]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("setting", [(2.0**16, 2.0, 0.5, 3), (3e38, 2.0, 0.25, 2), (1.0, 1.5, 0.125, 1)])
def test_the_scale_follows_GradScaler(setting, jit):
    scale, growth, backoff, interval = setting
    p = torch.nn.Parameter(torch.ones(3))
    torchs = torch.amp.GradScaler("cpu", scale, growth, backoff, interval)
    sgd = torch.optim.SGD([p], lr=0.125)
    plain = optim.Optimizer(lambda p: {}, lambda g, s, p, **_: (torch.utils._pytree.tree_map(lambda g: -0.125 * g, g), s))
    ours = optim.loss_scaling(plain, scale, growth, backoff, interval)

    def step(params, state, factor):
        loss, grads = optim.scaled_value_and_grad(lambda p, x: (p["w"] * x).sum())(state["scale"], params, factor)
        updates, state = ours.update(grads, state, params)
        return optim.apply_updates(params, updates), state, loss

    step = nf.jit(step) if jit else step
    params, state = {"w": p.detach().clone()}, ours.init({"w": p.detach()})
    for n in range(60):
        factor = torch.full((3,), 1e-3 * (n % 5 - 2))
        if n % 11 in (3, 4) or n > 50 and n % 2:
            factor[n % 3] = (float("inf"), float("nan"), -float("inf"))[n % 3]
        torchs.scale((p * factor).sum()).backward()
        torchs.step(sgd)
        torchs.update()
        sgd.zero_grad()
        params, state, loss = step(params, state, factor)
        assert state["scale"] == torchs.get_scale() and state["good"] == torchs._growth_tracker, n
        torch.testing.assert_close(params["w"], p.detach(), rtol=1e-6, atol=1e-9)
        if factor.isfinite().all() and scale < 1e30:
            assert loss == pytest.approx((p.detach() + 0.125 * factor).dot(factor).item(), abs=1e-6), "of before the step, unscaled"
    assert state["skipped"] > 10


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("jit", [False, True])
def test_a_skipped_update_leaves_no_trace(bad, jit):
    optimizer = optim.loss_scaling(optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2)), growth_interval=2)
    update = nf.jit(optimizer.update) if jit else optimizer.update
    params = {"a": torch.randn(5, 3), "b": torch.tensor([-0.0, 0.0, 1e-40, -3.0, float("inf")])}
    state = optimizer.init(params)
    good = {"a": torch.randn(5, 3), "b": torch.zeros(5)}
    _, state = update(good, state, params)
    overflown = {"a": good["a"], "b": torch.tensor([0.0, 0.0, bad, 0.0, 0.0])}
    updates, after = update(overflown, state, params)
    assert bits(optim.apply_updates(params, updates)) == bits(params)
    assert bits(after["optimizer"]) == bits(state["optimizer"])
    assert (after["scale"], after["good"], after["skipped"]) == (2.0**15, 0, 1)
    for expected in (2.0**15, 2.0**16, 2.0**16, 2.0**17):
        _, after = update(good, after, params)
        assert after["scale"] == expected and after["skipped"] == 1


def test_small_gradients_survive_float16():
    f = lambda w: (w.to(torch.float16) * torch.tensor(1e-4, dtype=torch.float16)).sum().float() * 1e-5
    w = torch.ones(4)
    assert (nf.grad(f)(w) == 0).all(), "1e-9 is less than float16's least, 6e-8"
    value, grad = optim.scaled_value_and_grad(f)(torch.tensor(2.0**16), w)
    torch.testing.assert_close(grad, torch.full((4,), 1e-9), rtol=2e-3, atol=0)
    assert value == f(w)


def test_gradients_of_float16_parameters_are_divided_in_float32():
    f = lambda w, x: ((w * x).sum().float() * 1e-5, x + 1)
    w = torch.ones(4, dtype=torch.float16)
    (value, aux), grad = optim.scaled_value_and_grad(f, has_aux=True)(torch.tensor(2.0**16), w, torch.tensor(1e-4, dtype=torch.float16))
    assert grad.dtype == torch.float32 and aux == 1 and value == pytest.approx(4e-9, rel=1e-2)
    torch.testing.assert_close(grad, torch.full((4,), 1e-9), rtol=2e-3, atol=0)


def test_float16_training_recovers_from_overflows():
    """A classifier under torch.autocast, with infinities put into the gradients at chosen steps, and a first scale that is
    far too large: every such step is skipped, and the others go where float32 goes."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    weights = {name: torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 for name, p in model.named_parameters()}
    x = torch.randn(64, 16, generator=generator)
    y = (x @ torch.randn(16, 4, generator=generator)).argmax(1)

    def train(dtype, scale, poisoned):
        loss_fn = optim.autocast(lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y), dtype)
        optimizer = optim.loss_scaling(optim.adamw(1e-2), init_scale=scale, growth_interval=40)

        @nf.jit
        def step(params, state, poison):
            loss, grads = optim.scaled_value_and_grad(loss_fn)(state["scale"], params)
            grads["2.bias"] = grads["2.bias"] + poison
            updates, state = optimizer.update(grads, state, params)
            return optim.apply_updates(params, updates), state, loss

        params, scales, skipped = dict(weights), [], []
        state = optimizer.init(params)
        for n in range(150):
            new, after, loss = step(params, state, torch.tensor(float("inf") if n in poisoned else 0.0))
            scales.append(after["scale"].item())
            if after["skipped"] > state["skipped"]:
                skipped.append(n)
                assert bits(new) == bits(params) and bits(after["optimizer"]) == bits(state["optimizer"])
                assert after["scale"] == state["scale"] / 2
            params, state = new, after
        return loss.item(), scales, skipped

    expected, _, none = train(None, 1.0, ())
    loss, scales, skipped = train(torch.float16, 2.0**26, {20, 21, 90})
    assert not none and {20, 21, 90} < set(skipped), skipped
    first = [n for n in skipped if n < 20]
    assert first == list(range(len(first))) and first, "until the scale fits"
    assert scales[21] == scales[19] / 4
    assert scales[61] == 2 * scales[60] == 2 * scales[21], "40 good steps later"
    assert loss < 0.1 and expected < 0.1


@pytest.mark.parametrize(
    "name, value", [("init_scale", 0), ("init_scale", float("inf")), ("growth_factor", 0.5), ("backoff_factor", 1.0), ("growth_interval", 0)]
)
def test_values_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"loss_scaling: {name}={value}; expected"):
        optim.loss_scaling(optim.adamw(1e-3), **{name: value})
