"""What a run tells: the progress bar, the metrics file, the curve, the last words."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ..bench import product_peak
from ..data import Dataset
from ..files import write_atomic
from ..models import ModelConfig
from .config import Config
from .pictures import picture
from .step import DTYPES


class Report:
    """Prints to the terminal and appends to `metrics.jsonl` in the run's folder (a line a step: the step's metrics,
    among them loss in nats per token; seconds, tokens per second, share of the measured peak)."""

    def __init__(self, config: Config, out: Path):
        self.config, self.out = config, out
        self.console = Console(highlight=False)
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        (self._bar.console if self._bar else self.console).print(text, markup=False)

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yields what `data.prepare` tells its progress to: (stage, bytes done, bytes in all)."""
        columns = (TextColumn("{task.description} the text"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def progress(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)

            yield progress

    @contextmanager
    def run(self, done: int, model: ModelConfig, dataset: Dataset, baseline: float, peak: float) -> Iterator[None]:
        """The facts of the run, then its progress; `baseline` is the bigram model's loss, `peak` the machine's FLOP/s."""
        self.model, self.dataset, self.baseline, self.peak = model, dataset, baseline, peak
        self._drop_lines_after(done)
        self.note(
            f"model   {self.model.kind}, {self.model.parameter_count() / 1e6:.1f} M parameters, "
            f"{self.model.n_layers} layers of width {self.model.d_model}"
        )
        self.note(
            f"data    {dataset.source}: {len(dataset.train) / 1e6:.2f} M tokens to train on, {len(dataset.valid) / 1e6:.2f} M "
            f"held out, {dataset.bytes_per_token:.2f} bytes per token"
        )
        self.note(f"bigram  {baseline:.3f} nats per token on the held-out text: the loss to beat")
        self.note(f"into    {self.out}" + (f", resumed at step {done}" if done else ""))
        self._began, self._first = time.perf_counter(), done
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip; all of it fits into 80 columns
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("training", total=self.config.train.steps, completed=self._first, facts="")
            yield
        self._bar = None

    def step(self, done: int, metrics: dict[str, Any], seconds: float, micro_batches: int) -> None:
        tokens = micro_batches * self.config.train.batch * self.config.model.context
        rate = tokens / seconds
        share = rate * self.model.flops_per_token() / self.peak
        self._bar.update(
            self._task, completed=done, facts=f"loss {metrics['loss']:.3f}  {rate:,.0f} tokens/s  {share:.0%} of peak"
        )
        self._write(step=done, **metrics, tokens=tokens, seconds=seconds, tokens_per_second=rate, peak_share=share)

    def validation(self, done: int, loss: float) -> None:
        self.note(f"step {done:>6}  validation loss {loss:.3f}, {self._bits(loss):.3f} bits per byte")
        self._write(step=done, valid_loss=loss)

    def finished(self, valid_loss: float | None) -> None:
        if valid_loss is not None:
            gap = self.baseline - valid_loss
            verdict = f"{gap:.3f} below" if gap > 0 else f"{-gap:.3f} above"
            self.note(
                f"done    validation loss {valid_loss:.3f} ({self._bits(valid_loss):.3f} bits per byte), {verdict} the bigram "
                f"model's {self.baseline:.3f}; {time.perf_counter() - self._began:.0f} s"
            )
        self.note(f"curve   {self.out / 'loss.png'}")

    def interrupted(self, done: int) -> None:
        self.note(f"stopped and saved at step {done}; go on with: neuralforge train --resume --out {self.out}")

    def sample(self, text: str) -> None:
        self.note("sample\n")
        self.note(text)

    def _bits(self, loss: float) -> float:
        return loss / math.log(2) / self.dataset.bytes_per_token

    def _write(self, **line: Any) -> None:
        line = json.loads(json.dumps(line), parse_constant=lambda name: None)  # JSON has no infinity
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def _drop_lines_after(self, done: int) -> None:
        """Steps beyond the checkpoint that a resumed run starts from will be written again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            kept = b"".join(line for line in path.read_bytes().splitlines(True) if _step(line) <= done)
            write_atomic(path, kept)


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a process that was killed, or a damaged one
        return math.inf


def draw_curve(out: Path) -> None:
    """Draw `metrics.jsonl` as loss.png and loss.svg."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    valid = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    with picture(out / "loss.png", out / "loss.svg") as axes:
        if train:
            axes.plot(*zip(*train), linewidth=1, label="training")
        if valid:
            axes.plot(*zip(*valid), marker="o", label="validation")
        axes.set(xlabel="step", ylabel="loss (nats per token)")


def print_plan(config: Config) -> None:
    """What a run would do, without doing it: model, work, and time at half of the measured peak."""
    model, train = config.model_config(), config.train
    tokens = train.batch * train.accumulate * config.model.context
    flops = tokens * model.flops_per_token()
    peak = product_peak(DTYPES[train.precision] or torch.float32)
    print(f"model       {model}")
    print(f"parameters  {model.parameter_count():,}")
    print(f"step        {tokens:,} tokens, {flops / 1e9:,.1f} GFLOP, {flops / peak.value:.3f} s at the measured peak of "
          f"{peak.value / 1e9:,.0f} GFLOP/s ({peak.how})")  # fmt: skip
    print(f"run         {train.steps:,} steps, {train.steps * tokens / 1e6:,.1f} M tokens, at least "
          f"{train.steps * flops / peak.value / 60:.1f} minutes")  # fmt: skip
    state = 3 * 4 * model.parameter_count()
    print(f"state       {state / 1e6:,.1f} MB of parameters and moments")
