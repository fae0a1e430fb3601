import json
import os
import subprocess
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuralforge.data import open_dataset, prepare
from neuralforge.errors import ConfigError, DataError

WORDS = "the cat sat on a mat and looked at some other cats that ran over there".split()


def document(i: int) -> str:
    return " ".join(WORDS[j] for j in np.random.default_rng(i).integers(0, len(WORDS), 60)) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A folder of 200 text files."""
    root = tmp_path / "text"
    root.mkdir()
    for i in range(200):
        (root / f"{i}.txt").write_text(document(i))
    return root


def tree(folder):
    """Everything below the folder but lock files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock")


def test_the_default_corpus(tmp_path):
    stages = []
    data = prepare(None, tmp_path, 4096, 0.05, progress=lambda *told: stages.append(told))
    assert [stage for stage, done, total in stages if done == total] == ["reading", "learning", "encoding"]
    assert "standard library" in data.source and data.tokenizer.vocab_size == 4096
    assert data.train.text_bytes > 5e6 and 0.03 < data.valid.text_bytes / data.train.text_bytes < 0.08
    assert data.bytes_per_token == data.valid.bytes_per_token > 1.5
    assert "import" in data.tokenizer.decode(data.train.array[:3000])
    assert int(data.train.array.max()) < 4096


def test_all_formats_give_the_same_text(folder, tmp_path):
    texts = [document(i) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=50)
    for source in (folder, tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        data = prepare(str(source), tmp_path / "cache", 300, 0.1, text_field="body")
        got = data.tokenizer.decode(data.train.array) + data.tokenizer.decode(data.valid.array)
        assert sorted(got.split("<|endoftext|>")) == sorted([*texts, ""])
        assert 10 < data.valid.documents < 30 and data.train.documents + data.valid.documents == 200


def test_it_is_made_once(folder, tmp_path):
    first = prepare(str(folder), tmp_path / "cache", 300, 0.1)
    made = os.stat(first.folder / "train.bin")
    again = prepare(str(folder), tmp_path / "cache", 300, 0.1)
    assert os.stat(again.folder / "train.bin") == made
    ready = prepare(str(first.folder), tmp_path / "unused", 9999, 0.1)  # token files are used as they are
    assert np.array_equal(ready.train.array, first.train.array) and not (tmp_path / "unused").exists()
    assert open_dataset(first.folder).source == first.source


@pytest.mark.parametrize("change", ["file", "vocabulary", "fraction", "field"])
def test_a_change_makes_it_anew(folder, tmp_path, change):
    first = prepare(str(folder), tmp_path / "cache", 300, 0.1)
    if change == "file":
        (folder / "3.txt").write_text("other\n")
    vocab_size = 301 if change == "vocabulary" else 300
    fraction = 0.2 if change == "fraction" else 0.1
    field = "body" if change == "field" else "text"
    again = prepare(str(folder), tmp_path / "cache", vocab_size, fraction, field)
    assert again.folder != first.folder


def test_the_result_does_not_depend_on_place_or_time(folder, tmp_path):
    first = prepare(str(folder), tmp_path / "cache", 300, 0.1)
    moved = folder.rename(tmp_path / "moved")
    os.utime(moved / "5.txt", (1, 1))
    again = prepare(str(moved), tmp_path / "cache2", 300, 0.1)
    for name in ("train.bin", "valid.bin", "tokenizer.json"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()


def worker(source, cache, barrier, results):
    barrier.wait()
    data = prepare(source, cache, 300, 0.1)
    results.put((str(data.folder), os.stat(data.folder / "train.bin").st_ino))


def test_two_processes_at_once_make_it_once(folder, tmp_path):
    context = get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=worker, args=(str(folder), tmp_path / "cache", barrier, results))
                 for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_cleared(folder, tmp_path):
    cache = tmp_path / "cache"
    name = prepare(str(folder), cache, 300, 0.1).folder.name
    (cache / name).rename(cache / f"{name}.tmp-999")
    prepare(str(folder), cache, 300, 0.1)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [name]


def bad_sources(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"ok\n\0")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"a")
    (tmp_path / "late.jsonl").write_text('{"text": "fine"}\n' * 500 + '{"txt": "bad"}\n')


@pytest.mark.parametrize("name, says", [
    ("binary.txt", "byte 3 is NUL"),
    ("empty.txt", "holds no text"),
    ("short.txt", "split of .* is empty: 1 bytes"),
    ("late.jsonl", "late.jsonl:501: no field 'text'; did you mean 'txt'"),
    ("nowhere", "does not exist"),
])
def test_bad_input_leaves_nothing(tmp_path, name, says):
    bad_sources(tmp_path)
    with pytest.raises(DataError, match=says):
        prepare(str(tmp_path / name), tmp_path / "cache", 300, 0.1)
    assert not (tmp_path / "cache").exists() or not tree(tmp_path / "cache")


def test_wrong_settings(folder, tmp_path):
    for fraction in (0, 0.6, float("nan")):
        with pytest.raises(ConfigError, match="valid_fraction is .*: expected a share"):
            prepare(str(folder), tmp_path / "cache", 300, fraction)
    with pytest.raises(ConfigError, match="vocabulary of 100 is too small"):
        prepare(str(folder), tmp_path / "cache", 100, 0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file can't be written: File exists"):
        prepare(str(folder), tmp_path / "file", 300, 0.1)


def test_token_files_without_a_header(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"train\.bin\) without their header tokens\.json"):
        prepare(str(tmp_path), tmp_path / "cache", 300, 0.1)


def test_a_corrupted_cache_says_what_to_delete(folder, tmp_path):
    data = prepare(str(folder), tmp_path / "cache", 300, 0.1)
    (data.folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=f"truncated.*Delete the folder {data.folder}"):
        prepare(str(folder), tmp_path / "cache", 300, 0.1)


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, mounted):
    small, source = mounted("small", "size=300k"), tmp_path / "long.txt"
    source.write_text("".join(document(i) for i in range(5000)))
    with pytest.raises(DataError, match=r"small/cache: the disk is full: .* and 0\.3 MB are free") as error:
        prepare(str(source), small / "cache", 270, 0.05)
    needed = float(str(error.value).split("about ")[1].split(" MB")[0]) * 1e6
    assert not tree(small / "cache")
    subprocess.run(["mount", "-o", f"remount,size={int(needed * 1.05)}", str(small)], check=True)
    prepare(str(source), small / "cache", 270, 0.05)  # with the room it asked for it goes through
    used = sum((small / "cache" / name).stat().st_size for name in tree(small / "cache"))
    assert used == pytest.approx(needed, rel=0.05)
