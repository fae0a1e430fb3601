"""The training run. Reads from top to bottom: prepare, step, evaluate, save, report."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import optim, resilience
from ..bench import product_peak
from ..compiler import jit
from ..data import Dataset, Sampler, Tokenizer, bigram_loss, prepare, validation_batches
from ..errors import CheckpointError
from ..files import write_atomic
from ..models import build, generate
from .config import Config, dump, load
from .report import Report, draw_curve, print_plan
from .schedule import make_plateau, make_schedule
from .step import DTYPES, State, curvature_due, make_optimizer, make_step, weights


def run(config: Config, resume: bool = False, dry_run: bool = False) -> None:
    """Train as `config` says, into the folder `config.train.out`. With `resume`, go on from its newest checkpoint,
    bit for bit as if never interrupted. With `dry_run`, print what would happen.

    Ctrl-C finishes the step under way, saves and leaves. Raises NeuralForgeError for what the user can mend.
    """
    out = Path(config.train.out).expanduser()
    if dry_run:
        return print_plan(config)
    start = checkpoint_to_resume(out, resume)
    check_writable(out)
    report = Report(config, out)
    dataset = prepare_data(config, report)
    batch, context = config.train.batch, config.model.context
    sampler = Sampler(dataset.train, batch=batch, context=context, seed=config.train.seed)  # of micro-batches
    train = config.train
    controller = optim.noise_scale.BatchController(train.accumulate, train.accumulate_most) if train.accumulate_most else None
    validation_batches(dataset.valid, batch, context, limit=1)  # is there text enough?

    torch.manual_seed(config.train.seed)
    model_config = config.model_config(dataset.tokenizer.vocab_size)
    model = build(model_config, config.train.seed)
    init, step_fn, loss_fn = make_step(model, config)
    plateau = make_plateau(config)
    step_fn, evaluate = jit(step_fn, donate=(0,)), jit(loss_fn)
    state: State = init()
    done, valid_loss = 0, None
    if start is not None:
        state, done, valid_loss = restore(start, state, sampler, controller)

    facts = {
        "baseline": bigram_loss(dataset.train, dataset.valid, model_config.vocab_size),
        "peak": product_peak(DTYPES[train.precision] or torch.float32).value,
    }

    def validate() -> float:
        model.eval()
        params = weights(config, state)
        batches = validation_batches(dataset.valid, batch, context, config.train.eval_batches)
        losses = [evaluate(params, b["tokens"]).item() for b in batches]
        model.train()
        return sum(losses) / len(losses)

    def save() -> None:
        wrong = next((name for name, p in state["params"].items() if not p.isfinite().all()), None)
        if wrong is not None:
            raise diverged(f"the parameter {wrong} isn't finite", done, out)
        tensors = {**resilience.flatten(state), "rng": torch.get_rng_state()}
        positions = {"sampler": sampler.state_dict(), "controller": controller and controller.state_dict()}
        metadata = {"step": done, **positions, "valid_loss": valid_loss}
        resilience.save(out / "checkpoints", f"step-{done:08d}", tensors, metadata, keep=config.train.keep)

    # All that could be wrong has been looked at.
    with run_folder(out, config, dataset, start), stop_requested() as stop, report.run(done, model_config, dataset, **facts):
        while done < config.train.steps and not stop():
            began = time.perf_counter()
            count = controller.count if controller else train.accumulate
            tokens = torch.cat([next(sampler)["tokens"] for _ in range(count)])
            state, metrics = step_fn(state, tokens, curvature_due(config, done))
            told = {name: metric.tolist() for name, metric in metrics.items()}
            if "grad_norms" in told:
                told["grad_norms"] = dict(zip(state["params"], told["grad_norms"]))
            loss = told["loss"]
            done += 1
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss}", done, out)
            if not math.isfinite(told["grad_norm"]) and train.precision != "fp16":  # there the step was skipped
                raise diverged(f"the gradient's norm is {told['grad_norm']}", done, out)
            report.step(done, told, time.perf_counter() - began, count)
            if controller:
                controller.step(told["noise_scale"], count * batch * context)
            last = done == config.train.steps
            if done % config.train.eval_every == 0 or last:
                valid_loss = validate()
                report.validation(done, valid_loss)
                if plateau:
                    state["plateau"] = plateau.observe(state["plateau"], valid_loss)
            if done % config.train.checkpoint_every == 0 or last or stop():
                save()
        interrupted = stop() and done < config.train.steps

    draw_curve(out)
    if interrupted:
        report.interrupted(done)
        sys.exit(130)
    report.finished(valid_loss)
    report.sample(sample(model, state, dataset, config))


def checkpoint_to_resume(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; None for a new run. Raises CheckpointError where there is none to resume, or
    where a new run would overwrite an old one."""
    newest = resilience.latest(out / "checkpoints")
    if resume and newest is None:
        raise CheckpointError(f"{out}: no checkpoint to resume from. Start the run without --resume.")
    if not resume and newest is not None:
        raise CheckpointError(
            f"{out}: a run is already here, at {newest.name}. Go on with it with --resume, or choose another folder "
            f"with --out."
        )
    return newest


def check_writable(out: Path) -> None:
    """Raises CheckpointError where the run's folder can't be made or written to; makes nothing yet."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise CheckpointError(f"{out}: can't make the run's folder: {nearest} is a file. Choose another with --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: can't write the run's folder: {nearest} isn't writable. Choose another with --out.")


def diverged(what: str, done: int, out: Path) -> CheckpointError:
    """The error of a run that can't go on, and how to."""
    before = resilience.checkpoints(out / "checkpoints")
    kept = f"the newest checkpoint before it is kept in {before[-1].parent}" if before else "no checkpoint was saved before it"
    mend = "resume from it" if before else "start anew"
    return CheckpointError(f"{what} at step {done}; {kept}. Lower --optimizer.lr or lengthen --schedule.warmup, and {mend}.")


def prepare_data(config: Config, report: Report) -> Dataset:
    data = config.data
    with report.preparing() as progress:
        return prepare(data.path, Path(data.cache), data.vocab_size, data.valid_fraction, data.text_field, progress)


@contextmanager
def run_folder(out: Path, config: Config, dataset: Dataset, start: Path | None) -> Iterator[None]:
    """The run's folder, with what is needed to use its checkpoints; it is this process's own meanwhile, and holds no checkpoint newer
    than `start`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise CheckpointError(f"{out}: can't make the run's folder: {e}. Choose another with --out.") from e
    with lock:  # goes with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = resilience.latest(out / "checkpoints") == start
        except BlockingIOError:
            free = False
        if not free:
            raise CheckpointError(f"{out}: another process trains into this folder. Choose another with --out, or go on with it later.")
        write_atomic(out / "config.toml", dump(config).encode())
        dataset.tokenizer.save(out / "tokenizer.json")
        yield


def restore(
    folder: Path, like: State, sampler: Sampler, controller: optim.noise_scale.BatchController | None
) -> tuple[State, int, float | None]:
    """The training state of a checkpoint; sets the sampler, the controller of the batch and the random generator."""
    tensors, metadata = resilience.load(folder)
    torch.set_rng_state(tensors.pop("rng"))
    state = resilience.unflatten(tensors, like)
    sampler.load_state_dict(metadata["sampler"])
    if controller and metadata["controller"]:
        controller.load_state_dict(metadata["controller"])
    return state, metadata["step"], metadata["valid_loss"]


def load_run(folder: Path) -> tuple[torch.nn.Module, Tokenizer, Config]:
    """Model, tokenizer and configuration of a finished or interrupted run. Raises CheckpointError if there is none."""
    newest = resilience.latest(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder}: no run with a checkpoint here. Train one with: neuralforge train --out {folder}")
    config = load(folder / "config.toml")
    tensors, _ = resilience.load(newest)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = build(config.model_config(tokenizer.vocab_size), 0)
    fresh = {name: p.detach() for name, p in model.named_parameters()}
    like = {"params": fresh, "optimizer": make_optimizer(config, make_schedule(config)).init(fresh)}
    own = {path: x for path, x in tensors.items() if path.partition(".")[0] in like}
    model.load_state_dict(weights(config, resilience.unflatten(own, like)), strict=False)
    return model, tokenizer, config


def sample(model: torch.nn.Module, state: State, dataset: Dataset, config: Config) -> str:
    """Text continued from the configured prompt by the trained weights."""
    model.load_state_dict(weights(config, state), strict=False)
    prompt = dataset.tokenizer.encode(config.sample.prompt)
    tokens = generate(
        model,
        torch.tensor([prompt]),
        config.sample.tokens,
        config.sample.temperature,
        config.sample.top_k,
        torch.Generator().manual_seed(config.train.seed),
    )
    return dataset.tokenizer.decode(tokens[0].tolist())


@contextmanager
def stop_requested() -> Iterator[Any]:
    """Within, the first Ctrl-C or SIGTERM only sets a flag, read by calling what this yields: a step works in place,
    so it must not be torn in the middle. A second Ctrl-C interrupts at once."""
    asked = False

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: no signals arrive here
        before = {}
    try:
        yield lambda: asked
    finally:
        for s, old in before.items():
            signal.signal(s, old)
