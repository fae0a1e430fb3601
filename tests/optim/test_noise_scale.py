"""The noise scale of a problem where it is known, and the controller that follows it."""

import math
import random

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import ConfigError
from neuralforge.optim import accumulation, noise_scale
from neuralforge.optim.noise_scale import BatchController


def test_running_means_are_taken_apart():
    state, signal, noise = noise_scale.init(), 0.0, 0.0
    for n in range(30):
        one = [1 + 0.5 * (-1) ** n, 10.0 + n]
        state = noise_scale.update(state, accumulation.Statistics(*map(torch.tensor, one), *[torch.zeros(())] * 4), decay=0.9)
        signal, noise = 0.9 * signal + 0.1 * one[0], 0.9 * noise + 0.1 * one[1]
        assert noise_scale.noise_scale(state) == pytest.approx(noise / signal, rel=1e-5)


@pytest.mark.parametrize("signal, noise, expected", [(2.0, 6.0, 3.0), (-1.0, 6.0, math.inf), (0.0, 0.0, math.inf), (2.0, -1.0, 0.0)])
def test_noise_scale_of_means_on_either_side_of_zero(signal, noise, expected):
    assert noise_scale.noise_scale({"signal": torch.tensor(signal), "noise": torch.tensor(noise)}) == expected


def test_a_regression_whose_noise_scale_is_known():
    """Mean of (w x - y)^2 / 2 for independent x, y of variance 1: each example's gradient is (w x - y) x."""
    w = torch.tensor([0.6])
    # E[g] = w and E[g^2] = E[(w x - y)^2 x^2] = 3 w^2 + 1
    expected = (2 * w**2 + 1) / w**2
    generator = torch.Generator().manual_seed(0)
    loss = lambda w, x, y: (w * x - y).square().mean() / 2

    @nf.jit
    def measure(state, w, x, y):
        sums = accumulation.empty(w)
        for xs, ys in zip(x.chunk(4), y.chunk(4)):
            sums = accumulation.add(sums, *nf.value_and_grad(loss)(w, xs, ys), weight=8)
        return noise_scale.update(state, accumulation.statistics(sums), decay=0.999)

    state = noise_scale.init()
    for _ in range(4000):
        state = measure(state, w, *torch.randn(2, 32, generator=generator))
    assert noise_scale.noise_scale(state) == pytest.approx(expected.item(), rel=0.15)


def counts(controller, scales, batch=100):
    return [controller.step(scale, batch * controller.count) for scale in scales]


def test_the_batch_follows_the_noise_scale_in_both_directions():
    controller = BatchController(least=2, most=16, patience=3)
    assert counts(controller, [1000.0] * 9) == [2, 2, 4, 4, 4, 8, 8, 8, 8], "1000 is above twice 400, and below twice 800"
    assert counts(controller, [math.inf] * 4) == [8, 8, 16, 16]
    assert counts(controller, [math.inf] * 6) == [16] * 6, "the most"
    assert counts(controller, [350.0] * 9) == [16, 16, 8, 8, 8, 4, 4, 4, 4]
    assert counts(controller, [0.0] * 9) == [4, 4, 2, 2, 2, 2, 2, 2, 2], "the least"


def test_a_scale_that_wavers_moves_nothing():
    controller = BatchController(least=2, most=16, patience=3)
    assert set(counts(controller, [1000.0, 1000.0, 300.0] * 20)) == {2}
    assert set(counts(controller, [1000.0, 50.0] * 30)) == {2}


def test_after_a_change_nothing_moves_until_the_scale_does():
    for scale in range(50, 4000, 37):
        controller = BatchController(least=2, most=64, patience=1)
        settled = counts(controller, [float(scale)] * 10)
        assert len(set(settled[6:])) == 1
        batch = 100 * settled[-1]
        assert scale / 2 <= batch or settled[-1] == 64
        assert batch <= 2 * scale or settled[-1] == 2


def test_a_saved_controller_goes_on_where_it_was():
    draw = random.Random(0)
    scales = [10 ** draw.uniform(2, 4) for _ in range(200)]
    whole, halves = BatchController(2, 32, patience=2), BatchController(2, 32, patience=2)
    expected = counts(whole, scales)
    found = counts(halves, scales[:77])
    again = BatchController(2, 32, patience=2)
    again.load_state_dict(halves.state_dict())
    assert found + counts(again, scales[77:]) == expected and len(set(expected)) > 2


@pytest.mark.parametrize("least, most", [(1, 8), (0, 8), (4, 2), (2, 12), (3, 8), (-2, 4)])
def test_bounds(least, most):
    with pytest.raises(ConfigError, match=f"least={least}, most={most}; expected"):
        BatchController(least, most)
    BatchController(3, 24)


def test_a_saved_count_out_of_bounds():
    with pytest.raises(ConfigError, match="16 micro-batches; expected 2 to 8"):
        BatchController(2, 8).load_state_dict({"count": 16, "votes": 0})


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_overflow_leave_the_means_as_they_were(bad):
    params = {"w": torch.ones(3)}
    sums = accumulation.empty(params)
    for size in (1.0, bad):
        sums = accumulation.add(sums, torch.ones(()), {"w": torch.full((3,), size)})
    state = {"signal": torch.tensor(2.0), "noise": torch.tensor(3.0)}
    assert noise_scale.update(state, accumulation.statistics(sums)) == state
