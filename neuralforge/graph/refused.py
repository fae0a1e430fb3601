"""What a captured graph can't hold, and what to do instead."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CaptureError
from .fake import TENSORS
from .source import user_line

aten = torch.ops.aten


def check_dense(x: torch.Tensor) -> None:
    """Raises CaptureError for a tensor that isn't numbers at strides in memory."""
    if isinstance(x, torch.nn.parameter.UninitializedTensorMixin):
        raise CaptureError(f"{user_line()}: a parameter of a lazy module has no shape yet. Call the module once before it is captured.")
    if type(x).__name__ == "DTensor":
        raise CaptureError(
            f"{user_line()}: a DTensor, of which each rank holds a part, can't be captured, as what is sent between ranks would be lost. Pass "
            f"x.to_local(), and send by torch.distributed._functional_collectives."
        )
    if type(x) not in TENSORS:
        raise CaptureError(
            f"{user_line()}: a tensor of class {type(x).__name__} can't be captured, as what its class does would be "
            f"lost; expected a torch.Tensor. Pass x.as_subclass(torch.Tensor) if that says all."
        )
    if x.layout != torch.strided:
        raise CaptureError(
            f"{user_line()}: a tensor of layout {x.layout} can't be captured; expected a dense one. Convert it with "
            f".to_dense()."
        )
    for here, what, mend in (
        (x.is_quantized, "a quantized tensor", ".dequantize()"),
        (x.is_nested, "a nested tensor", ".to_padded_tensor(0)"),
        (x._is_zerotensor(), "a tensor of zeros without memory", ".clone()"),
    ):
        if here:
            raise CaptureError(f"{user_line()}: {what} can't be captured; expected a dense one. Convert it with {mend}.")


_WRAPPERS = {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}


def check_module(module: torch.nn.Module) -> None:
    """Raises CaptureError for a module whose hooks send parameters or gradients between ranks."""
    kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
    if kind is not None:
        raise CaptureError(
            f"{user_line()}: {type(module).__name__}, a {kind}, sends between ranks in hooks of torch.autograd's, which takes no part in a "
            f"captured function. Capture the plain module, and add up gradients by torch.distributed._functional_collectives."
        )


_DATA = (
    "the program asks for the data of a tensor (through .numpy(), .data_ptr(), torch.tensor of tensors, text in a format, ...), which doesn't exist "
    "while a graph is captured. Use operators of torch (torch.stack for torch.tensor), or make an operator of the code that needs "
    "the data, with nf.opaque."
)
TOLD_OTHERWISE = {
    ".numpy() is not supported": _DATA,
    "data is not allocated yet": _DATA,
    "Cannot access data pointer": _DATA,
    "Cannot access storage": _DATA,
    "unsupported format string passed to FakeTensor": _DATA,
    "does not require grad and does not have a grad_fn": (
        "torch.autograd (through .backward() or torch.autograd.grad) takes no part in a captured function. Take derivatives with "
        "nf.grad or nf.value_and_grad of a function of the parameters (torch.func.functional_call calls a module with them)."
    ),
}
"""What PyTorch's errors mean while a graph is captured, by words of theirs."""


_FIXED_SHAPE = {
    aten.repeat_interleave: "Pass output_size, the number of elements of the result",
    aten.bincount: "Use x.new_zeros(n).index_add(0, x, torch.ones_like(x)) for numbers below n",
    aten._pack_padded_sequence: (
        "Run the layer on the padded sequences, mask what is padded, and take the last outputs by y[torch.arange(len(y)), lengths - 1]"
    ),
}
"""What to do in place of operators of which the result's shape depends on the data."""


def data_dependent(func: Any) -> str:
    """Why an operator that asks for the data, or whose result's shape depends on it, isn't captured, and what to do instead."""
    if func is aten._local_scalar_dense.default:
        what = (
            "the program asks for the value of a tensor (through `if`, `while`, `.item()`, `int()` or `float()`), "
            "which isn't known while a graph is captured"
        )
        mend = (
            "Use torch.where (or arithmetic) to choose between results, x[i + torch.arange(n)] for x[i : i + n], "
            "or move the decision outside the function"
        )
    elif not any("Tensor" in str(r.type) for r in func._schema.returns):
        what = f"{func} gives a number of Python's, which depends on the data and isn't known while a graph is captured"
        mend = "Use what gives a tensor ((a == b).all() for torch.equal, torch.isclose(a, b).all() for torch.allclose), or move it outside"
    else:
        what = f"{func} gives a result whose shape depends on the data, which a captured graph can't hold"
        mend = "Use a masked operation of fixed shape (torch.where, multiplication by a mask), or move it outside"
        mend = _FIXED_SHAPE.get(func.overloadpacket, mend)
    return f"{user_line()}: {what}. {mend}."
