"""Transformers in plain torch.nn."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ModelConfig

if TYPE_CHECKING:
    from .gpt2 import GPT2
    from .huggingface import load_pretrained, save_pretrained
    from .initialise import build, next_token_loss
    from .llama import Llama
    from .sampling import generate

_HOME = {
    "GPT2": "gpt2", "Llama": "llama",
    "build": "initialise", "next_token_loss": "initialise",
    "generate": "sampling",
    "load_pretrained": "huggingface", "save_pretrained": "huggingface",
}  # fmt: skip

__all__ = ["GPT2", "Llama", "ModelConfig", "build", "generate", "load_pretrained", "next_token_loss", "save_pretrained"]


def __getattr__(name: str) -> Any:  # a model's configuration can be read without importing torch
    if name in _HOME:
        found = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
