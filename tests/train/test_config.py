"""Configuration: layers, names, values, round trip."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuralforge.errors import ConfigError
from neuralforge.train.config import (
    SECTIONS,
    Config,
    Optimizer,
    Train,
    choices,
    dump,
    keys,
    load,
    nearest,
    resolve,
    set_key,
)


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
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
    assert load(write(tmp_path, dump(config))) == config


def values(hint: Any) -> st.SearchStrategy:
    """Any value of a field's type, in its range or not: `load` and `dump` don't mind."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.tuples(*map(values, get_args(hint)))
    if get_args(hint):  # a union
        return st.one_of(*map(values, get_args(hint)))
    return {
        int: st.integers(-(2**70), 2**70),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(exclude_categories=["Cs"])),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    drawn = {key: draw(values(hint)) for key, hint in keys().items()}
    return Config(**{s: cls(**{f.name: drawn[f"{s}.{f.name}"] for f in fields(cls)}) for s, cls in SECTIONS.items()})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_what_is_dumped_loads_as_it_was(config, tmp_path):
    assert load(write(tmp_path, dump(config))) == config


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
        ("train = 3\n", r"run\.toml:1: train=3; expected a section \[train\]"),
        ("\nsteps = 3\n", r"run\.toml:2: key steps stands outside any section\. Did you mean train\.steps\?"),
        ("[train]\nqqq = 3\n", r"run\.toml:2: unknown key train\.qqq\. The keys of \[train\] are steps, batch,"),
        ("[qqq]\n", r"unknown section \[qqq\]\. The sections are model, data,"),
        ("[sample]\ntop_k = 'some'\n", r"sample\.top_k='some'; expected a whole number or none"),
        ("[optimizer]\nlr = inf\n", r"optimizer\.lr=inf; expected a number"),
        (f"[optimizer]\nlr = 1{'0' * 400}\n", r"optimizer\.lr=10+; expected a number"),
        (f"[train]\nsteps = {'9' * 5000}\n", "not valid TOML"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_errors_in_a_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    "text, line",
    [
        ("train = {steps = 3, stepz = 4}", 1),
        ("\ntrain.steps = 3\ntrain.stepz = 4", 3),
        ("[train]\nsteps = 3\n[ 'train'.stepz ]\nx = 1", 3),
        ('[sample]\nprompt = """\n[train]\nstepz = 1\n"""\n[train]\n# stepz = 1\n"stepz" = 2', 8),
        ("[train]\n\nstepz = [\n  1,\n  2,\n]", 3),
    ],
)
def test_the_line_of_an_error_in_any_spelling_of_a_key(tmp_path, text, line):
    with pytest.raises(ConfigError, match=rf"run\.toml:{line}: unknown key train\.stepz"):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("train.step", "train.steps"),
        ("train.context", "model.context"),
        ("train.contxt", "model.context"),
        ("optimiser.lr", "optimizer.lr"),
        ("warmpu", "schedule.warmup"),
        ("trian", "train"),
        ("train.foo", None),
    ],
)
def test_nearest(name, expected):
    assert nearest(name, [*keys(), *SECTIONS]) == expected


def test_numbers_in_flags_are_spelt_as_in_python():
    for text, value in [(".001", 1e-3), ("1e-3", 1e-3), ("5.", 5.0), ("3", 3.0)]:
        assert set_key(Config(), "optimizer.lr", text).optimizer.lr == value
    assert set_key(Config(), "train.steps", "1_000").train.steps == 1000
    assert set_key(Config(), "model.tie_embeddings", "False").model.tie_embeddings is False


def test_derived_sizes_fit_together():
    for kind in ("gpt2", "llama"):
        for d_model in range(2, 600, 2):
            config = set_key(set_key(Config(), "model.kind", kind), "model.d_model", str(d_model))
            model = config.model_config()  # checks that the heads divide the width, evenly for llama
            assert d_model % 64 or model.d_head == 64
    assert resolve(set_key(Config(), "model.d_model", "352")).model.n_heads in (4, 8), "352 / 6 isn't whole"


def test_model_config_carries_every_wish():
    config = Config()
    wishes = {"kind": "llama", "depth": "3", "context": "17", "d_model": "48", "n_heads": "6", "n_kv_heads": "2",
              "d_ff": "99", "dropout": "0.25", "tie_embeddings": "false"}  # fmt: skip
    for key, text in wishes.items():
        config = set_key(config, f"model.{key}", text)
    m = config.model_config(vocab_size=300)
    assert (m.kind, m.n_layers, m.context, m.d_model, m.n_heads, m.n_kv_heads) == ("llama", 3, 17, 48, 6, 2)
    assert (m.d_ff, m.dropout, m.tie_embeddings, m.vocab_size) == (99, 0.25, False, 300)
    assert config.model_config().vocab_size == config.data.vocab_size


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes("[train]\r\nsteps = 7\r\n".encode("utf-8-sig"))
    assert load(path).train.steps == 7
    path.write_bytes("[train]\r\nsteps = 7\r\nlr = 1\r\n".encode("utf-8-sig"))
    with pytest.raises(ConfigError, match=r"run\.toml:3: unknown key train\.lr"):
        load(path)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("train.stepz", "3", r"unknown option --train\.stepz\. Did you mean train\.steps\?"),
        ("train.steps", "x", r"--train\.steps='x'; expected a whole number"),
        ("train.steps", "3 # many", r"--train\.steps='3 # many'; expected a whole number"),
        ("train.steps", "2024-01-01", r"--train\.steps='2024-01-01'; expected a whole number"),
        ("data.path", "caf\udce9", r"--data\.path='caf\\udce9'; expected text in UTF-8"),
        ("schedule.name", "cosin", r"--schedule\.name='cosin'; expected one of .* \(did you mean cosine\?\)"),
        ("optimizer.lr", "nan", "expected a number"),
        ("optimizer.betas", "0.9,x", "expected a number"),
        ("model.tie_embeddings", "maybe", "expected true or false"),
        ("sample.top_k", "", r"--sample\.top_k=''; expected a whole number or none"),
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
        ("optimizer.gamma", "0.1", r"optimizer\.gamma=0\.1; expected none with optimizer\.name=adamw.*those that do: sophia_h, sophia_g"),
        ("schedule.warmup", "1000000", r"schedule\.warmup=1000000; expected at least 0 and at most train\.steps"),
        ("model.n_heads", "7", "doesn't divide"),
        ("model.dropout", "1.5", "dropout"),
        ("data.vocab_size", "10", "vocab_size=10"),
        ("train.seed", str(2**63), r"train\.seed=9223372036854775808; expected a whole number in \[0, 2\*\*63\)"),
        ("train.seed", "-1", r"train\.seed=-1; expected"),
        ("sample.prompt", "", r"sample\.prompt=''; expected at least one character"),
        ("data.path", "", r"data\.path=''; expected a path"),
        ("data.cache", "", r"data\.cache=''; expected a path"),
        ("train.out", "~nobody-of-that-name/x", r"train\.out='~nobody-of-that-name/x'; expected a path; ~ or ~user is"),
        ("optimizer.betas", "0.9,1", r"optimizer\.betas=\(0\.9, 1\.0\); expected two in \[0, 1\)"),
        ("optimizer.momentum", "0.9", r"optimizer\.momentum=0\.9; expected none with optimizer\.name=adamw.*those that do: sgd, muon"),
        ("optimizer.ema", "1", r"optimizer\.ema=1\.0; expected a number in \[0, 1\)"),
        ("optimizer.lookahead", "0", r"optimizer\.lookahead=0; expected at least 1"),
        ("optimizer.clip_share", "0", r"optimizer\.clip_share=0\.0; expected a number above 0"),
        ("model.n_kv_heads", "2", r"model\.n_kv_heads=2 with model\.n_heads=4, kind gpt2; expected the same number"),
    ],
)
def test_values_out_of_range(key, text, message):
    with pytest.raises(ConfigError, match=message):
        resolve(set_key(Config(), key, text))


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("sgd", {"nesterov": True, "momentum": 0.0}, r"optimizer\.nesterov=True; expected false without momentum"),
        ("schedule_free_adamw", {"betas": (0.0, 0.9)}, r"optimizer\.betas=\(0\.0, 0\.9\); expected the first above 0"),
        ("lion", {"eps": 1e-8}, r"optimizer\.eps=1e-08; expected none with optimizer\.name=lion"),
        ("muon", {"adamw_lr": 0.0}, r"optimizer\.adamw_lr=0\.0; expected a number above 0"),
    ],
)
def test_options_of_an_optimizer(name, wrong, message):
    with pytest.raises(ConfigError, match=message):
        resolve(Config(optimizer=Optimizer(name=name, **wrong)))


def test_left_out_values_follow_the_optimizer():
    found = {name: resolve(Config(optimizer=Optimizer(name=name))) for name in choices("optimizer.name")}
    assert len({c.optimizer.lr for c in found.values()}) > 3
    assert {n for n, c in found.items() if c.schedule.name == "constant"} == {"schedule_free_adamw"}
    assert resolve(Config(optimizer=Optimizer(name="muon", lr=0.01))).optimizer.adamw_lr == 0.01
    assert resolve(Config(optimizer=Optimizer(name="muon", lr=0.01, scaling="original"))).optimizer.adamw_lr == 0.003
    for c in found.values():
        assert resolve(c) == c


def test_every_key_can_be_set_from_a_flag_and_is_documented():
    from neuralforge.cli.train import usage

    told = usage()
    for key in keys():
        assert f"--{key}=" in told, key
        assert all(choice in " ".join(told.split()).partition(f"--{key}=")[2] for choice in choices(key)), key


@pytest.mark.parametrize("accumulate, most", [(1, 4), (2, 3), (2, 6), (4, 2)])
def test_how_far_the_batch_may_grow(accumulate, most):
    train = Train(accumulate=accumulate, accumulate_most=most)
    with pytest.raises(ConfigError, match=rf"train\.accumulate_most={most}; expected train\.accumulate={accumulate}, at least 2, times a power"):
        resolve(Config(train=train))
    assert resolve(Config(train=Train(accumulate=2, accumulate_most=8))).train.accumulate_most == 8
