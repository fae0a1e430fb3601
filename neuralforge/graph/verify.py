"""Checks that a graph is well formed; run after every pass."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from .ir import Graph, Value, leaves, map_tree


def verify(graph: Graph, types: bool = False) -> Graph:
    """Return `graph` if every value is defined once, before its use; else raise AssertionError naming the equation.

    With `types`, every operator is also re-run on fake tensors and its results compared with the recorded types.
    """
    defined: set[Value] = set()
    names: set[str] = set()

    def define(value: Value, where: Any) -> None:
        assert value not in defined, f"{value.typed} is defined twice, again in: {where!r}"
        assert value.name not in names, f"two values are named {value.name}, the second in: {where!r}"
        defined.add(value)
        names.add(value.name)

    for value in (*graph.inputs, *graph.constants):
        define(value, "the inputs")
    for eq in graph.equations:
        for value in eq.inputs:
            assert value in defined, f"{value.name} is used before it is defined, in: {eq!r}"
        for value in eq.results:
            define(value, eq)
        if types:
            _check_types(eq)
    for value in leaves(graph.outputs):
        assert value in defined, f"the output {value.name} is never defined"
    return graph


def _check_types(eq) -> None:
    fakes = map_tree(lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf, (eq.args, eq.kwargs))
    mode = next((v.fake.fake_mode for v in (*eq.inputs, *eq.results) if isinstance(v.fake, FakeTensor)), None)
    if mode is None:
        return
    with mode:
        out = eq.op(*fakes[0], **fakes[1])
    found: list = []
    map_tree(lambda leaf: found.append(leaf) if hasattr(leaf, "shape") else None, out)
    assert len(found) == len(eq.results), f"{len(found)} results, {len(eq.results)} recorded, in: {eq!r}"
    for tensor, value in zip(found, eq.results):
        same = tensor.shape == value.shape and tensor.dtype == value.dtype
        assert same, f"computes {tensor.dtype}{list(tensor.shape)}, not {value.typed}, in: {eq!r}"
