"""Flash attention forward and backward beside PyTorch's, 256 to 8192 tokens.

    python benchmarks/attention.py [--tokens 256 1024 4096] [--heads 6] [--groups 6] [--width 64] [--full] [--dtype float32|bfloat16]
        [--rounds 20]

Queries, keys and values are parts of one [B, T, (H + 2 G) K] projection, read in place, and B is 2048 / T or 1. The
four calls alternate; times are best and median milliseconds; "CPU" is the median CPU time of all threads, forward and
backward together. FLOPs count what a query sees: causal attention has half of full attention's. "MiB" is what
resident memory grows by in forward and backward at most, the results included.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from neuralforge.bench import (
    alternate,
    peak_flops,
    peak_resident_bytes,
    ratio_interval,
    reset_peak,
    resident_bytes,
)
from neuralforge.kernels.attention import flash_attention, flash_attention_backward
from neuralforge.kernels.toolchain import cpu_model, has_bfloat16, isa
from neuralforge.memory import keep_pages

aten = torch.ops.aten
OWN, TORCH = "neuralforge", "torch"


def calls(B: int, H: int, G: int, T: int, K: int, causal: bool, dtype: torch.dtype) -> dict[str, Callable[[], tuple]]:
    """Forward and backward of both, on the same operands."""
    x_BTD = torch.randn(B, T, (H + 2 * G) * K, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, K)).transpose(1, 2) for x in x_BTD.split([H * K, G * K, G * K], -1))
    g = torch.randn(B, T, H, K, dtype=dtype).transpose(1, 2)
    own, theirs = flash_attention(q, k, v, causal), aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(own[0], theirs[0], rtol=tolerance, atol=tolerance)
    found = {
        f"{OWN} forward": lambda: flash_attention(q, k, v, causal),
        f"{TORCH} forward": lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal),
        f"{OWN} backward": lambda: flash_attention_backward(g, q, k, v, *own, causal),
        f"{TORCH} backward": lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, *theirs, 0.0, causal
        ),
    }
    for a, b in zip(found[f"{OWN} backward"](), found[f"{TORCH} backward"]()):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)
    return found


def memory(*functions: Callable[[], tuple]) -> float:
    """MiB that resident memory grows by at most."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before is given back, so as to count again
    before = resident_bytes()
    reset_peak()
    kept = [f() for f in functions]
    grown = peak_resident_bytes() - before
    del kept
    return grown / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--groups", type=int, help="heads of keys and values (default: as many as --heads)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    H, G, K, causal = args.heads, args.groups or args.heads, args.width, not args.full
    shapes = [(max(1, 2048 // T), H, G, T, K, causal, getattr(torch, args.dtype)) for T in args.tokens]
    grown = []
    for shape in shapes:
        forward, their_forward, backward, their_backward = calls(*shape).values()
        grown.append((memory(forward, backward), memory(their_forward, their_backward)))
    keep_pages()
    peak = peak_flops(args.dtype if args.dtype == "float32" or has_bfloat16() else "float32").value
    table = Table(
        title=f"{cpu_model()}, {isa()}, {args.threads} threads, {args.dtype}, measured peak {peak / 1e9:.0f} GFLOP/s; "
        f"{H} heads, {G} groups, width {K}, {'causal' if causal else 'full'}"
    )
    for heading in ("B x T", "", "forward ms", "backward ms", "CPU ms", "of peak", "MiB", f"time / {OWN}"):
        table.add_column(heading, justify="right" if heading else "left")
    for (B, _, _, T, *_), shape, mib in zip(shapes, shapes, grown):
        timings = alternate(calls(*shape), args.rounds)
        seen = T * (T + 1) / 2 if causal else T * T
        both = {
            who: [f + b for f, b in zip(timings[f"{who} forward"].wall, timings[f"{who} backward"].wall)]
            for who in (OWN, TORCH)
        }
        for who, used in zip((OWN, TORCH), mib):
            f, b = timings[f"{who} forward"], timings[f"{who} backward"]
            ratio, low, high = ratio_interval(both[who], both[OWN])
            cpu = statistics.median(x + y for x, y in zip(f.cpu, b.cpu))
            table.add_row(
                f"{B} x {T}" if who == OWN else "", who,
                *(f"{t.best * 1e3:.2f} ({t.median * 1e3:.2f})" for t in (f, b)), f"{cpu * 1e3:.1f}",
                f"{4 * B * H * seen * K / f.best / peak:.0%}, {10 * B * H * seen * K / b.best / peak:.0%}",
                f"{used:.0f}", "1" if who == OWN else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
