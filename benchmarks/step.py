"""One training step of a GPT, side by side: ours, PyTorch eager, torch.compile, and JAX where it is installed.

    python benchmarks/step.py [--model gpt2|llama] [--rounds 10] [--only ours eager] [--no-fresh]

The step is forward, backward, clipping to global norm 1 and AdamW, float32, on the same weights and tokens. Times
alternate in one process. The rest is taken in a fresh process each, with empty compiler caches: the first step, from
the initialised model to its loss; the best step alone, with nobody else's settings or threads in the process; and the
peak of memory during later steps, beyond that of importing the libraries. `ours, kernels built` has the
once-per-machine choices and libraries of an earlier run, as every run but the first.

On a busy machine, `taskset -c 0 python benchmarks/step.py` and the CPU times tell more: one core's CPU time hardly
depends on the others' work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from torch import nn
from torch.func import functional_call

import neuralforge as nf
from neuralforge.bench import (
    alternate,
    peak_flops,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    timing_table,
)
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.models import ModelConfig, build, next_token_loss

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
MODELS = {
    # 17.0 M parameters: output layer not tied to the embedding.
    "gpt2": (ModelConfig("gpt2", 8192, 256, 384, 6, 6, 6, 1536, tie_embeddings=False), 8),
    # 50 M: RMS norm, rotary, SwiGLU, grouped queries.
    "llama": (ModelConfig("llama", 8192, 256, 640, 8, 10, 5, 1728, tie_embeddings=False), 4),
}


def tokens_for(config: ModelConfig, batch: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, config.context + 1), generator=torch.Generator().manual_seed(1))


def ours(model: nn.Module, config: ModelConfig, batch: int) -> Callable[[], float]:
    tokens = tokens_for(config, batch)
    optimizer = nf.optim.adamw(LR, BETAS, EPS, DECAY)

    def loss_fn(params, tokens):
        return next_token_loss(functional_call(model, params, (tokens[:, :-1],)), tokens[:, 1:])

    def step(state, tokens):
        loss, grads = nf.value_and_grad(loss_fn)(state["params"], tokens)
        grads, _ = nf.optim.clip_by_global_norm(grads, CLIP)
        params, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": optimizer_state}, loss

    step = nf.jit(step, donate=0)
    params = {name: p.detach() for name, p in model.named_parameters()}
    state = {"params": params, "optimizer": optimizer.init(params)}

    def run() -> float:
        nonlocal state
        state, loss = step(state, tokens)
        return loss.item()

    return run


def eager(model: nn.Module, config: ModelConfig, batch: int, compiled: bool = False) -> Callable[[], float]:
    tokens = tokens_for(config, batch)
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY, fused=True)
    forward = lambda: next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    forward = torch.compile(forward) if compiled else forward

    def run() -> float:
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def with_jax(model: nn.Module, config: ModelConfig, batch: int) -> Callable[[], float]:
    from jax_step import make_step  # beside this file

    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return make_step(config, weights, tokens_for(config, batch).numpy(), LR, BETAS, EPS, DECAY, CLIP)


CANDIDATES: dict[str, Callable[[nn.Module, ModelConfig, int], Callable[[], float]]] = {
    "ours": ours,
    "eager": eager,
    "compile": partial(eager, compiled=True),
    "jax": with_jax,
}


def fresh(name: str, model: str, cache: str) -> dict[str, float]:
    """What `report_fresh` finds in a process of its own, with compiler caches in the folder `cache`."""
    env = {**os.environ, "NEURALFORGE_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--fresh", name, "--model", model]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers it waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def report_fresh(name: str, model: str) -> None:
    """Print seconds of the first step and of the best later one, and the bytes of memory they took, as JSON."""
    if name == "jax":
        importlib.import_module("jax_step")
    config, batch = MODELS[model]
    before = resident_bytes()
    model = [build(config, 0)]
    start, cpu_start = time.perf_counter(), cpu_seconds()
    run = CANDIDATES[name](model.pop(), config, batch)  # given away: JAX copies the weights
    run()
    first, first_cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    reset_peak()  # the compiler's own memory is not the step's
    best = alternate({name: run}, rounds=5)[name].best
    print(json.dumps({"first": first, "first_cpu": first_cpu, "best": best, "peak": peak_resident_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--no-fresh", action="store_true", help="skip the fresh processes")
    parser.add_argument("--fresh", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fresh:
        return report_fresh(args.fresh, args.model)

    console = Console(width=130)
    config, batch = MODELS[args.model]
    flops = config.flops_per_token() * batch * config.context
    peak = peak_flops()
    names = [n for n in args.only if n != "jax" or importlib.util.find_spec("jax")]
    console.print(
        f"{args.model}: {config.parameter_count() / 1e6:.1f} M parameters, {batch} x {config.context} tokens, "
        f"{flops / 1e9:.0f} GFLOP a step; {cpu_model()}, {isa()}, {torch.get_num_threads()} threads, measured peak "
        f"{peak.value / 1e9:.0f} GFLOP/s"
    )
    runs = {name: CANDIDATES[name](build(config, 0), config, batch) for name in names}
    losses = {name: [run() for _ in range(3)] for name, run in runs.items()}
    for name, values in losses.items():
        console.print(f"losses of the first steps, {name}: " + ", ".join(f"{v:.4f}" for v in values))
    spread = max(abs(v[2] - losses[names[0]][2]) for v in losses.values())
    if spread > 2e-3:
        raise SystemExit(f"the candidates disagree by {spread:.4f} after three steps: they don't run the same step")

    timings = alternate(runs, args.rounds)
    columns = {"of peak (best)": {name: f"{flops / t.best / peak.value:.0%}" for name, t in timings.items()}}
    if not args.no_fresh:
        with tempfile.TemporaryDirectory() as shared:
            found = {name: fresh(name, args.model, shared) for name in names}
            if "ours" in names:
                again = fresh("ours", args.model, shared)
        columns["alone, best ms"] = {name: f"{f['best'] * 1e3:.0f}" for name, f in found.items()}
        columns["first step s (CPU)"] = {name: f"{f['first']:.1f} ({f['first_cpu']:.1f})" for name, f in found.items()}
        columns["peak memory MB"] = {name: f"{f['peak'] / 1e6:.0f}" for name, f in found.items()}
    console.print(timing_table(timings, "whole training step", columns))
    if not args.no_fresh and "ours" in names:
        console.print(f"ours, kernels built: first step {again['first']:.1f} s ({again['first_cpu']:.1f} s of CPU time)")


if __name__ == "__main__":
    main()
