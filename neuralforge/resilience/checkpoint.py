"""Checkpoints on disk: atomic, checksummed, free of pickle.

A checkpoint is a folder `<root>/<name>/` with `tensors.safetensors` and `metadata.json` (the caller's metadata, and
checksums of everything); `<root>/latest` is a text file with the name of the newest. A checkpoint is written beside
its final name, flushed to the disk, and renamed: whoever looks sees a whole one or none, also after a kill or a power
cut. One process at a time saves under a root.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import atomic_folder, clear_leftovers, discard, disk_errors, write_atomic, write_synced
from ..graph.tree import tree_flatten_with_path, tree_unflatten
from . import tensor_file
from .tensor_file import Checksums, Damaged

FORMAT = 1
TENSORS, METADATA, LATEST = "tensors.safetensors", "metadata.json", "latest"


def save(
    root: Path, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], keep: int | None = None
) -> Path:
    """Write the checkpoint `name` under `root` and return its folder; then delete all but the `keep` newest (None
    keeps all). Tensors may be anywhere and strided; those that are the same memory are stored once, and are one
    tensor again when loaded. `metadata` is anything JSON can hold. A checkpoint of the same name is replaced.

    Raises CheckpointError if it can't be written; earlier checkpoints are untouched and nothing half-written stays.
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or ".tmp-" in name or name == LATEST:
        raise CheckpointError(f"{name!r} can't name a checkpoint; use letters, digits, '-', '_' and '.', as in step-00000042.")
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep={keep}; expected at least 1 checkpoint to keep, or None for all.")
    try:
        metadata = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"the metadata of checkpoint {name} can't be written as JSON: {e}.") from e
    unique, aliases = _untie(tensors)
    needed = sum(t.numel() * t.element_size() for t in unique.values())
    with disk_errors(root, lambda: needed, CheckpointError):
        root.mkdir(parents=True, exist_ok=True)
        clear_leftovers(root)
        if shutil.disk_usage(root).free < needed:  # don't fill a disk that others need too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_folder(root / name) as folder:
            checksums = tensor_file.write(folder / TENSORS, unique, {"format": "pt"})
            record = {
                "format": FORMAT,
                "serial": max(map(_serial, checkpoints(root)), default=0) + 1,
                "metadata": metadata,
                "aliases": aliases,
                "header": checksums.header,
                "tensors": checksums.tensors,
            }
            write_synced(folder / METADATA, json.dumps({"checksum": _checksum(record), **record}, indent=1).encode())
        write_atomic(root / LATEST, name.encode(), CheckpointError)
        for old in checkpoints(root)[:-keep] if keep else []:
            discard(old)
    return root / name


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and metadata of the checkpoint in `folder`, verified.

    Raises CheckpointError for one that is missing, damaged, or of an unknown format; the message names the file, the
    damage, and the newest good checkpoint beside it.
    """
    return _read_or_advise(folder, keep=True)


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root`, verified; None if there is none. Raises CheckpointError as `load` does if it
    is damaged: going back to an older one is for the user to decide."""
    found = checkpoints(root)
    newest = found[-1] if found else None
    try:
        named = root / (root / LATEST).read_text()
        if named != root and named.is_dir() and not _serial(named):  # damaged, so that it is not known to be the last one
            newest = named
    except (OSError, ValueError):  # deleted by hand, or the pointer is damaged
        pass
    if newest is not None:
        _read_or_advise(newest, keep=False)
    return newest


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first, not verified."""
    found = [p.parent for p in root.glob(f"*/{METADATA}") if ".tmp-" not in p.parent.name]
    return sorted(found, key=lambda p: (_serial(p), p.name))


def flatten(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of a pytree by dotted path, `params.blocks.0.up.weight`. Raises CheckpointError where a leaf isn't a
    tensor, or two have the same path."""
    tensors: dict[str, torch.Tensor] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        name = _path(path)
        if not isinstance(leaf, torch.Tensor):
            raise CheckpointError(f"the state's {name} is a {type(leaf).__name__}; expected a tensor. Put it in the metadata.")
        if name in tensors:
            raise CheckpointError(f"the state has two leaves with the path {name}; rename one of the keys.")
        tensors[name] = leaf
    return tensors


def unflatten(tensors: dict[str, torch.Tensor], like: Any) -> Any:
    """A pytree shaped like `like`, on its devices, from `flatten`'s dictionary. Raises CheckpointError where a tensor
    is missing, left over, or of another shape or dtype."""
    paths, tree = tree_flatten_with_path(like)
    left = dict(tensors)
    leaves = []
    for path, leaf in paths:
        name = _path(path)
        found = left.pop(name, None)
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            what = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise CheckpointError(
                f"the checkpoint doesn't fit: {name} is {what}, and this run needs {tuple(leaf.shape)} {leaf.dtype}. "
                f"Resume with the configuration that the checkpoint was made with."
            )
        leaves.append(found.to(leaf.device))
    if left:
        raise CheckpointError(
            f"the checkpoint doesn't fit: it holds {next(iter(left))} and {len(left) - 1} more that this run has no "
            f"place for. Resume with the configuration that the checkpoint was made with."
        )
    return tree_unflatten(leaves, tree)


def _path(path: tuple) -> str:
    """Keys of dictionaries, indices of lists, names of fields."""
    return ".".join(str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in path)


def _untie(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct tensor once, and the names of the others that are the same memory."""
    first: dict[tuple, str] = {}
    unique, aliases = {}, {}
    for name, t in tensors.items():
        key = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()) if t.numel() else (name,)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = t
    return unique, aliases


def _read(folder: Path, keep: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `load` returns; without `keep` no tensors, only verified. Raises OSError, Damaged."""
    record = _record(folder)
    tensors = tensor_file.read(folder / TENSORS, Checksums(record["header"], record["tensors"]), keep)
    if keep:
        tensors.update({name: tensors[source] for name, source in record["aliases"].items()})
    return tensors, record["metadata"]


def _read_or_advise(folder: Path, keep: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        return _read(folder, keep)
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder}: {Path(e.filename).name} is missing. {_advice(folder)}") from e
    except (OSError, Damaged) as e:
        raise CheckpointError(f"{folder}: the checkpoint can't be used: {e}. {_advice(folder)}") from e


def _advice(folder: Path) -> str:
    for other in reversed(checkpoints(folder.parent)):
        try:
            if other.name != folder.name:
                _read(other, keep=False)
                return f"The newest good one is {other}: delete {folder} to resume from that."
        except (OSError, Damaged):
            continue
    return "There is no good checkpoint beside it: start the training anew."


def _record(folder: Path) -> dict[str, Any]:
    """What `metadata.json` holds, verified."""
    try:
        record = json.loads((folder / METADATA).read_text())
        checksum, form = record.pop("checksum"), record["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Damaged(f"{METADATA}: not what a save writes ({e})") from e
    if form != FORMAT:
        raise Damaged(f"{METADATA}: format {form!r}, and this version reads {FORMAT}")
    if _checksum(record) != checksum:
        raise Damaged(f"{METADATA}: the contents don't have their checksum")
    return record


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _serial(folder: Path) -> int:
    """Position in the order of saving; 0 for a damaged checkpoint. Names and file times don't survive every copy."""
    try:
        return _record(folder)["serial"]
    except (OSError, Damaged):
        return 0
