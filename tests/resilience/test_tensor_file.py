import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuralforge.errors import CheckpointError
from neuralforge.resilience import tensor_file
from neuralforge.resilience.tensor_file import DTYPES, Damaged


def samples() -> dict[str, torch.Tensor]:
    """Every dtype, no and many dimensions, no elements, odd strides, odd sizes."""
    base = torch.arange(-7, 8).view(3, 5)
    return {
        **{name: base.abs().to(dtype) for name, dtype in DTYPES.items()},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.double().T,
        "every other": base[:, ::2],
        "repeated": torch.tensor([1.5]).expand(4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "naïve 名": torch.tensor([True]),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(torch.complex128), b.to(torch.complex128))


def test_reads_what_it_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    back = tensor_file.read(path, tensor_file.write(path, samples(), {}))
    assert back.keys() == samples().keys()
    for name, t in samples().items():
        assert same(back[name], t), name


def test_the_safetensors_library_reads_and_writes_the_same_format(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, samples(), {"format": "pt"})
    theirs = load_file(path)
    assert theirs.keys() == samples().keys()
    for name, t in samples().items():
        assert same(theirs[name], t), name
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + size) % 64 == 0
    assert json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"] == {"format": "pt"}


def test_their_file_has_our_checksums(tmp_path):
    """The checksums are of the tensors' bytes, wherever they lie."""
    tensors = {name: t.resolve_conj().resolve_neg().contiguous() for name, t in samples().items()}
    ours = tensor_file.write(tmp_path / "a", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "b", {"format": "pt"})
    with pytest.raises(Damaged, match="the header"):
        tensor_file.read(tmp_path / "b", ours)
    data = (tmp_path / "b").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    back = tensor_file.read(tmp_path / "b", ours._replace(header=zlib.crc32(header)))
    assert all(same(back[name], t) for name, t in tensors.items())


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="tensor z is torch.complex128"):
        tensor_file.write(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)}, {})


@pytest.mark.parametrize("keep", [True, False])
def test_every_damaged_byte_is_noticed(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    checksums = tensor_file.write(path, {"a": torch.arange(3.0), "b": torch.tensor([7], dtype=torch.int8)}, {})
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
        with pytest.raises(Damaged):
            tensor_file.read(path, checksums, keep)
    for i in range(len(good)):
        path.write_bytes(good[:i])
        with pytest.raises(Damaged):
            tensor_file.read(path, checksums, keep)
    path.write_bytes(good + b"\0")
    with pytest.raises(Damaged, match="goes on after the last tensor"):
        tensor_file.read(path, checksums, keep)
    path.write_bytes(good)
    assert len(tensor_file.read(path, checksums, keep)) == 2 * keep
