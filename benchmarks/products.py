"""The matrix products of a training step, by every call that PyTorch has for them.

    python benchmarks/products.py [--model gpt2|llama] [--precision fp32|bf16] [--rounds 20] [--threads 1] [--prepacked]
                                  [--fresh-pages]

For each linear layer y = x w^T (+ bias) of the model: the forward product (x: M x K, w: N x K), dx = g w and
dw = g^T x. aten is torch.mm and torch.addmm, with and without out= (MKL in fp32, oneDNN in bf16), linear is oneDNN's
inner product (torch.ops.mkldnn._linear_pointwise, which has no out= form; in fp32 alone), own our kernel
(neuralforge/kernels/matmul), where it has the type; operands are strided views unless "copied" says that a transposed
copy is made within the call. Calls alternate; each is checked against the others. malloc
keeps freed pages, as under nf.jit; --fresh-pages leaves it alone. On a busy machine
--threads=1 says more: one thread's CPU time hardly depends on the others' work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from models import GPT, LLAMA  # beside this file
from rich.console import Console

from neuralforge.bench import alternate, peak_flops, timing_table
from neuralforge.kernels import matmul
from neuralforge.kernels.toolchain import cpu_model, isa
from neuralforge.memory import keep_pages
from neuralforge.models import ModelConfig

MODELS = {"gpt2": (GPT, 8), "llama": (LLAMA, 4)}
"""Configuration and batch size."""


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


def calls(M: int, N: int, K: int, dtype: torch.dtype, prepacked: bool) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """The calls for each of the layer's three products."""
    def own(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        matmul.forward((out,), (a, b, bias), {})
        return out

    x, w, g, bias = (torch.randn(shape).to(dtype) for shape in ((M, K), (N, K), (M, N), N))
    y, dx, dw = (torch.empty(shape, dtype=dtype) for shape in ((M, N), (M, K), (N, K)))
    forward = {
        "aten mm": partial(torch.mm, x, w.t()),
        "aten mm out=": partial(torch.mm, x, w.t(), out=y),
        "linear": partial(linear, x, w),
        "own": partial(own, y, x, w.t()),
    }
    with_bias = {
        "aten addmm": partial(torch.addmm, bias, x, w.t()),
        "aten addmm out=": partial(torch.addmm, bias, x, w.t(), out=y),
        "linear": partial(linear, x, w, bias),
        "own": partial(own, y, x, w.t(), bias),
    }
    if prepacked and dtype == torch.float32:  # a weight that stays the same from call to call may be reordered once
        packed = torch.ops.mkldnn._reorder_linear_weight(w, M)
        forward["linear, prepacked"] = partial(linear, x, packed)
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, M)
        forward["MKL, prepacked"] = partial(torch.ops.mkl._mkl_linear, x, mkl, w, None, M)
    found = {
        "forward (NT)": forward,
        "forward + bias": with_bias,
        "dx (NN)": {
            "aten mm": partial(torch.mm, g, w),
            "aten mm out=": partial(torch.mm, g, w, out=dx),
            "linear": lambda: linear(g, w.t()),
            "own": partial(own, dx, g, w),
            "linear, w copied": lambda: linear(g, w.t().contiguous()),
            "linear, transposed": lambda: linear(w.t(), g).t(),
        },
        "dw (TN)": {
            "aten mm": partial(torch.mm, g.t(), x),
            "aten mm out=": partial(torch.mm, g.t(), x, out=dw),
            "linear": lambda: linear(g.t(), x.t()),
            "own": partial(own, dw, g.t(), x),
            "linear, both copied": lambda: linear(g.t().contiguous(), x.t().contiguous()),
            "linear, transposed": lambda: linear(x.t(), g.t()).t(),
        },
    }
    here = lambda name: dtype == torch.float32 or name.startswith("aten") or name == "own" and matmul.available(dtype)
    return {product: {n: call for n, call in of.items() if here(n)} for product, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
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
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    M, peak, console = batch * config.context, peak_flops(str(dtype).removeprefix("torch.")).value, Console(width=130)
    rtol, atol = (1e-4, 1e-3) if dtype == torch.float32 else (2**-6, 2**-6 * M**0.5)
    console.print(
        f"{cpu_model()}, {isa()}, {torch.get_num_threads()} threads, measured peak {peak / 1e9:.0f} GFLOP/s; {args.precision}, "
        f"M = {M} tokens"
    )
    for layer, (N, K) in layers(config).items():
        for product, candidates in calls(M, N, K, dtype, args.prepacked).items():
            truth = next(iter(candidates.values()))().clone()
            for name, call in candidates.items():
                torch.testing.assert_close(call(), truth, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023
            timings = alternate(candidates, args.rounds)
            rate = {name: 2 * M * N * K / t.best for name, t in timings.items()}
            columns = {
                "GFLOP/s (best)": {name: f"{r / 1e9:.0f}" for name, r in rate.items()},
                "of peak": {name: f"{r / peak:.0%}" for name, r in rate.items()},
            }
            console.print(timing_table(timings, f"{layer}, N {N}, K {K}: {product}", columns))


if __name__ == "__main__":
    main()
