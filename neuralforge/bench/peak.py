"""What the machine can do at best, measured: a share of peak is always of a figure from here."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import KernelError
from ..kernels.toolchain import NoCompiler, cpu_features, isa, load

# Enough independent chains to fill the pipelines: 2 units times a latency of 4 cycles, and some.
CHAINS = 12
WIDTH = {"avx512": 64, "avx2": 32, "portable": 16}


@dataclass(frozen=True)
class Peak:
    """`value` in operations or bytes per second; `how` says what was timed."""

    value: float
    how: str


@cache
def peak_flops(dtype: str = "float32", threads: int | None = None) -> Peak:
    """Peak floating-point operations per second of `threads` cores (default: torch's number of threads): fused
    multiply-adds on registers, two operations each, best of several runs. `dtype`: float32, float64, or bfloat16
    (dot products into float32, where the CPU has the instruction).

    Without a C compiler it is the best of some large matrix products, which is lower. Raises KernelError for a dtype
    the CPU has no such instruction for.
    """
    threads = threads or torch.get_num_threads()
    if dtype not in ("float32", "float64", "bfloat16"):
        raise KernelError(f"peak_flops: dtype {dtype!r}; expected float32, float64 or bfloat16.")
    if dtype == "bfloat16" and (isa() != "avx512" or "avx512_bf16" not in cpu_features()):
        raise KernelError("peak_flops: this CPU has no bfloat16 arithmetic; PyTorch emulates it in float32.")
    try:
        library = load(_source(dtype), f"peak-{dtype}")
    except NoCompiler:
        return Peak(_product_flops(dtype), "best of large matrix products (no C compiler)")
    library.run.restype = ctypes.c_double
    library.run.argtypes = [ctypes.c_long, ctypes.c_int]
    width = WIDTH[isa()] // (8 if dtype == "float64" else 4) * (2 if dtype == "bfloat16" else 1)
    count = 2_000_000
    library.run(count // 10, threads)
    seconds = min(library.run(count, threads) for _ in range(12))
    return Peak(2.0 * width * CHAINS * count * threads / seconds, f"fused multiply-adds on registers, {threads} threads")


def _source(dtype: str) -> str:
    scalar = "double" if dtype == "float64" else "float"
    chains = range(CHAINS)
    if dtype == "bfloat16":
        body = "".join(f'__asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(x{j}) : "v"(m));' for j in chains)
    else:
        body = "".join(f"x{j} = x{j} * m + a;" for j in chains)
    return f"""
#include <omp.h>
typedef {scalar} vec __attribute__((vector_size({WIDTH[isa()]})));
double run(long n, int threads) {{
    double start = 0, sink = 0;
    #pragma omp parallel num_threads(threads) reduction(+:sink)
    {{
        vec m = (vec){{}} + ({scalar})0.999, a = (vec){{}} + ({scalar})0.001;
        vec {", ".join(f"x{j} = m * {j}" for j in chains)};
        #pragma omp barrier
        #pragma omp master
        start = omp_get_wtime();
        for (long i = 0; i < n; i++) {{ {body} }}
        sink += ({" + ".join(f"x{j}" for j in chains)})[0];
    }}
    double seconds = omp_get_wtime() - start;
    return sink == 12345.678 ? 0 : seconds;
}}
"""


def _product_flops(dtype: str) -> float:
    n = 1536
    a, b = (torch.randn(n, n, dtype=getattr(torch, dtype)) for _ in range(2))
    calls = [lambda: a @ b]
    if torch.backends.mkldnn.is_available() and dtype == "float32":
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = float("inf")
    for call in calls * 4:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best


@cache
def bandwidth() -> Peak:
    """Memory bandwidth in bytes per second: STREAM's triad on arrays far larger than the caches, best of several."""
    n = 1 << 24
    a, b, c = torch.empty(n), torch.ones(n), torch.ones(n)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.add(b, c, alpha=3.0, out=a)
        best = min(best, time.perf_counter() - start)
    return Peak(3 * 4 * n / best, "triad")
