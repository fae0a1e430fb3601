"""Timing on a machine that others use too: candidates take turns in one process, and the figures are best and
quartiles, wall and CPU time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate; `cpu` counts all threads of the process."""

    wall: list[float]
    cpu: list[float]

    @property
    def best(self) -> float:
        return min(self.wall)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        if len(self.wall) == 1:
            return self.wall[0], self.wall[0]
        first, _, third = statistics.quantiles(self.wall, n=4, method="inclusive")
        return first, third

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int = 10, warmup: int = 1) -> dict[str, Timing]:
    """Run each candidate once a round, `rounds` rounds after `warmup` unmeasured ones. Every other round goes
    backwards, so that none always runs after the same neighbour."""
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(warmup + rounds):
        order = list(candidates) if n % 2 == 0 else list(reversed(candidates))
        for name in order:
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            candidates[name]()
            wall_time, cpu_time = time.perf_counter() - wall_start, time.process_time() - cpu_start
            if n >= warmup:
                wall[name].append(wall_time)
                cpu[name].append(cpu_time)
    return {name: Timing(wall[name], cpu[name]) for name in candidates}


def ratio_interval(a: list[float], b: list[float], confidence: float = 0.95, draws: int = 2000) -> tuple[float, float, float]:
    """Median of the per-round ratios a/b, with a bootstrap interval: rounds are pairs, since a busy moment hits both."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    cut = int((1 - confidence) / 2 * draws)
    return statistics.median(ratios), medians[cut], medians[-1 - cut]


def timing_table(timings: dict[str, Timing], title: str, columns: dict[str, dict[str, str]] | None = None) -> Table:
    """Milliseconds of each candidate; how much longer it takes than the first, with a 95 % interval; and the given
    `columns`, {heading: {candidate: text}}."""
    columns = columns or {}
    base = next(iter(timings))
    table = Table(title=title)
    headings = ["best ms", "median ms", "quartiles ms", "CPU ms", f"time / {base}", *columns]
    for heading in ["", *headings]:
        table.add_column(heading, justify="right" if heading else "left")
    for name, t in timings.items():
        first, third = t.quartiles
        middle, low, high = ratio_interval(t.wall, timings[base].wall)
        ratio = "1" if name == base else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        ms = lambda seconds: f"{seconds * 1e3:.{0 if seconds >= 0.1 else 2}f}"
        table.add_row(
            name, ms(t.best), ms(t.median), f"{ms(first)} to {ms(third)}", ms(t.cpu_median), ratio,
            *(column.get(name, "") for column in columns.values()),
        )  # fmt: skip
    return table
