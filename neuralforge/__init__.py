"""Neural Forge: train transformers, with the whole training step as one graph."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import operators, optim, random, testing
    from .autograd import (
        GradientTape,
        checkpoint,
        checkpoint_name,
        custom_jvp,
        custom_vjp,
        grad,
        hessian,
        hvp,
        jacfwd,
        jacrev,
        jvp,
        linearize,
        opaque,
        save_only,
        save_products,
        stop_gradient,
        value_and_grad,
        vjp,
        vmap,
    )
    from .bench.explain import explain
    from .compiler import jit

__all__ = [
    "GradientTape", "checkpoint", "checkpoint_name", "custom_jvp", "custom_vjp", "explain", "grad", "hessian", "hvp",
    "jacfwd", "jacrev", "jit", "jvp", "linearize", "opaque", "operators", "optim", "random", "save_only", "save_products",
    "stop_gradient", "testing", "value_and_grad", "vjp", "vmap",
]  # fmt: skip

_HOME = {
    "explain": "bench.explain", "jit": "compiler", "operators": "operators", "optim": "optim", "random": "random", "testing": "testing",
}  # fmt: skip
"""The rest is in autograd."""


def __getattr__(name: str) -> Any:
    # Loaded at first use: the command line must answer `--help` without importing torch.
    if name not in __all__:
        raise AttributeError(f"module 'neuralforge' has no attribute {name!r}")
    home = _HOME.get(name, "autograd")
    module = import_module(f".{home}", __name__)
    found = module if name == home else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
