import errno
import os

import pytest

from neuralforge.errors import CheckpointError, DataError
from neuralforge.files import atomic_folder, clear_leftovers, disk_errors, write_atomic


@pytest.fixture
def small_disk(mounted):
    """A disk of one megabyte."""
    return mounted("small", "size=1m")


def test_a_full_disk_keeps_the_old_file(small_disk):
    path = small_disk / "a.json"
    write_atomic(path, b"old")
    with pytest.raises(DataError, match=r"small: the disk is full: about 3\.0 MB are needed and 1\.0 MB are free"):
        write_atomic(path, b"x" * 3_000_000)
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "whole"
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "b").write_text("new")
        assert (tmp_path / "out" / "a").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in (tmp_path / "out").iterdir()] == ["b"]


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    (tmp_path / "a.tmp-1").mkdir()
    (tmp_path / "a.tmp-1" / "x").touch()
    for name in ("a", "a.tmp-2", "b.tmp-3"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.tmp-3"]


def test_which_refusals_are_the_users_to_mend(tmp_path):
    with pytest.raises(DataError, match="can't be written: Not a directory"):
        (tmp_path / "file").write_text("")
        write_atomic(tmp_path / "file" / "a.json", b"")
    with pytest.raises(DataError, match="can't be written: Read-only"), disk_errors(tmp_path, lambda: 0):
        raise OSError(errno.EROFS, "Read-only file system")
    with pytest.raises(CheckpointError, match="Input/output"), disk_errors(tmp_path, lambda: 0, CheckpointError):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(BrokenPipeError), disk_errors(tmp_path, lambda: 0):
        raise BrokenPipeError
