"""Torch custom operators of a plain definition: the compiler makes their code, the tape their gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ..autograd import vjp
from ..autograd.rules import definition
from ..compiler import jit
from ..compiler.passes.descend import DESCENDING
from ..kernels.native import wide as wide_dtype


def operator(truth: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.ops.neuralforge.<name>` of a function of tensors, optional tensors and numbers with one result, and
    `<name>_backward`, which gives the gradients of those tensors that are wanted. In a program that `nf.jit` compiles, the
    definition takes the operator's place, so that it is fused with what is around it."""
    name = truth.__name__

    def forward(*args: Any) -> torch.Tensor:
        return truth(*map(_contiguous, args)).contiguous()

    def backward(g: torch.Tensor, wanted: list[bool], *args: Any) -> list[torch.Tensor]:
        at = [i for i, w in enumerate(wanted) if w]

        def of_wanted(*tensors: torch.Tensor) -> torch.Tensor:
            full = list(map(_contiguous, args))
            for i, t in zip(at, tensors):
                full[i] = t
            return truth(*full)

        gradients = vjp(of_wanted, *[_contiguous(args[i]) for i in at])[1](_contiguous(g))
        return [d.contiguous() for d in gradients]

    schema = torch.library.infer_schema(truth, mutates_args=())
    inputs = re.sub(r"=[^,]+", "", schema.removeprefix("(").split(") ->")[0])
    op = torch.library.custom_op(f"neuralforge::{name}", _fast(forward), mutates_args=(), schema=schema)
    op_backward = torch.library.custom_op(
        f"neuralforge::{name}_backward", _fast(backward), mutates_args=(), schema=f"(Tensor g, bool[] wanted, {inputs}) -> Tensor[]"
    )
    op.register_fake(lambda *args: forward(*args))
    op_backward.register_fake(lambda g, wanted, *args: [x.new_empty(x.shape) for x, w in zip(args, wanted) if w])

    def setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
        ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in inputs]

    def torch_backward(ctx: Any, g: torch.Tensor) -> tuple:
        args = [number if t is None else t for t, number in zip(ctx.saved_tensors, ctx.numbers)]
        wanted = list(ctx.needs_input_grad)
        gradients = iter(op_backward(g, wanted, *args))
        return tuple(next(gradients) if w else None for w in wanted)

    op.register_autograd(torch_backward, setup_context=setup)

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[torch.Tensor, int]:
        one = lambda n: [x if d is None else x.select(d, n) for x, d in zip(args, in_dims)]
        return torch.stack([op(*one(n)) for n in range(info.batch_size)]), 0

    op.register_vmap(vmap)
    for made, plain in ((name, forward), (f"{name}_backward", backward)):
        definition(f"neuralforge::{made}")(plain)
        DESCENDING.add(getattr(torch.ops.neuralforge, made))
    op.truth = truth
    op.__doc__ = truth.__doc__
    return op


def _fast(plain: Callable) -> Callable:
    compiled = jit(plain)

    def run(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        return (compiled if all(x.device.type == "cpu" for x in tensors) else plain)(*args)

    return run


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def wide(x: torch.Tensor) -> torch.Tensor:
    """In what `x` is computed with: float32 at least."""
    return x.to(wide_dtype(x.dtype))
