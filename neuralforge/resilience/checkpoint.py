"""Checkpoints on disk: atomic, checksummed, free of pickle.

A checkpoint is a folder `<root>/step-00000042/` with `tensors.safetensors` and `metadata.json` (the caller's metadata,
and the SHA-256 of the tensor file). It is written beside its final name, flushed to the disk, and renamed: whoever
looks sees a whole checkpoint or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import SequenceKey, tree_flatten_with_path, tree_unflatten

from ..errors import CheckpointError

FORMAT = 1
TENSORS, METADATA = "tensors.safetensors", "metadata.json"


def save(root: Path, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], keep: int | None) -> Path:
    """Write the checkpoint of `step` under `root` and return its folder; then delete all but the `keep` newest
    (None keeps all). `metadata` is anything JSON can hold.

    Raises CheckpointError if it can't be written; earlier checkpoints are untouched and nothing half-written stays.
    """
    final = root / f"step-{step:08d}"
    unique, aliases = _untie(tensors)
    needed = sum(t.numel() * t.element_size() for t in unique.values())
    folder: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=root))
        _check_room(root, needed)
        save_file({name: t.contiguous() for name, t in unique.items()}, folder / TENSORS, metadata={"format": "pt"})
        _sync(folder / TENSORS)
        record = {"format": FORMAT, "step": step, "aliases": aliases, "sha256": _digest(folder / TENSORS), "metadata": metadata}
        (folder / METADATA).write_text(json.dumps(record, indent=1))
        _sync(folder / METADATA)
        _sync(folder)
        if final.exists():  # the same step again: the rename can't replace a folder that isn't empty
            shutil.rmtree(final)
        os.replace(folder, final)
        _sync(root)
    except (OSError, SafetensorError) as e:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(_failed(root, needed, e)) from e
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for old in steps(root)[: -keep or None] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and metadata of the checkpoint in `folder`, verified.

    Raises CheckpointError for one that is missing, damaged, or of an unknown format; the message names the newest
    other checkpoint beside it.
    """
    try:
        record = json.loads((folder / METADATA).read_text())
        if record["format"] != FORMAT:
            raise CheckpointError(f"{folder}: checkpoint format {record['format']}; this version reads {FORMAT}.")
        digest = _digest(folder / TENSORS)
        if digest != record["sha256"]:
            raise ValueError(f"{TENSORS} has SHA-256 {digest[:12]}..., not {record['sha256'][:12]}... as recorded")
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder}: no checkpoint here ({Path(e.filename).name} is missing). {_others(folder)}") from e
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: the checkpoint is damaged: {e}. {_others(folder)}") from e
    tensors.update({name: tensors[source] for name, source in record["aliases"].items()})
    return tensors, record["metadata"]


def steps(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and (p / METADATA).exists()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root`; None if there is none."""
    found = steps(root)
    return found[-1] if found else None


def flatten(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of a pytree by dotted path, `params.blocks.0.up.weight`."""
    return {_path(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def unflatten(tensors: dict[str, torch.Tensor], like: Any) -> Any:
    """A pytree shaped like `like` from `flatten`'s dictionary. Raises CheckpointError where a tensor is missing, left
    over, or of another shape or dtype."""
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
        leaves.append(found)
    if left:
        raise CheckpointError(
            f"the checkpoint doesn't fit: it holds {next(iter(left))} and {len(left) - 1} more that this run has no "
            f"place for. Resume with the configuration that the checkpoint was made with."
        )
    return tree_unflatten(leaves, tree)


def _path(path: tuple) -> str:
    return ".".join(str(k.idx if isinstance(k, SequenceKey) else getattr(k, "key", k)) for k in path)


def _untie(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct tensor once, and the names of the others that are the same memory."""
    first: dict[tuple, str] = {}
    unique, aliases = {}, {}
    for name, t in tensors.items():
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = t.detach()
    return unique, aliases


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(root: Path) -> None:
    """Delete what an interrupted save left behind."""
    for leftover in root.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_room(root: Path, needed: int) -> None:
    if shutil.disk_usage(root).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failed(root: Path, needed: int, e: Exception) -> str:
    if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
        free = shutil.disk_usage(root).free
        return (
            f"{root}: the disk is full: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free. Nothing "
            f"was written and earlier checkpoints are intact. Free some space, or choose another folder with --train.out."
        )
    return f"{root}: can't write a checkpoint: {e}. Earlier checkpoints are intact. Choose a writable folder."


def _others(folder: Path) -> str:
    others = [p for p in steps(folder.parent) if p != folder]
    if not others:
        return "There is no other checkpoint beside it: start the training anew."
    return f"The newest other one is {others[-1]}: delete {folder.name} to resume from that."
