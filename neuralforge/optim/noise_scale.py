"""The gradient noise scale (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162): the batch size at which noise and signal in
the gradient are equally large. Much smaller batches waste steps, much larger ones waste tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .accumulation import Statistics

NoiseState = dict[str, torch.Tensor]


def init() -> NoiseState:
    """Running means over no step yet; a flat pytree of float32 scalars."""
    return {"signal": torch.zeros(()), "noise": torch.zeros(())}


def update(state: NoiseState, statistics: Statistics, decay: float = 0.99) -> NoiseState:
    """With the estimates of one more step. Signal and noise are averaged apart: the quotient of the means is the noise
    scale, the mean of the quotients is not. Both begin at 0, and so are too small by the same factor. A step whose gradients
    overflowed, which loss scaling skips, tells nothing."""
    told = statistics.signal.isfinite() & statistics.noise.isfinite()
    mix = lambda old, new: torch.where(told, old * decay + new.to(old.dtype) * (1 - decay), old)
    return {"signal": mix(state["signal"], statistics.signal), "noise": mix(state["noise"], statistics.noise)}


def noise_scale(state: NoiseState) -> torch.Tensor:
    """The paper's B_simple, in the unit of the weights (tokens): the noise over the signal. Infinite while no signal
    stands out of the noise, 0 while no noise does."""
    signal, noise = state["signal"], state["noise"].clamp(min=0)
    return torch.where(signal > 0, noise / signal, torch.inf)


@dataclass
class BatchController:
    """Chooses the number of micro-batches in a step, a power of two times `least`, so that the batch is about the noise
    scale: twice as many once the noise scale has been above twice the batch for `patience` steps in a row, half as many
    once it has been below half of it. Between these, and so right after a change, nothing moves.

    Lives outside of the graph. All it remembers is in `count` and `votes`, of `state_dict`.
    """

    least: int
    most: int
    patience: int = 20
    count: int = 0
    """Micro-batches in a step now; begins at `least`."""
    votes: int = 0
    """Steps in a row in which the batch was too small; negative: too large."""

    def __post_init__(self) -> None:
        doublings = self.most // self.least if self.least > 0 else 0
        if self.least < 2 or self.least * doublings != self.most or doublings.bit_count() != 1:
            raise ConfigError(
                f"BatchController: least={self.least}, most={self.most}; expected at least 2 micro-batches (one alone tells "
                f"nothing of the noise), and a power of two times as many at most."
            )
        self.count = self.count or self.least

    def step(self, noise_scale: float, batch: float) -> int:
        """The micro-batches of the next step, after one of weight `batch` (tokens); both in the same unit."""
        direction = (noise_scale > 2 * batch) - (noise_scale < batch / 2)
        self.votes = direction * (abs(self.votes) + 1 if direction * self.votes >= 0 else 1)
        if abs(self.votes) >= self.patience:
            self.count = min(self.most, max(self.least, self.count * 2 if direction > 0 else self.count // 2))
            self.votes = 0
        return self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count, "votes": self.votes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError for a count outside of the bounds."""
        if not self.least <= state["count"] <= self.most:
            raise ConfigError(
                f"the batch had grown to {state['count']} micro-batches; expected {self.least} to {self.most}. Resume with bounds "
                f"that hold it."
            )
        self.count, self.votes = state["count"], state["votes"]
