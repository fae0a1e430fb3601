"""Checkpoints: exact, atomic, checked, and gone from the disk when told to."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from neuralforge.errors import CheckpointError
from neuralforge.resilience import flatten, latest, load, save, steps, unflatten


def state():
    torch.manual_seed(0)
    w = torch.randn(20, 30)
    return {"params": {"a.b": w, "tied": w, "t": w.t()}, "opt": [torch.tensor(3), torch.randn(4).to(torch.bfloat16)]}


def test_round_trip(tmp_path):
    before = state()
    folder = save(tmp_path, 7, flatten(before), {"note": [1, "two"]}, keep=None)
    tensors, metadata = load(folder)
    after = unflatten(tensors, before)
    for a, b in zip(flatten(before).items(), flatten(after).items()):
        assert a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1])
    assert metadata == {"note": [1, "two"]} and latest(tmp_path) == folder
    assert json.loads((folder / "metadata.json").read_text())["aliases"] == {"params.tied": "params.a.b"}


def test_only_the_newest_are_kept_and_a_step_can_be_saved_again(tmp_path):
    for step in (1, 2, 10, 10):
        save(tmp_path, step, {"x": torch.full((2,), float(step))}, {}, keep=2)
    assert [p.name for p in steps(tmp_path)] == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no tensors", "no metadata", "not json", "other format"])
def test_damage_is_found_and_the_previous_one_named(tmp_path, damage):
    save(tmp_path, 1, {"x": torch.zeros(100)}, {}, keep=None)
    folder = save(tmp_path, 2, {"x": torch.ones(100)}, {}, keep=None)
    tensors, metadata = folder / "tensors.safetensors", folder / "metadata.json"
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-40])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no metadata":
        metadata.unlink()
    elif damage == "not json":
        metadata.write_text("{")
    else:
        metadata.write_text(metadata.read_text().replace('"format": 1', '"format": 99'))
    expected = "format 99" if damage == "other format" else "step-00000001"
    with pytest.raises(CheckpointError, match=expected):
        load(folder)


def test_tensors_that_do_not_fit(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"a is \(2,\) torch.float32, and this run needs \(5,\)"):
        unflatten(tensors, {"a": torch.zeros(5), "b": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="c is missing"):
        unflatten(tensors, {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds b and 0 more"):
        unflatten(tensors, {"a": torch.zeros(2)})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write a checkpoint"):
        save(tmp_path / "file", 1, {"x": torch.zeros(1)}, {}, keep=None)


SAVER = """
import sys, torch
from pathlib import Path
from neuralforge.resilience import save
root, first = Path(sys.argv[1]), True
step = 1
while True:
    save(root, step, {"x": torch.full((4_000_000,), float(step))}, {}, keep=3)
    print(step, flush=True)
    step += 1
"""


def test_a_kill_in_the_middle_of_saving_loses_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        finished = int(process.stdout.readline())
    deadline = time.time() + 60
    while not list(tmp_path.glob("*.tmp-*")) and time.time() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    newest = latest(tmp_path)
    tensors, _ = load(newest)
    step = int(newest.name[5:])
    assert step >= finished and tensors["x"][0] == step == tensors["x"][-1]
    save(tmp_path, step + 1, {"x": torch.zeros(1)}, {}, keep=None)
    assert not list(tmp_path.glob("*.tmp-*")), "the next save sweeps what the killed one left"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("told_late", [False, True])
def test_full_disk(small_disk, monkeypatch, told_late):
    save(small_disk, 1, {"x": torch.zeros(250_000)}, {}, keep=None)
    if told_late:  # as when another process takes the room after we looked
        monkeypatch.setattr("neuralforge.resilience.checkpoint._check_room", lambda root, needed: None)
    with pytest.raises(CheckpointError, match=r"disk is full: a checkpoint needs 4\.0 MB and .* MB are free"):
        save(small_disk, 2, {"x": torch.zeros(1_000_000)}, {}, keep=None)
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    load(latest(small_disk))
