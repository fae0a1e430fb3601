import json

import numpy as np
import pytest

from neuralforge.data import Tokenizer, open_token_files, tokens, write_token_files
from neuralforge.errors import DataError

TEXTS = {
    "train": ["def f():\n    return 1\n" * 9, "x = 2\n", "naïve\n"],
    "valid": ["def g():\n    return 2\n"],
}
TOKENIZER = Tokenizer.train(TEXTS["train"], 300)


def write(folder, tokenizer=TOKENIZER):
    parts = [(split, text, True) for split, texts in TEXTS.items() for text in texts]
    size = sum(len(text.encode()) for _, text, _ in parts)
    write_token_files(folder, parts, tokenizer, text_bytes=size, source="a test", fingerprint="f")
    return folder


def text_of(file, tokenizer):
    ids = file.array
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    return [tokenizer.decode(part[part != tokenizer.end_of_text]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("batch_bytes", [1, 50, 1 << 20])
def test_what_is_written_is_read(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(tokens, "BATCH_BYTES", batch_bytes)
    train, valid, tokenizer, source = open_token_files(write(tmp_path / "out"))
    assert source == "a test" and tokenizer.sha256 == TOKENIZER.sha256
    assert text_of(train, tokenizer) == TEXTS["train"] and text_of(valid, tokenizer) == TEXTS["valid"]
    assert train.documents == 3 and train.text_bytes == sum(len(text.encode()) for text in TEXTS["train"])
    assert len(train) == len(train.array) and train.array.dtype == np.uint16
    assert valid.bytes_per_token == len(TEXTS["valid"][0]) / len(valid)
    assert (tmp_path / "out" / "train.bin").read_bytes() == train.array.astype("<u2").tobytes()
    assert not train.array.flags.writeable


def test_a_document_goes_on_over_parts(tmp_path):
    parts = [("train", "one ", False), ("valid", "v", True), ("train", "two", True)]
    write_token_files(tmp_path / "out", parts, TOKENIZER, text_bytes=8, source="", fingerprint="")
    train, _, tokenizer, _ = open_token_files(tmp_path / "out")
    assert text_of(train, tokenizer) == ["one two"] and train.documents == 1


def test_a_large_vocabulary_needs_four_bytes(tmp_path):
    file = tokens.TokenWriter(tmp_path / "a.bin", (1 << 16) + 1)
    file.append([0, 1 << 16], 5)
    assert (found := file.finish()).dtype == "uint32" and found.array.tolist() == [0, 1 << 16]
    file.close()
    assert tokens.TokenWriter(tmp_path / "b.bin", 1 << 16).dtype == "uint16"


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(how(data))


def header(folder, **fields):
    path = folder / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("harm, says", [
    (lambda f: damage(f / "train.bin", lambda d: d[:-3]), r"train\.bin is truncated: it has \d+ bytes"),
    (lambda f: damage(f / "valid.bin", lambda d: d + b"12"), r"valid\.bin is too long"),
    (lambda f: damage(f / "train.bin", lambda d: b"\xff\xff" + d[2:]), r"train\.bin is corrupted"),
    (lambda f: (f / "valid.bin").unlink(), r"valid\.bin does not exist"),
    (lambda f: (f / "tokens.json").unlink(), r"tokens\.json does not exist"),
    (lambda f: damage(f / "tokens.json", lambda d: d[:40]), r"tokens\.json is not a sound header \(JSON"),
    (lambda f: damage(f / "tokens.json", lambda d: b"[]"), r"not a sound header \(TypeError"),
    (lambda f: header(f, splits={}), r"not a sound header \(KeyError: 'train'"),
    (lambda f: header(f, format=99), r"has format 99, this version reads 1"),
    (lambda f: Tokenizer.train(["other"], 257).save(f / "tokenizer.json"), r"not the tokenizer that made"),
    (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json does not exist"),
])
def test_damage_is_named(tmp_path, harm, says):
    folder = write(tmp_path / "out")
    harm(folder)
    with pytest.raises(DataError, match=says):
        open_token_files(folder)


def test_an_empty_split_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="The valid split of a test is empty: 2 bytes of text are too few"):
        write_token_files(tmp_path / "out", [("train", "ab", True)], TOKENIZER, text_bytes=2, source="a test",
                          fingerprint="")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path):
    def parts():
        yield "train", "some text", True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_files(tmp_path / "out", parts(), TOKENIZER, text_bytes=9, source="", fingerprint="")
    assert not list(tmp_path.iterdir())
