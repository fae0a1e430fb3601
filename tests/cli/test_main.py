"""The command line: help without torch, unknown words, errors as one paragraph with exit code 2."""

import json
import subprocess
import sys

import pytest

from neuralforge.cli.main import main

RUN = [sys.executable, "-m", "neuralforge.cli"]


def test_help_does_not_import_torch():
    code = "import sys; from neuralforge.cli.main import main; main(['--help']); main(['train', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: neuralforge VERB" in done.stdout and "--train.steps=" in done.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("neuralforge 0.")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "unknown verb 'trian'; expected one of train, generate, doctor. Did you mean train?"),
        (["train", "--train.step=3"], "unknown option --train.step. Did you mean --train.steps?"),
        (["train", "--train.lr=3"], "unknown option --train.lr. Did you mean --optimizer.lr?"),
        (["train", "steps=3"], "unexpected 'steps=3'; options are written --name=value."),
        (["train", "--train.steps"], "--train.steps needs a value"),
        (["train", "--resume=yes"], "--resume takes no value"),
        (["train", "--train.steps=many"], "--train.steps='many'; expected a whole number."),
        (["train", "--config=none.toml"], "none.toml: no such configuration file."),
        (["generate", "--tokens=-1"], "--tokens=-1; expected a whole number of at least 1."),
        (["generate", "--temperature=hot"], "--temperature=hot; expected a number"),
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


def test_doctor_as_text_and_json(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "GFLOP/s float32, measured" in text and "torch" in text
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["threads"] >= 1 and told["peaks"]["float32"] > 1e9


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(f"{' '.join(RUN)} train --help | head -1", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stderr == ""
