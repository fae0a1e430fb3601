"""What the optimizers ask of their arguments."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .groups import named_leaves


def check(optimizer: str, **values: tuple[Any, bool, str]) -> None:
    """Raise ConfigError for the first of `name=(value, is it good, what was expected)` that isn't good."""
    for name, (value, good, expected) in values.items():
        if not good:
            raise ConfigError(f"{optimizer}: {name}={value!r}; expected {expected}.")


def check_real(optimizer: str, params: Any) -> None:
    """Raise ConfigError for a complex parameter."""
    for name, p in named_leaves(params).items():
        if p is not None and p.is_complex():
            raise ConfigError(
                f"{optimizer}: the parameter {name or 'given'} is {p.dtype}; expected real numbers. Give it to adamw or sgd, with groups()."
            )


def is_rate(lr: Any) -> tuple[Any, bool, str]:
    return lr, callable(lr) or lr >= 0, "a number of at least 0, or a schedule"


def is_share(value: float) -> tuple[Any, bool, str]:
    return value, 0 <= value < 1, "a number in [0, 1)"


def is_at_least_0(value: float) -> tuple[Any, bool, str]:
    return value, value >= 0, "at least 0"


def are_shares(values: tuple[float, float]) -> tuple[Any, bool, str]:
    return values, len(values) == 2 and all(0 <= b < 1 for b in values), "two numbers in [0, 1)"
