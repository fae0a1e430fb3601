"""Which weights dropout keeps: the truth, in plain operators. The same seed and offset give the same, in every kernel."""

from __future__ import annotations

import torch

from ..random.philox import random_bits


def threshold(dropout_p: float) -> int:
    """A weight is kept whose 32-bit number is at least this."""
    return int(dropout_p * 2**32)


def keep(p_BHTS: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | int:
    """0 or 1 / (1 - dropout_p) for each weight, in p's dtype. Of Philox, the key is `seed[0]` and the counter of four
    weights in a row (key // 4, query, head of all in the batch, seed[1])."""
    if seed is None:
        return 1
    drawn = random_bits(seed, p_BHTS.shape, [0] * 4, p_BHTS.shape)
    return (drawn >= threshold(dropout_p) - 2**31).to(p_BHTS.dtype) / (1 - dropout_p)
