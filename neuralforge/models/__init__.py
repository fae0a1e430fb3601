"""Transformers in plain torch.nn."""

from .build import build, next_token_loss
from .config import ModelConfig
from .generate import generate
from .gpt2 import GPT2
from .llama import Llama

__all__ = ["GPT2", "Llama", "ModelConfig", "build", "generate", "next_token_loss"]
