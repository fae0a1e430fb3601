"""Functions of PyTorch that ask for the numbers in tensors though the shapes of their results don't depend on them.

`x[i]` reads the number i to make a view, `F.gaussian_nll_loss` a variance to refuse what is negative. Captured code calls others
in their place, which don't ask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import CaptureError
from ..kernels.ctc import ctc_loss
from .fake import FakeMode
from .in_place import Link
from .switched_off import SwitchedOff
from .tracer import Tracer

aten = torch.ops.aten


class WithoutData(TorchFunctionMode):
    """Calls the functions of `_OTHERS` for those of PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _OTHERS.get(func, func)(*args, **(kwargs or {}))


def _getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    x, index = _at_numbers(x, index)
    return x[index]


def _setitem(x: torch.Tensor, index: Any, value: Any) -> None:
    x, index = _at_numbers(x, index)
    x[index] = value


def _narrow(x: torch.Tensor, dim: int, start: Any, length: int) -> torch.Tensor:
    if not isinstance(start, torch.Tensor) or not _unknown(start):
        return x.narrow(dim, start, length)
    return _view(x, dim % x.dim(), start + torch.arange(length, device=start.device))


def _at_numbers(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, Any]:
    """`x` at those parts of an index that are tensors of one integer, and the other parts."""
    parts = index if isinstance(index, tuple) else (index,)
    unknown = [_unknown(part) for part in parts]
    if not any(unknown):
        return x, index
    between = x.dim() - sum(map(_dims, parts))  # the dimensions that `...` is for
    dim, rest = 0, []
    for part, number in zip(parts, unknown):
        if number:
            x = _view(x, dim, part.clone())  # what is written to it later leaves the view where it is
        else:
            rest.append(part)
            dim += between if part is ... else _dims(part)
    return x, tuple(rest)


def _unknown(part: Any) -> bool:
    """Is a part of an index a tensor of one integer that isn't known?"""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func's, which has its own ways
        return False
    if not isinstance(part, torch.Tensor) or part.dim() or part.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        return False
    try:
        int(part)
    except CaptureError:
        return True
    return False


def _dims(part: Any) -> int:
    """How many dimensions a part of an index is for."""
    if isinstance(part, torch.Tensor):
        return part.dim() if part.dtype in (torch.bool, torch.uint8) else 1
    return 0 if part is None or part is ... or isinstance(part, bool) else 1


def _view(x: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    """`x` at these places in a dimension. To the tracers it is a view: writes to it are writes to `x`."""
    index = [None] * dim + [places.long()]
    out = aten.index.Tensor(x, index)
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, Tracer):
            x = mode.now(x)
            mode.note_view(out, Link(x, aten.index.Tensor, (index,), {}, None))
    return out


def _ctc_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: Any, target_lengths: Any,
    blank: int = 0, reduction: str | int = "mean", zero_infinity: bool = False,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's makes a tensor of lengths in a list, in C++, where no tracer sees it, and results as wide as the lengths in a tensor say."""
    input_lengths, target_lengths = torch.as_tensor(input_lengths).reshape(-1), torch.as_tensor(target_lengths).reshape(-1)
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.reshape(1, -1)
    losses = ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    if reduction in ("mean", 1):
        losses = losses / target_lengths.clamp(min=1).to(losses)
    return _reduced(losses, "sum" if single else reduction)


def _gaussian_nll_loss(
    input: torch.Tensor, target: torch.Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> torch.Tensor:
    """Negative variances count as `eps`, as those below it do; PyTorch's refuses them."""
    if not isinstance(var, torch.Tensor):
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    if var.dim() != input.dim():
        raise ValueError("var is of incorrect size")
    var = var.clone()
    with torch.no_grad():
        var.clamp_(min=eps)
    losses = 0.5 * (var.log() + (input - target) ** 2 / var)
    return _reduced(losses + 0.5 * math.log(2 * math.pi) if full else losses, reduction)


def _reduced(losses: torch.Tensor, reduction: str | int) -> torch.Tensor:
    if reduction in ("none", 0):
        return losses
    if reduction not in ("mean", "sum", 1, 2):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return losses.mean() if reduction in ("mean", 1) else losses.sum()


def _matrix_rank(*args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """PyTorch's loses what it is to write to `out` where that is no plain tensor."""
    rank = torch.linalg.matrix_rank(*args, **kwargs)
    return rank if out is None else torch.add(rank, 0, out=out)


def _deepcopy(x: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """PyTorch's copies the memory, in which there is nothing."""
    return memo.setdefault(id(x), x.detach().clone())


_OTHERS = {
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.__setitem__: _setitem,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.narrow: _narrow,
    torch.narrow: _narrow,
    torch.ctc_loss: _ctc_loss,
    F.ctc_loss: _ctc_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    torch.linalg.matrix_rank: _matrix_rank,
}

_forward = _BatchNorm.forward


def _batch_norm(self: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
    """With `momentum=None` the running statistics are averages over all batches, of which a tensor says how many there were."""
    captured = any(isinstance(mode, FakeMode) for mode in _get_current_dispatch_mode_stack())  # other threads' aren't
    if not captured or self.momentum is not None or not self.training or not self.track_running_stats:
        return _forward(self, input)
    self._check_input_dim(input)
    self.num_batches_tracked.add_(1)
    running = self.running_mean, self.running_var
    batch = [r.clone() for r in running]
    out = F.batch_norm(input, *batch, self.weight, self.bias, True, 1.0, self.eps)
    for r, b in zip(running, batch):
        r.add_((b - r) / self.num_batches_tracked)
    return out


own_batch_norm = SwitchedOff(lambda: _BatchNorm.forward, lambda own: setattr(_BatchNorm, "forward", own or _batch_norm))
"""PyTorch's, which makes a number of Python's of that tensor; a module's method, of which no mode is told."""
