"""The learning rate that a configuration asks for."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import torch

from ..optim import schedules
from .config import Config, schedule_points
from .pictures import picture


def make_schedule(config: Config) -> schedules.Schedule:
    """Of a resolved configuration. That of reduce_on_plateau is constant, for `make_plateau` to lower."""
    s = config.schedule
    maker = schedules.constant if s.name == "reduce_on_plateau" else getattr(schedules, s.name)
    known = {**vars(s), "lr": config.optimizer.lr, "steps": config.train.steps, "points": schedule_points(s)}
    return maker(**{name: known[name] for name in signature(maker).parameters if name in known})


def make_plateau(config: Config) -> schedules.Plateau | None:
    """What lowers the rate when the validation loss stalls, where the configuration asks for it."""
    s = config.schedule
    if s.name != "reduce_on_plateau":
        return None
    return schedules.reduce_on_plateau(s.factor, s.patience, s.threshold, s.cooldown, least=s.final)


def rates(config: Config, most: int = 2000) -> tuple[list[int], list[float]]:
    """Steps, all of them or `most` evenly spaced ones, and the rates there."""
    schedule, last = make_schedule(config), config.train.steps - 1
    steps = range(last + 1) if last < most else sorted({round(i * last / (most - 1)) for i in range(most)})
    return list(steps), [schedule(torch.tensor(step)).item() for step in steps]


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """Rates over steps, a labelled line each, as a picture of the kind that the file's name says."""
    with picture(path, height=3.5) as axes:
        for label, (steps, found) in curves.items():
            axes.plot(steps, found, label=label)
        axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
