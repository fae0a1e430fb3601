"""Batches of windows of a token file: any batch from (seed, step) alone, so resuming needs one integer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError
from .tokens import TokenFile

if TYPE_CHECKING:
    import torch

ROUNDS = 6


def scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 to uint64, every bit depending on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A random permutation of range(n) at `index`, one permutation a `key`; both [k] uint64. No state.

    A Feistel network over the next power of four, repeated until the value falls into the range again (cycle walking:
    Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, outside = index.copy(), np.arange(len(index))
    while len(outside):
        left, right = out[outside] >> half, out[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (scramble(key[outside] + np.uint64(turn) ^ scramble(right)) & mask)
        out[outside] = left << half | right
        outside = outside[out[outside] >= n]
    return out


def windows(tokens: TokenFile, rows: np.ndarray, context: int) -> dict[str, torch.Tensor]:
    import torch

    at = rows.astype(np.int64)[:, None] * context + np.arange(context + 1)
    return {"tokens": torch.from_numpy(tokens.array[at].astype(np.int64))}


class Sampler:
    """Training batches `{"tokens": int64 [batch / world_size, context + 1]}`, on without end.

    The text is cut into windows of `context` tokens and the one that follows (each token is a target once); every epoch
    goes through all windows once, in a new order. `batch` counts all ranks together: a rank takes its rows of the same
    global batch, so the batches don't depend on `world_size`, and a run resumes with another one.

    Raises DataError if the text is shorter than one batch, and ConfigError if `batch` can't be divided among the ranks.
    """

    def __init__(self, tokens: TokenFile, batch: int, context: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        if batch < 1 or context < 1:
            raise ConfigError(f"A batch of {batch} x {context} tokens holds nothing: both must be at least 1.")
        if world_size < 1:
            raise ConfigError(f"world_size={world_size}; expected at least 1 rank.")
        if batch % world_size or not 0 <= rank < world_size:
            raise ConfigError(
                f"Rank {rank} of {world_size} can't take its part of a batch of {batch}: the batch must be a multiple "
                f"of the number of ranks, such as {-(-batch // world_size) * world_size}."
            )
        if (needed := batch * context + 1) > tokens.count:
            room = (tokens.count - 1) // context
            longest = max(tokens.count - 1, 1) // batch or 1
            mend = f"a batch of at most {room}" if room >= 1 else f"a context of at most {longest}"
            raise DataError(
                f"The batch is longer than the text: {batch} x {context} tokens need {needed}, {tokens.path} has "
                f"{tokens.count}. Choose {mend}, or give more text."
            )
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self.rank, self.world_size = rank, world_size
        self.count = (tokens.count - 1) // context  # windows
        self.step = 0

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of `step`, whatever was drawn before."""
        share = self.batch // self.world_size
        position = step * self.batch + self.rank * share + np.arange(share, dtype=np.uint64)
        epoch, index = position // np.uint64(self.count), position % np.uint64(self.count)
        key = scramble(scramble(np.full(share, self.seed % 2**64, np.uint64)) ^ epoch)
        return windows(self.tokens, permute(index, self.count, key), self.context)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self.at(self.step)
        self.step += 1
        return batch

    @property
    def epoch(self) -> float:
        """How often the text has been gone through so far."""
        return self.step * self.batch / self.count

    def identity(self) -> dict[str, int]:
        data = {"tokens": self.tokens.count, "crc32": self.tokens.crc32}
        return {"seed": self.seed, "batch": self.batch, "context": self.context, **data}

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"step": self.step, **self.identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises DataError if the state is of other data, another seed, batch or context."""
        for name, own in self.identity().items():
            if state[name] != own:
                raise DataError(
                    f"Can't resume the data where it stopped: {name} was {state[name]}, now it is {own}. Resume with "
                    "the same data, seed, batch and context, or start a new run."
                )
        self.step = state["step"]


def validation_batches(
    tokens: TokenFile, batch: int, context: int, limit: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """The validation text in order: batches `{"tokens": int64 [batch, context + 1]}`, no window twice.

    At most `limit` batches, then spread evenly over the text. All batches have one shape (a captured step needs that):
    `batch`, or fewer where the text has fewer windows; so up to a batch of windows is left out. Raises DataError if the
    text has no whole window.
    """
    count = (tokens.count - 1) // context
    if count < 1:
        raise DataError(
            f"The validation text is shorter than one window: {tokens.path} has {tokens.count} tokens, a context of "
            f"{context} needs {context + 1}. Choose a context of at most {max(tokens.count - 1, 1)}, hold out a larger "
            "fraction, or give more text."
        )
    batch = min(batch, count)
    number = count // batch if limit is None else min(limit, count // batch)
    rows = np.arange(number * batch) * count // max(number * batch, 1)
    return (windows(tokens, rows[i * batch : (i + 1) * batch], context) for i in range(number))
