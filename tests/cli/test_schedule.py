"""`neuralforge schedule` as a user runs it."""

import re

import pytest

from neuralforge.cli.main import main
from neuralforge.cli.schedule import sparkline
from neuralforge.train.config import SCHEDULE_KEYS


@pytest.mark.parametrize("name", SCHEDULE_KEYS)
def test_every_schedule_is_drawn(name, tmp_path, capsys):
    points = ["--schedule.points=0:1,20:1,50:0.5"] if name == "piecewise" else []
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        picture = tmp_path / f"rate{suffix}"
        assert main(["schedule", f"--schedule.name={name}", "--steps=100", f"--picture={picture}", *points]) == 0
        assert picture.read_bytes().startswith(magic)
    told = capsys.readouterr().out
    assert f"{name}, 100 steps" in told and "highest         0.003" in told


def test_the_rates_told_and_those_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[optimizer]\nlr = 0.5\n[schedule]\nname = 'linear'\nfinal = 0.0\nwarmup = 10\n[train]\nbatch = 3\n")
    assert main(["schedule", "--config=run.toml", "--steps=110"]) == 0
    told = re.findall(r"step +(\S+)  (\S+)", capsys.readouterr().out)
    assert told[0] == ("1", "0.05") and told[-1] == ("110", "0.005") and (tmp_path / "schedule.png").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule.nmae=cosine"], "unknown option --schedule.nmae. Did you mean --schedule.name?"),
        (["--train.batch=3"], "unknown option --train.batch."),
        (["--picture=rate.pdf"], "--picture=rate.pdf; expected a name that ends in .png or .svg."),
        (["--picture=none/rate.png"], "--picture=none/rate.png: can't be written"),
        (["--schedule.decay=0.1"], "schedule.decay=0.1; expected none with schedule.name=cosine"),
    ],
)
def test_what_cannot_be_drawn(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_sparkline():
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0]) == "▁▃▅▇█"
    assert sparkline([0.0] * 3) == "▁▁▁" and len(sparkline([1.0] * 999)) == 72
