"""Neural Forge: train transformers, with the whole training step as one graph."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import optim
    from .autograd import grad, hvp, jvp, stop_gradient, value_and_grad, vjp
    from .compiler import explain, jit

# Loaded at first use: the command line must answer `--help` without importing torch.
_HOME = {
    "grad": "autograd", "hvp": "autograd", "jvp": "autograd", "stop_gradient": "autograd",
    "value_and_grad": "autograd", "vjp": "autograd",
    "explain": "compiler", "jit": "compiler",
    "optim": "optim",
}  # fmt: skip

__all__ = ["explain", "grad", "hvp", "jit", "jvp", "optim", "stop_gradient", "value_and_grad", "vjp"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuralforge' has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    found = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
