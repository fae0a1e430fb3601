"""The configuration of a training run: defaults, then a TOML file, then flags.

Each field is a TOML key `[section] key = value` and a flag `--section.key=value`, and nothing else is. `resolve`
derives what depends on what, once; the resolved configuration, written out, runs the same run again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
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
    """Attention heads; left out: d_model / 64."""
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
        m = resolve(self).model
        return ModelConfig(
            m.kind, vocab_size or self.data.vocab_size, m.context, m.d_model, m.depth, m.n_heads, m.n_kv_heads, m.d_ff,
            m.dropout, m.tie_embeddings,
        )  # fmt: skip


SECTIONS: dict[str, type] = get_type_hints(Config)


def resolve(config: Config) -> Config:
    """Fill in what was left out, and check everything. Raises ConfigError naming key, value and expectation."""
    m, t = config.model, config.train
    _at_least("model", m, depth=1, context=2, d_model=1, n_heads=1, n_kv_heads=1, d_ff=1)
    d_model = m.d_model or max(128, 64 * m.depth)
    n_heads = m.n_heads or max(1, round(d_model / 64))
    d_ff = m.d_ff or (4 * d_model if m.kind == "gpt2" else 32 * math.ceil(d_model * 8 / 3 / 32))
    model = replace(m, d_model=d_model, n_heads=n_heads, n_kv_heads=m.n_kv_heads or n_heads, d_ff=d_ff)
    _at_least("train", t, steps=1, batch=1, accumulate=1, seed=0, eval_every=1, eval_batches=1, checkpoint_every=1, keep=1)
    _at_least("data", config.data, vocab_size=257)
    _at_least("sample", config.sample, tokens=0, temperature=0, top_k=1)
    _at_least("optimizer", config.optimizer, eps=0, weight_decay=0)
    _at_least("schedule", config.schedule, warmup=0)
    _require(0 < config.data.valid_fraction <= 0.5, "data", config.data, "valid_fraction", "a number in (0, 0.5]")
    _require(config.optimizer.lr > 0, "optimizer", config.optimizer, "lr", "a number above 0")
    _require(config.optimizer.clip_norm > 0, "optimizer", config.optimizer, "clip_norm", "a number above 0")
    _require(all(0 <= b < 1 for b in config.optimizer.betas), "optimizer", config.optimizer, "betas", "two in [0, 1)")
    _require(0 <= config.schedule.final <= 1, "schedule", config.schedule, "final", "a number in [0, 1]")
    warmup = config.schedule.warmup
    warmup = min(200, t.steps // 20) if warmup is None else warmup
    schedule = replace(config.schedule, warmup=warmup)
    _require(warmup <= t.steps, "schedule", schedule, "warmup", f"at most train.steps={t.steps}")
    resolved = replace(config, model=model, schedule=schedule)
    ModelConfig(
        m.kind, config.data.vocab_size, m.context, d_model, m.depth, n_heads, model.n_kv_heads, d_ff, m.dropout,
        m.tie_embeddings,
    )  # fmt: skip  (checks how the sizes fit together)
    return resolved


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
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such configuration file.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can't read the configuration: {e}.") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}.") from e
    config = base or Config()
    for section, values in table.items():
        where = f"{path}:{_line(text, section, None)}"
        if section not in SECTIONS:
            raise ConfigError(f"{where}: unknown section [{section}]. {_nearest(section)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {section}={values!r}; expected a section [{section}] with keys.")
        hints = get_type_hints(SECTIONS[section])
        changes = {}
        for key, value in values.items():
            where = f"{path}:{_line(text, section, key)}"
            if key not in hints:
                raise ConfigError(f"{where}: unknown key {section}.{key}. {_nearest(f'{section}.{key}')}")
            changes[key] = _convert(value, hints[key], f"{where}: {section}.{key}")
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    return config


def dump(config: Config) -> str:
    """The configuration as TOML. A key without a value (None) is left out."""
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if value is not None:
                lines.append(f"{key} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08X}") for c in value) + '"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


def _line(text: str, section: str, key: str | None) -> int:
    """The line of a section's header, or of a key in it."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\]]+?)\s*\]", line)
        if header:
            inside = header.group(1) == section
            if inside and key is None:
                return number
        elif key is None and re.match(rf"\s*{re.escape(section)}\s*[.=]", line):
            return number
        elif key is not None and inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
        elif key is not None and re.match(rf"\s*{re.escape(section)}\s*\.\s*{re.escape(key)}\s*=", line):
            return number
    return 1


# ---- values and names


def keys() -> dict[str, Any]:
    """Every key, `section.key`, with its type."""
    return {f"{s}.{k}": hint for s, cls in SECTIONS.items() for k, hint in get_type_hints(cls).items()}


def set_key(config: Config, key: str, text: str) -> Config:
    """The configuration with one key set from the text of a flag. Raises ConfigError."""
    known = keys()
    if key not in known:
        raise ConfigError(f"unknown option --{key}. {_nearest(key)}")
    section, name = key.split(".")
    value = _convert(_parse(text, known[key]), known[key], f"--{key}")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _parse(text: str, hint: Any) -> Any:
    """A flag's text as the TOML value it stands for, where the type isn't a string."""
    options = _options(hint)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    if str in options or any(get_origin(o) is Literal for o in options):
        return text
    if any(get_origin(o) is tuple for o in options):
        return [_parse(part.strip(), float) for part in text.strip("[]()").split(",")]
    try:
        return tomllib.loads(f"value = {text.lower() if bool in options else text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` in the type `hint`; whole numbers are fine where a number is expected. Raises ConfigError."""
    for option in _options(hint):
        if option is type(None) and value is None:
            return None
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, list) and len(value) == len(get_args(option)):
            return tuple(_convert(v, o, where) for v, o in zip(value, get_args(option)))
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    raise ConfigError(f"{where}={value!r}; expected {_describe(hint, value)}.")


def _options(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any, value: Any = None) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
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


def _nearest(name: str) -> str:
    """What was probably meant: the nearest key, also by its last part in another section."""
    known = list(keys())
    last = name.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.endswith("." + last)]
    found = elsewhere or difflib.get_close_matches(name, [*known, *SECTIONS], 1, 0.6)
    if not found:
        by_last = difflib.get_close_matches(last, [k.split(".")[1] for k in known], 1, 0.7)
        found = [k for k in known if by_last and k.endswith("." + by_last[0])]
    if found:
        return f"Did you mean {found[0]}?"
    return f"The sections are {', '.join(SECTIONS)}; `neuralforge train --help` lists the keys."
