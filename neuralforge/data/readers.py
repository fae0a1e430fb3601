"""Read documents from text, JSONL and parquet files, a piece at a time, and say where a file is bad."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

PIECE_BYTES = 64 * 1024  # small enough that a batch of pieces keeps every core of the tokenizer busy
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """A stretch of one document. `key` in [0, 1) is the document's own and decides its split; `start` and `size` (bytes of
    UTF-8) say where the piece begins and how long the whole document is."""

    key: float
    text: str
    start: int
    size: int
    last: bool


def stable_key(content: bytes) -> float:
    """A number in [0, 1) that depends on `content` only: equal on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "little") / 2**48


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to read `path` into a DataError."""
    try:
        yield
    except PermissionError as e:
        raise DataError(
            f"{path} can't be read: permission denied. Make it readable (chmod +r) or leave it out of the data."
        ) from e
    except FileNotFoundError as e:
        raise DataError(f"{path} does not exist. Check the spelling of the path.") from e
    except OSError as e:
        raise DataError(
            f"{path} can't be read: {e.strerror or e}. Check the disk, or leave the file out of the data."
        ) from e


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest spelling in `known`, or else all of it."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(map(repr, known)) or 'none'}."


def decode(data: bytes, path: Path, offset: int) -> str:
    """`data`, which begins at byte `offset` of `path`, as text; DataError if it is binary or not UTF-8."""
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path} is a binary file: byte {offset + nul} is NUL. Expected UTF-8 text; leave the file out, or convert "
            "it (UTF-16: iconv -f utf-16 -t utf-8)."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8: byte {offset + e.start} is 0x{data[e.start]:02x}. Convert it (iconv -f latin1 -t "
            "utf-8), or leave it out of the data."
        ) from e


def read_text(path: Path, name: str) -> Iterator[Piece]:
    """The file as one document, in pieces that end with a line where lines are not enormous."""
    key = stable_key(name.encode())
    with readable(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset, rest = 0, b""
        while block := file.read(PIECE_BYTES):
            data = rest + block
            last = offset + len(data) >= size
            end = len(data) if last else line_end(data)
            data, rest = data[:end], data[end:]
            start, offset = offset, offset + end
            text = decode(data.removeprefix(BYTE_ORDER_MARK) if start == 0 else data, path, start)
            if text:
                yield Piece(key, text, start, size, last)


def line_end(data: bytes) -> int:
    """Where to cut: behind the last newline or, inside one long line, before a character that may go on."""
    if end := data.rfind(b"\n") + 1:
        return end
    return len(data) - next((i for i in (1, 2, 3) if data[-i] >= 0xC0), 0)


def read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """A document a line: the string in `field`. Blank lines and nulls are no documents."""
    with readable(path), open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            text = decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as e:
                raise DataError(
                    f"{path}:{number}: not JSON at column {e.colno}: {e.msg}. JSONL holds one JSON object a line."
                ) from e
            yield from whole(json_field(record, field, f"{path}:{number}"), f"{path}:{number}")


def json_field(record: object, field: str, where: str) -> str | None:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: expected a JSON object with the field {field!r}, got {type(record).__name__}. JSONL holds one "
            "JSON object a line."
        )
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; {nearest(field, record)} Name the field that holds the text.")
    if not isinstance(record[field], str | None):
        raise DataError(
            f"{where}: the field {field!r} holds {type(record[field]).__name__}, expected a string. Name the field "
            "that holds the text."
        )
    return record[field]


def read_parquet(path: Path, column: str) -> Iterator[Piece]:
    """A document a row of a string column; one row group in memory at a time. Nulls are no documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(path):
        try:
            with pq.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    known = nearest(column, file.schema_arrow.names)
                    raise DataError(f"{path}: no column {column!r}; {known} Name the column with the text.")
                kind = file.schema_arrow.field(column).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if kind not in (pa.string(), pa.large_string(), pa.string_view()):
                    raise DataError(
                        f"{path}: the column {column!r} holds {kind}, expected strings. Name the column that holds the "
                        "text."
                    )
                row = 0
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield from whole(text, f"{path} row {row}")
        except (pa.ArrowException, UnicodeDecodeError) as e:
            raise DataError(
                f"{path} is not a sound parquet file: {str(e).rstrip('.')}. Write or download it again."
            ) from e


def whole(text: str | None, where: str) -> Iterator[Piece]:
    """A document that is all in memory; none if it is empty. Equal texts share a key, hence a split."""
    if not text:
        return
    try:
        data = text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: character {e.start} is half of a surrogate pair (\\u{ord(text[e.start]):04x}), which is no "
            "text. Remove it or pair it."
        ) from e
    yield Piece(stable_key(data), text, 0, len(data), True)
