"""What the compiler's tests share."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler import compiled


@pytest.fixture
def joined_by(monkeypatch):
    """Called with the name of a step of `Compiled` that joins equations: the list in which their names will be."""

    def joined_by(step: str) -> list[str]:
        names, real = [], getattr(compiled, step)

        def join(*args):
            graph, kernels = real(*args)
            names.extend(eq.name for eq in kernels)
            return graph, kernels

        monkeypatch.setattr(compiled, step, join)
        return names

    return joined_by


@pytest.fixture
def names():
    """Called with a function and its arguments: the names of what runs."""
    return lambda f, *args: [row.name for row in nf.explain(f, *args).rows]


@pytest.fixture
def agree():
    """Called with a function and its arguments: its results are those in float64."""

    def agree(f, *args) -> None:
        wide = [x.double() if x.is_floating_point() else x for x in args]
        for found, truth in zip(nf.jit(f)(*args), f(*wide)):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)

    return agree
