"""What the compiler's tests share."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler import compiled
from neuralforge.compiler.storage import is_view


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
def optimised(monkeypatch):
    """Called with a function and its arguments: the graph that the passes make of it, and the results of the program made of that."""
    graphs, real = [], compiled._optimised
    monkeypatch.setattr(compiled, "_optimised", lambda *args: graphs.append(real(*args)) or graphs[-1])

    def optimised(f, *args):
        results = nf.jit(f)(*args)
        return graphs[-1], results

    return optimised


@pytest.fixture
def names_and_results(optimised):
    """Called with a function and its arguments: the names of the graph's equations after the passes, and the program's results."""

    def names_and_results(f, *args):
        graph, results = optimised(f, *args)
        return [eq.name for eq in graph.equations], results

    return names_and_results


@pytest.fixture
def ran():
    """Called with a compiled program: the names of its equations, without views and others with nothing to do."""
    return lambda compiled: [eq.name for eq in compiled.graph.equations if not is_view(eq) and eq not in compiled.program.plan.in_place]


@pytest.fixture
def names(ran):
    """Called with a function and its arguments: the names of what runs."""
    return lambda f, *args: ran(nf.jit(f).lookup(args, {})[0])


@pytest.fixture
def agree(ran):
    """Called with a function and its arguments: its results are those in float64. Returns the names of what ran."""

    def agree(f, *args) -> list[str]:
        jitted = nf.jit(f)
        wide = [x.double() if x.is_floating_point() else x for x in args]
        for found, truth in zip(jitted(*args), f(*wide)):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)
        return ran(jitted.programs[0])

    return agree
