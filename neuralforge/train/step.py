"""The training step: forward, backward, accumulation, clipping and the optimizer as one pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from .. import optim
from ..autograd import value_and_grad
from ..models import next_token_loss
from .config import Config

State = dict[str, Any]
"""`{"params": {name: tensor}, "optimizer": the optimizer's state}`."""


def make_optimizer(config: Config) -> optim.Optimizer:
    schedule = {
        "constant": lambda lr, warmup, **_: optim.schedules.constant(lr, warmup),
        "linear": optim.schedules.linear,
        "cosine": optim.schedules.cosine,
        "wsd": lambda lr, steps, warmup, final: optim.schedules.wsd(lr, steps, warmup, final=final),
    }[config.schedule.name]
    lr = schedule(config.optimizer.lr, steps=config.train.steps, warmup=config.schedule.warmup, final=config.schedule.final)
    return optim.adamw(
        lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        decay=lambda p: p.dim() >= 2,  # matrices, not biases and norms
    )


def make_step(
    model: nn.Module, config: Config
) -> tuple[Callable[[], State], Callable[[State, torch.Tensor], tuple[State, dict]], Callable]:
    """`(init() -> state, step(state, tokens) -> (state, metrics), evaluate(params, tokens) -> loss)`.

    `tokens` is int64 [accumulate * batch, context + 1]: inputs and targets overlap by all but one. The metrics are
    scalar tensors: `loss` (nats per token) and `grad_norm` (before clipping).
    """
    optimizer = make_optimizer(config)
    accumulate = config.train.accumulate

    def loss_fn(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, params, (tokens[:, :-1],))
        return next_token_loss(logits, tokens[:, 1:])

    def init() -> State:
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {"params": params, "optimizer": optimizer.init(params)}

    def step(state: State, tokens: torch.Tensor) -> tuple[State, dict[str, torch.Tensor]]:
        loss, grads = None, None
        for micro in tokens.chunk(accumulate):
            micro_loss, micro_grads = value_and_grad(loss_fn)(state["params"], micro)
            loss = micro_loss if loss is None else loss + micro_loss
            grads = micro_grads if grads is None else tree_map(torch.add, grads, micro_grads)
        if accumulate > 1:
            loss, grads = loss / accumulate, tree_map(lambda g: g / accumulate, grads)
        grads, norm = optim.clip_by_global_norm(grads, config.optimizer.clip_norm)
        params, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": optimizer_state}, {"loss": loss, "grad_norm": norm}

    return init, step, loss_fn
