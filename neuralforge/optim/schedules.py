"""Learning rate by step. Each maker returns a function of the number of finished updates, an int64 scalar tensor, that
gives the rate for the next one as a float64 scalar; it is captured in the step, so nothing recompiles as it moves."""

from __future__ import annotations

import math

import torch

from ..errors import ConfigError
from .base import Schedule


def constant(lr: float, warmup: int = 0) -> Schedule:
    """`lr` after a linear warm-up of `warmup` steps."""
    return lambda step: lr * _warm(step, warmup)


def linear(lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up, then linear decay to `final * lr` at step `steps`."""
    _check(steps, warmup)
    return lambda step: lr * _warm(step, warmup) * (1 - (1 - final) * _progress(step, warmup, steps))


def cosine(lr: float, steps: int, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine to `final * lr` at step `steps` (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983)."""
    _check(steps, warmup)

    def rate(step: torch.Tensor) -> torch.Tensor:
        wave = 0.5 + 0.5 * torch.cos(math.pi * _progress(step, warmup, steps))
        return lr * _warm(step, warmup) * (final + (1 - final) * wave)

    return rate


def wsd(lr: float, steps: int, warmup: int = 0, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: constant but for the warm-up and a linear fall to `final * lr` over the last share
    `decay` of the steps (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""
    _check(steps, warmup)
    start = steps - max(1, round(decay * steps))
    return lambda step: lr * _warm(step, warmup) * (1 - (1 - final) * _progress(step, start, steps))


def _warm(step: torch.Tensor, warmup: int) -> torch.Tensor:
    return ((step.to(torch.float64) + 1) / max(warmup, 1)).clamp(max=1.0)


def _progress(step: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return ((step.to(torch.float64) - start) / max(end - start, 1)).clamp(0.0, 1.0)


def _check(steps: int, warmup: int) -> None:
    if not 0 <= warmup <= steps:
        raise ConfigError(f"schedule: warmup={warmup} of steps={steps}; expected 0 <= warmup <= steps.")
