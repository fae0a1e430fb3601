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
from collections.abc import Collection, Sequence
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
    name: Literal[
        "adamw", "sgd", "adafactor", "lion", "muon", "schedule_free_adamw", "sophia_h", "sophia_g"
    ] = "adamw"
    """Update rule. muon trains the matrices within the blocks, and AdamW the rest; schedule_free_adamw validates, generates
    and exports the average of its weights."""
    lr: float | None = None
    """Peak learning rate; left out: adamw, muon and schedule_free_adamw 0.003, sgd 0.3, adafactor 0.01, lion 0.0006, sophia
    0.001."""
    betas: tuple[float, float] | None = None
    """Decay of the running mean of the gradient and of its square (sophia: of the curvature; lion: of the gradient in the
    update and in the mean); left out: adamw, muon and schedule_free_adamw 0.9,0.95, lion 0.9,0.99, sophia 0.96,0.99."""
    eps: float | None = None
    """Added to the root of the mean square (sophia: least denominator); left out: 1e-8 (sophia: 1e-12)."""
    weight_decay: float | None = None
    """Decay of the matrices, decoupled but for sgd; left out: 0.1, lion 0.5, sgd and adafactor 0."""
    momentum: float | None = None
    """sgd and muon: decay of the running mean of the gradient; left out: sgd 0.9, muon 0.95."""
    nesterov: bool | None = None
    """sgd and muon: look ahead along the momentum; left out: sgd false, muon true."""
    scaling: Literal["original", "match_rms_adamw"] | None = None
    """muon: step by sqrt(max(1, rows / columns)), or by 0.2 sqrt(max(rows, columns)), with which AdamW's rates suit; left out:
    match_rms_adamw."""
    adamw_lr: float | None = None
    """muon: AdamW's peak learning rate; left out: lr with match_rms_adamw, else 0.003."""
    gamma: float | None = None
    """sophia: factor of the curvature; the higher, the more elements go unclipped; left out: sophia_h 0.01, sophia_g 0.05."""
    curvature_every: int | None = None
    """sophia: steps between estimates of the curvature; left out: 10."""
    like: Literal["paper", "official", "optax", "pytorch_optimizer"] | None = None
    """sophia: which published version to follow, and whose betas, eps and gamma are taken when left out; left out: paper."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    clip_share: float | None = None
    """Largest norm of each unit's gradient as a share of that of its weights, before clip_norm (adaptive clipping); left
    out: none."""
    lookahead: int | None = None
    """Steps between those of the slow weights, half of the way to the fast ones; left out: no slow weights."""
    ema: float | None = None
    """Decay of a moving average of the weights, to validate, generate with and export; left out: no average."""


@dataclass(frozen=True)
class Schedule:
    name: Literal[
        "cosine", "constant", "linear", "wsd", "cosine_restarts", "inverse_sqrt", "one_cycle", "piecewise", "reduce_on_plateau"
    ] | None = None
    """Shape of the learning rate over the steps; `neuralforge schedule` draws it; left out: cosine (schedule_free_adamw:
    constant)."""
    warmup: int | None = None
    """Steps of linear warm-up; left out: a twentieth of the steps, at most 200 (one_cycle: three tenths)."""
    final: float | None = None
    """Last learning rate as a share of the peak, or the least one (reduce_on_plateau); left out: 0.1 (one_cycle: 4e-6)."""
    decay: float | None = None
    """wsd: share of the steps, at the end, in which the rate falls; left out: 0.2."""
    period: int | None = None
    """cosine_restarts: steps of the first cycle; left out: so that three cycles fit."""
    growth: int | None = None
    """cosine_restarts: how many times as long each cycle is as the one before; left out: 2."""
    timescale: int | None = None
    """inverse_sqrt: steps after the warm-up until the rate is down to 0.71 of the peak; left out: the warm-up."""
    start: float | None = None
    """one_cycle: first learning rate as a share of the peak; left out: 0.04."""
    points: str | None = None
    """piecewise: steps and the shares of the peak there, joined by straight lines, as 0:1,500:1,800:0.1."""
    factor: float | None = None
    """reduce_on_plateau: what the rate is multiplied by; left out: 0.5."""
    patience: int | None = None
    """reduce_on_plateau: validations without a better loss before that; left out: 2."""
    threshold: float | None = None
    """reduce_on_plateau: share by which a better loss must be better; left out: 0.0001."""
    cooldown: int | None = None
    """reduce_on_plateau: validations that don't count after that; left out: 0."""


@dataclass(frozen=True)
class Train:
    steps: int = 1500
    """Optimizer steps."""
    batch: int = 8
    """Sequences in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step, their gradients averaged; from two on, the metrics tell the gradient's noise."""
    accumulate_most: int | None = None
    """Most micro-batches in a step: as many as the gradient noise scale asks for, from accumulate on; left out: always
    accumulate."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products; weights, their gradients and the optimizer stay in fp32; fp16 scales the loss."""
    seed: int = 0
    """Of the initial weights, the order of the data and dropout."""
    eval_every: int = 250
    """Steps between validations."""
    eval_batches: int = 20
    """Batches of held-out text in a validation, at most."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    out: str = "runs/default"
    """Folder of the run: configuration, checkpoints, metrics, curve."""


@dataclass(frozen=True)
class Sample:
    prompt: str = "def __init__(self,"
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
    _require(0 <= t.seed < 2**63, "train", t, "seed", "a whole number in [0, 2**63)")
    doublings = (t.accumulate_most or 2 * t.accumulate) // t.accumulate
    grows = t.accumulate >= 2 and t.accumulate_most == t.accumulate * doublings and doublings.bit_count() == 1
    expected = f"train.accumulate={t.accumulate}, at least 2, times a power of two (one micro-batch tells nothing of the noise)"
    _require(t.accumulate_most is None or grows, "train", t, "accumulate_most", expected)
    _require(config.sample.prompt != "", "sample", config.sample, "prompt", "at least one character to continue")
    _require(0 < config.data.valid_fraction <= 0.5, "data", config.data, "valid_fraction", "a number in (0, 0.5]")
    for section, key in (("data", "path"), ("data", "cache"), ("train", "out")):
        path = getattr(getattr(config, section), key)
        named = path is None or (path and not os.path.expanduser(path).startswith("~"))  # ~nobody stays as it is
        _require(named, section, getattr(config, section), key, "a path; ~ or ~user is a home folder of this machine")
    _shape(model, config.data.vocab_size)  # checks how the sizes fit together
    name = config.schedule.name or ("constant" if config.optimizer.name == "schedule_free_adamw" else "cosine")
    schedule = _schedule(replace(config.schedule, name=name), t.steps)
    return replace(config, model=model, optimizer=_optimizer(config.optimizer), schedule=schedule)


def _optimizer(o: Optimizer) -> Optimizer:
    sophia: dict[str, Any] = {"lr": 1e-3, "betas": None, "eps": None, "weight_decay": 0.1, "gamma": None, "like": "paper", "curvature_every": 10}
    paper = o.like in (None, "paper")
    adamw: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    rest = 3e-3 if o.scaling == "original" or o.lr is None else o.lr
    muon = {"momentum": 0.95, "nesterov": True, "scaling": "match_rms_adamw", "adamw_lr": rest}
    o = _fill("optimizer", o, {
        "adamw": adamw,
        "sgd": {"lr": 0.3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
        "adafactor": {"lr": 1e-2, "weight_decay": 0.0},
        "lion": {"lr": 6e-4, "betas": (0.9, 0.99), "weight_decay": 0.5},
        "muon": {**adamw, **muon},
        "schedule_free_adamw": adamw,
        "sophia_h": sophia,
        "sophia_g": {**sophia, "gamma": 0.05 if paper else None},
    })  # fmt: skip
    _at_least("optimizer", o, eps=0, weight_decay=0, curvature_every=1, lookahead=1)
    for key in ("momentum", "ema"):
        _require(getattr(o, key) is None or 0 <= getattr(o, key) < 1, "optimizer", o, key, "a number in [0, 1)")
    _require(o.name != "sgd" or not o.nesterov or o.momentum > 0, "optimizer", o, "nesterov", "false without momentum")
    averages = o.name == "schedule_free_adamw" and o.betas[0] == 0
    _require(not averages, "optimizer", o, "betas", "the first above 0 with schedule_free_adamw")
    for key in ("lr", "adamw_lr", "gamma", "clip_norm", "clip_share"):
        _require(getattr(o, key) is None or getattr(o, key) > 0, "optimizer", o, key, "a number above 0")
    _require(o.betas is None or all(0 <= b < 1 for b in o.betas), "optimizer", o, "betas", "two in [0, 1)")
    return o


SCHEDULE_KEYS = {
    "cosine": ("final",), "constant": (), "linear": ("final",), "wsd": ("decay", "final"),
    "cosine_restarts": ("period", "growth", "final"), "inverse_sqrt": ("timescale",), "one_cycle": ("start", "final"),
    "piecewise": ("points",), "reduce_on_plateau": ("factor", "patience", "threshold", "cooldown", "final"),
}  # fmt: skip
"""What each schedule takes beside its warm-up."""


def _schedule(s: Schedule, steps: int) -> Schedule:
    cycle = s.name == "one_cycle"
    warmup = (max(1, 3 * steps // 10) if cycle else min(200, steps // 20)) if s.warmup is None else s.warmup
    left_out = {
        "final": 4e-6 if cycle else 0.1, "decay": 0.2, "period": max(1, math.ceil((steps - warmup) / 7)), "growth": 2,
        "timescale": max(1, warmup), "start": 0.04, "factor": 0.5, "patience": 2, "threshold": 1e-4, "cooldown": 0,
    }  # fmt: skip
    s = replace(s, warmup=warmup)
    s = _fill("schedule", s, {name: {key: left_out.get(key) for key in keys} for name, keys in SCHEDULE_KEYS.items()})
    _require(cycle <= warmup <= steps, "schedule", s, "warmup", f"at least {cycle:d} and at most train.steps={steps}")
    _at_least("schedule", s, period=1, growth=1, timescale=1, patience=0, cooldown=0)
    for key in ("final", "decay", "start", "factor", "threshold"):
        value = getattr(s, key)
        _require(value is None or 0 <= value <= 1, "schedule", s, key, "a number in [0, 1]")
    _require(s.name != "piecewise" or bool(schedule_points(s)), "schedule", s, "points", "step:share pairs, as 0:1,500:1,800:0.1")
    return s


def _fill(section: str, holder: Any, takes: dict[str, dict[str, Any]]) -> Any:
    """The section with the defaults of what its `name` takes and was left out. Raises ConfigError for a key that it
    doesn't take."""
    for key in dict.fromkeys(key for keys in takes.values() for key in keys):
        takers = [name for name, keys in takes.items() if key in keys]
        without = f"none with {section}.name={holder.name}, which doesn't take it (those that do: {', '.join(takers)})"
        _require(key in takes[holder.name] or getattr(holder, key) is None, section, holder, key, without)
    return replace(holder, **{key: value for key, value in takes[holder.name].items() if getattr(holder, key) is None})


def schedule_points(s: Schedule) -> dict[int, float]:
    """Steps and shares of the peak in `points`; none if it is left out or can't be read."""
    pairs = re.findall(r"(\d+)\s*:\s*([0-9.eE+-]+)", s.points or "")
    try:
        points = {int(step): float(share) for step, share in pairs}
    except ValueError:
        return {}
    whole = len(pairs) == len(points) == len((s.points or "").split(","))
    return points if whole and all(0 <= share < math.inf for share in points.values()) else {}


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
        raise ConfigError(f"{path}: no such configuration file. Check the spelling of its path.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: can't read the configuration: {e}.") from e
    except ValueError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}. Correct that line.") from e
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


def locate(error: ConfigError, files: Sequence[Path]) -> ConfigError:
    """The error of `resolve`, with file and line if one of the files gives the key that its message begins with."""
    section, key = re.split(r"[.=/]", str(error))[:2]
    for path in reversed(files):
        text = path.read_text(encoding="utf-8-sig")
        if key in tomllib.loads(text).get(section, ()):
            return ConfigError(f"{path}:{_line(text, section, key)}: {error}")
    return error


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
