"""One training step side by side: ours, PyTorch eager, torch.compile, and JAX where it is installed.

    python benchmarks/step.py [--model gpt|llama|mlp|wild|layers] [--precision fp32|bf16] [--rounds 10]
                              [--only ours eager] [--no-fresh]

The step is forward, backward, clipping to global norm 1 and AdamW, on the same weights and data (`models.py`). `wild`
is the GPT as nobody tuned it: attention by matmul, mask and softmax, the loss by logsumexp and gather, and, for us
alone, AdamW and clipping as a loop of tensor arithmetic over a dictionary, all in one `nf.jit`; PyTorch's candidates
keep their fused AdamW, and JAX runs the tuned model. `layers` is the GPT of PyTorch's nn.TransformerEncoderLayer. bf16
is torch.autocast's: master weights and optimizer in float32, products and attention in bfloat16; JAX casts likewise.

Times alternate in one process. The rest is taken in a fresh process each, with empty compiler caches: the first step,
from the making of the model to its loss (without our library of kernels, built once for a machine, which is told
apart); the best step alone, with nobody else's settings or threads in the process; and the peak of memory during later
steps, beyond that of importing the libraries. `ours, all from the disk cache` has the choices and libraries of an
earlier run, as every run of the same program but the first.

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
from models import TASKS, Task
from rich.console import Console

import neuralforge as nf
from neuralforge.bench import (
    alternate,
    arithmetic_peak,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    timing_table,
)
from neuralforge.kernels.native import build_ahead, built_ahead
from neuralforge.kernels.toolchain import cpu_model, isa

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}
"""By how much the losses of the third step may differ."""
Run = Callable[[], float]


def lowered(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def ours(task: Task, precision: str, wild: bool = False) -> Run:
    model, data = task.model(), task.data()
    optimizer = nf.optim.adamw(LR, BETAS, EPS, DECAY)

    def loss_fn(params, *data):
        with lowered(precision):
            return task.loss(model, params, *data)

    def step(state, *data):
        loss, grads = nf.value_and_grad(loss_fn)(state["params"], *data)
        grads, _ = nf.optim.clip_gradients(grads, CLIP)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = nf.optim.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, loss

    def wild_step(state, *data):
        loss, grads = nf.value_and_grad(loss_fn)(state["params"], *data)
        norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = torch.clamp(CLIP / (norm + 1e-6), max=1.0)
        new = {"t": state["t"] + 1, "params": {}, "m": {}, "v": {}}
        for name, p in state["params"].items():
            g = grads[name] * factor
            m = new["m"][name] = BETAS[0] * state["m"][name] + (1 - BETAS[0]) * g
            v = new["v"][name] = BETAS[1] * state["v"][name] + (1 - BETAS[1]) * g * g
            m_hat, v_hat = m / (1 - BETAS[0] ** new["t"]), v / (1 - BETAS[1] ** new["t"])
            new["params"][name] = p - LR * (m_hat / (torch.sqrt(v_hat) + EPS) + DECAY * p)
        return new, loss

    params = {name: p.detach() for name, p in model.named_parameters()}
    if wild:
        zeros = lambda: {name: torch.zeros_like(p) for name, p in params.items()}
        state = {"t": torch.tensor(0.0), "params": params, "m": zeros(), "v": zeros()}
    else:
        state = {"params": params, "optimizer": optimizer.init(params)}
    step = nf.jit(wild_step if wild else step, donate=0)

    def run() -> float:
        nonlocal state
        state, loss = step(state, *data)
        return loss.item()

    return run


def eager(task: Task, precision: str, compiled: bool = False) -> Run:
    model, data = task.model(), task.data()
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY, fused=True)

    def forward() -> torch.Tensor:
        with lowered(precision):
            return task.loss(model, None, *data)

    forward = torch.compile(forward) if compiled else forward

    def run() -> float:
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def with_jax(task: Task, precision: str) -> Run:
    from jax_step import make_step  # beside this file

    weights = {name: p.detach().numpy() for name, p in task.model().named_parameters()}
    data = [x.numpy() for x in task.data()]
    return make_step(task.jax, weights, data, precision, LR, BETAS, EPS, DECAY, CLIP)


CANDIDATES: dict[str, Callable[[Task, str], Run]] = {
    "ours": ours,
    "eager": eager,
    "compile": partial(eager, compiled=True),
    "jax": with_jax,
}


def start(name: str, model: str, precision: str) -> Run:
    options = {"wild": True} if name == "ours" and model == "wild" else {}
    return CANDIDATES[name](TASKS[model], precision, **options)


def fresh(name: str, model: str, precision: str, cache: str) -> dict[str, float]:
    """What `report_fresh` finds in a process of its own, with compiler caches in the folder `cache`."""
    env = {**os.environ, "NEURALFORGE_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--fresh", name, "--model", model, "--precision", precision]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers it waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def report_fresh(name: str, model: str, precision: str) -> None:
    """Print seconds of the first step and of the best later one, and the bytes of memory they took, as JSON."""
    if name == "jax":
        importlib.import_module("jax_step")
    start_of_library = time.perf_counter()
    if name == "ours":
        nf.jit  # noqa: B018  (imports the compiler, as the others are imported by now)
        build_ahead()
        if precision == "bf16":
            build_ahead(bfloat16=True)
        built_ahead()
    library = time.perf_counter() - start_of_library
    before = resident_bytes()
    clock, cpu_start = time.perf_counter(), cpu_seconds()
    run = start(name, model, precision)
    run()
    first, first_cpu = time.perf_counter() - clock, cpu_seconds() - cpu_start
    reset_peak()  # the compiler's own memory is not the step's
    best = alternate({name: run}, rounds=5)[name].best
    found = {"first": first, "first_cpu": first_cpu, "best": best, "peak": peak_resident_bytes() - before}
    print(json.dumps({**found, "library": library}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TASKS, default="gpt")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--no-fresh", action="store_true", help="skip the fresh processes")
    parser.add_argument("--fresh", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fresh:
        return report_fresh(args.fresh, args.model, args.precision)

    console = Console(width=130)
    task, peak = TASKS[args.model], arithmetic_peak(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    names = [n for n in args.only if n != "jax" or task.jax is not None and importlib.util.find_spec("jax")]
    console.print(
        f"{args.model} ({task.describe}), {args.precision}: {task.flops / 1e9:.0f} GFLOP a step; {cpu_model()}, {isa()}, "
        f"{torch.get_num_threads()} threads, measured peak {peak.value / 1e9:.0f} GFLOP/s"
    )
    runs = {name: start(name, args.model, args.precision) for name in names}
    losses = {name: [run() for _ in range(3)] for name, run in runs.items()}
    for name, values in losses.items():
        console.print(f"losses of the first steps, {name}: " + ", ".join(f"{v:.4f}" for v in values))
    spread = max(abs(v[2] - losses[names[0]][2]) for v in losses.values())
    if spread > TOLERANCE[args.precision]:
        raise SystemExit(f"the candidates disagree by {spread:.4f} after three steps: they don't run the same step")

    timings = alternate(runs, args.rounds)
    columns = {"of peak (best)": {name: f"{task.flops / t.best / peak.value:.0%}" for name, t in timings.items()}}
    if not args.no_fresh:
        with tempfile.TemporaryDirectory() as shared:
            found = {name: fresh(name, args.model, args.precision, shared) for name in names}
            if "ours" in names:
                again = fresh("ours", args.model, args.precision, shared)
        columns["alone, best ms"] = {name: f"{f['best'] * 1e3:.0f}" for name, f in found.items()}
        columns["first step s (CPU)"] = {name: f"{f['first']:.1f} ({f['first_cpu']:.1f})" for name, f in found.items()}
        columns["peak memory MB"] = {name: f"{f['peak'] / 1e6:.0f}" for name, f in found.items()}
    console.print(timing_table(timings, "whole training step", columns))
    if not args.no_fresh and "ours" in names:
        console.print(f"ours: library of kernels, once for a machine, with imports: {found['ours']['library']:.1f} s")
        console.print(f"ours, all from the disk cache: first step {again['first']:.1f} s ({again['first_cpu']:.1f} s of CPU time)")


if __name__ == "__main__":
    main()
