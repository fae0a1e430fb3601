import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import register_dataclass

from neuralforge.errors import CheckpointError
from neuralforge.resilience import checkpoint, checkpoints, flatten, latest, load, save, unflatten


def state(value: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(value)), "step": torch.tensor(int(value))}


def fill(root: Path, count: int = 3) -> list[Path]:
    return [save(root, f"step-{i}", state(i), {"step": i}) for i in range(1, count + 1)]


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed meanwhile
        return 0


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_loads_what_was_saved(tmp_path):
    metadata = {"step": 3, "loss": 0.1, "none": None, "nested": [{"a": [1, 2]}], "name": "naïve", "nan": float("inf")}
    tensors = {"a.b": torch.randn(5, 7).T, "flag": torch.tensor(True), "none": torch.empty(0)}
    folder = save(tmp_path / "new" / "root", "step-3", tensors, metadata)
    assert folder == tmp_path / "new" / "root" / "step-3" == latest(tmp_path / "new" / "root")
    back, back_metadata = load(folder)
    assert back_metadata == metadata
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert names(folder) == ["metadata.json", "tensors.safetensors"]


def test_shared_memory_is_stored_once_and_shared_again(tmp_path):
    a = torch.randn(1000)
    tensors = {"a": a, "tied": a.view(1000), "part": a[:500], "turned": a.view(10, 100), "none": a[:0], "nil": a[:0]}
    folder = save(tmp_path, "x", tensors, {})
    assert (folder / "tensors.safetensors").stat().st_size < 4000 + 2000 + 4000 + 1000
    back, _ = load(folder)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors) and back.keys() == tensors.keys()
    assert back["a"].data_ptr() == back["tied"].data_ptr() != back["turned"].data_ptr()


def test_a_conjugate_is_not_the_same_tensor(tmp_path):
    z = torch.tensor([1 + 2j])
    back, _ = load(save(tmp_path, "x", {"z": z, "conjugate": z.conj()}, {}))
    assert torch.equal(back["z"], z) and torch.equal(back["conjugate"], z.conj())


def test_keep_deletes_the_oldest_saved(tmp_path):
    for i in (5, 30, 4, 200, 10):  # the order of saving counts: not the number, nor the alphabet
        save(tmp_path, f"step-{i}", state(i), {}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-4", "step-200", "step-10"]
    assert names(tmp_path) == ["latest", "step-10", "step-200", "step-4"]
    assert latest(tmp_path).name == (tmp_path / "latest").read_text() == "step-10"


def test_order_survives_a_copy_that_loses_times_and_the_pointer(tmp_path):
    fill(tmp_path / "a", 11)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    (tmp_path / "b" / "latest").unlink()
    for i in range(1, 12):
        os.utime(tmp_path / "b" / f"step-{i}" / "metadata.json", (100 - i, 100 - i))
    assert [p.name for p in checkpoints(tmp_path / "b")] == [f"step-{i}" for i in range(1, 12)]
    assert latest(tmp_path / "b").name == "step-11"


@pytest.mark.parametrize("pointer", [b"\xff", b"", b"step-", b"\0" * 6, b"x" * 5000, None])
def test_a_damaged_pointer_counts_as_none(tmp_path, pointer):
    fill(tmp_path)
    (tmp_path / "latest").unlink()
    if pointer is None:
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").write_bytes(pointer)
    assert latest(tmp_path).name == "step-3"


def test_a_pointer_to_an_older_one_counts_as_damaged(tmp_path):
    """One bit from step-3; or a process was killed before it wrote the pointer."""
    fill(tmp_path)
    (tmp_path / "latest").write_text("step-2")
    assert latest(tmp_path).name == "step-3"


def test_the_same_name_again_replaces(tmp_path):
    fill(tmp_path)
    folder = save(tmp_path, "step-2", state(9), {"again": True}, keep=2)
    assert load(folder)[0]["step"] == 9 and latest(tmp_path) == folder
    assert names(tmp_path) == ["latest", "step-2", "step-3"]


def test_none(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "no") is None and checkpoints(tmp_path / "no") == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "a.tmp-1", "latest", "a\n"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(CheckpointError, match="can't name a checkpoint"):
        save(tmp_path, name, state(1), {})
    assert names(tmp_path) == []


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match="metadata of checkpoint x can't be written as JSON: .*Path"):
        save(tmp_path, "x", state(1), {"path": tmp_path})
    with pytest.raises(CheckpointError, match="tensor z is torch.complex128"):
        save(tmp_path, "x", {"z": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(CheckpointError, match="keep=0"):
        save(tmp_path, "x", state(1), {}, keep=0)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "tensors.safetensors", -9), "tensors.safetensors: tensor .* doesn't have its checksum"),
        (lambda f: flip(f / "tensors.safetensors", 20), "tensors.safetensors: the header doesn't"),
        (lambda f: os.truncate(f / "tensors.safetensors", 500), "tensors.safetensors: the file ends within tensor weight"),
        (lambda f: (f / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
        (lambda f: (f / "metadata.json").write_text(""), "metadata.json: not what a save writes"),
        (lambda f: (f / "metadata.json").write_bytes(b"\xff"), "metadata.json: not what a save writes"),
        (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json: not what a save writes"),
        (lambda f: (f / "metadata.json").write_text("[" * 100_000), "metadata.json: not what a save writes"),
        (lambda f: (f / "metadata.json").unlink(), "metadata.json is missing"),
        (
            lambda f: (f / "metadata.json").write_text((f / "metadata.json").read_text().replace('"step": 3', '"step": 4')),
            "metadata.json: the contents don't have their checksum",
        ),
        (
            lambda f: (f / "metadata.json").write_text((f / "metadata.json").read_text().replace('"format": 1', '"format": 9')),
            "metadata.json: format 9, and this version reads 1",
        ),
    ],
)
def test_damage_is_named_and_the_last_good_one_too(tmp_path, damage, message):
    one, two, three = fill(tmp_path)
    flip(two / "tensors.safetensors", -1)
    damage(three)
    for attempt in (lambda: load(three), lambda: latest(tmp_path)):
        with pytest.raises(CheckpointError, match=message) as e:
            attempt()
        assert str(e.value).startswith(f"{three}: ")
        assert str(e.value).endswith(f"The newest good one is {one}: delete {three} to resume from that.")
    shutil.rmtree(three)
    with pytest.raises(CheckpointError, match=re.escape(f"{two}: ")):
        latest(tmp_path)
    shutil.rmtree(two)
    assert latest(tmp_path) == one
    flip(one / "tensors.safetensors", -1)
    with pytest.raises(CheckpointError, match="no good checkpoint beside it: start the training anew"):
        latest(tmp_path)


def test_saving_goes_on_beside_a_damaged_one(tmp_path):
    _, two, three = fill(tmp_path)
    flip(three / "metadata.json", 40)
    four = save(tmp_path, "step-4", state(4), {}, keep=2)
    assert latest(tmp_path) == four and checkpoints(tmp_path) == [two, four]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from neuralforge.resilience import save

root = Path(sys.argv[1])
at = {"fsync": os.fsync, "replace": os.replace}

def fatal(stage):
    count = 0
    def counted(name):
        def call(*args):
            nonlocal count
            count += 1
            if count == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            return at[name](*args)
        return call
    os.fsync, os.replace = counted("fsync"), counted("replace")

torch.set_num_threads(1)
save(root / "none", "old", {"weight": torch.full((1000,), 1.0)}, {})
for stage in range(1, 100):
    folder = root / str(stage)
    save(folder, "old", {"weight": torch.full((1000,), 1.0)}, {})
    child = os.fork()
    if not child:
        fatal(stage)
        save(folder, "new", {"weight": torch.full((100_000,), 2.0)}, {}, keep=1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        print(stage)
        break
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Killed before each flush and each rename of a save that replaces the only checkpoint."""
    out = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    stages = int(out.stdout)
    assert stages > 7
    found = []
    for stage in range(1, stages + 1):
        root = tmp_path / str(stage)
        newest = latest(root)
        assert load(newest)[0]["weight"].unique().tolist() == [{"old": 1.0, "new": 2.0}[newest.name]]
        found.append((newest.name, any(".tmp-" in name for name in names(root))))
        save(root, "next", state(3), {}, keep=1)
        assert names(root) == ["latest", "next"]
    assert found[0] == ("old", True) and found[-1] == ("new", False)


SAVES_ON_AND_ON = """
import sys, torch
from pathlib import Path
from neuralforge.resilience import save
for i in range(1, 1000):
    save(Path(sys.argv[1]), f"step-{i}", {k: torch.full((4_000_000,), float(i)) for k in "abc"}, {"step": i}, keep=2)
    print(i, flush=True)
"""


def test_a_kill_in_the_middle_of_writing(tmp_path):
    """A real process, killed while the tensor file grows: no finished checkpoint is lost."""
    child = subprocess.Popen([sys.executable, "-c", SAVES_ON_AND_ON, tmp_path], stdout=subprocess.PIPE, text=True)
    with child:
        finished = [int(child.stdout.readline()) for _ in range(2)][-1]
        while not any(size(p) > 10_000_000 for p in tmp_path.glob("*.tmp-*/tensors.safetensors")):
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
    tensors, metadata = load(latest(tmp_path))
    assert metadata["step"] >= finished
    assert all(t.unique().tolist() == [metadata["step"]] for t in tensors.values())
    save(tmp_path, "next", state(3), {}, keep=1)
    assert names(tmp_path) == ["latest", "next"]


def test_everything_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    """What a power cut leaves depends on this order alone."""
    did = []
    fsync, replace = os.fsync, os.replace
    short = lambda path: re.sub(r"\.tmp-\w+", ".tmp", str(Path(path).relative_to(tmp_path)))
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append(short(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append(f"-> {short(b)}"), replace(a, b)))
    save(tmp_path, "x", state(1), {})
    assert did == [
        "x.tmp/tensors.safetensors", "x.tmp/metadata.json", "x.tmp", "-> x", ".", "latest.tmp", "-> latest", ".",
    ]  # fmt: skip


@pytest.fixture
def small_disk(mounted):
    """A file system of 2 MB."""
    return mounted("disk", "size=2M")


@pytest.mark.parametrize("foreseen", [True, False])
def test_disk_full(small_disk, monkeypatch, foreseen):
    """Too large for the disk from the start, and filled up meanwhile."""
    old = save(small_disk, "old", state(1, 100_000), {})
    usage = shutil.disk_usage(small_disk)
    if not foreseen:
        real, answers = shutil.disk_usage, [usage._replace(free=10**9)]
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: answers.pop() if answers else real(p))
    with pytest.raises(CheckpointError, match=r"the disk is full: about 2\.0 MB are needed and 1\.[67] MB are free"):
        save(small_disk, "new", state(2, 500_000), {}, keep=1)
    assert names(small_disk) == ["latest", "old"] and latest(small_disk) == old
    assert load(old)[0]["weight"].unique().tolist() == [1.0]
    monkeypatch.undo()
    assert shutil.disk_usage(small_disk).free == usage.free
    assert latest(small_disk) == old
    save(small_disk, "fits", state(2, 200_000), {}, keep=1)
    assert names(small_disk) == ["fits", "latest"]


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written.*Choose a writable folder"):
        save(tmp_path / "file", "x", state(1), {})


@dataclass
class Moments:
    mean: torch.Tensor
    square: torch.Tensor


register_dataclass(Moments)


def tree() -> dict:
    return {
        "params": {"blocks.0.up.weight": torch.ones(2), "b": [torch.zeros(3), (torch.tensor(1),)]},
        "optimizer": Moments(torch.ones(1), torch.zeros(1)),
    }


def test_a_state_comes_back(tmp_path):
    w = torch.randn(20, 30)
    before = {"params": {"a.b": w, "tied": w, "turned": w.T}, "moments": [torch.tensor(3), torch.randn(4).bfloat16()]}
    tensors, _ = load(save(tmp_path, "x", flatten(before), {}))
    after = flatten(unflatten(tensors, before))
    for name, t in flatten(before).items():
        assert after[name].dtype == t.dtype and torch.equal(after[name], t), name


def test_trees():
    flat = flatten(tree())
    assert sorted(flat) == [
        "optimizer.mean", "optimizer.square", "params.b.0", "params.b.1.0", "params.blocks.0.up.weight",
    ]  # fmt: skip
    back = unflatten(flat, tree())
    assert flatten(back).keys() == flat.keys() and isinstance(back["optimizer"], Moments)
    assert all(a is b for a, b in zip(flatten(back).values(), flat.values()))


def test_trees_that_do_not_fit():
    flat = flatten(tree())
    with pytest.raises(CheckpointError, match="params.b.0 is missing"):
        unflatten({k: v for k, v in flat.items() if k != "params.b.0"}, tree())
    with pytest.raises(CheckpointError, match=r"optimizer.mean is \(2,\) torch.float32, and this run needs \(1,\)"):
        unflatten(flat | {"optimizer.mean": torch.ones(2)}, tree())
    with pytest.raises(CheckpointError, match=r"this run needs \(1,\) torch.float32"):
        unflatten(flat | {"optimizer.mean": torch.ones(1).double()}, tree())
    with pytest.raises(CheckpointError, match="holds x and 0 more"):
        unflatten(flat | {"x": torch.ones(2)}, tree())
    with pytest.raises(CheckpointError, match="two leaves with the path a.b"):
        flatten({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})
    with pytest.raises(CheckpointError, match="the state's step is a int"):
        flatten({"step": 3})


def test_metadata_is_readable(tmp_path):
    folder = save(tmp_path, "x", state(7), {"step": 7})
    assert json.loads((folder / "metadata.json").read_text())["metadata"] == {"step": 7}
