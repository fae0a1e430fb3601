"""The configuration of a training run: defaults, then a TOML file, then flags.

Each field is a TOML key `[section] key = value` and a flag `--section.key=value`, and nothing else is. `resolve`
derives what depends on what, once; the resolved configuration, written out, runs the same run again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
import tomllib
import types
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..models.config import ModelConfig


@dataclass(frozen=True)
class Model:
    kind: Literal["gpt2", "llama"] = "gpt2"
    """Architecture."""
    depth: int = 4
    """The dial: number of layers, from which the sizes left out below follow (width 64 a layer, at least 128; heads
    of 64)."""
    context: int = 256
    """Longest sequence, in tokens."""
    d_model: int | None = None
    """Width; left out: 64 * depth."""
    n_heads: int | None = None
    """Attention heads; left out: as many as divide d_model into widths nearest to 64."""
    n_kv_heads: int | None = None
    """Key/value heads (llama); left out: n_heads."""
    d_ff: int | None = None
    """Feed-forward width; left out: 4 * d_model (gpt2), 8/3 * d_model to a multiple of 32 (llama)."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    tie_embeddings: bool = True
    """Use the token embedding as the output layer."""


@dataclass(frozen=True)
class Data:
    path: str | None = None
    """Text, JSONL or parquet file, a folder of them, or ready token files; left out: the Python standard library's
    sources."""
    text_field: str = "text"
    """JSONL field or parquet column that holds the text."""
    vocab_size: int = 4096
    """Size of the byte-level BPE vocabulary, at most."""
    valid_fraction: float = 0.05
    """Share of the text held out for validation, in (0, 0.5]."""
    cache: str = "~/.cache/neuralforge/data"
    """Folder where tokenizers and token files are kept."""


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw"] = "adamw"
    """Update rule."""
    lr: float = 2e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""


@dataclass(frozen=True)
class Schedule:
    name: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """Shape of the learning rate over the steps."""
    warmup: int | None = None
    """Steps of linear warm-up; left out: a twentieth of the steps, at most 200."""
    final: float = 0.1
    """Last learning rate as a share of the peak."""


@dataclass(frozen=True)
class Train:
    steps: int = 400
    """Optimizer steps."""
    batch: int = 16
    """Sequences in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step, their gradients averaged."""
    seed: int = 0
    """Of the initial weights, the order of the data and dropout."""
    eval_every: int = 100
    """Steps between validations."""
    eval_batches: int = 20
    """Batches of held-out text in a validation, at most."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    out: str = "runs/default"
    """Folder of the run: configuration, checkpoints, metrics, curve."""


@dataclass(frozen=True)
class Sample:
    prompt: str = "def "
    """Start of the text generated at the end."""
    tokens: int = 200
    """Tokens generated."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = 50
    """Sample among the k likeliest."""


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)

    def model_config(self, vocab_size: int | None = None) -> ModelConfig:
        """The model's complete shape; `vocab_size` is the tokenizer's, which may come out below the wish."""
        return _shape(resolve(self).model, vocab_size or self.data.vocab_size)


SECTIONS: dict[str, type] = get_type_hints(Config)


def resolve(config: Config) -> Config:
    """Fill in what was left out, and check everything. Raises ConfigError naming key, value and expectation."""
    m, t = config.model, config.train
    _at_least("model", m, depth=1, context=2, d_model=1, n_heads=1, n_kv_heads=1, d_ff=1)
    d_model = m.d_model or max(128, 64 * m.depth)
    n_heads = m.n_heads or _heads(d_model, m.kind)
    d_ff = m.d_ff or (4 * d_model if m.kind == "gpt2" else 32 * math.ceil(d_model * 8 / 3 / 32))
    model = replace(m, d_model=d_model, n_heads=n_heads, n_kv_heads=m.n_kv_heads or n_heads, d_ff=d_ff)
    _at_least("train", t, steps=1, batch=1, accumulate=1, eval_every=1, eval_batches=1, checkpoint_every=1, keep=1)
    _at_least("data", config.data, vocab_size=257)
    _at_least("sample", config.sample, tokens=0, temperature=0, top_k=1)
    _at_least("optimizer", config.optimizer, eps=0, weight_decay=0)
    _at_least("schedule", config.schedule, warmup=0)
    _require(0 <= t.seed < 2**63, "train", t, "seed", "a whole number in [0, 2**63)")
    _require(config.sample.prompt != "", "sample", config.sample, "prompt", "at least one character to continue")
    _require(0 < config.data.valid_fraction <= 0.5, "data", config.data, "valid_fraction", "a number in (0, 0.5]")
    _require(config.optimizer.lr > 0, "optimizer", config.optimizer, "lr", "a number above 0")
    _require(config.optimizer.clip_norm > 0, "optimizer", config.optimizer, "clip_norm", "a number above 0")
    _require(all(0 <= b < 1 for b in config.optimizer.betas), "optimizer", config.optimizer, "betas", "two in [0, 1)")
    _require(0 <= config.schedule.final <= 1, "schedule", config.schedule, "final", "a number in [0, 1]")
    for section, key in (("data", "path"), ("data", "cache"), ("train", "out")):
        path = getattr(getattr(config, section), key)
        named = path is None or (path and not os.path.expanduser(path).startswith("~"))  # ~nobody stays as it is
        _require(named, section, getattr(config, section), key, "a path; ~ or ~user is a home folder of this machine")
    warmup = config.schedule.warmup
    warmup = min(200, t.steps // 20) if warmup is None else warmup
    schedule = replace(config.schedule, warmup=warmup)
    _require(warmup <= t.steps, "schedule", schedule, "warmup", f"at most train.steps={t.steps}")
    _shape(model, config.data.vocab_size)  # checks how the sizes fit together
    return replace(config, model=model, schedule=schedule)


def _heads(d_model: int, kind: str) -> int:
    """The number of heads whose width is nearest to 64; rotary embeddings (llama) need an even width."""
    widths = [w for w in {*range(1, min(d_model, 1024) + 1), d_model} if d_model % w == 0]
    fits = [w for w in widths if kind == "gpt2" or w % 2 == 0] or [d_model]
    return d_model // min(fits, key=lambda w: abs(math.log(w / 64)))


def _shape(m: Model, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        m.kind, vocab_size, m.context, m.d_model, m.depth, m.n_heads, m.n_kv_heads, m.d_ff, m.dropout, m.tie_embeddings
    )


def _at_least(section: str, holder: Any, **bounds: float) -> None:
    for key, bound in bounds.items():
        value = getattr(holder, key)
        _require(value is None or value >= bound, section, holder, key, f"at least {bound}")


def _require(ok: bool, section: str, holder: Any, key: str, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{section}.{key}={getattr(holder, key)!r}; expected {expected}.")


# ---- TOML


def load(path: Path, base: Config | None = None) -> Config:
    """The configuration in a TOML file, over `base` (the defaults). Raises ConfigError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        table = tomllib.loads(text)
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such configuration file.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can't read the configuration: {e}.") from e
    except ValueError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}.") from e
    config = base or Config()
    for section, values in table.items():
        key = None
        try:
            if not isinstance(values, dict):
                if section in SECTIONS:
                    raise ConfigError(f"{section}={values!r}; expected a section [{section}] with keys.")
                raise ConfigError(f"key {section} stands outside any section. {_suggest(section)}")
            if section not in SECTIONS:
                raise ConfigError(f"unknown section [{section}]. {_suggest(section)}")
            hints = get_type_hints(SECTIONS[section])
            changes = {}
            for key, value in values.items():
                if key not in hints:
                    raise ConfigError(f"unknown key {section}.{key}. {_suggest(f'{section}.{key}')}")
                changes[key] = _convert(value, hints[key], f"{section}.{key}")
        except ConfigError as e:
            raise ConfigError(f"{path}:{_line(text, section, key)}: {e}") from None
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    return config


def dump(config: Config) -> str:
    """The configuration as TOML, such that `load` gives it back: a key that is None is left out where that is the
    default, else written "none"."""
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for f in dataclasses.fields(SECTIONS[section]):
            value = getattr(getattr(config, section), f.name)
            if value is not None or f.default is not None:
                lines.append(f"{f.name} = {toml_value('none' if value is None else value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08X}") for c in value) + '"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)


def _line(text: str, section: str, key: str | None) -> int:
    """The line where a section, or a key in it, first stands. tomllib tells no positions; but the beginning of a file
    is TOML too, if it is cut between statements, so this reads ever longer beginnings until the key is there."""
    lines, start = text.split("\n"), 1
    for end in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:  # cut within a statement of several lines
            continue
        if section in table and (key is None or key in table[section]):
            return start
        start = end + 1
    raise AssertionError(f"{section}.{key} is not in the text")


# ---- values and names


def keys() -> dict[str, Any]:
    """Every key, `section.key`, with its type."""
    return {f"{s}.{k}": hint for s, cls in SECTIONS.items() for k, hint in get_type_hints(cls).items()}


def choices(key: str) -> tuple[str, ...]:
    """The values that a key takes, where they are listed; else ()."""
    return next((get_args(o) for o in _options(keys()[key]) if get_origin(o) is Literal), ())


def set_key(config: Config, key: str, text: str) -> Config:
    """The configuration with one key set from the text of a flag. Raises ConfigError."""
    known = keys()
    if key not in known:
        raise ConfigError(f"unknown option --{key}. {_suggest(key)}")
    section, name = key.split(".")
    value = _convert(_parse(text, known[key]), known[key], f"--{key}")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _parse(text: str, hint: Any) -> Any:
    """A flag's text as a value of type `hint`; unchanged where it is none, for `_convert` to refuse."""
    options = _options(hint)
    if type(None) in options and text.lower() == "none":
        return None
    if any(get_origin(o) is tuple for o in options):
        return [_parse(part, float) for part in text.strip("[]()").split(",")]
    if bool in options:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` in the type `hint`; whole numbers are fine where a number is expected, and "none" stands for None, which
    TOML lacks. Raises ConfigError."""
    options = _options(hint)
    for option in options:
        if option is type(None) and (value is None or (value == "none" and str not in options)):
            return None
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, list) and len(value) == len(get_args(option)):
            return tuple(_convert(v, o, where) for v, o in zip(value, get_args(option)))
        if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # so not nan
            return float(value)
        if option in (int, bool) and type(value) is option:
            return value
        if option is str and type(value) is str and not re.search("[\ud800-\udfff]", value):  # TOML is UTF-8
            return value
    raise ConfigError(f"{where}={value!r}; expected {_describe(hint, value)}.")


def _options(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any, value: Any = None) -> str:
    names = {int: "a whole number", float: "a number", str: "text in UTF-8", bool: "true or false", type(None): "none"}
    parts = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            choices = get_args(option)
            close = difflib.get_close_matches(str(value), choices, 1)
            parts.append("one of " + ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else ""))
        elif get_origin(option) is tuple:
            parts.append(f"{len(get_args(option))} numbers, as 0.9,0.95")
        else:
            parts.append(names[option])
    return " or ".join(parts)


def nearest(name: str, known: Collection[str]) -> str | None:
    """What `name` was probably meant to be: a key of the same name in another section, one spelt alike in its own, or
    one spelt alike anywhere."""
    section, _, last = name.rpartition(".")
    alike = lambda keys: difflib.get_close_matches(last, [k.rpartition(".")[2] for k in keys], 1, 0.6)
    own = [k for k in known if k.rpartition(".")[0] == section]
    for keys, found in ((known, [last]), (own, alike(own)), (known, alike(known))):
        for key in keys:
            if found and key.rpartition(".")[2] == found[0]:
                return key
    close = difflib.get_close_matches(name, known, 1, 0.8)
    return close[0] if close else None


def _suggest(name: str) -> str:
    section = name.partition(".")[0]
    found = nearest(name, [*keys(), *SECTIONS])
    if found:
        return f"Did you mean {found}?"
    if section in SECTIONS:
        return f"The keys of [{section}] are {', '.join(get_type_hints(SECTIONS[section]))}."
    return f"The sections are {', '.join(SECTIONS)}; `neuralforge train --help` lists the keys."
