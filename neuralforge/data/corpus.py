"""What is trained on: the interpreter's own standard library, or the user's files."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .readers import Piece, nearest, read_jsonl, read_parquet, read_text, readable

TEXT = frozenset(
    """.txt .text .md .markdown .rst .tex .org .log .html .htm .css .xml .svg .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp
    .cu .cuh .rs .go .java .kt .scala .swift .js .mjs .jsx .ts .tsx .vue .sh .bash .zsh .sql .yaml .yml .toml .ini .cfg
    .lua .rb .php .pl .r .jl .hs .ml .ex .exs .erl .clj .lisp .el .vim .lean .zig .nim .dart .cs .fs .m .f90 .asm .s .cmake
    .proto .diff .patch""".split()
)
JSONL = frozenset({".jsonl", ".ndjson"})
PARQUET = frozenset({".parquet"})

# Of the standard library: no tests, no generated tables, no machine's build settings.
NOT_SOURCES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # the path below the root, with forward slashes: equal on every machine
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """A list of files in a fixed order and how to read them; nothing of their text is kept in memory."""

    description: str
    root: Path
    files: tuple[SourceFile, ...]
    text_field: str = "text"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def pieces(self) -> Iterator[Piece]:
        """All documents in order, in pieces. Raises DataError where a file is binary, not UTF-8, unreadable, or lacks the
        field."""
        for file in self.files:
            suffix = file.path.suffix.lower()
            if suffix in JSONL:
                yield from read_jsonl(file.path, self.text_field)
            elif suffix in PARQUET:
                yield from read_parquet(file.path, self.text_field)
            else:
                yield from read_text(file.path, file.name)


def standard_library() -> Corpus:
    """The running interpreter's own library sources without its tests and tables: about 10 MB of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        name
        for name in walk(root)
        if name.endswith(".py")
        and NOT_SOURCES.isdisjoint(name.split("/"))
        and not name.startswith("_sysconfigdata")
        and not (root / name).is_symlink()
    ]
    if not names:
        raise DataError(
            f"This Python carries no sources of its standard library (looked in {root}). Give a corpus with --data "
            "PATH, or use an ordinary Python build."
        )
    return corpus_of(f"Python {platform.python_version()} standard library", root, names)


def from_path(path: Path, text_field: str = "text") -> Corpus:
    """A text, JSONL or parquet file, or all such files below a folder. Raises DataError where there is no such path, its
    extension isn't known, or the folder holds no file that can be read."""
    with readable(path):
        path = path.resolve()
        is_folder, is_file = path.is_dir(), path.is_file()
        path.stat()
    known = TEXT | JSONL | PARQUET
    if not is_folder:
        suffix = path.suffix.lower()
        if not is_file or suffix and suffix not in known:
            raise DataError(
                f"{path}: can't read a file of kind {suffix or 'special'!r}; {guess(suffix)} Give text (.txt, .md, "
                "source code), .jsonl or .parquet; rename it to .txt if it is plain text."
            )
        return corpus_of(str(path), path.parent, [path.name], text_field)
    names = list(walk(path))
    chosen = [name for name in names if Path(name).suffix.lower() in known]
    others = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    others = Counter({kind: count for kind, count in others.items() if kind not in known})
    told = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    if not chosen:
        found = f"it has {told}" if told else "it is empty"
        raise DataError(
            f"{path} holds no file that can be read ({found}). Expected text (.txt, .md, source code), .jsonl or "
            ".parquet files in it or below it."
        )
    return corpus_of(f"{path}" + (f", left out {told}" if told else ""), path, chosen, text_field)


def guess(suffix: str) -> str:
    return nearest(suffix, JSONL | PARQUET | {".txt", ".md", ".py"})


def corpus_of(description: str, root: Path, names: list[str], text_field: str = "text") -> Corpus:
    files = []
    for name in names:
        with readable(root / name):
            status = (root / name).stat()
        files.append(SourceFile(root / name, name, status.st_size, status.st_mtime_ns))
    size = sum(file.size for file in files)
    told = f"{description} ({len(files)} file{'s'[: len(files) != 1]}, {size / 1e6:.1f} MB)"
    return Corpus(told, root, tuple(files), text_field)


def walk(root: Path) -> Iterator[str]:
    """Names of the files below `root`, sorted; hidden ones and byte code are no data."""

    def refused(e: OSError) -> None:
        with readable(Path(e.filename)):
            raise e

    for folder, folders, names in os.walk(root, onerror=refused):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()
