"""The learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186): train while the rate rises by the same factor
each step, and see where the loss falls fastest, and where it goes up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..compiler import jit
from ..data import Sampler, prepare
from ..errors import ConfigError
from ..models import build
from .config import Config
from .pictures import picture
from .step import curvature_due, make_step

MEMORY = 0.9  # of the running mean that smooths the losses


@dataclass(frozen=True)
class RateTest:
    """Rates, the losses of their steps, and those smoothed."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]

    @property
    def lowest(self) -> float:
        """The rate at which the loss was lowest: beyond it, training gets worse."""
        return self.rates[min(range(len(self.rates)), key=self.smooth.__getitem__)]

    @property
    def steepest(self) -> float:
        """The rate at which the loss fell fastest."""
        end = self.rates.index(self.lowest)
        width = max(2, len(self.rates) // 20)
        slopes = {i: self.smooth[i] - self.smooth[i - width] for i in range(width, end + 1)}
        return self.rates[min(slopes, key=slopes.__getitem__) - width // 2] if slopes else self.rates[0]

    @property
    def suggestion(self) -> float:
        """A peak rate for a schedule with warm-up: between the two, in equal factors."""
        return math.sqrt(self.steepest * self.lowest)


def rising(low: float, high: float, steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A schedule from `low` to `high` in equal factors."""
    factor = math.log(high / low) / max(steps - 1, 1)
    return lambda step: low * torch.exp(factor * step.to(torch.float64))


def rate_test(config: Config, low: float, high: float, told: Callable[[int, float, float], None] | None = None) -> RateTest:
    """Train for `config.train.steps` steps with rates from `low` to `high`, from the configured start and on its data; stop
    once the smoothed loss is beyond the first one by as much as it had fallen, or not finite. Writes nothing. `told` is
    called with (step, rate, loss) after each. Raises ConfigError unless 0 < low < high."""
    if not 0 < low < high < math.inf:
        raise ConfigError(f"rates from {low:g} to {high:g}; expected two numbers above 0, the lower one first.")
    data, steps = config.data, config.train.steps
    dataset = prepare(data.path, Path(data.cache), data.vocab_size, data.valid_fraction, data.text_field)
    batch = config.train.batch * config.train.accumulate
    sampler = Sampler(dataset.train, batch=batch, context=config.model.context, seed=config.train.seed)
    torch.manual_seed(config.train.seed)
    model = build(config.model_config(dataset.tokenizer.vocab_size), config.train.seed)
    schedule = rising(low, high, steps)
    init, step, _ = make_step(model, config, schedule)
    step, state = jit(step, donate=(0,)), init()
    found = RateTest([], [], [])
    mean = 0.0
    for n in range(steps):
        rate = schedule(torch.tensor(n)).item()
        state, metrics = step(state, next(sampler)["tokens"], curvature_due(config, n))
        loss = metrics["loss"].item()
        if not math.isfinite(loss):
            break
        mean = MEMORY * mean + (1 - MEMORY) * loss
        found.rates.append(rate)
        found.losses.append(loss)
        found.smooth.append(mean / (1 - MEMORY ** (n + 1)))
        if told:
            told(n + 1, rate, loss)
        if found.smooth[-1] > 2 * found.smooth[0] - min(found.smooth) and n > steps // 10:
            break
    if not found.rates:
        raise ConfigError(f"the loss is not finite at a rate of {low:g} already; look for the reason in the data or the model.")
    return found


def draw(found: RateTest, path: Path) -> None:
    """Losses over rates, as a picture of the kind that the file's name says."""
    with picture(path) as axes:
        axes.plot(found.rates, found.losses, linewidth=0.7, alpha=0.5, label="loss")
        axes.plot(found.rates, found.smooth, label="smoothed")
        axes.axvline(found.suggestion, color="tab:green", linestyle="--", label=f"suggestion: {found.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats per token)")
        axes.set_ylim(0.95 * min(found.losses), 1.05 * max(found.smooth))
