"""What is on this machine: facts for `neuralforge doctor` and for the head of a benchmark."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
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
    caches: dict[str, int]
    numa_nodes: int
    memory: int
    available_memory: int
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
    cuda: str | None
    nccl: str | None
    gloo: bool
    triton: str | None


def inspect_machine() -> Machine:
    """Look around. Runs nothing longer than `compiler --version`."""
    memory = psutil.virtual_memory()
    return Machine(
        cpu=toolchain.cpu_model() or "unknown",
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        vector_features=tuple(f for f in VECTOR_FEATURES if f in toolchain.cpu_features()),
        isa=toolchain.isa(),
        caches=_caches(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        memory=memory.total,
        available_memory=memory.available,
        memory_limit=_cgroup_number("memory.max", "memory/memory.limit_in_bytes", memory.total),
        free_disk={str(p): shutil.disk_usage(p).free for p in (toolchain.cache_folder(), Path.cwd())},
        compiler=_compiler(),
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        onednn=torch.backends.mkldnn.is_available(),
        mkl=torch.backends.mkl.is_available(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        gloo=torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        triton=_version("triton"),
    )


def usable_cores() -> float:
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return cores


def compiles() -> str | None:
    """None if a small OpenMP program compiles, loads and runs here; else what went wrong."""
    source = (
        "#include <omp.h>\nint threads(void) { int n = 0;\n#pragma omp parallel reduction(+:n)\nn += 1;\nreturn n; }"
    )
    try:
        count = toolchain.load(source, "doctor").threads()
    except KernelError as e:
        return str(e)
    return None if count == torch.get_num_threads() else f"{count} threads run where torch has {torch.get_num_threads()}"


def _compiler() -> str | None:
    try:
        return toolchain.compiler(os.environ.get("CC"))[1]
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


def _cgroup_number(v2: str, v1: str, total: int) -> int | None:
    for path in (Path("/sys/fs/cgroup") / v2, Path("/sys/fs/cgroup") / v1):
        try:
            value = int(path.read_text())
        except (OSError, ValueError):
            continue
        return value if value < total else None
    return None


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None
