"""`neuralforge doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from ..bench import bandwidth, peak_flops
from ..bench.machine import Machine, compiles, inspect_machine
from ..errors import KernelError
from ..kernels.choices import Choices
from .flags import split_flags

USAGE = """usage: neuralforge doctor [--json]

Shows what this machine has, measures what it can do (two seconds), and says what to do about what it hasn't."""

OK, WARN, MISSING = "ok", "warn", "missing"
Line = tuple[str, str, str, str]
"""State, subject, fact, advice."""


def main(argv: list[str]) -> None:
    switches = {name for name, _ in split_flags(argv, [], ["json", "help"])}
    if "help" in switches:
        print(USAGE)
        return
    machine = inspect_machine()
    if "json" in switches:
        checks = [dict(zip(("state", "subject", "fact", "advice"), line)) for line in lines(machine)]
        measured = {"peaks": peaks(), "bandwidth": bandwidth().value}
        print(json.dumps({**asdict(machine), **measured, "checks": checks}, indent=1))
        return
    for state, subject, fact, advice in lines(machine):
        print(f"{state:<8}{subject:<14}{fact}" + (f"\n{'':22}-> {advice}" if advice else ""))


def lines(m: Machine) -> Iterator[Line]:
    gigabytes = lambda n: f"{n / 1e9:.1f} GB"
    yield OK, "cpu", f"{m.cpu}, {m.cores} cores", ""
    few = m.usable_cores < m.cores
    yield (WARN if few else OK), "usable cores", f"{m.usable_cores:g}", (
        "affinity or the container's quota holds this process back; widen it if the machine is yours" if few else ""
    )  # fmt: skip
    yield (OK if m.isa != "portable" else WARN), "vectors", f"{m.isa} ({' '.join(m.vector_features) or 'none known'})", (
        "" if m.isa != "portable" else "kernels are compiled without vector extensions and run several times slower"
    )  # fmt: skip
    yield OK, "bf16", "in hardware" if "avx512_bf16" in m.vector_features else "not in hardware: float32 is faster", ""
    yield OK, "caches", ", ".join(f"{k} {v >> 10} KiB" for k, v in m.caches.items()) or "not told", ""
    yield OK, "numa nodes", str(m.numa_nodes), "bind one process a node with numactl" if m.numa_nodes > 1 else ""
    tight = m.available_memory < 2e9
    limit = f", container's limit {gigabytes(m.memory_limit)}" if m.memory_limit else ""
    yield (WARN if tight else OK), "memory", f"{gigabytes(m.memory)}, {gigabytes(m.available_memory)} free{limit}", (
        "less than 2 GB are free: close other programs or lower --train.batch" if tight else ""
    )  # fmt: skip
    for folder, free in m.free_disk.items():
        yield (WARN if free < 1e9 else OK), "disk", f"{gigabytes(free)} free in {folder}", (
            "checkpoints need three times the weights, and there is little room" if free < 1e9 else ""
        )  # fmt: skip
    trouble = compiles()
    yield (OK if not trouble else WARN if m.compiler else MISSING), "compiler", m.compiler or "none", trouble or ""
    yield OK, "torch", f"{m.torch_version}, {m.threads} threads", ""
    over = m.threads > m.usable_cores
    if over:
        yield WARN, "threads", f"{m.threads} threads on {m.usable_cores:g} cores", "set OMP_NUM_THREADS to the cores"
    yield (OK if m.onednn else MISSING), "oneDNN", "yes" if m.onednn else "no", "" if m.onednn else "use a stock build of torch"
    yield OK, "MKL", "yes" if m.mkl else "no", ""
    for dtype, value in peaks().items():
        yield OK, "peak", f"{value / 1e9:,.0f} GFLOP/s {dtype}, measured", ""
    yield OK, "bandwidth", f"{gigabytes(bandwidth().value)}/s, measured", ""
    for name, count in products().items():
        yield OK, "products", f"{name} is the fastest for {count} matrix shapes timed so far", ""
    unseen = m.nvidia_driver and not m.gpus
    yield (WARN if unseen else OK), "gpus", ", ".join(m.gpus) or "none that torch can use: everything runs on the CPU", (
        "an NVIDIA driver is here: install a CUDA build of torch, or check CUDA_VISIBLE_DEVICES" if unseen else ""
    )  # fmt: skip
    yield OK, "CUDA", f"{m.cuda or 'not in this build of torch'}, driver {m.nvidia_driver or 'none'}", ""
    yield (OK if m.nccl or not m.gpus else MISSING), "NCCL", m.nccl or "not in this build of torch", (
        "" if m.nccl or not m.gpus else "several GPUs need a build of torch with NCCL"
    )  # fmt: skip
    yield (OK if m.gloo else MISSING), "Gloo", "yes" if m.gloo else "no", "" if m.gloo else "use a stock build of torch"
    yield OK, "triton", m.triton or "no", "" if m.triton else "needed for GPU kernels only: pip install triton"


def peaks() -> dict[str, float]:
    """Measured peaks by dtype, FLOP/s, of those the CPU computes in."""
    found = {}
    for dtype in ("float32", "float64", "bfloat16"):
        try:
            found[dtype] = peak_flops(dtype).value
        except KernelError:
            continue
    return found


def products() -> dict[str, int]:
    """How many matrix shapes each library won on this machine."""
    wins: dict[str, int] = {}
    for entry in Choices("products").table.values():
        wins[entry["choice"]] = wins.get(entry["choice"], 0) + 1
    return wins
