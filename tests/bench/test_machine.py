"""Facts about the machine: limits of control groups, read from copies of /proc and /sys."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from neuralforge.bench.machine import control_groups, inspect_machine, memory_limit, usable_cores

GB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000 100000\n"}, 4),
        # a limit of an outer group applies, too
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 9"}, 2),
        # the host's path, as a container without its own namespace sees it: only the root is there
        ({"proc/self/cgroup": "0::/docker/123\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        # version 1
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n2:memory:/\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000\n",
          "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 3),
        ({"proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)  # fmt: skip
def test_usable_cores(files, cores, tmp_path, four_cores):
    assert usable_cores(tree(tmp_path, files)) == cores


@pytest.mark.parametrize(
    "files, limit, left",
    [
        ({}, None, None),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None, None),
        ({"memory.max": f"{99 * GB}\n", "memory.current": "5\n"}, None, None),
        ({"memory.max": f"{4 * GB}\n", "memory.current": f"{3 * GB}\n"}, 4 * GB, GB),
        ({"memory.max": f"{4 * GB}\n", "memory.current": f"{3 * GB}\n", "memory.stat": f"anon 7\ninactive_file {GB}\n"}, 4 * GB, 2 * GB),
        ({"memory.max": f"{4 * GB}\n", "memory.current": f"{5 * GB}\n"}, 4 * GB, 0),
        # the outer group has a larger limit, but less room under it
        ({"memory.max": f"{8 * GB}\n", "memory.current": f"{7 * GB}\n", "in/memory.max": f"{4 * GB}\n",
          "in/memory.current": f"{2 * GB}\n"}, 4 * GB, GB),
    ],
)  # fmt: skip
def test_memory_limit(files, limit, left, tmp_path):
    tree(tmp_path, {"proc/self/cgroup": "0::/in\n", **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})
    assert memory_limit(16 * GB, tmp_path) == (limit, left)


def test_memory_limit_of_version_1(tmp_path):
    folder = "sys/fs/cgroup/memory/x/memory."
    files = {"limit_in_bytes": f"{2 * GB}", "usage_in_bytes": f"{GB}", "stat": f"cache 3\ntotal_inactive_file {GB // 2}\n"}
    tree(tmp_path, {"proc/self/cgroup": "4:memory:/x\n", **{folder + name: text for name, text in files.items()}})
    assert memory_limit(16 * GB, tmp_path) == (2 * GB, 3 * GB // 2)


def test_control_groups_of_another_controller_are_left_out(tmp_path):
    tree(tmp_path, {"proc/self/cgroup": "4:memory:/x\n3:cpu:/y\n", "sys/fs/cgroup/memory/x/f": "", "sys/fs/cgroup/cpu/y/f": ""})
    base = tmp_path / "sys/fs/cgroup/cpu"
    assert control_groups("cpu", tmp_path) == [base / "y", base]


def test_this_machine():
    m = inspect_machine()
    assert 0 < m.usable_cores <= m.cores and 0 < m.available_memory <= m.memory and m.threads >= 1
    assert m.memory_limit is None or m.memory_limit < m.memory
    assert all(size >= 1024 for size in m.caches.values()) and all(free >= 0 for free in m.free_disk.values())
    assert json.loads(json.dumps(asdict(m)))["torch_version"] == m.torch_version
