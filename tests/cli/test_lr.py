"""`neuralforge lr` as a user runs it, on a small model."""

import re

import pytest

from neuralforge.cli.main import main

TEXT = "\n".join(f"def square_{i}(x):\n    return x * x + {i}\n" for i in range(2000))


@pytest.fixture
def small(tmp_path):
    (tmp_path / "code.txt").write_text(TEXT)
    return [
        "lr", f"--data={tmp_path / 'code.txt'}", f"--data.cache={tmp_path / 'cache'}", "--data.vocab_size=300", "--depth=1",
        "--model.context=32", "--model.d_model=32", "--train.batch=4", f"--picture={tmp_path / 'lr.png'}",
    ]  # fmt: skip


def test_a_rate_is_suggested_and_drawn(small, tmp_path, capsys):
    assert main([*small, "--low=1e-5", "--high=10", "--steps=60"]) == 0
    told = capsys.readouterr().out
    fastest, lowest, suggestion = (float(re.search(rf"{word} +([\d.e-]+)", told)[1]) for word in ("fall", "loss", "suggestion"))
    assert 1e-5 <= fastest <= suggestion <= lowest <= 10 and "--optimizer.lr=" in told
    assert (tmp_path / "lr.png").stat().st_size > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"code.txt", "cache", "lr.png"}, "nothing of the training is kept"

    assert main([*small, "--low=1e-6", "--high=1e-4", "--steps=20"]) == 0
    assert "still falling at 0.0001: a higher --high" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--optimizer.lr=1"], "unknown option --optimizer.lr."),
        (["--schedule.name=wsd"], "unknown option --schedule.name."),
        (["--low=1", "--high=0.1"], "rates from 1 to 0.1; expected two numbers above 0, the lower one first"),
        (["--steps=3"], "--steps=3; expected a whole number of at least 10"),
        (["--picture=lr.gif"], "--picture=lr.gif; expected a name that ends in .png or .svg"),
        (["--picture=none/lr.png"], "--picture=none/lr.png: can't be written: there is no folder none"),
    ],
)
def test_what_cannot_be_tried(flags, message, small, capsys):
    assert main([*small, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
