"""`neuralforge doctor`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..bench import bandwidth, peak_flops
from ..bench.machine import Machine, compiles, inspect_machine
from ..errors import KernelError
from ..kernels.choices import Choices
from .flags import split_flags

USAGE = """usage: neuralforge doctor [--products] [--json]

Shows what this machine has, measures what it can do (two seconds), and says what to do about what it hasn't.

  --products    all matrix products timed on this machine so far, not only the largest
  --json        the same for programs"""

OK, WARN, MISSING = "ok", "warn", "missing"
LARGEST = 12
"""Products told of unless all are asked for."""
Line = tuple[str, str, str, str]
"""State, subject, fact, advice."""


def main(argv: list[str]) -> None:
    switches = {name for name, _ in split_flags(argv, [], ["json", "products", "help"])}
    if "help" in switches:
        print(USAGE)
        return
    machine = inspect_machine()
    if "json" in switches:
        checks = [dict(zip(("state", "subject", "fact", "advice"), line)) for line in lines(machine)]
        measured = {"peaks": peaks(), "bandwidth": bandwidth().value, "products": [asdict(p) for p in timed_products()]}
        print(json.dumps({**asdict(machine), **measured, "checks": checks}, indent=1))
        return
    for state, subject, fact, advice in lines(machine):
        print(f"{state:<8}{subject:<14}{fact}" + (f"\n{'':22}-> {advice}" if advice else ""))
    timed = timed_products()
    if timed:
        print("\n" + "\n".join(product_table(timed if "products" in switches else timed[:LARGEST], len(timed))))


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
    refused = "amx_bf16" in m.vector_features and not m.amx
    bfloat16 = "avx512_bf16" in m.vector_features or m.amx
    yield (WARN if refused else OK), "bf16", (
        "in hardware" + (", AMX tiles, which multiply float32 too" if m.amx else "") if bfloat16 else "not in hardware: float32 is faster"
    ), "the CPU has AMX, and the kernel refuses it: Linux 5.16 or newer, outside a sandbox, grants it" if refused else ""
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


@dataclass
class Timed:
    """A matrix product of which the candidates were timed on this machine. `operands` are shapes with strides."""

    name: str
    operands: list[tuple[list[int], list[int]]]
    conditions: str
    flops: int
    seconds: dict[str, float]
    choice: str


def timed_products() -> list[Timed]:
    """The table of choices between libraries, the products with the most arithmetic first."""
    found = []
    for key, entry in Choices("products").table.items():
        if "like" in entry:  # not timed
            continue
        name, _, rest = key.partition(" ")
        groups = [[int(n) for n in group.split(",") if n.strip()] for group in re.findall(r"\(([^)]*)\)", rest)]
        operands = list(zip(groups[::2], groups[1::2]))
        matrices = [shape for shape, _ in operands if len(shape) > 1]
        flops = 2 * math.prod(matrices[-2]) * matrices[-1][-1] if len(matrices) > 1 else 0
        conditions = rest.rpartition(")")[2].strip()
        found.append(Timed(name.removeprefix("aten."), operands, conditions, flops, entry["seconds"], entry["choice"]))
    return sorted(found, key=lambda p: -p.flops)


def product_table(shown: list[Timed], count: int) -> Iterator[str]:
    """Shapes, whether each matrix lies by rows or by columns, and of each candidate milliseconds and GFLOP/s."""
    candidates = list(dict.fromkeys(name for p in shown for name in p.seconds))
    yield f"matrix products timed on this machine, ms (GFLOP/s) of each candidate; * is chosen; {len(shown)} of {count}" + (
        "" if len(shown) == count else ", all with --products"
    )  # fmt: skip
    yield f"{'product':<9}{'shapes and layouts':<38}{''.join(f'{name:>18}' for name in candidates)}  conditions"
    for p in shown:
        shapes = " ".join("x".join(map(str, shape)) + layout(shape, strides) for shape, strides in p.operands)
        cells = ""
        for name in candidates:
            seconds = p.seconds.get(name)
            chosen = "*" if name == p.choice else " "
            sound = seconds is not None and 0 < seconds < math.inf
            cells += f"{f'{seconds * 1e3:.3f} ({p.flops / seconds / 1e9:,.0f}){chosen}' if sound else '- ':>18}"
        yield f"{p.name:<9}{shapes:<38}{cells}  {p.conditions}"


def layout(shape: list[int], strides: list[int]) -> str:
    """By rows "", by columns "t", otherwise "s"."""
    if len(shape) < 2 or strides[-1] == 1 or shape[-1] == 1:
        return ""
    return "t" if strides[-2] == 1 else "s"
