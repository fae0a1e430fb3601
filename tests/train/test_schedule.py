"""The schedule that a configuration asks for."""

import pytest
import torch

from neuralforge.errors import ConfigError
from neuralforge.optim import schedules
from neuralforge.train.config import (
    SCHEDULE_KEYS,
    Config,
    Optimizer,
    Schedule,
    Train,
    choices,
    dump,
    load,
    resolve,
)
from neuralforge.train.schedule import make_plateau, make_schedule


def config(steps=100, **schedule):
    return resolve(Config(optimizer=Optimizer(lr=0.5), train=Train(steps=steps), schedule=Schedule(**schedule)))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"name": "cosine", "warmup": 7, "final": 0.2}, schedules.cosine(0.5, 100, 7, 0.2)),
        ({"name": "cosine"}, schedules.cosine(0.5, 100, 5, 0.1)),
        ({"name": "constant"}, schedules.constant(0.5, 5)),
        ({"name": "linear", "final": 0.0}, schedules.linear(0.5, 100, 5, 0.0)),
        ({"name": "wsd", "decay": 0.5}, schedules.wsd(0.5, 100, 5, 0.5, 0.1)),
        ({"name": "wsd"}, schedules.wsd(0.5, 100, 5, 0.2, 0.1)),
        ({"name": "cosine_restarts", "warmup": 2}, schedules.cosine_restarts(0.5, 14, 2, 2, 0.1)),
        ({"name": "cosine_restarts", "period": 30, "growth": 1}, schedules.cosine_restarts(0.5, 30, 1, 5, 0.1)),
        ({"name": "inverse_sqrt", "warmup": 10}, schedules.inverse_sqrt(0.5, 10)),
        ({"name": "inverse_sqrt", "warmup": 0, "timescale": 20}, schedules.inverse_sqrt(0.5, 0, 20)),
        ({"name": "one_cycle"}, schedules.one_cycle(0.5, 100, 30)),
        ({"name": "one_cycle", "warmup": 50, "start": 0.5, "final": 0.25}, schedules.one_cycle(0.5, 100, 50, 0.5, 0.25)),
        ({"name": "piecewise", "warmup": 0, "points": "0:1, 50:0.5,90:1e-1"}, schedules.piecewise(0.5, {0: 1, 50: 0.5, 90: 0.1})),
        ({"name": "reduce_on_plateau"}, schedules.constant(0.5, 5)),
    ],
)
def test_every_schedule_by_its_name(options, expected, tmp_path):
    c = config(**options)
    (tmp_path / "run.toml").write_text(dump(c))
    assert resolve(load(tmp_path / "run.toml")) == c, "what resolving filled in is accepted again"
    schedule = make_schedule(c)
    for step in range(100):
        assert schedule(torch.tensor(step)).item() == pytest.approx(expected(torch.tensor(step)).item(), rel=1e-12)


def test_the_names_are_those_of_the_library():
    assert set(choices("schedule.name")) == set(SCHEDULE_KEYS) <= set(dir(schedules))


def test_reduce_on_plateau_halves_the_rate():
    plateau = make_plateau(config(name="reduce_on_plateau", patience=1, final=0.3))
    state, shares = plateau.init(), []
    for loss in (2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        state = plateau.observe(state, loss)
        shares.append(state["share"].item())
    assert shares == [1, 1, 1, 0.5, 0.5, 0.3, 0.3, 0.3]
    assert make_plateau(config(name="cosine")) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "cosine", "decay": 0.3}, r"schedule\.decay=0\.3; expected none with schedule\.name=cosine.*\(those that do: wsd\)"),
        ({"name": "constant", "final": 0.3}, r"schedule\.final=0\.3; expected none with schedule\.name=constant"),
        ({"name": "wsd", "decay": 1.5}, r"schedule\.decay=1\.5; expected a number in \[0, 1\]"),
        ({"warmup": 101}, r"schedule\.warmup=101; expected at least 0 and at most train\.steps=100"),
        ({"name": "one_cycle", "warmup": 0}, r"schedule\.warmup=0; expected at least 1"),
        ({"name": "cosine_restarts", "period": 0}, r"schedule\.period=0; expected at least 1"),
        ({"name": "piecewise"}, r"schedule\.points=None; expected step:share pairs, as 0:1,500:1,800:0\.1"),
        ({"name": "piecewise", "points": "0:1,50"}, r"schedule\.points='0:1,50'; expected step:share pairs"),
        ({"name": "piecewise", "points": "0:1,50:1e999"}, r"schedule\.points='0:1,50:1e999'; expected step:share pairs"),
        ({"name": "piecewise", "points": "0:1,0:2"}, r"schedule\.points='0:1,0:2'; expected step:share pairs"),
        ({"name": "reduce_on_plateau", "factor": 2.0}, r"schedule\.factor=2\.0; expected a number in \[0, 1\]"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
