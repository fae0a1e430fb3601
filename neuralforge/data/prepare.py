"""From a source to ready token files, once: `prepare` keeps what it made and finds it again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from neuralforge.data.corpus import Corpus, from_path, standard_library
from neuralforge.data.files import disk_errors
from neuralforge.data.readers import stable_key
from neuralforge.data.split import Meter, Progress, Split
from neuralforge.data.tokenizer import Tokenizer
from neuralforge.data.tokens import FORMAT, HEADER, TokenFile, open_token_files, write_token_files
from neuralforge.errors import ConfigError, DataError

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


def prepare(source: str | None, folder: Path, vocab_size: int, valid_fraction: float,
            text_field: str = "text", progress: Progress | None = None) -> Dataset:
    """Tokenizer and token files of `source`, made below `folder` or found there.

    Args:
        source: a text, JSONL or parquet file, a folder of them, a folder of ready token files, or None for
            the interpreter's own standard library.
        folder: the cache; each combination of source files (name, size, time), vocabulary and versions has
            its own folder in it. Processes that prepare the same at once wait for the first.
        vocab_size: upper bound; the tokenizer's own `vocab_size` says what it came to.
        valid_fraction: the share of the text held out, in (0, 0.5].
        text_field: the JSONL field or parquet column with the text.
        progress: called with (stage, bytes done, bytes in all); the stages are "reading", "learning",
            "encoding", and "waiting" for another process.

    Raises:
        DataError: the source is missing, empty, binary or unreadable, the disk is full, the cache corrupted.
        ConfigError: vocab_size or valid_fraction is out of range.
    """
    if source is not None and (ready := Path(source).expanduser()).is_dir():
        if (ready / HEADER).exists():
            return open_dataset(ready)
        if (ready / "train.bin").exists():
            raise DataError(f"{ready} holds token files (train.bin) without their header {HEADER}. Copy it "
                            f"and tokenizer.json from where they were made, or give the text itself.")
    if not 0 < valid_fraction <= 0.5:
        raise ConfigError(f"valid_fraction is {valid_fraction}: expected a share above 0 and at most 0.5, "
                          f"such as 0.05.")
    corpus = standard_library() if source is None else from_path(Path(source).expanduser(), text_field)
    key = fingerprint(corpus, vocab_size, valid_fraction)
    folder = folder.expanduser()
    home = folder / key[:16]
    if not home.exists():
        with disk_errors(folder, lambda: corpus.size):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f".{home.name}.lock", progress):
                if not home.exists():
                    for left in folder.glob(f"{home.name}.*.partial"):  # of a process that was killed
                        shutil.rmtree(left)
                    build(corpus, home, key, vocab_size, valid_fraction, progress)
    return open_dataset(home)


def open_dataset(folder: Path) -> Dataset:
    """A folder of ready token files. Raises DataError if they aren't sound."""
    train, valid, tokenizer, source = open_token_files(folder)
    return Dataset(train, valid, tokenizer, valid.bytes_per_token, source, folder)


def fingerprint(corpus: Corpus, vocab_size: int, valid_fraction: float) -> str:
    """Changes whenever the token files would: sha256 over files, settings and versions."""
    files = [(file.name, file.size, file.mtime_ns) for file in corpus.files]
    parts = [str(corpus.root), files, corpus.text_field, vocab_size, valid_fraction, FORMAT,
             version("tokenizers"), platform.python_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build(corpus: Corpus, home: Path, key: str, vocab_size: int, valid_fraction: float,
          progress: Progress | None) -> None:
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
    write_token_files(home, parts, tokenizer, text_bytes=split.text_bytes, source=corpus.description,
                      fingerprint=key, progress=progress)


@contextlib.contextmanager
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
