"""Training runs over values of configuration keys and seeds, one after the other, each in a process of its own: a run
that fails or is killed doesn't take the others along, and a sweep that is started again does only what is left."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import Config, dump, keys, load, resolve, set_key, toml_value
from .pictures import picture

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its values by key, and its complete configuration."""

    values: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.train.out)

    @property
    def name(self) -> str:
        return ", ".join([*(f"{k}={_shown(v)}" for k, v in self.values.items()), f"seed {self.config.train.seed}"])


@dataclass(frozen=True)
class Outcome:
    """Validation loss in nats per token and seconds of training, or what went wrong."""

    trial: Trial
    loss: float = math.nan
    seconds: float = math.nan
    error: str | None = None


class Interrupted(Exception):
    """The sweep was asked to stop; the run under way has saved itself."""


def plan(base: Config, over: dict[str, list[str]], seeds: int, out: Path) -> list[Trial]:
    """Every combination of the values in `over`, the texts of flags by key, times `seeds` seeds from the configuration's
    on. Raises ConfigError where a value doesn't fit, or where a folder holds a run of another configuration."""
    for key in over:
        if key not in keys() or key in ("train.out", "train.seed"):
            what = "--seeds says how many seeds" if key == "train.seed" else "expected a key of `neuralforge train --help`"
            raise ConfigError(f"--over {key}: can't be swept; {what}.")
    trials = {}
    for texts in itertools.product(*over.values()):
        config = base
        for key, text in zip(over, texts):
            config = set_key(config, key, text)
        values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in over}
        name = re.sub(r"[^\w.=,+-]", "_", ",".join(f"{key}={_shown(value)}" for key, value in values.items())) or "base"
        for seed in range(base.train.seed, base.train.seed + seeds):
            folder = out / name / f"seed-{seed}"
            config = replace(config, train=replace(config.train, seed=seed, out=str(folder)))
            trial = Trial(values, resolve(config))
            written = folder / "config.toml"
            if written.exists() and resolve(replace(load(written), train=replace(load(written).train, out=str(folder)))) != trial.config:
                raise ConfigError(f"{folder}: a run of another configuration is there. Choose another folder with --out.")
            trials[folder] = trial  # one, also if a value is given twice
    return list(trials.values())


def finished(trial: Trial) -> Outcome | None:
    """What a run that is through has come to; None if it isn't."""
    loss, seconds = None, 0.0
    try:
        for line in (trial.folder / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            seconds += entry.get("seconds", 0.0)
            if entry["step"] == trial.config.train.steps:
                loss = entry.get("valid_loss", loss)
    except (OSError, ValueError):  # not begun, or its last line was cut
        return None
    return None if loss is None else Outcome(trial, loss, seconds)


def execute(trial: Trial) -> Outcome:
    """Run or go on with a trial; its output goes to `output.txt` in its folder. Raises Interrupted on Ctrl-C or SIGTERM, once
    the run has saved itself."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    written = trial.folder / "config.toml"
    written.write_text(dump(trial.config), encoding="utf-8")
    command = [sys.executable, "-m", "neuralforge.cli", "train", f"--config={written}"]
    command += ["--resume"] * any((trial.folder / CHECKPOINTS).glob("*/metadata.json"))
    environment = {**os.environ, "COLUMNS": "100000"}  # so that an error is one line
    with open(trial.folder / "output.txt", "a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment,
            start_new_session=True,  # Ctrl-C in the terminal comes here, and goes on from here
        )  # fmt: skip
        with _passed_on(process) as asked:
            told = process.communicate()[1]
        output.write(told)
    if asked:
        raise Interrupted
    outcome = finished(trial)
    if process.returncode == 0 and outcome is not None:
        return outcome
    if process.returncode < 0:
        why = f"killed by {signal.Signals(-process.returncode).name}, perhaps for want of memory"
    else:
        why = (told.strip().splitlines() or [f"exit code {process.returncode}"])[-1].removeprefix("error: ")
    return Outcome(trial, error=why)


@contextmanager
def _passed_on(process: subprocess.Popen) -> Iterator[list[int]]:
    """Within, signals to stop go to `process`, and are in the list that this yields."""
    asked: list[int] = []

    def handler(number: int, frame: Any) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, old in before.items():
            signal.signal(s, old)


@dataclass(frozen=True)
class Row:
    """The runs of one combination of values."""

    values: dict[str, Any]
    losses: list[float]
    seconds: float
    failed: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses) if self.losses else math.inf

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else math.nan


def rows(outcomes: list[Outcome]) -> list[Row]:
    """Seeds taken together, the lowest loss first."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(repr(outcome.trial.values), []).append(outcome)
    found = []
    for group in groups.values():
        good = [o for o in group if o.error is None]
        seconds = statistics.fmean(o.seconds for o in good) if good else math.nan
        found.append(Row(group[0].trial.values, [o.loss for o in good], seconds, len(group) - len(good)))
    return sorted(found, key=lambda row: row.mean)


def write(outcomes: list[Outcome], out: Path) -> None:
    """`sweep.json`, an entry a run, and the picture as sweep.png and sweep.svg."""
    finite = lambda x: x if math.isfinite(x) else None
    entries = [
        {**o.trial.values, "seed": o.trial.config.train.seed, "valid_loss": finite(o.loss), "seconds": finite(o.seconds), "error": o.error}
        for o in outcomes
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(json.dumps(entries, indent=1) + "\n")
    draw(rows(outcomes), out)


def draw(found: list[Row], out: Path) -> None:
    """Validation loss over the key with the most numeric values, a line for each combination of the others."""
    found = [row for row in found if row.losses]
    varied = list(found[0].values) if found else []
    count = lambda key: len({repr(row.values[key]) for row in found})
    numeric = [k for k in varied if all(type(row.values[k]) in (int, float) for row in found)]
    x = max(numeric or varied, key=count, default=None)
    lines: dict[str, list[Row]] = {}
    for row in found:
        lines.setdefault(", ".join(f"{k}={_shown(v)}" for k, v in row.values.items() if k != x), []).append(row)
    with picture(out / "sweep.png", out / "sweep.svg") as axes:
        for label, line in lines.items():
            line = sorted(line, key=lambda row: row.values[x]) if x in numeric else line
            at = [row.values[x] if x in numeric else _shown(row.values[x]) if x else "base" for row in line]
            (drawn,) = axes.plot(at, [row.mean for row in line], marker="o", label=label if len(lines) > 1 else None)
            for place, row in zip(at, line):
                axes.plot([place] * len(row.losses), row.losses, ".", color=drawn.get_color(), alpha=0.4)
        if x in numeric and (at := [row.values[x] for row in found]) and min(at) > 0 and max(at) >= 8 * min(at):
            axes.set_xscale("log")
        axes.set(xlabel=x or "", ylabel="validation loss (nats per token)")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else toml_value(value)
