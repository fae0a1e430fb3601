"""The training step: forward, backward, accumulation, clipping and the optimizer as one pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .. import optim, random
from ..autograd import value_and_grad
from ..models import next_token_loss
from .config import Config
from .schedule import make_plateau, make_schedule

State = dict[str, Any]
"""`{"params": {name: tensor}, "optimizer": the optimizer's state}`; also `plateau` with the schedule reduce_on_plateau,
`key`, of random numbers, with an optimizer that draws them, and `noise`, the gradient's, with several micro-batches."""

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the products are computed in, by `train.precision`; None: in the parameters' type."""


def make_optimizer(config: Config, schedule: optim.schedules.Schedule) -> optim.Optimizer:
    o = config.optimizer
    decay = lambda p: p.dim() >= 2  # matrices, not biases and norms
    match o.name:
        case "adamw":
            optimizer = optim.adamw(schedule, o.betas, o.eps, o.weight_decay, decay)
        case "sgd":
            optimizer = optim.sgd(schedule, o.momentum, 0.0, o.weight_decay, o.nesterov, decay)
        case "adafactor":
            optimizer = optim.adafactor(schedule, weight_decay=o.weight_decay, decay=decay)
        case "lion":
            optimizer = optim.lion(schedule, o.betas, o.weight_decay, decay)
        case "muon":
            hidden = optim.muon(
                schedule, o.momentum, o.nesterov, o.weight_decay, o.scaling, blocks={"*.qkv.weight": 3}
            )
            rest = optim.adamw(schedule, o.betas, o.eps, o.weight_decay, decay)
            rest = optim.chain(rest, optim.scale(o.adamw_lr / o.lr))
            optimizer = optim.groups({"blocks.*.*.*.weight": hidden, "*": rest})
        case "schedule_free_adamw":
            optimizer = optim.schedule_free_adamw(schedule, o.betas, o.eps, o.weight_decay, decay)
        case "sophia_h" | "sophia_g":
            optimizer = optim.sophia(schedule, o.betas, o.gamma, o.eps, weight_decay=o.weight_decay, decay=decay, like=o.like)
    if o.lookahead:
        optimizer = optim.lookahead(optimizer, o.lookahead)
    optimizer = optimizer if o.ema is None else optim.ema(optimizer, o.ema)
    return optim.loss_scaling(optimizer) if config.train.precision == "fp16" else optimizer


def weights(config: Config, state: State) -> dict[str, torch.Tensor]:
    """The parameters to validate, to generate with and to export: what is trained, or an average of it."""
    return make_optimizer(config, make_schedule(config)).evaluate(state["params"], state["optimizer"])


def curvature_due(config: Config, done: int) -> bool:
    """Does the step after `done` steps estimate the curvature?"""
    every = config.optimizer.curvature_every
    return every is not None and done % every == (every - 1 if config.optimizer.like == "official" else 0)


def make_step(
    model: nn.Module, config: Config, schedule: optim.schedules.Schedule | None = None
) -> tuple[Callable[[], State], Callable[[State, torch.Tensor], tuple[State, dict]], Callable]:
    """`(init() -> state, step(state, tokens, due=False) -> (state, metrics), evaluate(params, tokens) -> loss)`.

    `tokens` is int64 [micro-batches * batch, context + 1]: inputs and targets overlap by all but one. The metrics are
    scalar tensors: `loss` (nats per token) and `grad_norm` (before clipping); with several micro-batches also the gradient's
    `noise_scale` (tokens), `snr` and `cosine` (of micro-batches), and `grad_norms`, a number a parameter (`optim.accumulation`); in
    fp16 `loss_scale` and `skipped`, the steps whose gradients overflowed. `schedule` goes in place of the configured one.

    Where `curvature_due` says so, the step is called with `due=True`, which makes another program of it: Sophia's estimate,
    from the first micro-batch, goes into the update, and `unclipped` among the metrics is the share of elements that
    Sophia doesn't clip.
    """
    schedule, plateau = schedule or make_schedule(config), make_plateau(config)
    dtype, scaled = DTYPES[config.train.precision], config.train.precision == "fp16"

    def logits(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return functional_call(model, params, (tokens[:, :-1],))

    def loss_fn(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return next_token_loss(logits(params, tokens), tokens[:, 1:])

    logits, loss_fn = optim.autocast(logits, dtype), optim.autocast(loss_fn, dtype)

    def gradient(state: State, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if scaled:
            return optim.scaled_value_and_grad(loss_fn)(state["optimizer"]["scale"], state["params"], tokens)
        return value_and_grad(loss_fn)(state["params"], tokens)

    def curvature(params: dict[str, torch.Tensor], tokens: torch.Tensor, key: torch.Tensor) -> dict[str, torch.Tensor]:
        if config.optimizer.name == "sophia_h":
            return optim.hutchinson(lambda params: loss_fn(params, tokens), params, key)
        return optim.gauss_newton_bartlett(lambda params: logits(params, tokens), params, key)

    def init() -> State:
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = {"params": params, "optimizer": make_optimizer(config, schedule).init(params)}
        if plateau:
            state["plateau"] = plateau.init()
        if config.optimizer.curvature_every:
            state["key"] = random.key(config.train.seed)
        if config.train.accumulate > 1:
            state["noise"] = optim.noise_scale.init()
        return state

    def step(state: State, tokens: torch.Tensor, due: bool = False) -> tuple[State, dict[str, torch.Tensor]]:
        micros, metrics, extra, new = tokens.split(config.train.batch), {}, {}, {}
        if len(micros) == 1:
            loss, grads = gradient(state, tokens)
        else:
            sums = optim.accumulation.empty(state["params"])
            for micro in micros:
                sums = optim.accumulation.add(sums, *gradient(state, micro), weight=micro[:, 1:].numel())
            loss, grads = optim.accumulation.mean(sums)
            found = optim.accumulation.statistics(sums)
            new["noise"] = optim.noise_scale.update(state["noise"], found)
            scale = optim.noise_scale.noise_scale(new["noise"])
            metrics = {"noise_scale": scale, "snr": found.snr, "cosine": found.cosine, "grad_norms": found.norms}
        if config.optimizer.clip_share is not None:
            grads, _ = optim.clip_adaptively(config.optimizer.clip_share).update(grads, (), state["params"])
        grads, norm = optim.clip_gradients(grads, config.optimizer.clip_norm)
        rate = (lambda n: state["plateau"]["share"] * schedule(n)) if plateau else schedule
        metrics = {"loss": loss, "grad_norm": norm, **metrics}
        if due:
            new["key"], key = random.split(state["key"]).unbind()
            extra["curvature"] = curvature(state["params"], micros[0], key)
        updates, new["optimizer"] = make_optimizer(config, rate).update(grads, state["optimizer"], state["params"], **extra)
        if due:
            own = new["optimizer"]
            while "optimizer" in own:  # lookahead's and the average's hold that within
                own = own["optimizer"]
            metrics["unclipped"] = own["unclipped"]
        if scaled:
            metrics |= {"loss_scale": new["optimizer"]["scale"], "skipped": new["optimizer"]["skipped"]}
        return {**state, **new, "params": optim.apply_updates(state["params"], updates)}, metrics

    return init, step, loss_fn
