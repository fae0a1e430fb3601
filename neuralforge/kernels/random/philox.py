"""Random numbers from counters: the truth, in plain operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MASK = 0xFFFFFFFF


def random_bits(
    key: torch.Tensor, shape: Sequence[int], start: Sequence[int], whole: Sequence[int], offset: int = 0
) -> torch.Tensor:
    """See the operator of this name."""
    shape, start, whole = [1, 1, *shape], [0, 0, *start], [1, 1, *whole]
    number = lambda begin, end: torch.arange(begin, end, device=key.device)
    lead = torch.zeros((), dtype=torch.int64, device=key.device)
    for begin, n, total in zip(start[:-2], shape[:-2], whole[:-2]):
        lead = (lead.unsqueeze(-1) * total + number(begin, begin + n)).flatten()
    first, last = start[-1] // 4, (start[-1] + shape[-1] + 3) // 4
    counter = [
        number(first, last),
        number(start[-2], start[-2] + shape[-2]).view(-1, 1),
        lead.view(-1, 1, 1),
        (key[1] + offset) & MASK,
    ]
    words = philox(counter, [key[0] & MASK, (key[0] >> 32) & MASK])
    grid = lead.numel(), shape[-2], last - first
    words = torch.stack([word.expand(grid) for word in words], -1).flatten(2)
    words = words[..., start[-1] - 4 * first :][..., : shape[-1]]
    return (words - 2**31).to(torch.int32).reshape(shape[2:])


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
