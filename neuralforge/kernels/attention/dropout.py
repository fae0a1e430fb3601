"""Which weights dropout keeps: the truth, in plain operators. The same seed and offset give the same, in every kernel."""

from __future__ import annotations

import torch


def threshold(dropout_p: float) -> int:
    """A weight is kept whose 32-bit number is at least this."""
    return int(dropout_p * 2**32)


def keep(p_BHTS: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | int:
    """0 or 1 / (1 - dropout_p) for each weight, in p's dtype. Of Philox, the key is `seed[0]` and the counter of four
    weights in a row (key // 4, query, head of all in the batch, seed[1])."""
    if seed is None:
        return 1
    B, H, T, S = p_BHTS.shape
    number = lambda n, *shape: torch.arange(n, device=p_BHTS.device).view(shape)
    groups = (S + 3) // 4
    counter = [number(groups, 1, 1, groups), number(T, 1, T, 1), number(B * H, B * H, 1, 1), seed[1] & MASK]
    words = philox(counter, [seed[0] & MASK, (seed[0] >> 32) & MASK])
    drawn = torch.stack([word.expand(B * H, T, groups) for word in words], -1).view(B, H, T, groups * 4)[..., :S]
    return (drawn >= threshold(dropout_p)).to(p_BHTS.dtype) / (1 - dropout_p)


MASK = 0xFFFFFFFF


def philox(counter: list, key: list, rounds: int = 7) -> list:
    """Philox 4x32 of four and two 32-bit numbers in int64 (Salmon et al. 2011,
    https://doi.org/10.1145/2063384.2063405); 7 rounds are the fewest that pass all their tests."""
    for _ in range(rounds):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def _multiply(x, factor):
    """The upper and lower 32 bits of the product, which int64 can't hold."""
    high, low = (x >> 16) * factor, (x & 0xFFFF) * factor
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & MASK
