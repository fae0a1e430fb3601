"""Optimizers as pairs of pure functions, `init(params) -> state` and `update(grads, state, params) -> (updates, state)`,
after optax. Written in plain tensor arithmetic on pytrees, they are captured and fused with the rest of the step."""

from . import accumulation, noise_scale, schedules, torch
from .adafactor import adafactor
from .adamw import adamw
from .averages import ema, lookahead
from .base import Optimizer, apply_updates, chain, scale
from .clipping import clip_adaptively, clip_by_global_norm, clip_gradients, global_norm
from .groups import groups
from .lion import lion
from .loss_scaling import loss_scaling, scaled_value_and_grad
from .muon import muon
from .precision import autocast, cast, master_weights, stochastic_rounding
from .schedule_free import schedule_free_adamw
from .sgd import sgd
from .sophia import gauss_newton_bartlett, hutchinson, sophia

__all__ = [
    "Optimizer",
    "accumulation",
    "adafactor",
    "adamw",
    "apply_updates",
    "autocast",
    "cast",
    "chain",
    "clip_adaptively",
    "clip_by_global_norm",
    "clip_gradients",
    "ema",
    "gauss_newton_bartlett",
    "global_norm",
    "groups",
    "hutchinson",
    "lion",
    "lookahead",
    "loss_scaling",
    "master_weights",
    "muon",
    "noise_scale",
    "scale",
    "scaled_value_and_grad",
    "schedule_free_adamw",
    "schedules",
    "sgd",
    "sophia",
    "stochastic_rounding",
    "torch",
]
