"""Configuration: layers, names, values, round trip."""

import pytest

from neuralforge.errors import ConfigError
from neuralforge.train.config import Config, dump, keys, load, resolve, set_key


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_resolve_and_round_trip(tmp_path):
    config = resolve(Config())
    assert config.model.d_model and config.schedule.warmup is not None
    assert load(write(tmp_path, dump(config))) == config
    assert resolve(config) == config, "resolving is idempotent"


def test_round_trip_of_odd_values(tmp_path):
    config = Config()
    for key, text in [("sample.prompt", 'say "hi"\n\tπ \\ \x07'), ("optimizer.betas", "0.5,0.75"), ("sample.top_k", "none"),
                      ("model.tie_embeddings", "false"), ("optimizer.eps", "1e-7")]:  # fmt: skip
        config = set_key(config, key, text)
    assert config.sample.prompt == 'say "hi"\n\tπ \\ \x07' and config.optimizer.betas == (0.5, 0.75)
    back = load(write(tmp_path, dump(config)))
    assert back.sample.prompt == config.sample.prompt and back.optimizer == config.optimizer


def test_file_over_defaults_and_flag_over_file(tmp_path):
    config = load(write(tmp_path, "[train]\nsteps = 7\nbatch = 3\n"))
    config = set_key(config, "train.steps", "9")
    assert (config.train.steps, config.train.batch, config.train.seed) == (9, 3, 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\nstep = 3\n", r"run\.toml:2: unknown key train\.step\. Did you mean train\.steps\?"),
        ("# x\n[train]\n\nlr = 3\n", r"run\.toml:4: unknown key train\.lr\. Did you mean optimizer\.lr\?"),
        ("[trian]\nsteps = 3\n", r"run\.toml:1: unknown section \[trian\]\. Did you mean train\?"),
        ("[model]\nkind = 'lama'\n", r"run\.toml:2: model\.kind='lama'; expected one of gpt2, llama \(did you mean llama\?\)"),
        ("[train]\nsteps = 'many'\n", r"train\.steps='many'; expected a whole number"),
        ("[train]\nsteps = 2.5\n", r"train\.steps=2\.5; expected a whole number"),
        ("[train]\nsteps = true\n", r"train\.steps=True; expected a whole number"),
        ("[optimizer]\nbetas = [0.9]\n", r"optimizer\.betas=\[0\.9\]; expected 2 numbers"),
        ("train = 3\n", r"train=3; expected a section \[train\]"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_errors_in_a_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("train.stepz", "3", r"unknown option --train\.stepz\. Did you mean train\.steps\?"),
        ("train.steps", "x", r"--train\.steps='x'; expected a whole number"),
        ("optimizer.lr", "nan", "expected a number"),
        ("optimizer.betas", "0.9,x", "expected a number"),
        ("model.tie_embeddings", "maybe", "expected true or false"),
    ],
)
def test_errors_in_flags(key, text, message):
    with pytest.raises(ConfigError, match=message):
        set_key(Config(), key, text)


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("train.steps", "0", r"train\.steps=0; expected at least 1"),
        ("optimizer.lr", "0", r"optimizer\.lr=0\.0; expected a number above 0"),
        ("data.valid_fraction", "0.9", "valid_fraction=0.9"),
        ("schedule.warmup", "1000000", r"schedule\.warmup=1000000; expected at most train\.steps"),
        ("model.n_heads", "7", "doesn't divide"),
        ("model.dropout", "1.5", "dropout"),
        ("data.vocab_size", "10", "vocab_size=10"),
    ],
)
def test_values_out_of_range(key, text, message):
    with pytest.raises(ConfigError, match=message):
        resolve(set_key(Config(), key, text))


def test_every_key_can_be_set_from_a_flag_and_is_documented():
    from neuralforge.cli.train import usage

    told = usage()
    for key in keys():
        assert f"--{key}=" in told, key
