"""Fusion alone: chains of elementwise operators and reductions under nf.jit, PyTorch eager and torch.compile.

    python benchmarks/fusion.py [--rows 2048] [--columns 1536] [--rounds 30] [--threads 2] [--no-compile] [--backward]

Every chain is a function of float32 [rows, columns] tensors with no matrix product in it; with --backward it is the
gradient of its sum of cubes. The candidates take turns in one process and must agree. "GB/s" is what ours reads and writes at
least (operands once, results once) by its best time, beside the measured bandwidth: a chain near it can't be faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

import neuralforge as nf
from neuralforge.bench import alternate, bandwidth, ratio_interval
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.memory import keep_pages

Chain = Callable[..., torch.Tensor]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def adamw(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return p - 1e-3 * ((m / 0.1) / ((v / 0.05).sqrt() + 1e-8) + 0.1 * p), m, v


def layer_norm_by_hand(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


CHAINS: dict[str, tuple[str, Chain]] = {
    "bias, GELU": ("xc", lambda x, b: F.gelu(x + b)),
    "GELU (tanh) by hand": ("x", gelu_by_hand),
    "SwiGLU": ("xx", lambda x, y: F.silu(x) * y),
    "bias, residual, scale": ("xxc", lambda x, y, b: (x + b) * 0.7 + y),
    "12 operators": ("xx", lambda x, y: ((x * y + 1).tanh() * x - y).abs().add(0.5).log().mul(y).sub(x).sigmoid() * 2 + y),
    "softmax, scaled and masked": ("xm", lambda x, m: (x * 0.125).masked_fill(m, -1e9).softmax(-1)),
    "layer norm": ("xcc", lambda x, w, b: F.layer_norm(x, w.shape, w, b)),
    "residual, layer norm, GELU": ("xxcc", lambda x, y, w, b: F.gelu(F.layer_norm(x + y, w.shape, w, b))),
    "layer norm by hand": ("xcc", layer_norm_by_hand),
    "RMS norm by hand": ("xc", lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w),
    "rotary": ("xxx", rotary),
    "mean square error": ("xx", lambda x, y: (x - y).square().mean()),
    "column sums of a product": ("xx", lambda x, y: (x * y).sum(0)),
    "norm, clipped": ("x", lambda x: x * (1 / (x.square().sum().sqrt() + 1e-6)).clamp(max=1.0)),
    "AdamW by hand": ("xxxp", adamw),
}
"""Each with its operands: x [rows, columns], m a mask and p positive of the same shape, c [columns]."""


def operands(kinds: str, rows: int, columns: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    make = {
        "x": lambda: torch.randn(rows, columns),
        "c": lambda: torch.randn(columns),
        "p": lambda: torch.rand(rows, columns) + 0.1,
        "m": lambda: torch.rand(rows, columns) < 0.5,
    }
    return [make[kind]() for kind in kinds]


def by_torch(chain: Chain, args: list[torch.Tensor]) -> Callable[[], list]:
    """The gradients that torch.autograd gives."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in args]
    wanted = [x for x in given if x.requires_grad]

    def run() -> list:
        results = tree_leaves(chain(*given))
        return list(torch.autograd.grad(sum((r * r * r).sum() for r in results), wanted))

    return run


def by_us(chain: Chain, args: list[torch.Tensor]) -> Callable[[], list]:
    argnums = tuple(i for i, x in enumerate(args) if x.is_floating_point())
    step = nf.jit(nf.grad(lambda *a: sum((r * r * r).sum() for r in tree_leaves(chain(*a))), argnums))
    return lambda: step(*args)


def candidates(chain: Chain, args: list[torch.Tensor], backward: bool, compiled: bool) -> dict[str, Callable]:
    jitted = nf.jit(chain)
    found = {
        "ours": by_us(chain, args) if backward else lambda: jitted(*args),
        "eager": by_torch(chain, args) if backward else lambda: chain(*args),
    }
    if compiled:
        theirs = torch.compile(chain, dynamic=False)
        found["compile"] = by_torch(theirs, args) if backward else lambda: theirs(*args)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--backward", action="store_true", help="forward and backward of the sum of cubes")
    parser.add_argument("--only", nargs="+", choices=CHAINS, default=list(CHAINS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_pages()
    limit = bandwidth().value
    table = Table(
        title=f"{cpu_model()}, {isa()}, {args.threads} threads, {args.rows} x {args.columns}, "
        f"{'forward and backward' if args.backward else 'forward'}; measured bandwidth {limit / 1e9:.1f} GB/s"
    )
    others = ["eager"] + ([] if args.no_compile else ["compile"])
    headings = ["ours, best (median) ms", "CPU ms", "GB/s", *(h for o in others for h in (f"{o} ms", f"{o} / ours"))]
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    ratios: dict[str, list[float]] = {o: [] for o in others}
    for name in args.only:
        kinds, chain = CHAINS[name]
        tensors = operands(kinds, args.rows, args.columns)
        runs = candidates(chain, tensors, args.backward, not args.no_compile)
        results = {who: tree_leaves(run()) for who, run in runs.items()}
        for who in others:
            for a, b in zip(results["ours"], results[who], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=lambda m, name=name, who=who: f"{name}, {who}: {m}")
        moved = sum(t.nbytes for t in [*tensors, *results["ours"]])
        timings = alternate(runs, args.rounds, warmup=3)
        best, cells = timings["ours"].best, []
        for who in others:
            ratio, low, high = ratio_interval(timings[who].wall, timings["ours"].wall)
            ratios[who].append(ratio)
            cells += [f"{timings[who].best * 1e3:.2f} ({timings[who].median * 1e3:.2f})", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        ours = timings["ours"]
        table.add_row(
            name, f"{best * 1e3:.2f} ({ours.median * 1e3:.2f})", f"{ours.cpu_median * 1e3:.2f}", f"{moved / best / 1e9:.1f}", *cells
        )
    means = [cell for who in others for cell in ("", f"{statistics.geometric_mean(ratios[who]):.2f}")]
    table.add_row("geometric mean", "", "", "", *means)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
