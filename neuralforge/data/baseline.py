"""What counting alone achieves: the losses a trained model must beat."""

from __future__ import annotations

import numpy as np

from .tokens import TokenFile

CHUNK = 1 << 22  # tokens whose pairs are sorted at once: 32 MB


def unigram_loss(train: TokenFile, valid: TokenFile, vocab_size: int) -> float:
    """Nats per token of `valid` under the frequencies of `train`, one added to each count (Laplace)."""
    counts = np.ones(vocab_size)
    for chunk in chunks(train.array):
        counts += np.bincount(chunk, minlength=vocab_size)
    cost = -np.log(counts / counts.sum())
    return float(sum(cost[chunk].sum() for chunk in chunks(valid.array)) / valid.count)


def bigram_loss(train: TokenFile, valid: TokenFile, vocab_size: int) -> float:
    """Nats per token of `valid` given the token before, under an interpolated Kneser-Ney model of `train`.

    p(b | a) = max(c(ab) - D, 0) / c(a) + D n(a) / c(a) q(b), where n(a) counts the distinct followers of a, and q(b) is the
    share of distinct pairs that end in b, one added. The discount D is n1 / (n1 + 2 n2), from how many pairs occur once and
    twice (Ney, Essen and Kneser 1994, https://doi.org/10.1006/csla.1994.1001). Memory goes with the distinct pairs, not
    with the vocabulary squared.
    """
    pairs, counts = count_pairs(train.array, vocab_size)
    first, second = pairs // vocab_size, pairs % vocab_size
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5
    total = np.bincount(first, counts, vocab_size)
    followers = np.bincount(first, minlength=vocab_size)
    ends = np.bincount(second, minlength=vocab_size) + 1.0
    back_off = ends / ends.sum()
    held = np.where(total > 0, discount * followers / np.maximum(total, 1), 1.0)  # mass left to the back-off

    targets, weights = count_pairs(valid.array, vocab_size)
    a, b = targets // vocab_size, targets % vocab_size
    at = np.minimum(np.searchsorted(pairs, targets), len(pairs) - 1)
    seen = np.where(pairs[at] == targets, counts[at] - discount, 0.0)
    chance = seen / np.maximum(total[a], 1) + held[a] * back_off[b]
    return float(-(weights * np.log(chance)).sum() / weights.sum())


def chunks(tokens: np.ndarray):
    return (tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK))


def count_pairs(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct neighbours as a * vocab_size + b, sorted, and how often each occurs; both [pairs] int64."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for i in range(0, len(tokens) - 1, CHUNK):
        chunk = tokens[i : i + CHUNK + 1].astype(np.int64)
        new, new_counts = np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)
        both, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        summed = np.bincount(where, np.concatenate([counts, new_counts]), len(both))
        pairs, counts = both, summed.astype(np.int64)
    return pairs, counts
