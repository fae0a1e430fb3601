"""What tests of several folders share."""

import pytest
import torch

from neuralforge.errors import KernelError
from neuralforge.kernels import toolchain


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request, monkeypatch):
    """Each instruction set that code is compiled for; those this CPU lacks are skipped."""
    monkeypatch.setenv("NEURALFORGE_ISA", request.param)
    try:
        toolchain.isa()
    except KernelError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture
def threads_restored():
    """What a test sets the number of threads to doesn't outlive it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
