"""AdamW, clipping and schedules against torch.optim and closed forms."""

import math

import pytest
import torch

import neuralforge as nf
from neuralforge import optim
from neuralforge.errors import ConfigError


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_adamw_equals_torch(dtype, tolerance):
    torch.manual_seed(0)
    params = {"w": torch.randn(7, 5, dtype=dtype), "b": torch.randn(5, dtype=dtype), "s": torch.randn((), dtype=dtype)}
    theirs = {k: v.clone().requires_grad_() for k, v in params.items()}
    reference = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"], theirs["s"]], "weight_decay": 0.0}],
        lr=3e-2, betas=(0.8, 0.95), eps=1e-6,
    )  # fmt: skip
    ours = optim.adamw(3e-2, (0.8, 0.95), 1e-6, weight_decay=0.1, decay=lambda p: p.dim() >= 2)
    state = ours.init(params)
    for _ in range(50):
        grads = {k: torch.randn_like(v) for k, v in params.items()}
        for k in theirs:
            theirs[k].grad = grads[k]
        reference.step()
        updates, state = ours.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        for k in params:
            assert torch.allclose(params[k], theirs[k], rtol=tolerance, atol=tolerance)
    assert state["step"] == 50


def test_clip_gradients_equals_torch():
    grads = {"a": torch.randn(10, 3), "b": torch.randn(4)}
    params = {k: torch.zeros_like(v).requires_grad_() for k, v in grads.items()}
    for limit in (0.5, 1e3):
        for k, p in params.items():
            p.grad = grads[k].clone()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), limit)
        clipped, found = optim.clip_gradients(grads, limit)
        assert torch.allclose(found, norm)
        for k, p in params.items():
            assert torch.allclose(clipped[k], p.grad)


def at(schedule, *steps):
    return [float(schedule(torch.tensor(s))) for s in steps]


def test_schedules():
    assert at(optim.schedules.constant(2.0, warmup=4), 0, 1, 3, 100) == [0.5, 1.0, 2.0, 2.0]
    assert at(optim.schedules.linear(1.0, 10, final=0.1), 0, 5, 10, 99) == pytest.approx([1, 0.55, 0.1, 0.1])
    assert at(optim.schedules.cosine(1.0, 12, warmup=2, final=0.2), 2, 7, 12) == pytest.approx([1, 0.6, 0.2])
    assert at(optim.schedules.wsd(1.0, 100, decay=0.2), 0, 80, 90, 100) == pytest.approx([1, 1, 0.5, 0])


def test_bias_correction_survives_many_steps():
    p = {"w": torch.ones(1)}
    adam = optim.adamw(1e-3)
    state = adam.init(p)
    state["step"] += 10_000_000
    new, _ = adam.update({"w": torch.ones(1)}, state, p)
    assert math.isfinite(new["w"].item())


@pytest.mark.parametrize(
    "bad, message",
    [({"lr": -1.0}, "lr=-1.0"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": -1e-8}, "eps"), ({"weight_decay": -1}, "weight_decay")],
)
def test_values_out_of_range(bad, message):
    with pytest.raises(ConfigError, match=message):
        optim.adamw(**{"lr": 1e-3, **bad})


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_the_norm_of_complex_gradients_equals_torch(limit):
    generator = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn(5, 3, dtype=torch.complex64, generator=generator), "b": torch.randn(4, generator=generator)}
    params = {k: torch.zeros_like(v).requires_grad_() for k, v in grads.items()}
    for k, p in params.items():
        p.grad = grads[k].clone()
    norm = torch.nn.utils.clip_grad_norm_(params.values(), limit)
    for run in (optim.clip_gradients, nf.jit(optim.clip_gradients)):
        clipped, found = run({**grads, "a": grads["a"].conj().resolve_conj().conj()}, limit)
        torch.testing.assert_close(found, norm)
        torch.testing.assert_close(clipped, {k: p.grad for k, p in params.items()})
    assert optim.clip_gradients({"a": torch.tensor([3 + 4j], dtype=torch.complex128)}, 1.0)[1].dtype == torch.float64
