import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralforge.data.tokenizer import END_OF_TEXT, Tokenizer
from neuralforge.errors import ConfigError, DataError

TEXT = [
    "def f(x):\n    return x + 1\n\n\nfor i in range(10):\n    print(f(i))\n" * 20,
    "naïve café 12345\n" * 30,
]
TOKENIZER = Tokenizer.train(TEXT, 400)


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text]) == [ids]


@given(st.binary())
def test_any_bytes_come_back(data):
    ids = TOKENIZER.encode(data)
    assert TOKENIZER.decode_bytes(ids) == data
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


def test_every_byte_is_a_token():
    data = bytes(range(256))
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(data)) == data
    assert {token for token in TOKENIZER.token_bytes if len(token) == 1} == {bytes([i]) for i in range(256)}


def test_it_agrees_with_the_librarys_own_decoder():
    ids = TOKENIZER.encode("".join(TEXT))
    assert TOKENIZER.inner.decode(ids) == TOKENIZER.decode(ids)
    assert len(ids) < len("".join(TEXT)) / 2  # it learnt something


def test_the_end_of_text_in_a_document_is_only_text():
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert TOKENIZER.end_of_text not in ids and TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([TOKENIZER.end_of_text]) == END_OF_TEXT


def test_training_is_deterministic_across_processes(tmp_path):
    code = ("import sys, neuralforge.data as d; t = [p.text for p in d.standard_library().pieces()][:60];"
            "print(d.Tokenizer.train(t, 2000).sha256)")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}).stdout
            for seed, threads in (("1", "1"), ("2", "2"))}
    assert len(runs) == 1


def test_save_and_load(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == TOKENIZER.sha256 and loaded.vocab_size == TOKENIZER.vocab_size
    text = f"print(1)\n{END_OF_TEXT}"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_vocabulary_sizes():
    assert Tokenizer.train(TEXT, 257).vocab_size == 257
    assert Tokenizer.train(["ab"], 5000).vocab_size == 257  # no pair occurs twice
    with pytest.raises(ConfigError, match="vocabulary of 256 is too small.*need 257"):
        Tokenizer.train(TEXT, 256)


def test_an_error_in_the_text_is_not_swallowed():
    def texts():
        yield "fine"
        raise DataError("row 2 is bad")

    with pytest.raises(DataError, match="row 2 is bad"):
        Tokenizer.train(texts(), 300)


def bpe(vocabulary) -> dict:
    return {"type": "BPE", "vocab": vocabulary, "merges": []}


def changed(**parts) -> bytes:
    return json.dumps(json.loads(TOKENIZER.serialised) | parts).encode()


@pytest.mark.parametrize("data, says", [
    (b"{", "not a sound tokenizer.json"),
    (b"\xff", "not a sound tokenizer.json"),
    (changed(model=bpe({"a": 0}), added_tokens=[]), f"no token '{END_OF_TEXT[:2]}"),
    (changed(model=bpe({"a": 0, END_OF_TEXT: 1})), "255 of the 256 bytes"),
])
def test_what_is_no_byte_level_bpe_is_refused(tmp_path, data, says):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError, match=says.replace("|", r"\|")):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(DataError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path / "tokenizer.json")
