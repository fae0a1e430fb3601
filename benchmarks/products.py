"""The matrix products of a training step, by every call that PyTorch has for them.

    python benchmarks/products.py [--model gpt2|llama] [--rounds 20] [--threads 1] [--prepacked] [--fresh-pages]

For each linear layer y = x w^T (+ bias) of the model: the forward product (x: M x K, w: N x K), dx = g w and
dw = g^T x, float32. aten is MKL (torch.mm, torch.addmm, with and without out=), linear is oneDNN's inner product
(torch.ops.mkldnn._linear_pointwise, which has no out= form); its operands are strided views unless "copied" says that
a transposed copy is made within the call. Calls alternate; each is checked against the others. malloc
keeps freed pages, as under nf.jit; --fresh-pages leaves it alone. On a busy machine
--threads=1 says more: one thread's CPU time hardly depends on the others' work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from step import MODELS  # beside this file

from neuralforge.bench import alternate, peak_flops, timing_table
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.memory import keep_pages
from neuralforge.models import ModelConfig


def layers(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of each kind of linear layer."""
    kv = c.n_kv_heads * c.d_head
    return {
        "qkv": (c.d_model + 2 * kv, c.d_model), "attention out": (c.d_model, c.d_model),
        "feed-forward up": (c.d_ff, c.d_model), "feed-forward down": (c.d_model, c.d_ff),
        "head": (c.vocab_size, c.d_model),
    }  # fmt: skip


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def calls(M: int, N: int, K: int, prepacked: bool) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """The calls for each of the layer's three products."""
    x, w, g, bias = (torch.randn(shape) for shape in ((M, K), (N, K), (M, N), N))
    y, dx, dw = (torch.empty(shape) for shape in ((M, N), (M, K), (N, K)))
    forward = {
        "aten mm": partial(torch.mm, x, w.t()),
        "aten mm out=": partial(torch.mm, x, w.t(), out=y),
        "linear": partial(linear, x, w),
    }
    with_bias = {
        "aten addmm": partial(torch.addmm, bias, x, w.t()),
        "aten addmm out=": partial(torch.addmm, bias, x, w.t(), out=y),
        "linear": partial(linear, x, w, bias),
    }
    if prepacked:  # a weight that stays the same from call to call may be reordered once
        packed = torch.ops.mkldnn._reorder_linear_weight(w, M)
        forward["linear, prepacked"] = partial(linear, x, packed)
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, M)
        forward["MKL, prepacked"] = partial(torch.ops.mkl._mkl_linear, x, mkl, w, None, M)
    return {
        "forward (NT)": forward,
        "forward + bias": with_bias,
        "dx (NN)": {
            "aten mm": partial(torch.mm, g, w),
            "aten mm out=": partial(torch.mm, g, w, out=dx),
            "linear": lambda: linear(g, w.t()),
            "linear, w copied": lambda: linear(g, w.t().contiguous()),
            "linear, transposed": lambda: linear(w.t(), g).t(),
        },
        "dw (TN)": {
            "aten mm": partial(torch.mm, g.t(), x),
            "aten mm out=": partial(torch.mm, g.t(), x, out=dw),
            "linear": lambda: linear(g.t(), x.t()),
            "linear, both copied": lambda: linear(g.t().contiguous(), x.t().contiguous()),
            "linear, transposed": lambda: linear(x.t(), g.t()).t(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prepacked", action="store_true", help="with weights packed beforehand, as inference has them")
    parser.add_argument("--fresh-pages", action="store_true", help="new memory for each result, page faults included")
    args = parser.parse_args()
    if not args.fresh_pages:
        keep_pages()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config, batch = MODELS[args.model]
    M, peak, console = batch * config.context, peak_flops().value, Console(width=130)
    console.print(
        f"{cpu_model()}, {isa()}, {torch.get_num_threads()} threads, measured peak {peak / 1e9:.0f} GFLOP/s; "
        f"M = {M} tokens"
    )
    for layer, (N, K) in layers(config).items():
        for product, candidates in calls(M, N, K, args.prepacked).items():
            truth = next(iter(candidates.values()))().clone()
            for name, call in candidates.items():
                torch.testing.assert_close(call(), truth, rtol=1e-4, atol=1e-3, msg=lambda m: f"{name}: {m}")  # noqa: B023
            timings = alternate(candidates, args.rounds)
            rate = {name: 2 * M * N * K / t.best for name, t in timings.items()}
            columns = {
                "GFLOP/s (best)": {name: f"{r / 1e9:.0f}" for name, r in rate.items()},
                "of peak": {name: f"{r / peak:.0%}" for name, r in rate.items()},
            }
            console.print(timing_table(timings, f"{layer}, N {N}, K {K}: {product}", columns))


if __name__ == "__main__":
    main()
