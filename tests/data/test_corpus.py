import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuralforge.data import from_path, standard_library
from neuralforge.errors import DataError


def test_the_standard_library_is_a_few_megabytes_of_code():
    corpus = standard_library()
    names = [file.name for file in corpus.files]
    assert 5e6 < corpus.size < 20e6
    assert names == [file.name for file in standard_library().files]
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= set(names)
    assert not any("site-packages" in name or "/test" in name or name.startswith("test") for name in names)
    text = "".join(piece.text for piece in corpus.pieces() if piece.size < 20_000)
    assert "import " in text and "def " in text


def test_a_folder_is_read_recursively_in_a_fixed_order(tmp_path):
    names = "b/two.md a.txt b/a/one.PY .git/x.txt b/.hidden.txt pic.png pic2.png LICENSE".split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "from json"}')
    corpus = from_path(tmp_path)
    assert [piece.text for piece in corpus.pieces()] == ["a.txt", "from json", "b/two.md", "b/a/one.PY"]
    assert "left out 2 .png, 1 no extension (4 files" in corpus.description


def test_one_file(tmp_path):
    (tmp_path / "notes").write_text("no extension is text")
    assert [piece.text for piece in from_path(tmp_path / "notes").pieces()] == ["no extension is text"]
    (tmp_path / "rows.jsonl").write_text('{"body": "named"}')
    assert [piece.text for piece in from_path(tmp_path / "rows.jsonl", "body").pieces()] == ["named"]


@pytest.mark.parametrize("name, says", [
    ("x.jsnl", r"of kind '\.jsnl'; did you mean '\.jsonl'\?"),
    ("x.gz", r"of kind '\.gz'; known are .*'\.parquet'"),
])
def test_an_unknown_extension(tmp_path, name, says):
    (tmp_path / name).write_text("hello")
    with pytest.raises(DataError, match=says):
        from_path(tmp_path / name)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        from_path(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no file that can be read .it is empty"):
        from_path(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="it has 1 .png"):
        from_path(tmp_path)
    with pytest.raises(DataError, match="of kind 'special'"):
        from_path(Path("/dev/null"))


def test_a_folder_that_may_not_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked can't be read: permission denied"):
        from_path(tmp_path)


def test_importing_loads_no_heavy_library():
    code = "import sys, neuralforge.data; print(*({'pyarrow', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
