"""Choices between equivalent kernels, timed once and remembered on disk for this machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .toolchain import cache_folder, cpu_features, cpu_model, replacing


class Choices:
    """A table of timed choices, `{key: {"choice": name, "seconds": {name: best}}}`, one JSON file a machine, torch
    version and topic. Processes may race: the first choice saved stays, since another kernel rounds differently. A
    damaged file counts as empty."""

    def __init__(self, topic: str):
        machine = "\0".join([cpu_model(), *sorted(cpu_features()), torch.__version__])
        self.path: Path = cache_folder() / f"{topic}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"
        self.table: dict[str, Any] = self._read()
        self._changed = False

    def _read(self) -> dict[str, Any]:
        try:
            table = json.loads(self.path.read_text())
            sound = all(entry["choice"] in entry["seconds"] for entry in table.values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return table if sound else {}

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> str:
        """The name of the remembered choice, measured now if there is none."""
        if key not in self.table:
            self.table[key] = measure()
            self._changed = True
        return self.table[key]["choice"]

    def save(self) -> None:
        """Write the table if it changed. A cache that can't be written only costs timing again."""
        if not self._changed:
            return
        try:
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.table.update(self._read())
                with replacing(self.path) as temporary:
                    temporary.write_text(json.dumps(self.table, indent=1))
        except OSError:
            pass
