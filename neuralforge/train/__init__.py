"""Training runs: configuration, the step, the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import load_run, run

__all__ = ["load_run", "run"]


def __getattr__(name: str) -> Any:  # the configuration can be read without importing torch
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
