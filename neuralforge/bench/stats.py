"""Timing on a machine that others use too: candidates take turns in one process, and the figures are best and median,
wall and CPU time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int = 10, warmup: int = 1) -> dict[str, Timing]:
    """Run each candidate once a round, `rounds` rounds after `warmup` unmeasured ones."""
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(warmup + rounds):
        for name, run in candidates.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if n >= warmup:
                wall[name].append(time.perf_counter() - wall_start)
                cpu[name].append(time.process_time() - cpu_start)
    return {name: Timing(wall[name], cpu[name]) for name in candidates}


def ratio_interval(a: list[float], b: list[float], confidence: float = 0.95, draws: int = 2000) -> tuple[float, float, float]:
    """Median of the per-round ratios a/b, with a bootstrap interval: rounds are pairs, since a busy moment hits both."""
    ratios = [x / y for x, y in zip(a, b)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    cut = int((1 - confidence) / 2 * draws)
    return statistics.median(ratios), medians[cut], medians[-1 - cut]
