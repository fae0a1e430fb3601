import math
from collections import Counter

import numpy as np
import pytest

from neuralforge.data import TokenFile, baseline, bigram_loss, unigram_loss

VOCABULARY = 30


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    common = VOCABULARY - 2  # the last two tokens never come in training
    chain = rng.dirichlet(np.full(common, 0.1), common)

    def make(name, count):
        ids = [0]
        while len(ids) < count:
            ids.append(int(rng.choice(common, p=chain[ids[-1]])))
        if name == "valid":
            ids[5:7] = [VOCABULARY - 2, VOCABULARY - 1]
        np.array(ids, "<u2").tofile(tmp_path / name)
        return TokenFile(tmp_path / name, "uint16", count, count, 1, 0)

    return make("train", 3000), make("valid", 500)


def model(train: list[int]):
    """The bigram model written as its definition."""
    pairs, follows = Counter(zip(train, train[1:])), Counter(train[:-1])
    ones, twos = (sum(c == k for c in pairs.values()) for k in (1, 2))
    discount = ones / (ones + 2 * twos)

    def chance(a, b):
        ending = (sum(y == b for _, y in pairs) + 1) / (len(pairs) + VOCABULARY)
        if not follows[a]:
            return ending
        distinct = sum(x == a for x, _ in pairs)
        return (max(pairs[a, b] - discount, 0) + discount * distinct * ending) / follows[a]

    return chance


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 22])
def test_bigram_loss_equals_its_definition(files, monkeypatch, chunk):
    monkeypatch.setattr(baseline, "CHUNK", chunk)
    train, valid = files
    chance = model(train.array.tolist())
    for a in (0, 3, VOCABULARY - 1):
        assert sum(chance(a, b) for b in range(VOCABULARY)) == pytest.approx(1)
    ids = valid.array.tolist()
    expected = -sum(math.log(chance(a, b)) for a, b in zip(ids, ids[1:])) / (len(ids) - 1)
    assert bigram_loss(train, valid, VOCABULARY) == pytest.approx(expected, rel=1e-12)


def test_unigram_loss_equals_its_definition(files, monkeypatch):
    monkeypatch.setattr(baseline, "CHUNK", 64)
    train, valid = files
    counts = Counter(train.array.tolist())
    chance = [(counts[i] + 1) / (3000 + VOCABULARY) for i in range(VOCABULARY)]
    expected = -np.mean([math.log(chance[i]) for i in valid.array.tolist()])
    assert unigram_loss(train, valid, VOCABULARY) == pytest.approx(expected, rel=1e-12)


def test_context_helps(files):
    train, valid = files
    bigram, unigram = (loss(train, valid, VOCABULARY) for loss in (bigram_loss, unigram_loss))
    assert bigram < unigram < math.log(VOCABULARY)


def test_a_vocabulary_of_100_000_needs_no_table(tmp_path):
    np.arange(100_000, dtype="<u4").tofile(tmp_path / "a")
    file = TokenFile(tmp_path / "a", "uint32", 100_000, 1, 1, 0)
    assert bigram_loss(file, file, 100_000) < math.log(100_000)
