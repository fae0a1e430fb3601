"""Safetensors files (https://github.com/huggingface/safetensors#format) with a checksum of every tensor, written and
read one tensor after the other: no second copy of the state in memory.

The library `safetensors` reads these files too; it has no checksums, and doesn't flush to the disk.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Checksums(NamedTuple):
    """CRC-32 of the header and of each tensor's bytes: 4 GB/s, where SHA-256 does 1; against accidents, not malice."""

    header: int
    tensors: dict[str, int]


class Damaged(Exception):
    """A file isn't what was written; the message says where."""


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Checksums:
    """Write `tensors` (any device and strides) to `path` and flush it to the disk. Raises CheckpointError for a dtype
    that the format lacks, and OSError."""
    header: dict[str, object] = {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stable, and keeps each aligned
    end = 0
    for name in names:
        t = tensors[name]
        if t.dtype not in NAMES:
            raise CheckpointError(f"tensor {name} is {t.dtype}, which safetensors can't hold; convert it to another dtype.")
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    checksums: dict[str, int] = {}
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = _bytes(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous())
            checksum = beside.submit(zlib.crc32, data)
            file.write(data)
            checksums[name] = checksum.result()
        file.flush()
        os.fsync(file.fileno())
    return Checksums(zlib.crc32(text), checksums)


def read(path: Path, checksums: Checksums, keep: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of `path`, on the CPU; without `keep` only verified, one at a time. Raises Damaged, OSError."""
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, path.stat().st_size))
        if zlib.crc32(text) != checksums.header:
            raise Damaged(f"{path.name}: the header doesn't have its checksum")
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            data = _bytes(tensor)
            if file.readinto(data) != data.nbytes:
                raise Damaged(f"{path.name}: the file ends within tensor {name}")
            if zlib.crc32(data) != checksums.tensors[name]:
                raise Damaged(f"{path.name}: tensor {name} doesn't have its checksum")
            if keep:
                tensors[name] = tensor
        if file.read(1):
            raise Damaged(f"{path.name}: the file goes on after the last tensor")
    return tensors


def _bytes(t: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    flat = t.as_strided((t.numel(),), (1,))  # not reshape: one element counts as contiguous whatever its stride
    return flat.view(torch.uint8).numpy()
