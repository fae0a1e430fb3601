"""Transformers in plain torch.nn."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ModelConfig

if TYPE_CHECKING:
    from .gpt2 import GPT2
    from .initialise import build, next_token_loss
    from .llama import Llama
    from .sampling import generate

_HOME = {"GPT2": "gpt2", "Llama": "llama", "build": "initialise", "generate": "sampling", "next_token_loss": "initialise"}

__all__ = ["GPT2", "Llama", "ModelConfig", "build", "generate", "next_token_loss"]


def __getattr__(name: str) -> Any:  # a model's configuration can be read without importing torch
    if name in _HOME:
        found = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
