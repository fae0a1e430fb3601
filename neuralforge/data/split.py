"""What is held out for validation: never a document that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import DataError
from .corpus import Corpus
from .readers import Piece

SplitName = Literal["train", "valid"]
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


class Meter:
    """Tells `progress` of one stage, at most once a megabyte: a call a document could cost more than work."""

    def __init__(self, progress: Progress | None, stage: str, total: int):
        self.progress, self.stage, self.total = progress, stage, total
        self.done = self.told = 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress and self.done - self.told >= 1 << 20:
            self.told = self.done
            self.progress(self.stage, min(self.done, self.total), self.total)

    def finish(self) -> None:
        if self.progress:
            self.progress(self.stage, self.total, self.total)


@dataclass(frozen=True)
class Split:
    """Which text is held out for validation: the documents whose stable key lies below `threshold`; or, where documents are
    so few or so unequal that no threshold comes near `fraction`, the last part of each one."""

    fraction: float
    threshold: float | None
    text_bytes: int  # of both splits together

    @classmethod
    def of(cls, corpus: Corpus, fraction: float, progress: Progress | None = None) -> Split:
        """Reads the whole corpus once; so bad input is found here, before anything is written."""
        bins = np.zeros(1 << 16, np.int64)  # bytes of text by key
        meter = Meter(progress, "reading", corpus.size)
        for piece in corpus.pieces():
            count = len(piece.text.encode())
            bins[int(piece.key * len(bins))] += count
            meter.add(count)
        meter.finish()
        total = int(bins.sum())
        if not total:
            raise DataError(f"The corpus {corpus.description} holds no text. Give files that are not empty.")
        share = np.cumsum(bins) / total
        best = int(np.argmin(abs(share - fraction)))
        fair = abs(share[best] - fraction) <= 0.5 * fraction
        return cls(fraction, (best + 1) / len(bins) if fair else None, total)

    def parts(self, piece: Piece) -> Iterator[tuple[SplitName, str, bool]]:
        """The piece as (split, text, whether its document ends here); two parts where the cut falls."""
        if self.threshold is not None:
            yield "valid" if piece.key < self.threshold else "train", piece.text, piece.last
            return
        data = piece.text.encode()
        cut = min(max(round(piece.size * (1 - self.fraction)) - piece.start, 0), len(data))
        if 0 < cut < len(data):
            line = data.find(b"\n", cut) + 1
            cut = line if 0 < line < len(data) else cut
            while data[cut] & 0xC0 == 0x80:  # not inside a character
                cut -= 1
        if cut:
            yield "train", data[:cut].decode(), piece.last and cut == len(data)
        if cut < len(data):
            yield "valid", data[cut:].decode(), piece.last
