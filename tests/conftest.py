"""What tests of several folders share."""

import os
import subprocess
from pathlib import Path

import pytest

# Read as torch loads OpenMP. Threads that wait for work spin otherwise, which on a busy machine is half of the CPU time of tests of small kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from neuralforge.compiler.products import candidates  # noqa: E402
from neuralforge.errors import KernelError  # noqa: E402
from neuralforge.kernels import native, toolchain  # noqa: E402


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request, monkeypatch):
    """Each instruction set that code is compiled for; those this CPU lacks are skipped, but for AMX's tiles, which are
    emulated where there is the rest."""
    if request.param == "amx" and not toolchain.amx_granted() and toolchain.fast_dot():
        emulate_tiles(monkeypatch)
    monkeypatch.setenv("NEURALFORGE_ISA", request.param)
    try:
        toolchain.isa()
    except KernelError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture
def mounted(tmp_path):
    """`mounted(name, options)`: a folder with a file system of its own, in memory ("size=300k", "ro", ...). Skips the test where
    none can be mounted."""
    folders = []

    def mount(name, options):
        folder = tmp_path / name
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("file systems can't be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)


def emulate_tiles(monkeypatch):
    features, source = toolchain.cpu_features() | {"amx_tile", "amx_bf16"}, native.Native.source
    real, emulated = native.AMX.read_text(), Path(__file__).with_name("emulated_tiles.h").read_text()
    monkeypatch.setattr(toolchain, "cpu_features", lambda: features)
    monkeypatch.setattr(toolchain, "amx_granted", lambda: True)
    monkeypatch.setattr(native.Native, "source", property(lambda self: source.fget(self).replace(real, emulated)))


@pytest.fixture
def threads_restored():
    """What a test sets the number of threads to doesn't outlive it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(monkeypatch):
    """Called with a choice, that is made for every product, as if it had been timed so; none is remembered."""

    def timed(choice: str, own: float = 1.0, copy: float = 1.0) -> None:
        def get(self, key, measure):
            self.table[key] = {"choice": choice, "seconds": {"aten": 1.0, "own": own}, "copy": copy}
            return choice

        monkeypatch.setattr(candidates.Choices, "get", get)
        monkeypatch.setattr(candidates.Choices, "save", lambda self: None)

    return timed
