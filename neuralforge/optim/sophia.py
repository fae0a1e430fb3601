"""Sophia (Liu et al. 2023, https://arxiv.org/abs/2305.14342): momentum over a running estimate of the Hessian's diagonal,
clipped elementwise. The estimate is made every few steps and passed to `update`, so a program holds the step twice, with
it and without:

    curvature = optim.hutchinson(loss, params, key) if step_number % 10 == 0 else None  # outside of the jitted step
    updates, state = optimizer.update(grads, state, params, curvature=curvature)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from .. import random
from ..autograd import grad, hvp
from ..errors import ConfigError
from ..graph.tree import tree_flatten, tree_unflatten
from .base import Optimizer, Schedule, each, learning_rate, like_parameters
from .checks import check_real


class Rule(NamedTuple):
    """Where the published implementations differ, and their defaults."""

    before: bool
    """A new estimate enters the running mean before that is used, not after."""
    debias: bool
    """The momentum is divided by 1 - beta1**t."""
    add: bool
    """The denominator is gamma * h + eps, not max(gamma * h, eps)."""
    betas: tuple[float, float]
    gamma: float
    eps: float
    clip: float


RULES = {
    "paper": Rule(before=True, debias=False, add=False, betas=(0.96, 0.99), gamma=0.01, eps=1e-12, clip=1.0),
    "official": Rule(before=False, debias=False, add=True, betas=(0.965, 0.99), gamma=0.04, eps=1e-15, clip=1.0),
    "optax": Rule(before=False, debias=True, add=False, betas=(0.965, 0.99), gamma=0.01, eps=1e-8, clip=1.0),
    "pytorch_optimizer": Rule(before=True, debias=False, add=False, betas=(0.96, 0.99), gamma=1.0, eps=1e-12, clip=0.01),
}


def sophia(
    lr: float | Schedule,
    betas: tuple[float, float] | None = None,
    gamma: float | None = None,
    eps: float | None = None,
    clip: float | None = None,
    weight_decay: float = 0.1,
    decay: Callable[[torch.Tensor], bool] | None = None,
    like: Literal["paper", "official", "optax", "pytorch_optimizer"] = "paper",
) -> Optimizer:
    """Sophia, with decoupled weight decay.

    Four published versions disagree; `like` says which is followed, and gives the defaults of `betas`, `gamma`, `eps` and
    `clip` (`RULES`). With m and h the running means of the gradient and of the curvature, all step by
    -lr * (u + weight_decay * p), where u is

    - "paper" (the default), Algorithm 3: m / max(gamma h, eps) clipped to [-1, 1], h updated before its use. gamma is 0.01
      for Hutchinson's estimate; the paper takes 0.05 for Gauss–Newton–Bartlett's.
    - "official", the authors' code: the ratio is m / (gamma h + 1e-15), h is updated after its use. Their `rho * bs * h` is our
      gamma h: the number of samples, their `bs`, is already in `gauss_newton_bartlett`'s estimate.
    - "optax": as the paper but for m's bias correction, and h updated after its use.
    - "pytorch_optimizer": as the paper with gamma 1 and clipped to [-0.01, 0.01] (their `p`), so 100 times smaller steps.

    `update` takes the estimate as `curvature`, a pytree like the parameters, or None to leave h as it is. The state holds `step`,
    `m`, `h`, and `unclipped`: the share of elements whose ratio was within the bounds at the newest estimate, float32.
    0.1 to 0.5 is healthy; below, raise gamma. Raises ConfigError for a value out of range and for complex parameters.
    """
    if like not in RULES:
        raise ConfigError(f"sophia: like={like!r}; expected one of {', '.join(RULES)}.")
    rule = RULES[like]
    given = {"betas": betas, "gamma": gamma, "eps": eps, "clip": clip}
    rule = rule._replace(**{name: value for name, value in given.items() if value is not None})
    for name, value, ok, expected in (
        ("lr", lr, callable(lr) or lr >= 0, "at least 0"),
        ("betas", rule.betas, len(rule.betas) == 2 and all(0 <= b < 1 for b in rule.betas), "two numbers in [0, 1)"),
        ("gamma", rule.gamma, rule.gamma > 0, "above 0"),
        ("eps", rule.eps, rule.eps > 0, "above 0"),
        ("clip", rule.clip, rule.clip > 0, "above 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
    ):
        if not ok:
            raise ConfigError(f"sophia: {name}={value!r}; expected {expected}.")
    beta1, beta2 = rule.betas

    def init(params: Any) -> dict[str, Any]:
        check_real("sophia", params)
        zeros = lambda p: torch.zeros_like(p, requires_grad=False)
        step = torch.zeros((), dtype=torch.int64)
        return {"step": step, "m": each(zeros, params), "h": each(zeros, params), "unclipped": torch.zeros(())}

    def update(grads: Any, state: dict[str, Any], params: Any, curvature: Any = None, **_: Any) -> tuple[Any, dict[str, Any]]:
        step = state["step"] + 1
        rate = learning_rate(lr, state["step"])
        unbias = 1 - beta1 ** step.to(torch.float64)
        flat, tree = tree_flatten(params)
        estimates = [None] * len(flat) if curvature is None else like_parameters(tree, "curvature", curvature)
        kept = [like_parameters(tree, what, x) for what, x in (("gradients", grads), ("m", state["m"]), ("h", state["h"]))]
        updates, new_m, new_h, within = [], [], [], []
        for p, g, m, h, c in zip(flat, *kept, estimates):
            if p is None:
                for column in (updates, new_m, new_h):
                    column.append(None)
                continue
            m = m + (g - m) * (1 - beta1)
            h_next = h if c is None else h + (c - h) * (1 - beta2)
            scaled = rule.gamma * (h_next if rule.before else h)
            bottom = scaled.clamp(min=0) + rule.eps if rule.add else scaled.clamp(min=rule.eps)
            ratio = (m / unbias.to(p.dtype) if rule.debias else m) / bottom
            if c is not None:
                within.append((ratio.abs() < rule.clip).sum())
            u = ratio.clamp(-rule.clip, rule.clip)
            if weight_decay and (decay is None or decay(p)):
                u = u + weight_decay * p
            updates.append(u * -(rate.to(p.dtype) if callable(lr) else rate))
            new_m.append(m)
            new_h.append(h_next)
        pack = lambda leaves: tree_unflatten(leaves, tree)
        unclipped = state["unclipped"]
        if within:
            unclipped = (torch.stack(within).sum() / sum(p.numel() for p in flat if p is not None)).to(torch.float32)
        return pack(updates), {"step": step, "m": pack(new_m), "h": pack(new_h), "unclipped": unclipped}

    return Optimizer(init, update)


def hutchinson(
    loss_fn: Callable[[Any], torch.Tensor], params: Any, key: torch.Tensor, probe: Literal["rademacher", "normal"] = "rademacher"
) -> Any:
    """z * Hz for a random probe z from `key`, where H is the Hessian of `loss_fn` at `params`: in expectation the diagonal
    of H (Hutchinson 1989). A pytree like `params`; costs one Hessian-vector product. Signs (rademacher) give the least
    variance, and none from the diagonal itself; the paper's Algorithm 1 draws from a normal distribution."""
    flat, tree = tree_flatten(params)
    keys = random.split(key, len(flat))
    if probe == "rademacher":
        draw = lambda k, p: random.bernoulli(k, 0.5, p.shape).to(p.dtype) * 2 - 1
    else:
        draw = lambda k, p: random.normal(k, p.shape, p.dtype)
    z = tree_unflatten([None if p is None else draw(k, p) for k, p in zip(keys, flat)], tree)
    (product,) = hvp(loss_fn, (params,), (z,))
    return each(torch.mul, z, product)


def gauss_newton_bartlett(logits_fn: Callable[[Any], torch.Tensor], params: Any, key: torch.Tensor) -> Any:
    """N g * g, where g is the gradient of the mean cross entropy over the N rows of `logits_fn(params)`, [..., classes], with
    labels drawn from the model itself by `key`: in expectation the diagonal of the Gauss–Newton matrix of the mean loss
    (the paper's Algorithm 2). A pytree like `params`. With labels from the data, as in g**2 of Adam, it wouldn't be."""
    count = 0

    def loss(params: Any) -> torch.Tensor:
        nonlocal count
        logits = logits_fn(params).flatten(0, -2)
        count = logits.shape[0]
        return F.cross_entropy(logits, sample_labels(logits.detach(), key))

    return each(lambda g: count * g * g, grad(loss)(params))


def sample_labels(logits: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A class, int64, for each row of [rows, classes], with the probabilities softmax(logits)."""
    below = logits.softmax(-1).cumsum(-1)
    drawn = random.uniform(key, (logits.shape[0], 1), logits.dtype) * below[:, -1:]
    return (below <= drawn).sum(-1).clamp(max=logits.shape[-1] - 1)
