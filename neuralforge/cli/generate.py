"""`neuralforge generate`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ConfigError
from .flags import number, split_flags, whole_number

USAGE = """usage: neuralforge generate [options]

  --out=FOLDER        the run whose model to use (runs/default)
  --prompt=TEXT       text to continue; - reads it from standard input (the run's own)
  --tokens=N          tokens to generate (200)
  --temperature=T     0 takes the likeliest token (0.8)
  --top-k=K           sample among the k likeliest (50)
  --seed=N            of the sampling; the same seed, the same text (0)"""


def main(argv: list[str]) -> None:
    flags = split_flags(argv, ["out", "prompt", "tokens", "temperature", "top-k", "seed"], ["help", "h"])
    given = {name: value for name, value in flags if value is not None}
    if any(value is None for _, value in flags):
        print(USAGE)
        return
    tokens = whole_number("tokens", given.get("tokens", "200"), 1)
    temperature = number("temperature", given.get("temperature", "0.8"))
    top_k = whole_number("top-k", given.get("top-k", "50"), 1)
    seed = whole_number("seed", given.get("seed", "0"))

    import torch

    from ..models import generate
    from ..train import load_run

    model, tokenizer, config = load_run(Path(given.get("out", "runs/default")))
    prompt = given.get("prompt", config.sample.prompt)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    start = tokenizer.encode(prompt)
    if not start:
        raise ConfigError("--prompt is empty; expected at least one character to continue.")
    shown = bytearray()

    def show(column: torch.Tensor) -> None:
        """Write what is whole: a token may end in the middle of a character."""
        shown.extend(tokenizer.decode_bytes(column.tolist()))
        text = shown.decode("utf-8", errors="ignore")
        whole = len(text.encode())
        if len(shown) - whole < 4:
            sys.stdout.write(text)
            del shown[:whole]
        else:
            sys.stdout.write(shown.decode("utf-8", errors="replace"))
            shown.clear()
        sys.stdout.flush()

    sys.stdout.write(prompt)
    generate(
        model, torch.tensor([start]), tokens, temperature, top_k, torch.Generator().manual_seed(seed), on_token=show
    )
    sys.stdout.write(shown.decode("utf-8", errors="replace") + "\n")
