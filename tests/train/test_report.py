import json
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest

from neuralforge.train.config import Config
from neuralforge.train.pictures import picture
from neuralforge.train.report import Report, draw_curve


def test_metrics_are_json_at_every_depth(tmp_path):
    Report(Config(), tmp_path)._write(step=1, loss=0.1, grad_norm=math.inf, grad_norms={"a": math.nan, "b": [-math.inf, 2.5]})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 0.1, "grad_norm": None, "grad_norms": {"a": None, "b": [None, 2.5]}}


def test_damaged_lines_are_dropped_when_a_run_is_resumed(tmp_path):
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.0}\n'
    path.write_bytes(good + b'{"step": 2, "loss": \xff\xfe}\n7\n' + good.replace(b"1", b"9") + b'{"st')
    Report(Config(), tmp_path)._drop_lines_after(8)
    assert path.read_bytes() == good


def test_pictures_leave_the_users_backend_alone(tmp_path):
    before = matplotlib.rcParams["backend"], plt.get_fignums()
    draw_curve(tmp_path)  # of a run without a step
    with picture(tmp_path / "a.svg") as axes:
        axes.plot([1, 2], label="one")
    assert "<!-- one -->" in (tmp_path / "a.svg").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "loss.png", "loss.svg"]
    assert (matplotlib.rcParams["backend"], plt.get_fignums()) == before
