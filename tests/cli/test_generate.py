"""`neuralforge generate` on a small model: the same text as the library's, whatever bytes come out."""

import io
import sys

import pytest
import torch

from neuralforge.cli.main import main
from neuralforge.models import generate
from neuralforge.train import load_run

TEXT = "".join(f"naïve façade {i}: “π ≈ 3.14”, 漢字 😀\n" for i in range(3000))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step: weights near random, so that tokens end within characters and bytes are no UTF-8."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    assert main([
        "train", f"--data={home / 'text.txt'}", f"--data.cache={home / 'cache'}", f"--out={home / 'run'}", "--steps=1",
        "--data.vocab_size=280", "--model.depth=1", "--model.context=32", "--model.d_model=32", "--train.batch=2",
        "--train.eval_batches=1", "--sample.prompt=na", "--sample.tokens=7", "--sample.temperature=2.5", "--sample.top_k=none",
    ]) == 0  # fmt: skip
    return home / "run"


def expected(run, prompt, tokens, temperature, top_k, seed):
    model, tokenizer, _ = load_run(run)
    start = torch.tensor([tokenizer.encode(prompt)])
    ids = generate(model, start, tokens, temperature, top_k, torch.Generator().manual_seed(seed))
    return tokenizer.decode_bytes(ids[0].tolist())


def test_streams_what_the_library_generates_even_where_it_is_no_utf8(run, capsys):
    whole = expected(run, "façade", 300, 5.0, 1000, seed=3)
    with pytest.raises(UnicodeDecodeError):
        whole.decode()
    args = ["--prompt=façade", "--tokens=300", "--temperature=5", "--top-k=1000", "--seed=3"]
    assert main(["generate", f"--out={run}", *args]) == 0
    assert capsys.readouterr().out == (whole + b"\n").decode(errors="replace")


def test_what_is_left_out_is_the_runs_own(run, capsys):
    assert main(["generate", f"--out={run}", "--seed=1"]) == 0
    assert capsys.readouterr().out == (expected(run, "na", 7, 2.5, None, seed=1) + b"\n").decode(errors="replace")


@pytest.mark.parametrize("prompt", ["漢字\n".encode(), b"abc\xff\xfedef"])
def test_prompt_from_standard_input_is_any_bytes(run, prompt, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    assert main(["generate", f"--out={run}", "--prompt=-", "--tokens=4", "--temperature=0"]) == 0
    assert capsys.readouterr().out == (expected(run, prompt, 4, 0, None, 0) + b"\n").decode(errors="replace")


@pytest.mark.parametrize("source", ["argument", "standard input"])
def test_an_empty_prompt(source, run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["generate", f"--out={run}", "--prompt=" + ("" if source == "argument" else "-")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--prompt is empty; expected at least one character" in captured.err
