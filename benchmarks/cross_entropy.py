"""Cross entropy alone and behind a linear layer: ours, PyTorch eager, torch.compile, and JAX where it is installed.

    python benchmarks/cross_entropy.py [--tokens 2048] [--vocabulary 8192 50304 50257] [--dtype float32 bfloat16] [--rounds 10]
        [--threads 2] [--only ours eager] [--no-fresh]
    python benchmarks/cross_entropy.py --width 768 --vocabulary 50304

The mean over the tokens, forward and backward: of the logits [tokens, vocabulary], or with --width of x weight^T, x
[tokens, width] and weight [vocabulary, width], with the gradients of both. Ours is plain torch code under nf.jit. The candidates
take turns in one process and must agree. A fresh process each measures the best time alone, without nf.jit's setting of malloc to keep
freed pages for the others, and "memory", what resident memory grows by at most beyond the operands, gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import neuralforge as nf
from neuralforge.bench import (
    alternate,
    bandwidth,
    peak_flops,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    timing_table,
)
from neuralforge.errors import KernelError
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.memory import keep_pages

Run = Callable[[], list]
"""The loss and the gradients."""


def loss_of(*operands: torch.Tensor) -> torch.Tensor:
    *factors, target = operands
    return F.cross_entropy(factors[0] if len(factors) == 1 else F.linear(*factors), target)


def operands(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, vocabulary, (tokens,))
    if not width:
        return [torch.randn(tokens, vocabulary, dtype=dtype), target]
    return [torch.randn(tokens, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype) / width**0.5, target]


def ours(args: list[torch.Tensor]) -> Run:
    step = nf.jit(nf.value_and_grad(loss_of, argnums=tuple(range(len(args) - 1))))

    def run() -> list:
        loss, grads = step(*args)
        return [loss, *grads]

    return run


def eager(args: list[torch.Tensor], loss_of: Callable[..., torch.Tensor] = loss_of) -> Run:
    *factors, target = args
    factors = [x.detach().requires_grad_() for x in factors]

    def run() -> list:
        loss = loss_of(*factors, target)
        return [loss.detach(), *torch.autograd.grad(loss, factors)]

    return run


def compiled(args: list[torch.Tensor]) -> Run:
    return eager(args, torch.compile(loss_of, dynamic=False))


def with_jax(args: list[torch.Tensor]) -> Run:
    import jax
    import jax.numpy as jnp
    import optax

    def loss_of(*operands):
        *factors, target = operands
        logits = factors[0] if len(factors) == 1 else factors[0] @ factors[1].T
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target).mean()

    step = jax.jit(jax.value_and_grad(loss_of, argnums=tuple(range(len(args) - 1))))
    given = [jnp.from_dlpack(x) for x in args]

    def run() -> list:
        loss, grads = step(*given)
        return [torch.from_dlpack(jax.block_until_ready(x)) for x in (loss, *grads)]

    return run


CANDIDATES: dict[str, Callable[[list[torch.Tensor]], Run]] = {
    "ours": ours,
    "eager": eager,
    "compile": compiled,
    "jax": with_jax,
}


def report_fresh(name: str, shape: tuple, rounds: int) -> None:
    """Print the seconds of the best run, and the bytes that resident memory grows by at most, as JSON."""
    CANDIDATES[name](operands(8, 16, 8 * bool(shape[2]), shape[3]))()  # the libraries are loaded
    args, trim = operands(*shape), ctypes.CDLL(None).malloc_trim
    trim(0)  # freed memory is given back, so as to count again
    before = resident_bytes()
    run = CANDIDATES[name](args)
    run()
    trim(0)
    reset_peak()  # the compiler's own memory is not the program's
    run()
    peak = peak_resident_bytes() - before
    print(json.dumps({"best": alternate({name: run}, rounds)[name].best, "peak": peak}))


def fresh(name: str, rounds: int, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """What `report_fresh` finds in a process of its own."""
    shape = f"--tokens={tokens} --vocabulary={vocabulary} --width={width} --dtype={str(dtype).removeprefix('torch.')}"
    options = f"{shape} --rounds={rounds} --threads={torch.get_num_threads()}".split()
    done = subprocess.run([sys.executable, __file__, "--fresh", name, *options], capture_output=True, text=True)
    if not done.stdout:  # JAX may fail on its way out
        raise SystemExit(f"{name} failed in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s."""
    try:
        return peak_flops(str(dtype).removeprefix("torch.")).value
    except KernelError:  # no bfloat16 arithmetic: it is computed in float32
        return peak_flops().value


def compare(names: list[str], shape: tuple, rounds: int, with_fresh: bool) -> Table:
    tokens, vocabulary, width, dtype = shape
    args = operands(*shape)
    runs = {name: CANDIDATES[name](args) for name in names}
    first = {name: run() for name, run in runs.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, found in first.items():
        for a, b in zip(found, first[names[0]], strict=True):
            scale, text = b.abs().max().item(), lambda m, name=name: f"{name}: {m}"
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * scale, msg=text)
    del first, found, a, b
    timings = alternate(runs, rounds)
    if width:
        flops, peak = 6 * tokens * vocabulary * width, measured_peak(dtype)
        columns = {"of peak (best)": {name: f"{flops / t.best / peak:.0%}" for name, t in timings.items()}}
    else:
        moved = 2 * args[0].nbytes  # the logits are read and their gradient is written
        columns = {"GB/s (best)": {name: f"{moved / t.best / 1e9:.1f}" for name, t in timings.items()}}
    if with_fresh:
        del args, runs
        found = {name: fresh(name, rounds, *shape) for name in names}
        columns["alone, best ms"] = {name: f"{f['best'] * 1e3:.1f}" for name, f in found.items()}
        columns["memory MB"] = {name: f"{f['peak'] / 1e6:.0f}" for name, f in found.items()}
    what = f"{tokens} x {vocabulary}" + (f", width {width}" if width else "")
    return timing_table(timings, f"{what}, {str(dtype).removeprefix('torch.')}", columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 50304, 50257])
    parser.add_argument("--width", type=int, default=0, help="of the linear layer that makes the logits")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--no-fresh", action="store_true", help="skip the fresh processes")
    parser.add_argument("--fresh", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [(args.tokens, V, args.width, getattr(torch, dtype)) for V in args.vocabulary for dtype in args.dtype]
    if args.fresh:
        return report_fresh(args.fresh, shapes[0], args.rounds)
    names = [n for n in args.only if n != "jax" or importlib.util.find_spec("jax")]
    keep_pages()
    console = Console(width=150)
    peaks = {str(dtype)[6:]: f"{measured_peak(dtype) / 1e9:.0f}" for dtype in dict.fromkeys(shape[3] for shape in shapes)}
    console.print(
        f"{cpu_model()}, {isa()}, {args.threads} threads; measured bandwidth {bandwidth().value / 1e9:.1f} GB/s, peak "
        + ", ".join(f"{p} GFLOP/s in {dtype}" for dtype, p in peaks.items())
    )
    for shape in shapes:
        console.print(compare(names, shape, args.rounds, not args.no_fresh))


if __name__ == "__main__":
    main()
