"""Neural Forge: train transformers, with the whole training step as one graph."""

from . import optim
from .autograd import grad, hvp, jvp, stop_gradient, value_and_grad, vjp
from .compiler import jit

__version__ = "0.1.0"
__all__ = ["grad", "hvp", "jit", "jvp", "optim", "stop_gradient", "value_and_grad", "vjp"]
