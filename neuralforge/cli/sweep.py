"""`neuralforge sweep`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from ..errors import ConfigError
from ..train import config as configuration
from ..train.config import Config
from .flags import split_flags, whole_number
from .train import SHORT, configure

USAGE = """usage: neuralforge sweep --over=section.key=VALUE,VALUE,... [--over=...] [--seeds=N] [--out=FOLDER] [train's options]

Trains once for every combination of values and seed, one run after the other, and compares the validation losses at the
end: a table, sweep.json, sweep.png and sweep.svg. Started again, it does only what is left. A run that fails is told, and
the others go on.

  --over=KEY=VALUES   a key of `neuralforge train` and its values; those that hold commas themselves are separated by ;
  --seeds=N           runs for each combination, with seeds from train.seed on (1)
  --out=FOLDER        where the runs go (runs/sweep)

`neuralforge train --help` tells the other options, which hold for every run."""


def main(argv: list[str]) -> None:
    flags = split_flags(argv, [*configuration.keys(), *SHORT, "config", "over", "seeds"], ["help"])
    if ("help", None) in flags:
        print(USAGE)
        return
    over = dict(split_values(value) for name, value in flags if name == "over")
    if not over:
        raise ConfigError("nothing to sweep: say which key takes which values, as in --over=optimizer.lr=1e-3,3e-3,1e-2.")
    seeds = whole_number("seeds", dict(flags).get("seeds", "1"), 1)
    values = [("train.out", "runs/sweep")]
    values += [(SHORT.get(name, name), value) for name, value in flags if name not in ("over", "seeds")]
    base = configure(values, Config())
    out = Path(os.path.expanduser(base.train.out))

    from ..train import sweep

    trials = sweep.plan(base, over, seeds, out)
    outcomes = []
    for n, trial in enumerate(trials, start=1):
        outcome = sweep.finished(trial)
        known = " (from before)" if outcome else ""
        if outcome is None:
            try:
                outcome = sweep.execute(trial)
            except sweep.Interrupted:
                print(f"stopped at run {n} of {len(trials)}; the same command goes on with it")
                sys.exit(130)
        told = f"failed: {outcome.error}" if outcome.error else f"validation loss {outcome.loss:.4f}, {outcome.seconds:.0f} s{known}"
        print(f"[{n}/{len(trials)}] {trial.name}: {told}", flush=True)
        outcomes.append(outcome)
    sweep.write(outcomes, out)
    print_table(sweep.rows(outcomes), list(over))
    print(f"picture {out / 'sweep.png'}")


def split_values(text: str) -> tuple[str, list[str]]:
    """Key and values of `--over`. Raises ConfigError."""
    key, equals, values = text.partition("=")
    found = [value.strip() for value in values.split(";" if ";" in values else ",")]
    if not equals or not all(found):
        raise ConfigError(f"--over={text}; expected a key and its values, as in --over=optimizer.lr=1e-3,3e-3,1e-2.")
    return key, found


def print_table(found: list, varied: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*varied, "validation loss", "seeds", "seconds", "failed")
    for row in found:
        spread = "" if math.isnan(row.spread) else f" ± {row.spread:.4f}"
        loss = f"{row.mean:.4f}{spread}" if row.losses else "none"
        seconds = f"{row.seconds:.0f}" if row.losses else ""
        table.add_row(*(str(row.values[key]) for key in varied), loss, str(len(row.losses)), seconds, str(row.failed or ""))
    Console().print(table)
