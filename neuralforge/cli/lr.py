"""`neuralforge lr`."""

from __future__ import annotations

from ..train.config import Config, keys
from .flags import number, split_flags, whole_number
from .schedule import picture_path
from .train import SHORT, configure, resolve_with_places

UNUSED = {"optimizer.lr", "train.out", "train.steps", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "train.keep"}
KEYS = [key for key in keys() if key not in UNUSED and not key.startswith(("schedule.", "sample."))]

USAGE = """usage: neuralforge lr [--low=RATE] [--high=RATE] [--steps=N] [--picture=FILE] [train's options]

Looks for a learning rate: trains while the rate rises from one to the other by the same factor each step (Smith 2017), tells
where the loss fell fastest and where it was lowest, suggests a peak rate between, and draws it. Nothing of the training is kept.

  --low=RATE          first rate (1e-6)
  --high=RATE         last rate (1)
  --steps=N           steps in between (200)
  --picture=FILE      where to draw it, .png or .svg (lr.png)

`neuralforge train --help` tells the other options; those of the schedule, of validation and of the run's folder have no
meaning here."""


def main(argv: list[str]) -> None:
    own = ["low", "high", "steps", "picture"]
    short = {name: key for name, key in SHORT.items() if key in KEYS}
    flags = split_flags(argv, [*KEYS, *short, "config", *own], ["help"])
    if ("help", None) in flags:
        print(USAGE)
        return
    given = {name: value for name, value in flags if name in own}
    low, high = number("low", given.get("low", "1e-6")), number("high", given.get("high", "1"))
    steps = whole_number("steps", given.get("steps", "200"), 10)
    picture = picture_path(given.get("picture", "lr.png"))
    values = [(short.get(name, name), value) for name, value in flags if name not in own]
    values += [("train.steps", str(steps)), ("schedule.warmup", "none")]
    config = resolve_with_places(configure(values, Config()), values)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ..train import rate_test

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("trying", total=steps, facts="")
        show = lambda n, rate, loss: bar.update(task, completed=n, facts=f"rate {rate:.2e}  loss {loss:.3f}")
        found = rate_test.rate_test(config, low, high, show)
    print(f"fastest fall  {found.steepest:.2g}")
    print(f"lowest loss   {found.lowest:.2g}")
    print(f"suggestion    {found.suggestion:.2g}, between them: try --optimizer.lr={found.suggestion:.2g}")
    if found.lowest >= found.rates[-1]:
        print(f"The loss was still falling at {found.rates[-1]:.2g}: a higher --high would tell more.")
    rate_test.draw(found, picture)
    print(f"picture       {picture}")
