"""`neuralforge train`."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..train import config as configuration
from ..train.config import Config, load, locate, resolve, set_key
from .flags import split_flags

SHORT = {"data": "data.path", "out": "train.out", "steps": "train.steps", "depth": "model.depth"}
SWITCHES = {
    "resume": "go on with the run in --out from its newest checkpoint, with its own configuration",
    "dry-run": "print the model and the work, and train nothing",
    "help": "this text",
}


def main(argv: list[str]) -> None:
    flags = split_flags(argv, [*configuration.keys(), *SHORT, "config"], SWITCHES)
    switches = {name for name, value in flags if value is None}
    if "help" in switches:
        print(usage())
        return
    values = [(SHORT.get(name, name), value) for name, value in flags if value is not None]
    config, files = configure(values, Config()), []
    written = Path(os.path.expanduser(config.train.out)) / "config.toml"
    if "resume" in switches and written.exists():
        run_there = set_key(load(written), "train.out", config.train.out)  # the folder may have been moved
        config, files = configure(values, run_there), [written]
    config = resolve_with_places(config, values, files)
    from ..train.trainer import run

    run(config, resume="resume" in switches, dry_run="dry-run" in switches)


def configure(values: list[tuple[str, str]], base: Config) -> Config:
    """`base`, then the files named by --config, then the other flags."""
    for name, value in values:
        if name == "config":
            base = load(Path(os.path.expanduser(value)), base)
    for name, value in values:
        if name != "config":
            base = set_key(base, name, value)
    return base


def resolve_with_places(config: Config, values: list[tuple[str, str]], files: Sequence[Path] = ()) -> Config:
    """`resolve`; its errors name file and line of a value that `files`, or those named by --config, gave."""
    try:
        return resolve(config)
    except ConfigError as e:
        if any(name != "config" and str(e).startswith(f"{name}=") for name, _ in values):
            raise
        more = [Path(os.path.expanduser(value)) for name, value in values if name == "config"]
        raise locate(e, [*files, *more]) from None


def usage() -> str:
    lines = ["usage: neuralforge train [--config=FILE.toml] [--section.key=value ...] [switches]", ""]
    lines += [f"  --{name:<24} {what}" for name, what in SWITCHES.items()]
    lines += [f"  --{short + '=':<24} short for --{full}" for short, full in SHORT.items()]
    for section, cls in configuration.SECTIONS.items():
        lines += ["", f"[{section}]"]
        default, told = cls(), field_docs(cls)
        for key in told:
            value = getattr(default, key)
            choices = configuration.choices(f"{section}.{key}")
            among = [f"of {', '.join(choices)}"] if len(choices) > 1 else []
            parts = [*([] if value is None else [configuration.toml_value(value)]), *among]
            shown = f" ({', '.join(parts)})" if parts else ""
            first, *rest = textwrap.wrap(told[key] + shown, 84)
            lines.append(f"  --{section + '.' + key + '=':<26}{first}")
            lines += [" " * 30 + line for line in rest]
    return "\n".join(lines)


def field_docs(cls: type) -> dict[str, str]:
    """The strings written below the fields of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }
