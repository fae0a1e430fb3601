"""What is on this machine: facts for `neuralforge doctor` and for the head of a benchmark."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from ..errors import KernelError
from ..kernels import toolchain

VECTOR_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes. None or empty: not there, or the system doesn't tell."""

    cpu: str
    cores: int
    """Logical cores of the machine."""
    usable_cores: float
    """Those this process may use: affinity and the container's quota."""
    vector_features: tuple[str, ...]
    isa: str
    amx: bool
    """Tiles of bfloat16, granted to this process."""
    caches: dict[str, int]
    numa_nodes: int
    memory: int
    available_memory: int
    """Free for this process: of the machine's memory, and below the container's limit."""
    memory_limit: int | None
    """The container's."""
    free_disk: dict[str, int]
    """By folder: the kernel cache and the working folder."""
    compiler: str | None
    torch_version: str
    threads: int
    onednn: bool
    mkl: bool
    gpus: tuple[str, ...]
    """Those torch can use."""
    nvidia_driver: str | None
    cuda: str | None
    """The version torch was built for."""
    nccl: str | None
    gloo: bool
    triton: str | None


def inspect_machine() -> Machine:
    """Look around. Runs nothing longer than `compiler --version`."""
    memory = psutil.virtual_memory()
    limit, left = memory_limit(memory.total)
    return Machine(
        cpu=toolchain.cpu_model() or "unknown",
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        vector_features=tuple(f for f in VECTOR_FEATURES if f in toolchain.cpu_features()),
        isa=toolchain.isa(),
        amx=toolchain.amx_granted(),
        caches=_caches(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        memory=memory.total,
        available_memory=memory.available if left is None else min(memory.available, left),
        memory_limit=limit,
        free_disk={str(p): shutil.disk_usage(p).free for p in (toolchain.cache_folder(), Path.cwd())},
        compiler=_compiler(),
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        onednn=torch.backends.mkldnn.is_available(),
        mkl=torch.backends.mkl.is_available(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        nvidia_driver=_nvidia_driver(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        gloo=torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        triton=_version("triton"),
    )


def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, and the quota of its control groups. `root`: where /proc and /sys are."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups("cpu", root):
        quota = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def memory_limit(total: int, root: Path = Path("/")) -> tuple[int | None, int | None]:
    """The tightest limit of this process's control groups below the machine's `total`, and the least room left under
    one (the page cache counts as room), in bytes; None where there is no limit."""
    limits, left = [], []
    for folder in control_groups("memory", root):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used and limit[0] != "max" and int(limit[0]) < total:
            stat = _words(folder / "memory.stat")
            stat = dict(zip(stat[::2], stat[1::2]))
            cached = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            limits.append(int(limit[0]))
            left.append(max(0, int(limit[0]) - int(used[0]) + cached))
    return min(limits, default=None), min(left, default=None)


def control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of the control groups that this process is in, innermost first: a limit of each applies. Version 2's,
    and version 1's of `controller`. In a container the path may be the host's and not be there; its root is."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / (controller if controllers else "")
            inner = base / path.lstrip("/")
            folders += [f for f in (inner, *inner.parents) if f.is_relative_to(base) and f.is_dir()]
    return folders


def compiles() -> str | None:
    """None if a small OpenMP program compiles, loads and runs here; else what went wrong."""
    source = (
        "#include <omp.h>\nint threads(void) { int n = 0;\n#pragma omp parallel reduction(+:n)\nn += 1;\nreturn n; }"
    )
    try:
        count = toolchain.load(source, "doctor").threads()
    except KernelError as e:
        return str(e)
    if count == torch.get_num_threads():
        return None
    return (
        f"a compiled kernel runs on {count} threads where torch has {torch.get_num_threads()}: the compiler's OpenMP "
        f"isn't torch's. Set CC=gcc."
    )


def _compiler() -> str | None:
    try:
        return toolchain.compiler()[1]
    except KernelError:
        return None


def _caches() -> dict[str, int]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        name = f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[name] = int(size.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return found


def _words(path: Path) -> list[str]:
    """Of a small file; [] if it isn't there or can't be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def _nvidia_driver() -> str | None:
    found = re.search(r"\d+\.\d+(\.\d+)?", " ".join(_words(Path("/proc/driver/nvidia/version"))))
    return found.group() if found else None


def _version(module: str) -> str | None:
    try:
        return version(module)
    except PackageNotFoundError:
        return None
