"""`neuralforge sweep` as a user runs it, on small models."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neuralforge.cli.main import main
from neuralforge.cli.sweep import split_values
from neuralforge.train.config import Config
from neuralforge.train.sweep import plan

TEXT = "\n".join(f"def square_{i}(x):\n    return x * x + {i}\n" for i in range(2000))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text(TEXT)
    return [
        f"--data={path}", f"--data.cache={tmp_path / 'cache'}", "--data.vocab_size=300", "--model.depth=1", "--model.context=32",
        "--model.d_model=32", "--train.batch=4", "--train.eval_batches=2", "--sample.tokens=0", f"--out={tmp_path / 'sweep'}",
    ]  # fmt: skip


def entries(out):
    return json.loads((out / "sweep.json").read_text())


def test_values_and_seeds_failures_and_going_on(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "sweep"
    sweep = ["sweep", *small, "--steps=6", "--over=optimizer.lr=1e-2,1e30", "--optimizer.clip_norm=1e9", "--seeds=2"]
    assert main(sweep) == 0
    told = capsys.readouterr().out
    found = {(e["optimizer.lr"], e["seed"]): e for e in entries(out)}
    assert set(found) == {(lr, seed) for lr in (1e-2, 1e30) for seed in (0, 1)}
    for (lr, _), entry in found.items():
        assert (entry["error"] is None) == (lr < 1) == (entry["valid_loss"] is not None)
    assert found[1e30, 0]["error"].startswith("the loss is"), "why it failed"
    assert found[1e-2, 0]["valid_loss"] != found[1e-2, 1]["valid_loss"]
    assert "[4/4] optimizer.lr=1e+30, seed 1: failed: the loss is" in told
    best = next(line for line in told.splitlines() if "±" in line)
    mean = (found[1e-2, 0]["valid_loss"] + found[1e-2, 1]["valid_loss"]) / 2
    assert "0.01 " in best and f"{mean:.4f} ±" in best
    assert (out / "sweep.png").stat().st_size > 1000 and (out / "sweep.svg").stat().st_size > 1000

    # Once more: what is done isn't done again, what failed is tried again.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}
    assert main(sweep) == 0
    assert capsys.readouterr().out.count("(from before)") == 2
    changed = [path.parent.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert set(changed) == {"optimizer.lr=1e+30"}

    # The folders hold runs of another configuration.
    assert main([*sweep, "--train.batch=2"]) == 2
    assert "a run of another configuration is there" in " ".join(capsys.readouterr().err.split())


def test_a_killed_run_is_told_and_the_next_goes_on(small, tmp_path, capsys, monkeypatch):
    from neuralforge.train import sweep

    real, began = subprocess.Popen, []

    def popen(*args, **kwargs):
        process = real(*args, **kwargs)
        if not began:
            process.kill()
        began.append(process)
        return process

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    assert main(["sweep", *small, "--steps=2", "--over=schedule.name=wsd,one_cycle"]) == 0
    told = capsys.readouterr().out
    assert "[1/2] schedule.name=wsd, seed 0: failed: killed by SIGKILL" in told
    assert "[2/2] schedule.name=one_cycle, seed 0: validation loss" in told and len(began) == 2


def test_an_interrupt_saves_the_run_under_way(small, tmp_path):
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "neuralforge.cli", "sweep", *small, "--steps=100000", "--over=train.accumulate=1,2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "train.accumulate=1" / "seed-0" / "metrics.jsonl"
    deadline = time.time() + 120
    while not metrics.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped at run 1 of 2; the same command goes on with it" in told, told
    assert list(metrics.parent.glob("checkpoints/step-*/metadata.json")), "it saved itself"
    assert not (out / "train.accumulate=2").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to sweep: say which key takes which values"),
        (["--over=optimizer.lr"], "--over=optimizer.lr; expected a key and its values"),
        (["--over=optimizer.lr=1,,2"], "expected a key and its values"),
        (["--over=train.seed=1,2"], "--over train.seed: can't be swept; --seeds says how many seeds."),
        (["--over=optimizer.l=1,2"], "--over optimizer.l: can't be swept; expected a key"),
        (["--over=optimizer.lr=1,-2"], "optimizer.lr=-2.0; expected a number above 0"),
        (["--over=schedule.name=wsd,cosine", "--schedule.decay=0.5"], "schedule.decay=0.5; expected none with schedule.name=cosine"),
        (["--over=optimizer.lr=1", "--seeds=0"], "--seeds=0; expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_swept(flags, message, small, tmp_path, capsys):
    assert main(["sweep", *small, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "sweep").exists()


def test_values_that_hold_commas_and_values_given_twice(tmp_path):
    key, values = split_values("optimizer.betas=0.8,0.9; 0.9,0.99")
    trials = plan(Config(), {key: values, "optimizer.lr": ["1e-3", "0.001", "1e-2"]}, 2, tmp_path)
    found = [(t.config.optimizer.betas, t.config.optimizer.lr, t.config.train.seed) for t in trials]
    assert found == [(b, lr, seed) for b in ((0.8, 0.9), (0.9, 0.99)) for lr in (1e-3, 1e-2) for seed in (0, 1)]
    assert len({t.folder for t in trials}) == 8
