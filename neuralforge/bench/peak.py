"""What the machine can do at best, measured: a share of peak is always of a figure from here."""

from __future__ import annotations

import ctypes
import itertools
import time
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import KernelError
from ..kernels.toolchain import ISA_FLAGS, amx_granted, best_isa, cpu_features, has_amx, load

# Enough independent chains to fill the pipelines: 2 units times a latency of 4 cycles, and some.
CHAINS = 12
TILES = 4
"""And of AMX's tile products, which take 16 cycles each and 52 to finish; there are no more registers for them."""
TILE_FLOPS = 2 * 16 * 16 * 32
WIDTH = {"amx": 64, "avx512": 64, "avx2": 32, "portable": 16}


@dataclass(frozen=True)
class Peak:
    """`value` in operations or bytes per second; `how` says what was timed."""

    value: float
    how: str


@cache
def peak_flops(dtype: str = "float32", threads: int | None = None) -> Peak:
    """Peak floating-point operations per second of `threads` cores (default: torch's number of threads): fused
    multiply-adds on registers, two operations each, best of several runs. `dtype`: float32, float64, or bfloat16
    (into float32: AMX tile products where the CPU has them and the kernel grants them, else dot products of vectors).

    Where no C can be compiled it is the best of some large matrix products, which is lower. Raises KernelError for a
    dtype the CPU has no such instruction for.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise KernelError(f"peak_flops: threads={threads}; expected 1 or more.")
    if dtype not in ("float32", "float64", "bfloat16"):
        raise KernelError(f"peak_flops: dtype {dtype!r}; expected float32, float64 or bfloat16.")
    amx = dtype == "bfloat16" and amx_granted()
    if dtype == "bfloat16" and not amx and (WIDTH[best_isa()] < 64 or "avx512_bf16" not in cpu_features()):
        raise KernelError("peak_flops: this CPU has no bfloat16 arithmetic; PyTorch emulates it in float32.")
    try:
        library = load(_source(dtype, amx), f"peak-{dtype}", ISA_FLAGS[best_isa()])
    except KernelError:
        return Peak(_product_flops(dtype, threads), f"best of large matrix products (no C compiler), {threads} threads")
    library.run.restype = ctypes.c_double
    library.run.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
    width = WIDTH[best_isa()] // (8 if dtype == "float64" else 4) * (2 if dtype == "bfloat16" else 1)
    flops = TILES * TILE_FLOPS if amx else 2.0 * width * CHAINS
    count, seconds, stop = 40_000 if amx else 400_000, float("inf"), time.perf_counter() + 0.5
    # Runs of half a millisecond, so that on a shared machine some find all cores free; every other one with a core for
    # each thread, since a busy machine's scheduler lets two of them take turns on one.
    for n in itertools.takewhile(lambda _: time.perf_counter() < stop, itertools.count()):
        seconds = min(seconds, library.run(count, threads, n % 2))
    what = "AMX tile products" if amx else "multiply-adds"
    return Peak(flops * count * threads / seconds, f"{what} on registers, {threads} threads")


def arithmetic_peak(dtype: torch.dtype = torch.float32) -> Peak:
    """`peak_flops` of the type that `dtype` is computed in, which is float32 where there is no arithmetic of its own."""
    try:
        return peak_flops({torch.float64: "float64", torch.bfloat16: "bfloat16"}.get(dtype, "float32"))
    except KernelError:
        return peak_flops("float32")


def product_peak(dtype: torch.dtype = torch.float32) -> Peak:
    """The peak of matrix products. Where tiles multiply float32, each product is six of bfloat16 (`kernels/matmul/tiles.h`)."""
    best = arithmetic_peak(dtype)
    if dtype == torch.float32 and has_amx():
        tiles = peak_flops("bfloat16")
        best = max(best, Peak(tiles.value / 6, f"{tiles.how}, six of which are one of float32"), key=lambda peak: peak.value)
    return best


def _source(dtype: str, amx: bool = False) -> str:
    scalar = "double" if dtype == "float64" else "float"
    chains = range(CHAINS)
    begin = end = ""
    if amx:  # tiles 0 to 3 += tile 4 or 5 times tile 6 or 7
        begin = """
        struct { unsigned char palette, start[15]; unsigned short bytes[16]; unsigned char rows[16]; } tiles = {.palette = 1};
        for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
        __asm__ volatile("sttilecfg %0" : "=m"(before));
        __asm__ volatile("ldtilecfg %0" :: "m"(tiles));"""
        begin = "struct { char all[64]; } before;" + begin
        end = '__asm__ volatile("ldtilecfg %0" :: "m"(before));'  # a library's own configuration may be in use
        body = "".join(
            f'__asm__ volatile("tdpbf16ps %tmm{6 + j % 2}, %tmm{4 + j // 2}, %tmm{j}");' for j in range(TILES)
        )
    elif dtype == "bfloat16":
        body = "".join(f'__asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(x{j}) : "v"(m));' for j in chains)
    else:
        body = "".join(f"x{j} = x{j} * m + a;" for j in chains)
    return f"""
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>

static int nth_cpu(const cpu_set_t *set, int n) {{
    n %= CPU_COUNT(set);
    for (int cpu = 0;; cpu++) if (CPU_ISSET(cpu, set) && n-- == 0) return cpu;
}}

typedef {scalar} vec __attribute__((vector_size({WIDTH[best_isa()]})));
double run(long n, int threads, int pin) {{
    double start = 1e300, end = 0, sink = 0;
    #pragma omp parallel num_threads(threads) firstprivate(pin) reduction(+:sink) reduction(min:start) reduction(max:end)
    {{
        cpu_set_t allowed, own;
        pin = pin && sched_getaffinity(0, sizeof allowed, &allowed) == 0;
        if (pin) {{
            CPU_ZERO(&own);
            CPU_SET(nth_cpu(&allowed, omp_get_thread_num()), &own);
            sched_setaffinity(0, sizeof own, &own);
        }}
        vec m = (vec){{}} + ({scalar})0.999, a = (vec){{}} + ({scalar})0.001;
        vec {", ".join(f"x{j} = m * {j}" for j in chains)};
        {begin}
        #pragma omp barrier
        start = omp_get_wtime();
        for (long i = 0; i < n; i++) {{ {body} }}
        sink += ({" + ".join(f"x{j}" for j in chains)})[0];
        end = omp_get_wtime();
        {end}
        if (pin) sched_setaffinity(0, sizeof allowed, &allowed);
    }}
    return sink == 12345.678 ? 0 : end - start;  // from the first thread's start to the last one's end
}}
"""


def _product_flops(dtype: str, threads: int) -> float:
    n = 1536
    a, b = (torch.randn(n, n, dtype=getattr(torch, dtype)) for _ in range(2))
    calls = [lambda: a @ b]
    if torch.backends.mkldnn.is_available() and dtype == "float32":
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best, before = float("inf"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in calls * 4:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2.0 * n**3 / best


@cache
def bandwidth() -> Peak:
    """Memory bandwidth in bytes per second: STREAM's triad on arrays of 64 MiB each, best of several."""
    n = 1 << 24
    a, b, c = torch.empty(n), torch.ones(n), torch.ones(n)
    best, stop = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < stop:  # on a shared machine some find the memory free
        start = time.perf_counter()
        torch.add(b, c, alpha=3.0, out=a)
        best = min(best, time.perf_counter() - start)
    return Peak(3 * 4 * n / best, "triad")
