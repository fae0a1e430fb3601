"""`neuralforge train` and `generate` as a user runs them, on small models and real text."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import neuralforge as nf
from neuralforge.cli.main import main
from neuralforge.data import prepare, validation_batches
from neuralforge.models import next_token_loss
from neuralforge.resilience import latest, load
from neuralforge.train import load_run, trainer
from neuralforge.train.config import load as load_config

TEXT = "\n".join(f"def square_{i}(x):\n    return x * x + {i}\n" for i in range(2000))
SMALL = [
    "--data.vocab_size=300", "--model.depth=1", "--model.context=32", "--model.d_model=32", "--train.batch=4",
    "--train.eval_batches=2", "--train.eval_every=10", "--train.checkpoint_every=10", "--sample.tokens=20",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text(TEXT)
    return [f"--data={path}", f"--data.cache={tmp_path / 'cache'}", *SMALL]


def checkpoint(out: Path):
    return load(latest(out / "checkpoints"))


def metrics(out: Path):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_run(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *text, "--steps=80", "--optimizer.lr=1e-2", f"--out={out}"]) == 0
    told = capsys.readouterr().out
    for part in ("model   gpt2", "bigram", "validation loss", "bits per byte", "sample", "def "):
        assert part in told
    steps = [line for line in metrics(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 81))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    for name in ("loss.png", "loss.svg", "config.toml", "tokenizer.json"):
        assert (out / name).stat().st_size > 100, name
    assert len(list((out / "checkpoints").glob("step-*"))) == 2, "the newest two are kept"

    # The same prompt and seed give the same text; standard input is a prompt too.
    texts = []
    for seed in (1, 1, 2):
        assert main(["generate", f"--out={out}", "--prompt=def sq", "--tokens=30", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def sq")

    # A finished run isn't overwritten, and resuming it with more steps goes on.
    before = (out / "config.toml").read_text()
    assert main(["train", *text, f"--out={out}"]) == 2
    assert "--resume" in capsys.readouterr().err and (out / "config.toml").read_text() == before
    assert main(["train", "--resume", "--steps=90", f"--out={out}"]) == 0
    assert checkpoint(out)[1]["step"] == 90


@pytest.mark.parametrize(
    "more",
    [
        ["--model.dropout=0.1"],
        ["--model.dropout=0.1", "--model.kind=llama"],
        ["--optimizer.name=sophia_h", "--optimizer.curvature_every=7"],
        ["--optimizer.name=sophia_g", "--optimizer.curvature_every=7", "--optimizer.like=official", "--train.accumulate=2"],
        ["--optimizer.name=lion", "--optimizer.lookahead=3", "--optimizer.clip_share=0.05"],
        ["--optimizer.name=muon", "--optimizer.ema=0.9"],
        ["--optimizer.name=schedule_free_adamw"],
        ["--train.precision=fp16"],
        ["--train.accumulate=2", "--train.accumulate_most=4", "--train.batch=1", "--model.context=4"],
    ],
)
def test_resume_is_bit_for_bit(more, text, tmp_path, capsys):
    args = [*text, "--steps=30", *more]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(["train", *args, f"--out={whole}"]) == 0
    assert main(["train", *args, f"--out={halves}"]) == 0
    shutil.rmtree(halves / "checkpoints" / "step-00000030")  # as if it had been killed after step 20
    assert main(["train", "--resume", f"--out={halves}"]) == 0
    a, b = checkpoint(whole), checkpoint(halves)
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    assert all((a[0][name] == b[0][name]).all() for name in a[0])
    told = ("step", "loss", "valid_loss", "unclipped", "tokens", "noise_scale", "loss_scale")
    losses = lambda out: [[line.get(name) for name in told] for line in metrics(out)]
    assert losses(whole) == losses(halves)
    tokens = {line["tokens"] for line in metrics(whole) if "loss" in line}
    assert tokens == ({8, 16} if "--train.accumulate_most=4" in more else {256} if "--train.accumulate=2" in more else {128})
    estimates = [line["step"] for line in metrics(whole) if "unclipped" in line]
    first = {"sophia_h": 1, "sophia_g": 7}.get(more[0].partition("=")[2])
    assert estimates == (list(range(first, 31, 7)) if first else [])


@pytest.mark.parametrize("more", [["--optimizer.name=schedule_free_adamw"], ["--optimizer.name=sgd", "--optimizer.ema=0.8"]])
def test_averaged_weights_are_validated_and_loaded(more, text, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *text, "--steps=20", *more, f"--out={out}"]) == 0
    tensors, metadata = checkpoint(out)
    model, tokenizer, config = load_run(out)
    for name, p in model.named_parameters():
        trained = tensors[f"params.{name}"]
        if "ema" in more[-1]:
            expected = tensors[f"optimizer.average.{name}"]
        else:
            expected = trained + (tensors[f"optimizer.z.{name}"] - trained) * (1 - 1 / 0.9)
        assert torch.equal(p, expected) and not torch.equal(p, trained), name
    data = prepare(config.data.path, Path(config.data.cache), config.data.vocab_size, config.data.valid_fraction)
    batches = validation_batches(data.valid, config.train.batch, config.model.context, config.train.eval_batches)
    losses = [next_token_loss(model(b["tokens"][:, :-1]), b["tokens"][:, 1:]).item() for b in batches]
    assert sum(losses) / len(losses) == pytest.approx(metadata["valid_loss"], rel=1e-5)


def test_reduce_on_plateau_lowers_the_rate_and_is_resumed(text, tmp_path):
    """A rate so high that validation doesn't get better: the share is in every checkpoint, and steps get smaller with it."""
    args = [*text, "--steps=30", "--schedule.name=reduce_on_plateau", "--schedule.patience=0", "--schedule.factor=0.0",
            "--schedule.final=0.0", "--schedule.warmup=0", "--schedule.threshold=1.0"]  # fmt: skip
    out = tmp_path / "run"
    assert main(["train", *args, f"--out={out}"]) == 0
    steps = {p.name: load(p)[0] for p in (out / "checkpoints").glob("step-*")}
    assert sorted(steps) == ["step-00000020", "step-00000030"] and steps["step-00000020"]["plateau.share"] == 0
    weights = [{n: t for n, t in tensors.items() if n.startswith("params.")} for tensors in steps.values()]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0]), "a rate of 0 changes nothing"
    shutil.rmtree(out / "checkpoints" / "step-00000030")
    assert main(["train", "--resume", f"--out={out}"]) == 0
    again = checkpoint(out)[0]
    assert again.keys() == steps["step-00000030"].keys()
    assert all(torch.equal(again[n], t) for n, t in steps["step-00000030"].items())


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_not_finite_never_reaches_a_checkpoint(what, precision, text, tmp_path, capsys, monkeypatch):
    out, real, steps = tmp_path / "run", trainer.make_step, iter(range(1, 100))

    def make_step(*args):
        init, step, loss = real(*args)

        def spoilt(state, tokens, due, bad):
            state, metrics = step(state, tokens, due)
            nan = torch.where(bad, math.nan, 0.0)
            if what == "weights":
                state["params"] = {name: p + nan for name, p in state["params"].items()}
            else:
                name = "loss" if what == "loss" else "grad_norm"
                metrics = {**metrics, name: metrics[name] + nan}
            return state, metrics

        spoilt = nf.jit(spoilt)
        return init, lambda state, tokens, due=False: spoilt(state, tokens, due, torch.tensor(next(steps) == 20)), loss

    monkeypatch.setattr(trainer, "make_step", make_step)
    monkeypatch.setattr(trainer, "jit", lambda f, donate=(): f)
    code = main(["train", *text, "--steps=25", f"--train.precision={precision}", f"--out={out}"])
    told = " ".join(capsys.readouterr().err.split())
    if what == "gradient" and precision == "fp16":  # the step was skipped
        assert code == 0
        return
    expected = {"loss": "the loss is nan", "gradient": "the gradient's norm is nan", "weights": "the parameter .* isn't finite"}[what]
    assert code == 2 and re.search(rf"{expected} at step 20; the newest checkpoint before it is kept in .*checkpoints\. Lower", told)
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-00000010"]


def test_a_run_that_diverges_before_any_checkpoint(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *text, "--steps=20", "--optimizer.lr=1e30", f"--out={out}"]) == 2
    assert re.search("the loss is nan at step 2; no checkpoint was saved before it. .* and start anew", " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_cleanly(how, text, tmp_path, capsys):
    out, text = tmp_path / "run", [*text, "--train.checkpoint_every=1000000"]
    command = [sys.executable, "-m", "neuralforge.cli", "train", *text, "--steps=1000000", "--schedule.warmup=2", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    before = (out / "config.toml").read_text()
    assert main(["train", *text, "--steps=3", f"--out={out}"]) == 2
    assert "another process trains into this folder" in " ".join(capsys.readouterr().err.split())
    assert (out / "config.toml").read_text() == before
    os.kill(process.pid, how)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "stopped and saved at step" in told and "Traceback" not in told
    done = checkpoint(out)[1]["step"]
    assert done == metrics(out)[-1]["step"] and (out / "loss.png").exists()
    assert main(["train", "--resume", f"--steps={done + 2}", f"--out={out}"]) == 0
    assert checkpoint(out)[1]["step"] == done + 2


def test_config_file_and_the_resolved_copy_run_again(text, tmp_path, capsys):
    toml = tmp_path / "run.toml"
    toml.write_text("[train]\nsteps = 3\nseed = 5\n[model]\nkind = 'llama'\n")
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["train", f"--config={toml}", *text, f"--out={a}"]) == 0
    assert main(["train", f"--config={a / 'config.toml'}", f"--out={b}"]) == 0
    assert [line.get("loss") for line in metrics(a)] == [line.get("loss") for line in metrics(b)]
    assert "kind = \"llama\"" in (b / "config.toml").read_text()


def test_resume_finds_the_run_that_a_config_file_names_or_that_was_moved(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "run.toml"
    toml.write_text("[train]\nsteps = 2\nout = 'a'\n")
    assert main(["train", *text, "--steps=1", "--model.dropout=0.5"]) == 0  # another, where --out points by default
    assert main(["train", *text, f"--config={toml}", "--model.dropout=0.25"]) == 0
    assert main(["train", f"--config={toml}", "--resume", "--steps=3"]) == 0
    assert checkpoint(Path("a"))[1]["step"] == 3 and load_config(Path("a/config.toml")).model.dropout == 0.25

    shutil.rmtree("runs/default")
    Path("a").rename("runs/default")
    assert main(["train", "--resume", "--steps=4"]) == 0
    assert checkpoint(Path("runs/default"))[1]["step"] == 4 and not Path("a").exists()
    assert load_config(Path("runs/default/config.toml")).train.out == "runs/default"


def test_a_tilde_is_the_home_folder(text, tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "run.toml").write_text("[train]\nsteps = 1\nout = '~/run'\n")
    assert main(["train", *text, "--config=~/run.toml"]) == 0
    assert main(["train", "--resume", "--steps=2", "--out=~/run"]) == 0
    assert checkpoint(home / "run")[1]["step"] == 2 and not list(here.iterdir())
    assert main(["generate", "--out=~/run", "--tokens=1"]) == 0


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/run", "locked/run"])
def test_a_folder_that_cannot_be_made_is_told_before_the_data_is_prepared(out, tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    assert main(["train", f"--data={tmp_path / 'missing.txt'}", f"--out={tmp_path / out}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert out.split("/")[0] in error and "--out" in error and "missing" not in error, error


def test_a_value_out_of_range_is_told_with_its_place(tmp_path, capsys):
    toml = tmp_path / "run.toml"
    toml.write_text("[model]\nd_model = 60\nn_heads = 7\n[train]\nseed = 3\nbatch = 0\n")
    errors = []
    for more in ([], ["--train.batch=2"], ["--train.batch=2", "--model.d_model=70", "--train.seed=-1"]):
        assert main(["train", "--dry-run", f"--config={toml}", *more]) == 2
        errors.append(" ".join(capsys.readouterr().err.split()))
    assert f"{toml}:6: train.batch=0; expected at least 1" in errors[0]
    assert f"{toml}:2: model.d_model=60 doesn't divide" in errors[1]
    assert errors[2].startswith("error: train.seed=-1"), "a flag has no place"


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_file_where_the_run_should_be(resume, text, tmp_path, capsys):
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    assert main(["train", *text, f"--out={out}", *resume]) == 2
    assert main(["generate", f"--out={out}"]) == 2
    errors = capsys.readouterr().err
    assert errors.split().count("error:") == 2 and out.read_text() == "mine"  # a line may end behind one


def test_dry_run_writes_nothing(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *text, "--dry-run", f"--out={out}"]) == 0
    assert "parameters" in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("empty", "empty"),
        ("binary", "byte"),
        ("missing", "does not exist"),
        ("unreadable", "permission|can't be read|read"),
        ("short", "tokens"),
        ("not a corpus", "can't read a file of kind"),
    ],
)
def test_bad_input(spoil, message, text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "code.txt"
    if spoil == "empty":
        path.write_text("")
    elif spoil == "binary":
        path.write_bytes(TEXT.encode() + b"\x00\xff\xfe" * 50)
    elif spoil == "missing":
        path.unlink()
    elif spoil == "unreadable":
        if os.geteuid() == 0:
            monkeypatch.setattr("builtins.open", deny(path, open))
            monkeypatch.setattr("io.open", deny(path, open))
            monkeypatch.setattr("pathlib.Path.read_bytes", deny_method(path, Path.read_bytes))
        path.chmod(0)
    elif spoil == "short":
        path.write_text("print(1)\n" * 4)
    else:
        path = path.rename(path.with_suffix(".exe"))
        text = [f"--data={path}", *text[1:]]
    out = tmp_path / "run"
    assert main(["train", *text, "--steps=3", f"--out={out}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ") and re.search(message, error, re.IGNORECASE), error
    assert not out.exists(), "nothing is left half-written"


def deny(path, function):
    def wrapped(file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return function(file, *args, **kwargs)

    return wrapped


def deny_method(path, method):
    return lambda self, *args: deny(path, lambda file, *a: method(file, *a))(self, *args)


def test_a_corrupted_checkpoint(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *text, "--steps=20", f"--out={out}"]) == 0
    file = latest(out / "checkpoints") / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["train", "--resume", "--steps=25", f"--out={out}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "step-00000020" in error and "step-00000010" in error, error
    shutil.rmtree(file.parent)  # what the error says to do
    assert main(["train", "--resume", "--steps=25", f"--out={out}"]) == 0


@pytest.mark.parametrize("kilobytes, message", [(400, "disk is full.* MB are free"), (640, "run: the disk is full.* MB are free")])
def test_a_full_disk(kilobytes, message, text, mounted, capsys):
    """The disk fills up with the second checkpoint, or with the curve at the end."""
    disk = mounted("disk", f"size={kilobytes}k")
    assert main(["train", *text, "--steps=20", f"--out={disk / 'run'}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    left = [p.name for p in (disk / "run" / "checkpoints").iterdir()]
    assert left and not any(".tmp" in name for name in left)
    load(latest(disk / "run" / "checkpoints"))
    run = disk / "run"
    assert {p.suffix for p in run.iterdir()} <= {"", ".toml", ".json", ".jsonl", ".png", ".svg"}
    assert all(p.read_bytes().rstrip().endswith(b"</svg>") for p in run.glob("*.svg"))
    assert all(p.read_bytes().endswith(b"IEND\xaeB`\x82") for p in run.glob("*.png"))
