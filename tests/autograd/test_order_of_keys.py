"""Trees that belong together go by their keys, in whatever order a dictionary has them."""

from __future__ import annotations

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import DifferentiationError

both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])
AT = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}


def turned(d):
    return dict(reversed(d.items()))


@both
def test_cotangents_of_a_rule(run):
    f = nf.custom_vjp(lambda d: (2 * d["a"]).sum() + (100 * d["b"]).sum())
    f.defvjp(lambda d: (f.f(d), None), lambda _, g: ({"b": g.expand(2) * 100, "a": g.expand(2) * 2},))
    found = run(nf.grad(f))(AT)
    assert found["a"].tolist() == [2, 2] and found["b"].tolist() == [100, 100]


@both
def test_axes(run):
    f = run(nf.vmap(lambda d: {"sum": d["a"] + d["b"], "a": d["a"]}, ({"b": None, "a": 0},), {"a": 0, "sum": 1}))
    found = f(AT)
    assert found["sum"].tolist() == [[4, 5], [5, 6]] and found["a"].tolist() == [1, 2]


@both
def test_tangents_and_cotangents(run):
    f = lambda d: {"product": d["a"] * d["b"], "a": d["a"]}
    moves = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    assert run(lambda d, t: nf.jvp(f, (d,), (t,)))(AT, turned(moves))[1]["product"].tolist() == [3, 2]
    given = {"a": torch.zeros(2), "product": torch.ones(2)}
    found = run(lambda d, g: nf.vjp(f, d)[1](g)[0])(AT, given)
    assert found["a"].tolist() == [3, 4] and found["b"].tolist() == [1, 2]


def test_other_keys_are_refused():
    with pytest.raises(DifferentiationError, match="structure of the tangents differs.*missing.*'b'"):
        nf.jvp(lambda d: d["a"], (AT,), ({"a": AT["a"], "c": AT["b"]},))
