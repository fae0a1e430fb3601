"""Writing so that nothing is ever half-written, also after a kill or a power cut, and saying how much room a full disk lacks."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataError, NeuralForgeError


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename lives in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """A file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes, kind: type[NeuralForgeError] = DataError) -> None:
    """`path` holds either what it held before or all of `data`, whatever happens. An error of that kind says why it can't be
    written."""
    temporary = beside(path)
    with disk_errors(path.parent, lambda: len(data), kind):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill with synced files. It takes the place of `folder` when the block ends well, and vanishes
    when not."""
    temporary = beside(folder)
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if folder.exists():  # a rename can't replace a folder
            discard(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Delete a folder; interrupted, what is left of it doesn't have its name."""
    rest = beside(folder)
    os.replace(folder, rest)
    shutil.rmtree(rest, ignore_errors=True)


def beside(path: Path) -> Path:
    """A new name for what is to become `path`, or has been it: a process that is killed leaves `<name>.tmp-*`."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left of what was to become `name`, in `folder`."""
    for path in folder.glob(f"{name}.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path, needed: Callable[[], int], kind: type[NeuralForgeError] = DataError) -> Iterator[None]:
    """Errors of writing below `folder` become errors of that kind. `needed()`: bytes in all. Whatever deletes the
    half-written is to be within, as the room that it took counts as free."""
    try:
        yield
    except BrokenPipeError:  # a terminal's
        raise
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise kind(
                f"{folder} can't be written: {e.strerror or e}. What was there is intact. Choose a writable folder."
            ) from e
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        raise kind(
            f"{folder}: the disk is full: about {needed() / 1e6:.1f} MB are needed and "
            f"{shutil.disk_usage(place).free / 1e6:.1f} MB are free. Free some room, or choose a folder on another "
            "disk. What was there is intact, and nothing half-written was left."
        ) from e
