"""Differentiation: the rule table, the tape, forward mode and the transforms built on them."""

from . import rules, to_numpy, torch_function  # noqa: F401  (these two let transforms see what else they wouldn't)
from .checkpoint import checkpoint, checkpoint_name, save_only, save_products
from .custom import custom_jvp, custom_vjp, opaque
from .gradient_tape import GradientTape
from .jacobian import hessian, jacfwd, jacrev, linearize
from .transforms import grad, hvp, jvp, stop_gradient, value_and_grad, vjp
from .vmap import vmap

__all__ = [
    "GradientTape", "checkpoint", "checkpoint_name", "custom_jvp", "custom_vjp", "grad", "hessian", "hvp", "jacfwd",
    "jacrev", "jvp", "linearize", "opaque", "rules", "save_only", "save_products", "stop_gradient", "value_and_grad",
    "vjp", "vmap",
]  # fmt: skip
