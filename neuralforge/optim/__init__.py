"""Optimizers as pairs of pure functions, `init(params)` and `update(grads, state, params)` (after optax). Written in
plain tensor arithmetic on pytrees, they are captured and fused with the rest of the step."""

from . import schedules
from .adamw import adamw
from .base import Optimizer, clip_by_global_norm, global_norm

__all__ = ["Optimizer", "adamw", "clip_by_global_norm", "global_norm", "schedules"]
