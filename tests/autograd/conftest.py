"""What the tests of derivatives share."""

from functools import partial

import pytest

from neuralforge.compiler.fusion import codegen

_built = {}


@pytest.fixture
def unoptimised(monkeypatch):
    """Fused groups are compiled without optimisation, in less than half the time: for tests of what is computed, not of the code for it,
    which those of the compiler compile as it is for users."""
    monkeypatch.setattr(codegen, "load_many", partial(codegen.load_many, flags=["-O0"]))
    monkeypatch.setattr(codegen, "_built", _built)  # code for others isn't taken from here
