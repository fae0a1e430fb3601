"""From a source to ready token files, once: `prepare` keeps what it made and finds it again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..errors import ConfigError, DataError
from ..files import clear_leftovers, disk_errors
from .corpus import Corpus, from_path, standard_library
from .readers import stable_key
from .split import Meter, Progress, Split
from .tokenizer import Tokenizer
from .tokens import FORMAT, HEADER, TokenFile, open_token_files, write_token_files

TOKENIZER_BYTES = 200_000_000  # of text are plenty to learn merges from


@dataclass(frozen=True)
class Dataset:
    """Text ready to train on. `bytes_per_token` is the validation split's, for bits per byte."""

    train: TokenFile
    valid: TokenFile
    tokenizer: Tokenizer
    bytes_per_token: float
    source: str
    folder: Path


def prepare(
    source: str | None, folder: Path, vocab_size: int, valid_fraction: float, text_field: str = "text",
    progress: Progress | None = None,
) -> Dataset:  # fmt: skip
    """Tokenizer and token files of `source`, made below `folder` or found there.

    `source` is a text, JSONL or parquet file, a folder of them, a folder of ready token files, or None for the
    interpreter's own standard library; `text_field` the JSONL field or parquet column with the text. Each combination of
    source files (name, size, time), vocabulary and versions has its own folder below `folder`; processes that prepare the
    same at once wait for the first. `vocab_size` is an upper bound; the tokenizer's own says what it came to.
    `valid_fraction` is the share of the text held out, in (0, 0.5]. `progress` is called with (stage, bytes done, bytes in
    all); the stages are "reading", "learning", "encoding", and "waiting" for another process.

    Raises DataError where the source is missing, empty, binary or unreadable, the disk is full or the cache corrupted, and
    ConfigError where vocab_size or valid_fraction is out of range.
    """
    if source is not None and (ready := Path(source).expanduser()).is_dir():
        if (ready / HEADER).exists():
            return open_dataset(ready)
        if (ready / "train.bin").exists():
            raise DataError(
                f"{ready} holds token files (train.bin) without their header {HEADER}. Copy it and tokenizer.json from "
                "where they were made, or give the text itself."
            )
    if not 0 < valid_fraction <= 0.5:
        raise ConfigError(
            f"valid_fraction is {valid_fraction}: expected a share above 0 and at most 0.5, such as 0.05."
        )
    corpus = standard_library() if source is None else from_path(Path(source).expanduser(), text_field)
    key = fingerprint(corpus, vocab_size, valid_fraction)
    folder = folder.expanduser()
    home = folder / key[:16]
    if not home.exists():
        with disk_errors(folder, lambda: corpus.size):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f".{home.name}.lock", progress):
                if not home.exists():
                    clear_leftovers(folder, home.name)
                    build(corpus, home, key, vocab_size, valid_fraction, progress)
    return open_dataset(home)


def open_dataset(folder: Path) -> Dataset:
    """A folder of ready token files. Raises DataError if they aren't sound."""
    train, valid, tokenizer, source = open_token_files(folder)
    return Dataset(train, valid, tokenizer, valid.bytes_per_token, source, folder)


def fingerprint(corpus: Corpus, vocab_size: int, valid_fraction: float) -> str:
    """Changes whenever the token files would: sha256 over files, settings and versions."""
    files = [(file.name, file.size, file.mtime_ns) for file in corpus.files]
    parts = [
        str(corpus.root),
        files,
        corpus.text_field,
        vocab_size,
        valid_fraction,
        FORMAT,
        version("tokenizers"),
        platform.python_version(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build(
    corpus: Corpus, home: Path, key: str, vocab_size: int, valid_fraction: float, progress: Progress | None
) -> None:
    split = Split.of(corpus, valid_fraction, progress)
    sample = min(1.0, TOKENIZER_BYTES / split.text_bytes)

    def training_text() -> Iterator[str]:
        meter = Meter(progress, "learning", split.text_bytes)
        for piece in corpus.pieces():
            for name, text, _ in split.parts(piece):
                meter.add(len(text))
                # The tokenizer never sees held-out text. Of a large corpus it sees an even sample.
                if name == "train" and (sample == 1 or stable_key(text.encode()) < sample):
                    yield text
        meter.finish()

    tokenizer = Tokenizer.train(training_text(), vocab_size)
    parts = (part for piece in corpus.pieces() for part in split.parts(piece))
    write_token_files(
        home,
        parts,
        tokenizer,
        text_bytes=split.text_bytes,
        source=corpus.description,
        fingerprint=key,
        progress=progress,
    )


@contextmanager
def locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress("waiting", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
