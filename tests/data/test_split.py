from collections import defaultdict

import pytest

from neuralforge.data import Split, from_path, standard_library
from neuralforge.data.readers import Piece
from neuralforge.data.split import Meter
from neuralforge.errors import DataError


def divide(corpus, split):
    """{split: {document key: its text}}"""
    out = {"train": defaultdict(str), "valid": defaultdict(str)}
    for piece in corpus.pieces():
        for name, text, _ in split.parts(piece):
            out[name][piece.key] += text
    return out["train"], out["valid"]


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3])
def test_the_standard_library_is_held_out_by_files(fraction):
    corpus = standard_library()
    split = Split.of(corpus, fraction)
    train, valid = divide(corpus, split)
    assert not train.keys() & valid.keys()
    held = sum(len(text.encode()) for text in valid.values())
    assert split.text_bytes == corpus.size and abs(held / corpus.size - fraction) < 0.2 * fraction


@pytest.mark.parametrize("text", [
    "one line äöü " * 50_000,
    "".join(f"line {i} ä\n" for i in range(60_000)),
])
def test_of_one_document_the_last_part_is_held_out(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    corpus = from_path(tmp_path / "a.txt")
    split = Split.of(corpus, 0.1)
    train, valid = (next(iter(part.values())) for part in divide(corpus, split))
    assert train + valid == text
    assert abs(len(valid.encode()) / len(text.encode()) - 0.1) < 0.001
    assert "\n" not in text or train.endswith("\n")


def test_of_two_large_files_both_ends_are_held_out(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} line\n" * 20_000)
    corpus = from_path(tmp_path)
    train, valid = divide(corpus, Split.of(corpus, 0.05))
    assert train.keys() == valid.keys() and len(train) == 2


def test_documents_end_once(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 50_000)
    corpus = from_path(tmp_path)
    split = Split.of(corpus, 0.25)
    ends = [(name, last) for piece in corpus.pieces() for name, _, last in split.parts(piece)]
    assert [end for end in ends if end[1]] == [("valid", True)]


def test_rows_of_one_file_are_held_out_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i} of many"}}\n' for i in range(2000)))
    corpus = from_path(tmp_path / "a.jsonl")
    train, valid = divide(corpus, Split.of(corpus, 0.05))
    assert not train.keys() & valid.keys() and len(valid) == pytest.approx(100, abs=5)


def test_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        Split.of(from_path(tmp_path), 0.05)


def test_a_cut_never_lands_inside_a_character():
    text = "a😀" * 5
    for fraction in (i / 100 for i in range(1, 50)):
        parts = list(Split(fraction, None, 25).parts(Piece(0.5, text, 0, 25, True)))
        assert "".join(part for _, part, _ in parts) == text
        assert [last for _, _, last in parts] == [False] * (len(parts) - 1) + [True]


def test_progress_is_told_sparingly_and_ends_full():
    told = []
    meter = Meter(lambda *args: told.append(args), "reading", 10 << 20)
    for _ in range(100_000):
        meter.add(105)
    meter.finish()
    assert 5 < len(told) < 13 and told[-1] == ("reading", 10 << 20, 10 << 20)
