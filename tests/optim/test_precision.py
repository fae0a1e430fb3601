"""What is rounded away without a master copy, and isn't with one or with stochastic rounding."""

import pytest
import torch

import neuralforge as nf
from neuralforge import optim
from neuralforge.optim.precision import stochastic_round

BF16 = torch.bfloat16


def train(optimizer, params, grads, steps, jit=True):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    step = nf.jit(step) if jit else step
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, grads)
    return params, state


def test_a_small_decay_is_rounded_away_without_a_master_copy_and_not_with_one():
    """lr * weight_decay = 2^-10: half a unit in the last place of bfloat16 is 2^-9 of the number, or 2^-8 at most."""
    lr, decay, steps = 2.0**-6, 2.0**-4, 1024
    params = {"w": torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).to(BF16) + 0.5}
    grads = {"w": torch.zeros(64, 64, dtype=BF16)}
    expected = params["w"].double() * (1 - lr * decay) ** steps  # 1 / e
    plain = optim.adamw(lr, weight_decay=decay)

    naive, _ = train(plain, params, grads, steps)
    assert (naive["w"] == params["w"]).all(), "nothing decays"

    ours, state = train(optim.master_weights(plain), params, grads, steps)
    assert ours["w"].dtype == BF16 and state["master"]["w"].dtype == torch.float32
    torch.testing.assert_close(state["master"]["w"].double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours["w"].double(), expected, rtol=2.0**-8, atol=0)

    random, _ = train(optim.stochastic_rounding(plain), params, grads, steps)
    assert random["w"].dtype == BF16
    error = (random["w"].double() / expected - 1).flatten()
    assert error.mean().abs() < 4 * error.std() / 64 and error.std() < 0.1


@pytest.mark.parametrize("jit", [False, True])
def test_master_weights_are_the_float32_run(jit):
    generator = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(9, 5, generator=generator).to(BF16), "b": [torch.randn(7, generator=generator).to(BF16)]}
    grads = {"a": torch.randn(9, 5, generator=generator).to(BF16), "b": [torch.randn(7, generator=generator).to(BF16)]}
    plain = optim.adamw(1e-3)
    wide = lambda tree: optim.cast(tree, torch.float32)
    expected, inner = train(plain, wide(params), wide(grads), 50, jit)
    found, state = train(optim.master_weights(plain), params, grads, 50, jit)
    torch.testing.assert_close(state["master"], expected, rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"], inner, rtol=0, atol=0)
    torch.testing.assert_close(found, optim.cast(expected, BF16), rtol=0, atol=0)


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, generator=generator) * 10.0**e for e in range(-30, 31, 15)])
    x = torch.cat([x, torch.tensor([1e-40, -1e-40, 1 - 2.0**-20, 2 - 2.0**-20])])  # subnormal, and next to a power of two
    cut = (x.view(torch.int32) & -0x10000).view(torch.float32)
    next = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    up = ((x.double() - cut) / (next.double() - cut)).expand(4000, -1)  # the probability of going away from zero
    found = stochastic_round(x.expand(4000, -1).contiguous(), nf.random.key(1))
    assert ((found == cut) | (found == next)).all() and (found.to(BF16).float() == found).all()
    ups = (found != cut).double().mean(0)
    deviation = (ups - up[0]) / (up[0] * (1 - up[0]) / 4000).sqrt().clamp(min=1e-3)
    assert deviation.abs().max() < 5, "each within five standard errors"
    assert deviation.square().mean() == pytest.approx(1, abs=0.15), "and all together as independent draws are"


def test_what_stochastic_rounding_leaves_alone():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-133, float("inf"), -float("inf"), float("nan")])
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # whose lower half would carry over
    for seed in range(20):
        key = nf.random.key(seed)
        found = stochastic_round(exact, key)
        assert (found.view(torch.int32) == exact.view(torch.int32)).all()
        assert stochastic_round(nan, key).isnan().all()


@pytest.mark.parametrize("jit", [False, True])
def test_stochastic_rounding_draws_from_its_state(jit):
    params = {"a": torch.ones(300, dtype=BF16), "b": torch.ones(300, dtype=BF16)}
    grads = {"a": torch.ones(300, dtype=BF16), "b": torch.ones(300, dtype=BF16)}
    make = lambda seed: optim.stochastic_rounding(optim.adamw(1e-3, weight_decay=0.0), seed)
    whole, state = train(make(0), params, grads, 6, jit)
    again, _ = train(make(0), params, grads, 6, not jit)
    other, _ = train(make(1), params, grads, 6, jit)
    assert all((whole[k] == again[k]).all() and (whole[k] != other[k]).any() for k in "ab")
    assert (whole["a"] != whole["b"]).any(), "each parameter draws its own numbers"
    half, half_state = train(make(0), params, grads, 3, jit)
    optimizer = make(0)
    for _ in range(3):
        updates, half_state = optimizer.update(grads, half_state, half)
        half = optim.apply_updates(half, updates)
    assert all((half[k] == whole[k]).all() for k in "ab") and (half_state["key"] == state["key"]).all()


@pytest.mark.parametrize("wrap", [optim.master_weights, optim.stochastic_rounding])
def test_parameters_of_more_bits_are_trained_as_without(wrap):
    """Norms in float32 beside products in bfloat16, say."""
    generator = torch.Generator().manual_seed(0)
    make = lambda: {
        "narrow": torch.randn(9, generator=generator).to(BF16), "float": torch.randn(9, generator=generator),
        "double": torch.randn(9, dtype=torch.float64, generator=generator), "complex": torch.randn(9, dtype=torch.complex64, generator=generator),
    }  # fmt: skip
    params, grads = make(), make()
    expected, _ = train(optim.adamw(1e-3), params, grads, 10)
    found, _ = train(wrap(optim.adamw(1e-3)), params, grads, 10)
    assert {k: p.dtype for k, p in found.items()} == {k: p.dtype for k, p in params.items()}
    for name in ("float", "double", "complex"):
        tolerance = 1e-6 if name != "double" else 1e-14
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_captured_equals_torch(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x, y = torch.randn(10, 8), torch.randint(0, 3, (10,))
    loss = lambda p, x: torch.nn.functional.cross_entropy(torch.func.functional_call(model, p, (x,)), y)
    params = {name: p.detach() for name, p in model.named_parameters()}
    found, grads = nf.jit(nf.value_and_grad(optim.autocast(loss, dtype)))(params, x)
    with torch.autocast("cpu", dtype=dtype):
        expected = torch.nn.functional.cross_entropy(model(x), y)
    expected.backward()
    eps = torch.finfo(dtype).eps
    assert found == pytest.approx(expected.item(), rel=eps) and found != loss(params, x)
    for name, p in model.named_parameters():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - p.grad).norm() <= 2 * eps * p.grad.norm(), name
    assert optim.autocast(loss, None) is loss


def test_cast_leaves_integers_alone():
    found = optim.cast({"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64), "name": "x"}, BF16)
    assert found["w"].dtype == BF16 and found["n"].dtype == torch.int64 and found["name"] == "x"
