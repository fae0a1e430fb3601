"""`neuralforge schedule`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError
from ..train.config import Config, keys
from .flags import split_flags
from .train import configure, resolve_with_places

KEYS = [key for key in keys() if key.startswith("schedule.") or key in ("optimizer.lr", "train.steps")]

USAGE = """usage: neuralforge schedule [--config=FILE.toml] [--section.key=value ...] [--picture=FILE]

Shows the learning rate of a training run over its steps, and draws it.

  --picture=FILE      where to draw it, .png or .svg (schedule.png)
  --steps=N           short for --train.steps
  --config=FILE.toml  a configuration of `neuralforge train`
""" + "".join(f"  --{key}=\n" for key in KEYS) + "\n`neuralforge train --help` tells what the keys mean."


def main(argv: list[str]) -> None:
    flags = split_flags(argv, [*KEYS, "steps", "config", "picture"], ["help"])
    if ("help", None) in flags:
        print(USAGE)
        return
    given = {name: value for name, value in flags if name == "picture"}
    values = [("train.steps" if name == "steps" else name, value) for name, value in flags if name != "picture"]
    config = resolve_with_places(configure(values, Config()), values)
    picture = picture_path(given.get("picture", "schedule.png"))

    from ..train.schedule import draw, rates

    steps, found = rates(config)
    print(f"{config.schedule.name}, {config.train.steps} steps, of them {config.schedule.warmup} of warm-up")
    print(sparkline(found))
    for part in (0, 0.25, 0.5, 0.75, 1):
        n = round(part * (len(steps) - 1))
        print(f"  step {steps[n] + 1:>9,}  {found[n]:.3g}")
    print(f"  highest         {max(found):.3g}")
    if config.schedule.name == "reduce_on_plateau":
        print("  times what falls with the validation loss, which isn't known here")
    draw({config.schedule.name: (steps, found)}, picture)
    print(f"picture {picture}")


def picture_path(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture={text}; expected a name that ends in .png or .svg.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--picture={text}: can't be written: there is no folder {path.parent}.")
    return path


def sparkline(values: list[float], width: int = 72) -> str:
    """Values as a line of bars of eight heights."""
    n = min(width, len(values))
    columns = [values[i * (len(values) - 1) // max(n - 1, 1)] for i in range(n)]
    top = max(columns) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in columns)
