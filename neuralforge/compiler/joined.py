"""Equations joined into one, which one kernel runs."""

from __future__ import annotations

import torch

from ..graph.ir import Equation, Graph


class Joined:
    """The operator that several equations became: called, it interprets `graph`, which is what it computes. `why` says how it came
    about. Each kind has a `kernel` that does it at once."""

    def __init__(self, name: str, why: str, graph: Graph):
        self.name, self.why, self.graph = name, why, graph

    def __call__(self, *tensors: torch.Tensor) -> tuple:
        return tuple(self.graph(*tensors))

    def equation(self, source: str, origin: str) -> Equation:
        """The equation of the same names as those within."""
        return Equation(self, tuple(self.graph.inputs), {}, tuple(self.graph.outputs), source, origin)
