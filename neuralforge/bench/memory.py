"""Peak resident memory."""

from __future__ import annotations

import re
from pathlib import Path

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


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}: peak memory can be measured on Linux only")
    return int(found.group(1)) * 1024
