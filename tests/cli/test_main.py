"""The command line: help without torch, unknown words, errors as one paragraph with exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuralforge.cli.main import VERBS, main

RUN = [sys.executable, "-m", "neuralforge.cli"]


def test_help_does_not_import_torch():
    code = "import sys; from neuralforge.cli.main import main; main(['--help']); main(['train', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: neuralforge VERB" in done.stdout and "--train.steps=" in done.stdout


def test_the_readme_lists_every_verb():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert re.findall(r"^\| `neuralforge (\w+)`", readme, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize(
    "args, message",
    [
        (["trian"], "Did you mean train?"),
        (["train", "--config=run.toml"], "run.toml:3: unknown key train.lr. Did you mean optimizer.lr?"),
        (["train", "--train.step", "3"], "unknown option --train.step. Did you mean --train.steps?"),
    ],
)
def test_the_command_itself(args, message, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nsteps = 3\nlr = 1\n")
    done = subprocess.run([*RUN, *args], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in " ".join(done.stderr.split())


@pytest.mark.parametrize("verb", [[], ["train"], ["sweep"], ["lr"], ["schedule"], ["generate"], ["doctor"]])
def test_help(verb, capsys):
    assert main([*verb, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: neuralforge")
    assert main([*verb, "-h"]) == 0
    assert capsys.readouterr().out == told


def test_an_interrupt_and_a_bug(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def bug(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr("neuralforge.cli.doctor.main", interrupted)
    assert main(["doctor"]) == 130
    monkeypatch.setattr("neuralforge.cli.doctor.main", bug)
    with pytest.raises(RuntimeError, match="a bug"):  # keeps its traceback
        main(["doctor"])


def test_errors_are_wrapped_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/somewhere/with-a-name/that-is-longer/than-the-terminal"
    assert main(["train", f"--config={path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and any(path in line for line in lines)
    assert all(len(line) <= 40 or path in line for line in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("neuralforge 0.")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "unknown verb 'trian'; expected one of train, sweep, lr, schedule, generate, explain, doctor. Did you mean train?"),
        (["--verson"], "unknown verb '--verson'; expected one of train, sweep, lr, schedule, generate, explain, doctor. Did you mean --version?"),
        (["train", "--out="], "train.out=''; expected a path"),
        (["train", "--data="], "data.path=''; expected a path"),
        (["train", "--train.step=3"], "unknown option --train.step. Did you mean --train.steps?"),
        (["train", "--train.lr=3"], "unknown option --train.lr. Did you mean --optimizer.lr?"),
        (["train", "steps=3"], "unexpected 'steps=3'; options are written --name=value."),
        (["train", "--train.steps"], "--train.steps needs a value"),
        (["train", "--out", "--resume"], "--out needs a value: --out=VALUE."),
        (["train", "--train.foo=1"], "unknown option --train.foo. See --help."),
        (["train", "--resume=yes"], "--resume takes no value"),
        (["train", "--train.steps=many"], "--train.steps='many'; expected a whole number."),
        (["train", "--config=none.toml"], "none.toml: no such configuration file."),
        (["generate", "--tokens=-1"], "--tokens=-1; expected a whole number of at least 1."),
        (["generate", "--temperature=hot"], "--temperature=hot; expected a number"),
        (["generate", f"--seed={2**63}"], f"--seed={2**63}; expected a whole number of less than 2**63."),
        (["generate", "--out=nowhere"], "nowhere: no run with a checkpoint here."),
        (["doctor", "--jsn"], "unknown option --jsn. Did you mean --json?"),
    ],
)
def test_errors_are_one_paragraph_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(unbuffered):
    """The reader is gone before the first write, whether that is at print or at the last flush."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*RUN, "train", "--help"], stdout=write, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
