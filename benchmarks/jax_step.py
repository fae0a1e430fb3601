"""The benchmark's training step in plain JAX: the same mathematics on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_loss(c: Any, dtype: Any) -> Callable[..., Any]:
    """loss(weights by name, data), products and attention in `dtype`."""

    def norm(p, name, x):
        if c.kind == "llama":
            return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c.norm_eps) * p[f"{name}.weight"]
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c.norm_eps)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(p, name, x):
        y = x.astype(dtype) @ p[f"{name}.weight"].T.astype(dtype)
        return y + p[f"{name}.bias"].astype(dtype) if f"{name}.bias" in p else y

    def heads(x):
        return x.reshape(*x.shape[:2], -1, c.d_head)

    def rotate(x, cos, sin):
        a, b = jnp.split(x, 2, -1)
        return (x * cos + jnp.concatenate([-b, a], -1) * sin).astype(dtype)

    def block(p, n, x, rope):
        h = norm(p, f"{n}.norm1", x)
        if c.kind == "llama":
            q, k, v = (heads(linear(p, f"{n}.attention.{w}", h)) for w in "qkv")
            q, k = rotate(q, *rope), rotate(k, *rope)
        else:
            q, k, v = (heads(t) for t in jnp.split(linear(p, f"{n}.attention.qkv", h), 3, -1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + linear(p, f"{n}.attention.out", y)
        h = norm(p, f"{n}.norm2", x)
        up = linear(p, f"{n}.feed_forward.up", h)
        if c.kind == "llama":
            up = jax.nn.silu(linear(p, f"{n}.feed_forward.gate", h)) * up
        else:
            up = jax.nn.gelu(up, approximate=True)
        return x + linear(p, f"{n}.feed_forward.out", up)

    def classify(p, x, y):
        x = linear(p, "enter", x)
        for i in range(c.n_layers):
            h = jax.nn.gelu(linear(p, f"ups.{i}", norm(p, f"norms.{i}", x)), approximate=False)
            x = x + linear(p, f"downs.{i}", h)
        return cross_entropy(linear(p, "head", x), y)

    def cross_entropy(logits, targets):
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()

    def next_token(p, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        T = inputs.shape[1]
        x = p["tokens.weight"][inputs]
        frequency = c.rope_theta ** (-jnp.arange(0, c.d_head, 2) / c.d_head)
        angle = jnp.tile(jnp.outer(jnp.arange(T), frequency), (1, 2))[:, None, :]
        if c.kind == "gpt2":
            x = x + p["positions.weight"][:T]
        for i in range(c.n_layers):
            x = block(p, f"blocks.{i}", x, (jnp.cos(angle), jnp.sin(angle)))
        return cross_entropy(linear(p, "head", norm(p, "norm", x)), targets)

    return classify if c.kind == "mlp" else next_token


def make_step(config: Any, weights: dict, data: list, precision: str, lr, betas, eps, decay, clip) -> Callable[[], float]:
    loss_fn = make_loss(config, jnp.bfloat16 if precision == "bf16" else jnp.float32)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(lr, betas[0], betas[1], eps, weight_decay=decay)
    )

    def step(params, state, *data):
        loss, grads = jax.value_and_grad(loss_fn)(params, *data)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    params = {name: jnp.array(w) for name, w in weights.items()}
    state, data = optimizer.init(params), [jnp.array(x) for x in data]

    def run() -> float:
        nonlocal params, state
        params, state, loss = step(params, state, *data)
        return float(loss)

    return run
