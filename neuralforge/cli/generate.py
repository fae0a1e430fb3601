"""`neuralforge generate`."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path

from ..errors import ConfigError
from .flags import number, split_flags, whole_number

USAGE = """usage: neuralforge generate [options]

  --out=FOLDER        the run whose model to use (runs/default)
  --prompt=TEXT       text to continue; - reads it from standard input
  --tokens=N          tokens to generate
  --temperature=T     0 takes the likeliest token
  --top-k=K           sample among the k likeliest
  --seed=N            of the sampling; the same seed, the same text (0)

What is left out is as in the run's own [sample] section."""


def main(argv: list[str]) -> None:
    flags = split_flags(argv, ["out", "prompt", "tokens", "temperature", "top-k", "seed"], ["help"])
    given = {name: value for name, value in flags if value is not None}
    if any(value is None for _, value in flags):
        print(USAGE)
        return
    tokens = whole_number("tokens", given["tokens"], 1) if "tokens" in given else None
    temperature = number("temperature", given["temperature"]) if "temperature" in given else None
    top_k = whole_number("top-k", given["top-k"], 1) if "top-k" in given else None
    seed = whole_number("seed", given.get("seed", "0"))

    import torch

    from ..models import generate
    from ..train import load_run

    model, tokenizer, config = load_run(Path(os.path.expanduser(given.get("out", "runs/default"))))
    own = config.sample
    if given.get("prompt") == "-":
        prompt = sys.stdin.buffer.read()
    else:
        prompt = given.get("prompt", own.prompt).encode(errors="surrogateescape")  # arguments may be any bytes
    start = tokenizer.encode(prompt)
    if not start:
        raise ConfigError("--prompt is empty; expected at least one character to continue.")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character

    def show(text: bytes, final: bool = False) -> None:
        sys.stdout.write(decoder.decode(text, final))
        sys.stdout.flush()

    show(prompt)
    generate(
        model,
        torch.tensor([start]),
        own.tokens if tokens is None else tokens,
        own.temperature if temperature is None else temperature,
        own.top_k if top_k is None else top_k,
        torch.Generator().manual_seed(seed),
        on_token=lambda column: show(tokenizer.decode_bytes(column.tolist())),
    )
    show(b"\n", final=True)
