"""Claiming equations: for each, the code that runs it best, or none, and then its own operator runs.

A kernel writes its results into tensors it is given. ATen's structured operators have such a form (`out=`); fused
groups have only this form. Generated C is compiled last and all at once (`built`), when it is known which equations there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..errors import KernelError
from ..graph.ir import Equation, Graph, Value
from ..graph.operators import operator_traits
from ..kernels import cross_entropy, embedding, linear_cross_entropy, matmul, rotary
from ..kernels.toolchain import compiler, plain_operators_instead
from .attention import claim_attention
from .fusion.codegen import caller, functions, source
from .fusion.fused import Fused


def _unbuilt(outputs: tuple, args: tuple, kwargs: dict) -> None:
    raise AssertionError("a kernel that was planned with hasn't been built")


@dataclass(frozen=True)
class Kernel:
    """`run(outputs, args, kwargs)` computes an equation into preallocated `outputs` (a tuple, one for each result)."""

    run: Callable[[tuple, tuple, dict], None] = _unbuilt
    may_overwrite: Callable[[Value, Value], bool] = lambda output, operand: False
    """May an output be put where an operand of the same type is, which nobody reads afterwards?"""
    serves: Callable[[Equation], bool] = lambda eq: True
    """Can it run this equation of its operator?"""
    scratch: Callable[[Equation], int] = lambda eq: 0
    """Bytes that it allocates for a while beside its outputs."""
    takes_prologues: bool = False
    """Is it our matrix product? `run` then also takes `prologues`, which make its factors."""
    library: str = ""
    """Whose code it calls, where that is neither ours nor ATen's."""
    code: Callable[[], list[str]] = list
    """Texts of the C functions that it calls, which are still to be compiled."""
    bind: Callable[[dict[str, Any]], Callable] | None = None
    """Makes `run` of these functions, given by their texts."""

    def built(self, functions: dict[str, Any]) -> Kernel:
        """The kernel as it runs, given what `code` was compiled to."""
        return replace(self, run=self.bind(functions), code=list, bind=None) if self.bind else self


OWN: dict[Any, Kernel] = {
    torch.ops.neuralforge.cross_entropy.default: Kernel(
        cross_entropy.forward, serves=lambda eq: cross_entropy.native(eq.args[0].fake)
    ),
    torch.ops.neuralforge.cross_entropy_backward.default: Kernel(
        cross_entropy.backward, lambda output, operand: True, serves=lambda eq: cross_entropy.native(eq.args[1].fake)
    ),
    torch.ops.neuralforge.cross_entropy_with_gradient.default: Kernel(
        cross_entropy.with_gradient,
        lambda output, operand: output.fake.dim() == 2,
        serves=lambda eq: cross_entropy.native(eq.args[1].fake),
    ),
    torch.ops.neuralforge.linear_cross_entropy.default: Kernel(
        linear_cross_entropy.forward,
        scratch=lambda eq: linear_cross_entropy.scratch_bytes(eq.args[0].fake, eq.args[1].fake),
    ),
    torch.ops.neuralforge.linear_cross_entropy_with_gradients.default: Kernel(
        linear_cross_entropy.with_gradients,
        scratch=lambda eq: linear_cross_entropy.scratch_bytes(eq.args[1].fake, eq.args[2].fake, *eq.args[6:]),
    ),
    torch.ops.neuralforge.matmul.default: Kernel(
        matmul.forward, serves=lambda eq: matmul.native(*(v.fake for v in eq.inputs))
    ),
    torch.ops.neuralforge.rotary.default: Kernel(
        rotary.forward,
        lambda output, operand: True,
        serves=lambda eq: rotary.native(*(v.fake for v in eq.args[:3]), eq.outputs.fake),
    ),
    torch.ops.aten.embedding_dense_backward.default: Kernel(
        embedding.backward, serves=lambda eq: embedding.native(eq.args[0].fake, eq.outputs.fake)
    ),
}
"""Kernels of this project by their operator."""


def claim(graph: Graph) -> dict[Equation, Kernel]:
    """The equations that run in destination-passing form: fused groups and ATen's structured operators. Code for the groups
    is still to be `built`."""
    kernels = {}
    for eq in graph.equations:
        attention = claim_attention(eq)
        own = OWN.get(eq.op)
        kernel = Kernel(attention) if attention else own if own and own.serves(eq) else destination_kernel(eq)
        if kernel is not None:
            kernels[eq] = kernel
    fused = [eq for eq in graph.equations if isinstance(eq.op, Fused)]
    try:
        compiler()
    except KernelError as e:
        if fused:
            plain_operators_instead(e)
        return kernels
    return kernels | {eq: fused_kernel(eq.op) for eq in fused}


def fused_kernel(group: Fused) -> Kernel:
    """That of a fused group, to be `built`."""
    text = cache(lambda: source(group.layouts[0]))
    return Kernel(may_overwrite=group.may_overwrite, code=lambda: [text()], bind=lambda built: caller(built[text()], group))


def built(graph: Graph, kernels: dict[Equation, Kernel]) -> dict[Equation, Kernel]:
    """The kernels of the graph's equations, their code compiled. Where it can't be, which is said once, those without."""
    here = {eq: kernels[eq] for eq in graph.equations if eq in kernels}
    try:
        compiled = functions(text for kernel in here.values() for text in kernel.code())
    except KernelError as e:
        plain_operators_instead(e)
        return {eq: kernel for eq, kernel in here.items() if kernel.bind is None}
    return {eq: kernel.built(compiled) for eq, kernel in here.items()}


def destination_kernel(eq: Equation) -> Kernel | None:
    """The destination-passing form of an ATen operator; None where there is none with a CPU kernel of its own."""
    if not isinstance(eq.op, torch._ops.OpOverload):
        return None
    found = out_overload(eq.op)
    if found is None or any(v.device.type != "cpu" for v in eq.results):
        return None
    op, names = found
    if len(names) != len(eq.results):
        return None
    if eq.op.overloadpacket in _IN_THEIR_OWN_ORDER and not all(v.fake.is_contiguous() for v in (*eq.inputs, *eq.results)):
        return None

    def run(outputs: tuple, args: tuple, kwargs: dict) -> None:
        op(*args, **kwargs, **dict(zip(names, outputs)))

    return Kernel(run, lambda output, operand: torch.Tag.pointwise in eq.op.tags)


_NOT_INTO = {torch.ops.aten.linalg_qr.default, torch.ops.aten.max_unpool2d.default}
"""Operators whose `out=` in PyTorch 2.13 goes wrong where two destinations are parts of one memory, or lays out the destination anew."""
_IN_THEIR_OWN_ORDER = {
    torch.ops.aten._log_softmax_backward_data, torch.ops.aten.log_sigmoid_forward, torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit,
}  # fmt: skip
"""Operators whose `out=` in PyTorch 2.13 fills a destination of another order of dimensions as if it were contiguous."""


@cache
def out_overload(op: Any) -> tuple[Any, tuple[str, ...]] | None:
    """The `out=` twin of an operator and the names of its destinations, if it computes in place rather than copying
    from a temporary (the generated ones do)."""
    if op.namespace != "aten" or operator_traits(op).is_view or operator_traits(op).written or op in _NOT_INTO:
        return None
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for overload in op.overloadpacket.overloads():
        candidate = getattr(op.overloadpacket, overload)
        outs = [a.name for a in candidate._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in candidate._schema.arguments if not a.is_out]
        # The dtype and layout of a factory or a conversion are the destination's own.
        if outs and rest == wanted and torch._C._dispatch_has_kernel_for_dispatch_key(candidate.name(), "CPU"):
            return candidate, tuple(outs)
    return None
