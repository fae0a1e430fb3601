"""Interpreting, printing and verifying graphs."""

import pytest
import torch

from neuralforge.graph import Equation, capture, verify


def graph():
    return capture(lambda x, y: ((x * y).sum(), x + y), torch.randn(3), torch.randn(3)).graph


def test_printing():
    text = str(graph())
    assert text.startswith("def graph(v0:f32[3], v1:f32[3]):")
    assert "v2:f32[3] = aten.mul.Tensor(v0, v1)   # " in text
    assert text.splitlines()[-1] == "    return v3, v4"


def test_wrong_number_of_inputs():
    with pytest.raises(TypeError, match="takes 2 inputs, not 1"):
        graph()(torch.ones(3))


def test_last_uses():
    g = graph()
    dead = g.last_uses()
    assert [v.name for v in dead[1]] == ["v2"], "the product dies in the sum"
    assert {v.name for v in dead[2]} == {"v0", "v1"}


def test_verify_finds_use_before_definition():
    g = graph()
    with pytest.raises(AssertionError, match="used before it is defined"):
        verify(g.replace(equations=g.equations[::-1]))


def test_verify_finds_double_definition():
    g = graph()
    with pytest.raises(AssertionError, match="defined twice"):
        verify(g.replace(equations=[*g.equations, g.equations[0]]))


def test_verify_finds_undefined_output():
    g = graph()
    with pytest.raises(AssertionError, match="never defined"):
        verify(g.replace(equations=g.equations[:-1]))


def test_verify_finds_wrong_types():
    g = graph()
    eq = g.equations[0]
    wrong = Equation(torch.ops.aten.sum.default, (eq.args[0],), {}, eq.outputs)
    with pytest.raises(AssertionError, match="computes"):
        verify(g.replace(equations=[wrong, *g.equations[1:]]), types=True)
