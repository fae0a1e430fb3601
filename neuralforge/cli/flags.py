"""Options as `--name value`, `--name=value` and switches: split from the arguments, checked against a list."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import ConfigError
from ..train.config import nearest


def split_flags(argv: list[str], valued: Collection[str], switches: Collection[str]) -> list[tuple[str, str | None]]:
    """(name, value) for each option in order; None for a switch; `-h` is `--help`. Raises ConfigError for an unknown
    option, a missing value, or a word that isn't an option."""
    found: list[tuple[str, str | None]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        word = "--help" if word == "-h" else word
        if not word.startswith("--"):
            raise ConfigError(f"unexpected {word!r}; options are written --name=value.")
        name, equals, value = word[2:].partition("=")
        if name in switches:
            if equals:
                raise ConfigError(f"--{name} takes no value, and got {value!r}.")
            found.append((name, None))
        elif name in valued:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"--{name} needs a value: --{name}=VALUE.")
                value = rest.pop(0)
            found.append((name, value))
        else:
            close = nearest(name, [*valued, *switches])
            mean = f"Did you mean --{close}?" if close else "See --help."
            raise ConfigError(f"unknown option --{name}. {mean}")
    return found


def whole_number(name: str, text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**63:
        bounds = f"at least {least}" if value < least else "less than 2**63"
        raise ConfigError(f"--{name}={text}; expected a whole number of {bounds}.")
    return value


def number(name: str, text: str, least: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ConfigError(f"--{name}={text}; expected a number of at least {least}.")
    return value
