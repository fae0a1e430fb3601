"""Derivatives, side by side: time per operation of the eager tape, time of capture, memory of the backward pass.

    python benchmarks/autograd.py [--rounds 10] [--only operations capture llama memory]

operations: the gradient of a chain of N small operations (4 elements each, so that the time is the bookkeeping's),
    beside torch.autograd, and un-jitted jax.grad where JAX is installed. Time per operation of the chain, forward and
    backward together.
capture: value_and_grad of a 48-layer GPT's loss (1.6 B parameters, 1 x 1024 tokens) as a graph, on fake tensors, beside
    make_fx (through torch.autograd, and through torch.func) and jax.make_jaxpr of the same mathematics in JAX. Nothing
    is compiled. Times alternate in one process, so the libraries' own caches are warm; every round traces a new
    function object.
llama: the same of a Llama of 7 B parameters at 1 x 2048 tokens, each in a process of its own: the first capture, and
    the resident memory that making the (fake) model and capturing it added.
memory: value and gradient of a model, each in a process of its own: the peak beyond weights and tokens. `tensors` is
    what PyTorch's allocator says, exact; `resident` is the kernel's count (VmHWM), where malloc is told to hand freed
    memory back at once, or else it would measure malloc's habits.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import models  # beside this file
import torch
from rich.console import Console
from rich.table import Table
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import neuralforge as nf
from neuralforge.bench import (
    alternate,
    peak_resident_bytes,
    peak_tensor_bytes,
    reset_peak,
    resident_bytes,
    timing_table,
)
from neuralforge.graph import capture
from neuralforge.graph.capture import FakeMode
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.models import GPT2, Llama, ModelConfig, build, next_token_loss

OPERATIONS = 400
GPT = ModelConfig("gpt2", 50304, 1024, 1600, 48, 25, 25, 6400, tie_embeddings=False)
LLAMA = ModelConfig("llama", 32000, 2048, 4096, 32, 32, 32, 11008, tie_embeddings=False)
EAGER = {
    "gpt2": (models.GPT, 8),
    "llama": (models.LLAMA, 4),
    "gpt2, dropout 0.1": (dataclasses.replace(models.GPT, dropout=0.1), 8),
}
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
HAVE_JAX = importlib.util.find_spec("jax") is not None


# ---- time per operation


def chain(x: Any, sin: Callable, tanh: Callable) -> Any:
    for _ in range(OPERATIONS // 4):
        x = tanh(sin(x * 1.01 + 0.1))
    return x.sum()


def operations() -> dict[str, Callable[[], Any]]:
    x = torch.linspace(-1, 1, 4)
    f = partial(chain, sin=torch.sin, tanh=torch.tanh)

    def with_torch() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    calls = {"nf.grad": lambda: nf.grad(f)(x), "torch.autograd": with_torch}
    if HAVE_JAX:
        import jax

        there = jax.numpy.asarray(x.numpy())
        calls["jax.grad, not jitted"] = lambda: jax.grad(partial(chain, sin=jax.numpy.sin, tanh=jax.numpy.tanh))(there)
    truth = with_torch()
    for name, call in calls.items():
        torch.testing.assert_close(torch.tensor(call().tolist()), truth, msg=lambda m: f"{name}: {m}")  # noqa: B023
    return calls


# ---- capture


def fake_problem(config: ModelConfig) -> tuple[Callable, dict, torch.Tensor]:
    """(loss of weights and tokens, weights, tokens) of a model that holds no memory."""
    with FakeMode():
        model = {"gpt2": GPT2, "llama": Llama}[config.kind](config)
        tokens = torch.zeros(1, config.context + 1, dtype=torch.int64)
    return loss_of(model), {name: p.detach() for name, p in model.named_parameters()}, tokens


def loss_of(model: torch.nn.Module) -> Callable:
    return lambda params, tokens: next_token_loss(functional_call(model, params, (tokens[:, :-1],)), tokens[:, 1:])


def with_autograd(loss: Callable) -> Callable:
    """Loss and gradient by torch.autograd."""

    def value_and_grad(params: dict, tokens: torch.Tensor) -> tuple:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        value = loss(leaves, tokens)
        return value.detach(), torch.autograd.grad(value, list(leaves.values()))

    return value_and_grad


def captures(config: ModelConfig) -> dict[str, Callable[[], int]]:
    """Each captures the model's loss and gradient and returns how many operations it found."""
    loss, params, tokens = fake_problem(config)

    def fx(f: Callable) -> int:
        return len(make_fx(f, tracing_mode="fake")(params, tokens).graph.nodes)

    calls = {
        "nf, capture": lambda: len(capture(nf.value_and_grad(loss), params, tokens).graph.equations),
        "make_fx, torch.autograd": lambda: fx(with_autograd(loss)),
        "make_fx, torch.func": lambda: fx(torch.func.grad_and_value(loss)),
    }
    if HAVE_JAX:
        calls["jax.make_jaxpr"] = lambda: with_jax(config, {n: tuple(p.shape) for n, p in params.items()}, tokens.shape)
    return calls


def with_jax(config: ModelConfig, shapes: dict[str, tuple], tokens: tuple) -> int:
    import jax
    from jax_step import make_loss  # beside this file

    weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    f = jax.value_and_grad(make_loss(config))
    return len(jax.make_jaxpr(f)(weights, jax.ShapeDtypeStruct(tokens, "int32")).eqns)


def report_capture(name: str) -> None:
    """Print what the first capture of the 7 B Llama took in this process."""
    if name == "jax.make_jaxpr":
        importlib.import_module("jax_step")
    before = resident_bytes()
    reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    call = captures(LLAMA)[name]
    made = time.perf_counter()
    count = call()
    end = time.perf_counter()
    found = {"make": made - start, "capture": end - made, "cpu": time.process_time() - cpu, "count": count}
    print(json.dumps({**found, "peak": peak_resident_bytes() - before}))


# ---- memory


def report_memory(name: str, model: str) -> None:
    """Print the peaks of one value and gradient in this process."""
    config, batch = EAGER[model]
    network = build(config, 0)
    tokens = torch.randint(0, config.vocab_size, (batch, config.context + 1), generator=torch.Generator().manual_seed(1))
    params = {n: p.detach() for n, p in network.named_parameters()}
    f = {"nf.value_and_grad": nf.value_and_grad, "torch.autograd": with_autograd}[name](loss_of(network))
    f(params, tokens)
    before = resident_bytes()
    reset_peak()
    f(params, tokens)
    resident = peak_resident_bytes() - before
    print(json.dumps({"resident": resident, "tensors": peak_tensor_bytes(lambda: f(params, tokens))}))


def fresh(*arguments: str, **environment: str) -> dict[str, float]:
    """What a report printed in a process of its own."""
    command = [sys.executable, __file__, "--fresh", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments} failed in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        made.add_row(*row)
    return made


def main() -> None:
    parts = ("operations", "capture", "llama", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--fresh", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fresh:
        return report_capture(*args.fresh) if len(args.fresh) == 1 else report_memory(*args.fresh)

    console = Console(width=130)
    console.print(f"{cpu_model()}, {isa()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "operations" in args.only:
        timings = alternate(operations(), 5 * args.rounds)
        per = {name: f"{t.best / OPERATIONS * 1e6:.1f}" for name, t in timings.items()}
        title = f"gradient of a chain of {OPERATIONS} operations on 4 elements"
        console.print(timing_table(timings, title, {"µs an operation (best)": per}))
    if "capture" in args.only:
        calls = captures(GPT)
        counts = {name: str(call()) for name, call in calls.items()}
        title = f"capture of loss and gradient, GPT of {GPT.n_layers} layers"
        console.print(timing_table(alternate(calls, args.rounds), title, {"operations found": counts}))
    if "llama" in args.only:
        rows = []
        for name in ("nf, capture", "make_fx, torch.autograd", "make_fx, torch.func", *["jax.make_jaxpr"] * HAVE_JAX):
            r = fresh(name)
            times = [f"{r[k]:.2f}" for k in ("make", "capture", "cpu")]
            rows.append([name, *times, f"{r['peak'] / 1e6:.0f}", str(r["count"])])
        title = f"first capture of loss and gradient, Llama of {LLAMA.parameter_count() / 1e9:.1f} B parameters"
        headings = ["", "fake model s", "capture s", "CPU of both s", "memory of both MB", "operations found"]
        console.print(table(title, headings, rows))
    if "memory" in args.only:
        rows = []
        for model in EAGER:
            for name in ("nf.value_and_grad", "torch.autograd"):
                r = fresh(name, model, **FREE_AT_ONCE)
                rows.append([model, name, f"{r['tensors'] / 1e6:.1f}", f"{r['resident'] / 1e6:.1f}"])
        title = "peak memory of an eager value and gradient, beyond weights and tokens"
        console.print(table(title, ["", "", "tensors MB", "resident MB"], rows))


if __name__ == "__main__":
    main()
