"""Checks that a graph is well formed; run after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch._subclasses.fake_tensor import FakeTensor

from .ir import Graph, Value, leaves, map_tree


def verify(graph: Graph, types: bool = False) -> Graph:
    """Return `graph` if every value is defined once, before its use; else raise AssertionError naming the equation.

    With `types`, every operator is also re-run on fake tensors and its results compared with the recorded types.
    """
    defined: set[Value] = {*graph.inputs, *graph.constants}
    count = len(graph.inputs) + len(graph.constants)
    assert len(defined) == count, "an input or a constant is defined twice"
    for eq in graph.equations:
        assert defined.issuperset(eq.inputs), f"{_missing(eq.inputs, defined)} is used before it is defined, in: {eq!r}"
        defined.update(eq.results)
        count += len(eq.results)
        assert len(defined) == count, f"a result is defined twice, again in: {eq!r}"
        if types:
            _check_types(eq)
    outputs = leaves(graph.outputs)
    assert defined.issuperset(outputs), f"the output {_missing(outputs, defined)} is never defined"
    names = Counter([value.name for value in defined])
    assert len(names) == count, f"two values are named {names.most_common(1)[0][0]}"
    return graph


def _missing(values: Iterable[Value], defined: set[Value]) -> Value:
    return next(value for value in values if value not in defined)


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
