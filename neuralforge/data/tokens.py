"""Memory-mapped token files: `train.bin` and `valid.bin`, raw little-endian uint16 or uint32 ids, beside one header
`tokens.json` (which says what they are and how long) and the `tokenizer.json` that made them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import atomic_folder, disk_errors, write_synced
from .readers import readable
from .split import Meter, Progress, SplitName
from .tokenizer import Tokenizer

HEADER = "tokens.json"
FORMAT = 1
BATCH_BYTES = 4 << 20  # of text encoded at once: about 150 MB of the tokenizer's memory


@dataclass(frozen=True)
class TokenFile:
    """The ids of one split on disk; `array` maps them."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    count: int  # tokens
    text_bytes: int  # bytes of UTF-8 that they stand for, ends of text not counted
    documents: int
    crc32: int  # of the file

    def __len__(self) -> int:
        return self.count

    @cached_property
    def array(self) -> np.ndarray:
        """[count] ids of `dtype`, read-only, mapped: pages are read when touched."""
        return np.asarray(np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r"))

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte = nats per token / ln 2 / bytes per token."""
        return self.text_bytes / self.count

    def verify(self) -> None:
        """Reads the whole file; DataError if it isn't what was written."""
        crc = 0
        with readable(self.path), open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        if crc != self.crc32:
            raise DataError(
                f"{self.path} is corrupted: its checksum is {crc:08x}, its header {HEADER} says {self.crc32:08x}. "
                f"Delete the folder {self.path.parent} and prepare the data again."
            )


class TokenWriter:
    """Appends ids to a new file and knows its header."""

    def __init__(self, path: Path, vocab_size: int):
        self.path = path
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.count = self.text_bytes = self.documents = self.crc32 = 0
        self.file = open(path, "wb")

    def append(self, ids: list[int], text_bytes: int) -> None:
        data = np.asarray(ids, np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self.crc32 = zlib.crc32(data, self.crc32)
        self.count += len(ids)
        self.text_bytes += text_bytes
        self.file.write(data)  # last: if the disk is full, the counts tell how much is needed

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()

    def finish(self) -> TokenFile:
        """Raises OSError if the disk is full."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return TokenFile(self.path, self.dtype, self.count, self.text_bytes, self.documents, self.crc32)


def write_token_files(
    folder: Path, parts: Iterable[tuple[SplitName, str, bool]], tokenizer: Tokenizer, *, text_bytes: int, source: str,
    fingerprint: str, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Encode `parts` (split, text, whether a document ends) on all cores into a new `folder`, all or nothing. `text_bytes`
    is the UTF-8 of all parts together. Raises DataError if the disk is full or a split is empty."""
    meter = Meter(progress, "encoding", text_bytes)
    writers: dict[str, TokenWriter] = {}

    def needed() -> int:
        written = sum(writer.count * np.dtype(writer.dtype).itemsize for writer in writers.values())
        ids = written * text_bytes / meter.done if meter.done else text_bytes / 2
        return len(tokenizer.serialised) + int(ids)

    def encode(batch: list[tuple[SplitName, str, bool]]) -> None:
        for (split, text, last), ids in zip(batch, tokenizer.encode_batch([text for _, text, _ in batch])):
            size = len(text.encode())
            meter.add(size)
            writers[split].append(ids + [tokenizer.end_of_text] * last, size)
            writers[split].documents += last

    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(folder.parent, needed))
        temporary = stack.enter_context(atomic_folder(folder))
        for split in ("train", "valid"):
            writers[split] = TokenWriter(temporary / f"{split}.bin", tokenizer.vocab_size)
            stack.callback(writers[split].close)
        write_synced(temporary / "tokenizer.json", tokenizer.serialised)
        batch, size = [], 0
        for part in parts:
            batch.append(part)
            size += len(part[1])
            if size >= BATCH_BYTES:
                encode(batch)
                batch, size = [], 0
        encode(batch)
        files = {split: writer.finish() for split, writer in writers.items()}
        for split, file in files.items():
            if not file.count:
                raise DataError(
                    f"The {split} split of {source} is empty: {text_bytes} bytes of text are too few to hold some out. "
                    "Give more text."
                )
        splits = {split: dataclasses.asdict(file) for split, file in files.items()}
        for fields in splits.values():
            del fields["path"]
        header = {
            "format": FORMAT, "source": source, "fingerprint": fingerprint, "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256, "splits": splits,
        }  # fmt: skip
        write_synced(temporary / HEADER, json.dumps(header, indent=2).encode())
    meter.finish()


def open_token_files(folder: Path) -> tuple[TokenFile, TokenFile, Tokenizer, str]:
    """(train, valid, tokenizer, source) of a folder of token files. Raises DataError where a file is missing, truncated or
    corrupted, or the tokenizer isn't the one that made them."""
    mend = f"Delete the folder {folder} and prepare the data again, or copy it anew."
    try:
        with readable(folder / HEADER):
            header = json.loads((folder / HEADER).read_bytes())
        if header["format"] != FORMAT:
            raise DataError(f"{folder / HEADER} has format {header['format']}, this version reads {FORMAT}. {mend}")
        train, valid = (TokenFile(folder / f"{split}.bin", **header["splits"][split]) for split in ("train", "valid"))
        sha256, source = header["tokenizer_sha256"], header["source"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{folder / HEADER} is not a sound header ({type(e).__name__}: {e}). {mend}") from e
    for file in (train, valid):
        if file.dtype not in ("uint16", "uint32"):
            raise DataError(
                f"{folder / HEADER} gives {file.path.name} the dtype {file.dtype!r}, expected uint16 or uint32. {mend}"
            )
        with readable(file.path):
            size = file.path.stat().st_size
        if size != (expected := file.count * np.dtype(file.dtype).itemsize):
            raise DataError(
                f"{file.path} is {'truncated' if size < expected else 'too long'}: it has {size} bytes, its header "
                f"says {file.count} {file.dtype} tokens, {expected} bytes. {mend}"
            )
        file.verify()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"{folder / 'tokenizer.json'} is not the tokenizer that made the tokens beside it: its sha256 is "
            f"{tokenizer.sha256[:12]}, the header says {sha256[:12]}. {mend}"
        )
    return train, valid, tokenizer, source
