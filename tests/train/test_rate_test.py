"""The learning-rate range test."""

import math

import pytest
import torch

from neuralforge.errors import ConfigError
from neuralforge.train.config import Config, Data, Model, Train, resolve
from neuralforge.train.rate_test import RateTest, rate_test, rising

TEXT = "\n".join(f"def square_{i}(x):\n    return x * x + {i}\n" for i in range(2000))


def test_rates_rise_in_equal_factors():
    rates = [rising(1e-4, 10.0, 6)(torch.tensor(n)).item() for n in range(6)]
    assert rates == pytest.approx([10.0**e for e in range(-4, 2)])


def test_where_a_curve_falls_and_turns():
    """A loss that falls along a logistic curve around 1e-3 and rises from 1e-1 on."""
    rates = [10 ** (-6 + 6 * i / 199) for i in range(200)]
    losses = [4 - 3 / (1 + math.exp(-3 * (math.log10(r) + 3))) + 10 * max(0.0, math.log10(r) + 1) for r in rates]
    found = RateTest(rates, losses, losses)
    assert found.lowest == pytest.approx(0.1, rel=0.1)
    assert found.steepest == pytest.approx(1e-3, rel=0.15)
    assert found.steepest < found.suggestion < found.lowest


def config(tmp_path, steps):
    path = tmp_path / "code.txt"
    path.write_text(TEXT)
    return resolve(
        Config(
            model=Model(depth=1, context=32, d_model=32),
            data=Data(path=str(path), cache=str(tmp_path / "cache"), vocab_size=300),
            train=Train(steps=steps, batch=4),
        )
    )


def test_a_real_model_learns_at_the_suggestion_and_diverges_beyond(tmp_path):
    seen = []
    found = rate_test(config(tmp_path, 80), 1e-5, 100.0, lambda *told: seen.append(told))
    assert 1e-4 < found.steepest < found.suggestion < found.lowest < 1
    assert len(found.rates) < 80, "it stops once the loss goes up"
    assert found.smooth[-1] > found.smooth[0] > min(found.smooth)
    assert [(n, rate, loss) for n, rate, loss in seen] == list(zip(range(1, 81), found.rates, found.losses))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1.0, 1e-3), (1e-3, math.inf)])
def test_impossible_rates(low, high, tmp_path):
    with pytest.raises(ConfigError, match="expected two numbers above 0, the lower one first"):
        rate_test(config(tmp_path, 10), low, high)
