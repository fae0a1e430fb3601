"""Learning rate by step. Each maker returns a function of the number of finished updates, an int64 scalar tensor, that
gives the rate for the next one as a float64 scalar; it is captured in the step, so nothing recompiles as it moves.

Warm-up is linear: with `warmup=4` the first updates have 1/4, 2/4, 3/4 and 4/4 of the rate. Every maker raises ConfigError
for a value that makes no sense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch

from ..errors import ConfigError

Schedule = Callable[[torch.Tensor], torch.Tensor]
"""Learning rate by step: a function of the number of finished updates (an int64 scalar tensor)."""

State = dict[str, torch.Tensor]


def constant(lr: float, warmup: int = 0) -> Schedule:
    """`lr` after the warm-up."""
    _check("constant", lr=lr, warmup=warmup)
    return lambda step: lr * _warm(step, warmup)


def linear(lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up, then linear decay to `final * lr` at step `steps`."""
    _check("linear", lr=lr, steps=steps, warmup=warmup, final=final)
    return lambda step: lr * _warm(step, warmup) * (1 - (1 - final) * _progress(step, warmup, steps))


def cosine(lr: float, steps: int, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Warm-up, then half a cosine to `final * lr` at step `steps` (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983, without restarts)."""
    _check("cosine", lr=lr, steps=steps, warmup=warmup, final=final)
    return lambda step: lr * _warm(step, warmup) * _mix(1.0, final, _wave(_progress(step, warmup, steps)))


def cosine_restarts(lr: float, period: int, growth: int = 1, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine over `period` steps to `final * lr`, again and again, each `growth` times as long as
    the one before (SGDR, https://arxiv.org/abs/1608.03983; T_0 and T_mult of torch's CosineAnnealingWarmRestarts)."""
    _check("cosine_restarts", lr=lr, period=period, growth=growth, warmup=warmup, final=final)
    starts = [0]  # beyond 2**53 steps, float64 can't count them
    while growth > 1 and starts[-1] < 2**53:
        starts.append(starts[-1] * growth + period)

    def rate(step: torch.Tensor) -> torch.Tensor:
        after = (step - warmup).clamp(min=0)
        if growth == 1:
            done = (after % period).to(torch.float64) / period
        else:
            start = torch.where(after >= torch.tensor(starts), torch.tensor(starts), 0).max()
            done = (after - start).to(torch.float64) / (start * (growth - 1) + period)
        return lr * _warm(step, warmup) * _mix(1.0, final, _wave(done))

    return rate


def wsd(lr: float, steps: int, warmup: int = 0, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: constant but for the warm-up and a linear fall to `final * lr` over the last share
    `decay` of the steps (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""
    _check("wsd", lr=lr, steps=steps, warmup=warmup, decay=decay, final=final)
    start = steps - max(1, round(decay * steps))
    return lambda step: lr * _warm(step, warmup) * (1 - (1 - final) * _progress(step, start, steps))


def inverse_sqrt(lr: float, warmup: int = 0, timescale: int | None = None) -> Schedule:
    """Warm-up, then `lr * sqrt(timescale / (n - warmup + timescale))` for the n-th update. Left out, the timescale is
    the warm-up: `lr * sqrt(warmup / n)` (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""
    timescale = warmup if timescale is None else timescale
    _check("inverse_sqrt", lr=lr, warmup=warmup, timescale=timescale)

    def rate(step: torch.Tensor) -> torch.Tensor:
        after = (step.to(torch.float64) + 1 - warmup).clamp(min=0.0)
        return lr * _warm(step, warmup) * (timescale / (timescale + after)).sqrt()

    return rate


def one_cycle(
    lr: float, steps: int, warmup: int, start: float = 0.04, final: float = 4e-6, shape: Literal["cosine", "linear"] = "cosine"
) -> Schedule:
    """From `start * lr` up to `lr` at the `warmup`-th update, then down to `final * lr` at the last (Smith & Topin 2018,
    https://arxiv.org/abs/1708.07120; torch's OneCycleLR, whose defaults are `warmup = 0.3 * steps` and these)."""
    _check("one_cycle", lr=lr, steps=steps, warmup=warmup, start=start, final=final)
    _require(shape in ("cosine", "linear"), f"one_cycle: {shape=}", "cosine or linear")
    bend = _wave if shape == "cosine" else (lambda done: done)

    def rate(step: torch.Tensor) -> torch.Tensor:
        up = _mix(start, 1.0, bend(_progress(step, 0, warmup - 1)))
        down = _mix(1.0, final, bend(_progress(step, warmup - 1, steps - 1)))
        return lr * torch.where(step < warmup - 1, up, down)

    return rate


def piecewise(lr: float, points: Mapping[int, float], shape: Literal["linear", "steps"] = "linear", warmup: int = 0) -> Schedule:
    """Straight lines through `points`, {step: share of lr}, constant before the first and after the last; or, with
    `shape="steps"`, each share from its step on (1 before the first), as torch's MultiStepLR."""
    _check("piecewise", lr=lr, warmup=warmup)
    _require(shape in ("linear", "steps"), f"piecewise: {shape=}", "linear or steps")
    sound = points and all(isinstance(n, Integral) and n >= 0 and 0 <= share < math.inf for n, share in points.items())
    _require(bool(sound), f"piecewise: points={dict(points)}", "at least one {step: share}, steps whole, both at least 0")
    at = sorted(points)

    def rate(step: torch.Tensor) -> torch.Tensor:
        share = torch.full_like(step, points[at[0]] if shape == "linear" else 1.0, dtype=torch.float64)
        for before, here in zip([None, *at], at):
            if shape == "steps":
                share = torch.where(step >= here, points[here], share)
            elif before is not None:
                share = torch.where(step >= before, _mix(points[before], points[here], _progress(step, before, here)), share)
        return lr * _warm(step, warmup) * share

    return rate


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """The first schedule up to step `boundaries[0]`, the second from there, and so on; each counts its steps from its own
    beginning (optax.join_schedules, torch's SequentialLR)."""
    rising = list(boundaries) == sorted(set(boundaries)) and min(boundaries, default=1) > 0
    _require(
        rising and len(boundaries) == len(schedules) - 1,
        f"join: boundaries={list(boundaries)} between {len(schedules)} schedules",
        f"{max(len(schedules) - 1, 1)} rising steps above 0, where one schedule hands over to the next",
    )

    def rate(step: torch.Tensor) -> torch.Tensor:
        out = schedules[0](step)
        for boundary, schedule in zip(boundaries, schedules[1:]):
            out = torch.where(step < boundary, out, schedule((step - boundary).clamp(min=0)))
        return out

    return rate


class Plateau(NamedTuple):
    """A share of the rate that falls when the validation loss does. `init() -> state`, a dictionary of scalar tensors
    whose float64 `share` multiplies the rate; `observe(state, loss) -> state` after each validation. The state goes into
    the step as an argument, so a new share compiles nothing, and into checkpoints as any tensor."""

    init: Callable[[], State]
    observe: Callable[[State, torch.Tensor | float], State]


def reduce_on_plateau(
    factor: float = 0.1, patience: int = 10, threshold: float = 1e-4, cooldown: int = 0, least: float = 0.0
) -> Plateau:
    """Multiply the rate by `factor`, down to the share `least`, once `patience` validations in a row were no better than
    the best one by the share `threshold` of it; then don't count for `cooldown` validations. The rule of torch's
    ReduceLROnPlateau, with its `min_lr` as a share."""
    _check("reduce_on_plateau", factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, least=least)

    def init() -> State:
        number = lambda x: torch.tensor(x, dtype=torch.float64)
        return {"share": number(1.0), "best": number(math.inf), "bad": torch.tensor(0), "cooling": torch.tensor(0)}

    def observe(state: State, loss: torch.Tensor | float) -> State:
        loss = torch.as_tensor(loss, dtype=torch.float64)
        better = loss < state["best"] - threshold * state["best"].abs().nan_to_num(posinf=0.0)
        bad = torch.where(better, 0, state["bad"] + 1)
        cooling = (state["cooling"] - 1).clamp(min=0)
        bad = torch.where(state["cooling"] > 0, 0, bad)
        reduce = bad > patience
        return {
            "share": torch.where(reduce, (state["share"] * factor).clamp(min=least), state["share"]),
            "best": torch.where(better, loss, state["best"]),
            "bad": torch.where(reduce, 0, bad),
            "cooling": torch.where(reduce, cooldown, cooling),
        }

    return Plateau(init, observe)


def _warm(step: torch.Tensor, warmup: int) -> torch.Tensor:
    return ((step.to(torch.float64) + 1) / max(warmup, 1)).clamp(max=1.0)


def _progress(step: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return ((step.to(torch.float64) - start) / max(end - start, 1)).clamp(0.0, 1.0)


def _wave(progress: torch.Tensor) -> torch.Tensor:
    return 0.5 - 0.5 * torch.cos(math.pi * progress)


def _mix(a: float, b: float, t: torch.Tensor) -> torch.Tensor:
    return a + (b - a) * t


_RANGES: dict[str, tuple[type, float, float]] = {
    "lr": (Real, 0, math.inf), "final": (Real, 0, math.inf), "start": (Real, 0, math.inf), "decay": (Real, 0, 1),
    "steps": (Integral, 1, math.inf), "warmup": (Integral, 0, math.inf), "period": (Integral, 1, math.inf),
    "growth": (Integral, 1, math.inf), "timescale": (Integral, 1, math.inf),
    "factor": (Real, 0, 1), "patience": (Integral, 0, math.inf), "threshold": (Real, 0, 1),
    "cooldown": (Integral, 0, math.inf), "least": (Real, 0, 1),
}  # fmt: skip


def _check(maker: str, **values: Any) -> None:
    """Raise ConfigError for the first value out of range."""
    for name, value in values.items():
        kind, least, most = _RANGES[name]
        if name == "warmup":
            least, most = 1 if maker == "one_cycle" else 0, values.get("steps", math.inf)
        if not (isinstance(value, kind) and least <= value <= most and value < math.inf):
            bounds = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
            raise ConfigError(f"{maker}: {name}={value!r}; expected a {'whole ' * (kind is Integral)}number {bounds}.")


def _require(ok: bool, told: str, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{told}; expected {expected}.")
