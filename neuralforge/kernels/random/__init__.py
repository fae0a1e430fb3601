"""Random words from counters: what is drawn depends on the key and on an element's place, on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import KernelError
from ..native import Native, long, pointer
from . import philox

PHILOX = Path(__file__).with_name("philox.h")
_native = Native(Path(__file__).with_name("random.c"), PHILOX)


@torch.library.custom_op("neuralforge::random_bits", mutates_args=())
def random_bits(
    key: torch.Tensor, shape: Sequence[int], start: Sequence[int], whole: Sequence[int], offset: int = 0
) -> torch.Tensor:
    """Uniform int32, -2^31 to 2^31 - 1, for the part of `shape` that begins at `start` in a tensor of shape `whole`.

    `key`, int64 [2], is a seed and an offset below 2^32, to which the argument `offset` is added. Four elements
    in a row are a word each of Philox 4x32-7 with the seed as key and the counter (column // 4, row, all dimensions before
    as one number, offset), so one-dimensional tensors are of one row. Raises KernelError for another key.
    """
    check(key)
    out = key.new_empty(list(shape), dtype=torch.int32)
    if out.device.type != "cpu" or not out.numel() or not _native.available():
        return philox.random_bits(key, shape, start, whole, offset)
    key = key.contiguous()
    sizes = [[fill, fill, *given] for fill, given in ((1, shape), (0, start), (1, whole))]
    arrays = [(long * len(given))(*given) for given in sizes]
    _native.library.random_bits(pointer(out), pointer(key), long(offset), long(len(sizes[0])), *arrays)
    return out


@random_bits.register_fake
def _(key, shape, start, whole, offset=0):
    check(key)
    return key.new_empty(shape, dtype=torch.int32)


@random_bits.register_vmap
def _(info, in_dims, key, shape, start, whole, offset=0):
    keys = key.movedim(in_dims[0], 0)
    return torch.stack([random_bits(k, shape, start, whole, offset) for k in keys]), 0


def check(key: torch.Tensor) -> None:
    if not isinstance(key, torch.Tensor) or key.shape != (2,) or key.dtype != torch.int64:
        what = f"{key.dtype} {list(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)
        raise KernelError(f"a random key of {what}; expected int64 [2], as nf.random.key(seed) gives.")
