"""Peak resident memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return _field("VmRSS")


def peak_resident_bytes() -> int:
    """The most resident memory since the process began, or since `reset_peak`, in bytes."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Start measuring the peak anew."""
    _CLEAR.write_text("5")


def peak_tensor_bytes(f: Callable[[], Any]) -> int:
    """The most that the tensors which `f()` makes hold at once, in bytes of CPU memory as PyTorch's allocator counts
    it: the same on every run and whatever malloc does with freed pages. Scratch memory within kernels isn't in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}: peak memory can be measured on Linux only")
    return int(found.group(1)) * 1024
