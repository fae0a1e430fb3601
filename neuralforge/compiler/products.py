"""Matrix products: ATen's (MKL) or oneDNN's, whichever was faster for this shape on this machine.

Neither is best everywhere: on AVX2 machines MKL reaches 80 % of the peak and oneDNN 50 %, on AMD's AVX-512 machines
40 % and over 90 %. The choice is timed once for each shape and layout and remembered on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..graph.ir import Equation, Value
from ..kernels.choices import Choices

aten = torch.ops.aten


def onednn(eq: Equation) -> Callable | None:
    """The equation as a call of oneDNN's inner product, x @ w.T + bias, which takes any strides; None where it
    doesn't apply (it computes in float32 and allocates its result)."""
    if not torch.backends.mkldnn.is_available() or not isinstance(eq.outputs, Value):
        return None
    linear = torch.ops.mkldnn._linear_pointwise.default
    if eq.op is aten.mm.default and _plain(eq.args):
        return lambda a, b: linear(a, b.t(), None, "none", [], "")
    if eq.op is aten.addmm.default and not eq.kwargs and _plain(eq.args) and eq.args[0].fake.dim() == 1:
        if eq.args[0].shape[0] == eq.outputs.shape[1]:
            return lambda c, a, b: linear(a, b.t(), c, "none", [], "")
    return None


def _plain(args: tuple) -> bool:
    return all(
        isinstance(v, Value) and v.dtype == torch.float32 and v.device.type == "cpu" and v.fake.numel() for v in args
    )


def choose_products(equations: list[Equation]) -> dict[Equation, Callable]:
    """For the products where oneDNN is the faster, the call that replaces the operator."""
    choices = Choices("products")
    chosen = {}
    for eq in equations:
        call = onednn(eq)
        if call is None:
            continue
        layouts = ";".join(f"{tuple(v.shape)}{tuple(v.strides)}" for v in eq.args)
        key = f"{eq.name} {layouts} threads={torch.get_num_threads()}"
        if choices.get(key, partial(_fastest, {"aten": eq.op, "onednn": call}, eq.args)) == "onednn":
            chosen[eq] = call
    choices.save()
    return chosen


def _fastest(candidates: dict[str, Callable], args: tuple[Value, ...], rounds: int = 3) -> dict[str, Any]:
    """Best times in seconds on random operands of the recorded layout, alternating, after one warm-up."""
    own = torch.Generator().manual_seed(0)  # a run must not depend on whether the choice was cached
    tensors = [torch.empty_strided(v.shape, v.strides, dtype=v.dtype).normal_(generator=own) for v in args]
    best = dict.fromkeys(candidates, float("inf"))
    for n in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call(*tensors)
            if n:
                best[name] = min(best[name], time.perf_counter() - start)
    return {"choice": min(best, key=best.__getitem__), "seconds": best}
