import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralforge.data import readers
from neuralforge.data.readers import read_jsonl, read_parquet, read_text, readable, stable_key
from neuralforge.errors import DataError


def texts(pieces) -> list[str]:
    return [piece.text for piece in pieces]


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")), size=st.integers(4, 40))
def test_text_comes_back_whole_from_pieces(text, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", size)
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        pieces = list(read_text(path, "a.txt"))
    assert "".join(texts(pieces)) == text.removeprefix("\ufeff")
    assert len({piece.key for piece in pieces}) <= 1
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    for piece, after in zip(pieces, pieces[1:]):
        mark = 3 if piece.start == 0 and text.startswith("\ufeff") else 0
        assert after.start == piece.start + len(piece.text.encode()) + mark


def test_pieces_end_with_lines(tmp_path):
    lines = [f"line {i} " + "x" * (i % 97) for i in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    pieces = list(read_text(tmp_path / "a.txt", "a.txt"))
    assert len(pieces) > 2 and all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_the_key_is_the_same_everywhere():
    assert stable_key(b"json/decoder.py") == 0.8323167398115849
    assert 0 <= min(stable_key(bytes([i])) for i in range(256)) < 0.05
    assert 0.95 < max(stable_key(bytes([i])) for i in range(256)) < 1


@pytest.mark.parametrize("data, says", [
    (b"x" * 100_000 + b"\n\0y", r"a\.txt is a binary file: byte 100001 is NUL"),
    ("caf\u00e9".encode("latin1"), r"a\.txt is not UTF-8: byte 3 is 0xe9"),
    (b"\n" * 70_000 + b"\xff", r"byte 70000 is 0xff"),
    ("hello".encode("utf-16"), r"binary file: byte 3 is NUL.*utf-16"),
    (b"abc\xe2\x82", r"byte 3 is 0xe2"),  # a character that ends too early
])
def test_what_is_no_text_is_refused_with_its_place(tmp_path, data, says):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=says):
        list(read_text(tmp_path / "a.txt", "a.txt"))


def test_jsonl(tmp_path):
    lines = ['{"text": "one"}', "", '{"text": null}', '{"text": ""}', '{"text": "tw\\u00f6\\n"}']
    path = jsonl(tmp_path, *lines)
    pieces = list(read_jsonl(path, "text"))
    assert texts(pieces) == ["one", "twö\n"]
    assert all(piece.last and piece.start == 0 for piece in pieces) and pieces[1].size == 5


@pytest.mark.parametrize("line, says", [
    ('{"txt": "a"}', r"rows\.jsonl:2: no field 'text'; did you mean 'txt'\?"),
    ('{"title": 1, "id": 2}', r"rows\.jsonl:2: no field 'text'; known are 'id', 'title'"),
    ('{"text": 5}', r"rows\.jsonl:2: the field 'text' holds int, expected a string"),
    ('["a"]', r"rows\.jsonl:2: expected a JSON object with the field 'text', got list"),
    ('{"text": "a"', r"rows\.jsonl:2: not JSON at column"),
    ('{"text": "\\ud800"}', r"rows\.jsonl:2: character 0 is half of a surrogate pair \(\\ud800\)"),
])
def test_a_bad_line_is_named(tmp_path, line, says):
    path = jsonl(tmp_path, '{"text": "fine"}', line)
    with pytest.raises(DataError, match=says):
        list(read_jsonl(path, "text"))


def test_jsonl_that_is_binary_names_the_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"text": "a"}).encode() + b"\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8: byte 14 is 0xff"):
        list(read_jsonl(path, "text"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    rows = [f"row {i}" for i in range(3000)]
    table = pa.table({"n": range(3002), "body": pa.array([*rows, None, ""]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(read_parquet(tmp_path / "a.parquet", "body")) == rows


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2], "txt": ["a", "b"]}), path)
    with pytest.raises(DataError, match="no column 'tex'; did you mean 'text'"):
        list(read_parquet(path, "tex"))
    with pytest.raises(DataError, match="column 'text' holds int64, expected strings"):
        list(read_parquet(path, "text"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet is not a sound parquet file"):
        list(read_parquet(path, "txt"))


def test_equal_documents_share_a_key(tmp_path):
    pieces = list(read_jsonl(jsonl(tmp_path, '{"text": "same"}', '{"id": 1, "text": "same"}'), "text"))
    assert pieces[0].key == pieces[1].key


def test_permission_denied():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders shut other users out
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret.txt"
        path.write_text("hidden")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # whom no permission stops
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"secret\.txt can't be read: permission denied.*chmod"):
                list(read_text(path, "secret.txt"))
        finally:
            os.seteuid(user)


def test_the_operating_systems_refusals_become_errors(tmp_path):
    with pytest.raises(DataError, match="nowhere.txt does not exist"):
        list(read_text(tmp_path / "nowhere.txt", "nowhere.txt"))
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(read_text(tmp_path, "x"))
    with pytest.raises(DataError, match="Input/output error"), readable(tmp_path):
        raise OSError(5, "Input/output error")
