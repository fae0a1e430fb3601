"""Write so that nothing is ever half-written, and say how much room is needed where a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from neuralforge.errors import DataError


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: a rename lives in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(folder: Path, needed: Callable[[], int], unfinished: Path | None = None) -> Iterator[None]:
    """Turns a full disk or a refusal to write below `folder` into a DataError. `needed()`: bytes in all;
    what `unfinished` holds is about to be removed, so it counts as free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            held = sum(p.stat().st_size for p in unfinished.iterdir()) if unfinished else 0
            place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            raise DataError(f"The disk of {folder} is full: about {megabytes(needed())} are needed and "
                            f"{megabytes(shutil.disk_usage(place).free + held)} are free. Free some room or "
                            f"choose a folder on another disk; nothing half-written was left.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{folder} can't be written: {error.strerror}. Choose a folder that you may "
                            f"write to.") from error
        raise


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def write_synced(path: Path, data: bytes) -> None:
    """A file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """`path` holds either what it held before or all of `data`, whatever happens. Raises DataError if the
    disk is full or refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path.parent, lambda: len(data)):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` when the block ends well and vanishes when not.

    The caller syncs the files. `folder` must not exist, or be empty; its parent must exist.
    """
    temporary = Path(f"{folder}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
