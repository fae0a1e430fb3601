"""Schedules against torch.optim.lr_scheduler, optax and formulas in float64."""

import math

import optax
import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

import neuralforge as nf
from neuralforge.errors import ConfigError
from neuralforge.optim import schedules

STEPS = 120


def ours(schedule, steps=STEPS):
    captured = nf.jit(schedule)
    rates = [captured(torch.tensor(n)) for n in range(steps)]
    assert all(rate.dtype == torch.float64 and rate.shape == () for rate in rates)
    assert len(captured.programs) == 1, "nothing recompiles from step to step"
    return [rate.item() for rate in rates]


def theirs(make, lr=0.7, steps=STEPS):
    """The rates of a torch scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def warm(warmup):
    """torch's way to the same warm-up."""
    return lambda o: torch_schedules.LambdaLR(o, lambda n: min(1.0, (n + 1) / warmup))


def warmed(rates, warmup):
    """Rates that begin when `warmup` steps are over, at the peak meanwhile, times the ramp."""
    peak = rates[0]
    return [min(1, (n + 1) / warmup) * (peak if n < warmup else rates[n - warmup]) for n in range(len(rates))]


def cosine(period, growth):
    return theirs(lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, T_0=period, T_mult=growth, eta_min=0.07))


def one_cycle(**options):
    return theirs(lambda o: torch_schedules.OneCycleLR(o, max_lr=0.7, total_steps=STEPS, cycle_momentum=False, **options), steps=STEPS - 1)


CASES = {
    "constant": (schedules.constant(0.7, warmup=9), lambda: theirs(warm(9))),
    "linear": (
        schedules.linear(0.7, 100, final=0.25),
        lambda: theirs(lambda o: torch_schedules.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=100)),
    ),
    "linear, warm-up": (
        schedules.linear(0.7, 109, warmup=9, final=0.25),
        lambda: warmed(theirs(lambda o: torch_schedules.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=100)), 9),
    ),
    "cosine": (
        schedules.cosine(0.7, 119, warmup=19, final=0.1),
        lambda: warmed(list(map(float, map(optax.cosine_decay_schedule(0.7, 100, alpha=0.1), range(STEPS)))), 19),
    ),
    "restarts": (schedules.cosine_restarts(0.7, 25, final=0.1), lambda: cosine(25, 1)),
    "restarts, doubling": (schedules.cosine_restarts(0.7, 7, growth=2, final=0.1), lambda: cosine(7, 2)),
    "restarts, tripling, warm-up": (schedules.cosine_restarts(0.7, 5, growth=3, warmup=12, final=0.1), lambda: warmed(cosine(5, 3), 12)),
    "wsd": (
        schedules.wsd(0.7, 100, warmup=10, decay=0.3, final=0.1),
        lambda: [0.7 * min(1, (n + 1) / 10) * (1 - 0.9 * min(1, max(0, n - 70) / 30)) for n in range(STEPS)],
    ),
    "inverse square root": (
        schedules.inverse_sqrt(0.7, warmup=16),
        lambda: [0.7 * 4 * min((n + 1) ** -0.5, (n + 1) * 16**-1.5) for n in range(STEPS)],
    ),
    "inverse square root, timescale": (
        schedules.inverse_sqrt(0.7, warmup=5, timescale=40),
        lambda: [0.7 * min((n + 1) / 5, math.sqrt(40 / (40 + max(0, n + 1 - 5)))) for n in range(STEPS)],
    ),
    "one cycle": (schedules.one_cycle(0.7, STEPS, warmup=36), lambda: one_cycle()),
    "one cycle, linear": (
        schedules.one_cycle(0.7, STEPS, warmup=60, start=0.1, final=0.001, shape="linear"),
        lambda: one_cycle(pct_start=0.5, anneal_strategy="linear", div_factor=10, final_div_factor=100),
    ),
    "steps": (
        schedules.piecewise(0.7, {20: 0.1, 50: 0.01}, shape="steps"),
        lambda: theirs(lambda o: torch_schedules.MultiStepLR(o, [20, 50])),
    ),
    "lines": (
        schedules.piecewise(0.7, {10: 1.0, 30: 0.25, 100: 0.5}),
        lambda: list(map(float, map(optax.piecewise_interpolate_schedule("linear", 0.7, {10: 1.0, 30: 0.25, 100: 2.0}), range(STEPS)))),
    ),
    "joined": (
        schedules.join([schedules.constant(0.2, warmup=8), schedules.linear(0.7, 40), schedules.constant(0.05)], [20, 70]),
        lambda: [0.2 * min(1, (n + 1) / 8) if n < 20 else 0.7 * (1 - min(1, (n - 20) / 40)) if n < 70 else 0.05 for n in range(STEPS)],
    ),
    "joined as optax": (
        schedules.join([schedules.linear(0.7, 30), schedules.cosine(0.3, 50, final=0.0)], [25]),
        lambda: list(map(float, map(optax.join_schedules([optax.linear_schedule(0.7, 0.0, 30), optax.cosine_decay_schedule(0.3, 50)], [25]), range(STEPS)))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_schedule(name):
    schedule, reference = CASES[name]
    expected = reference()
    single = any(word in name for word in ("cosine", "lines", "optax"))  # optax computes in float32
    assert ours(schedule, len(expected)) == pytest.approx(expected, rel=1e-12, abs=1e-7 if single else 1e-14)


def test_a_restart_starts_at_the_peak_after_a_million_steps():
    period = 3
    rate = schedules.cosine_restarts(1.0, period, growth=2)
    start = period * (2**20 - 1)
    length = period * 2**20
    at = lambda n: rate(torch.tensor(n)).item()
    assert at(start) == 1.0 and at(start - 1) < 1e-10
    assert at(start + length // 2) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"factor": 0.5, "patience": 2}, {"patience": 1, "cooldown": 3, "least": 0.05}, {"threshold": 0.1, "patience": 0}])
def test_reduce_on_plateau_equals_torch(options):
    generator = torch.Generator().manual_seed(3)
    losses = (3 / torch.arange(1, 200).sqrt() + 0.3 * torch.rand(199, generator=generator)).double()
    losses[30] = math.nan
    plateau = schedules.reduce_on_plateau(**options)
    state, observe = plateau.init(), nf.jit(plateau.observe)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    renamed = {{"least": "min_lr"}.get(name, name): value for name, value in options.items()}
    reference = torch_schedules.ReduceLROnPlateau(optimizer, **{**renamed, "eps": 0})
    for loss in losses:
        state = observe(state, loss)
        reference.step(loss.item())
        assert state["share"].item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        assert (state["bad"], state["cooling"]) == (reference.num_bad_epochs, reference.cooldown_counter)
    assert state["share"] < 1, "the losses have a plateau"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.constant(-1.0), r"constant: lr=-1\.0; expected a number of at least 0"),
        (lambda: schedules.constant(math.nan), "constant: lr=nan"),
        (lambda: schedules.constant(1.0, warmup=-1), "warmup=-1; expected a whole number of at least 0"),
        (lambda: schedules.linear(1.0, 0), "linear: steps=0; expected a whole number of at least 1"),
        (lambda: schedules.cosine(1.0, 10, warmup=11), r"cosine: warmup=11; expected a whole number in \[0, 10\]"),
        (lambda: schedules.cosine(1.0, 10, final=-0.1), r"final=-0\.1"),
        (lambda: schedules.wsd(1.0, 10, decay=1.5), r"wsd: decay=1\.5; expected a number in \[0, 1\]"),
        (lambda: schedules.cosine_restarts(1.0, 2.5), r"period=2\.5; expected a whole number"),
        (lambda: schedules.cosine_restarts(1.0, 2, growth=0), "growth=0; expected a whole number of at least 1"),
        (lambda: schedules.inverse_sqrt(1.0), "timescale=0; expected a whole number of at least 1"),
        (lambda: schedules.one_cycle(1.0, 10, warmup=0), r"warmup=0; expected a whole number in \[1, 10\]"),
        (lambda: schedules.one_cycle(1.0, 10, warmup=3, shape="cos"), "shape='cos'; expected cosine or linear"),
        (lambda: schedules.piecewise(1.0, {}), r"points=\{\}; expected at least one"),
        (lambda: schedules.piecewise(1.0, {-1: 0.5}), r"points=\{-1: 0\.5\}"),
        (lambda: schedules.join([schedules.constant(1.0)] * 2, []), r"boundaries=\[\] between 2 schedules; expected 1 rising"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 5]), r"boundaries=\[5, 5\]"),
        (lambda: schedules.reduce_on_plateau(factor=1.5), r"factor=1\.5; expected a number in \[0, 1\]"),
        (lambda: schedules.reduce_on_plateau(patience=-1), "patience=-1"),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
