"""Differentiation: the rule table, the tape, forward mode and the transforms built on them."""

from . import rules
from .transforms import grad, hvp, jvp, stop_gradient, value_and_grad, vjp

__all__ = ["grad", "hvp", "jvp", "rules", "stop_gradient", "value_and_grad", "vjp"]
