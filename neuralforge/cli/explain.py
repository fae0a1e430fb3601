"""`neuralforge explain`."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..train import config as configuration
from ..train.config import Config
from .flags import split_flags, whole_number
from .train import SHORT, configure, resolve_with_places

OWN = ["page", "max-rewrites"]
USAGE = """usage: neuralforge explain [--page=FILE.html] [--max-rewrites=N] [--config=FILE.toml] [--section.key=value ...]

Compiles the training step of a configuration, runs it a few times on random tokens, and tells what each pass of the
compiler did, what was fused and why, how the memory is laid out, and of each equation the bytes, operations and
seconds, predicted and measured.

  --page=FILE.html    write it all as one page, with pictures
  --max-rewrites=N    make N rewrites at most, in the order that the page lists them: halve it to find a wrong one

The other options are those of neuralforge train."""


def main(argv: list[str]) -> None:
    flags = split_flags(argv, [*configuration.keys(), *SHORT, "config", *OWN], ["help"])
    if any(value is None for _, value in flags):
        print(USAGE)
        return
    own = {name: value for name, value in flags if name in OWN}
    values = [(SHORT.get(name, name), value) for name, value in flags if name not in OWN]
    most = whole_number("max-rewrites", own["max-rewrites"]) if "max-rewrites" in own else None
    page = Path(own["page"]).expanduser() if "page" in own else None
    if page is not None and not page.absolute().parent.is_dir():
        raise ConfigError(
            f"--page={own['page']}: the folder {page.absolute().parent} isn't there. Make it, or name another."
        )
    config = resolve_with_places(configure(values, Config()), values)
    told = explain_step(config, most)
    print(told)
    if page is not None:
        try:
            told.page(page)
        except OSError as e:
            raise ConfigError(
                f"--page={own['page']}: can't be written ({e.strerror}). Name another file."
            ) from e
        print(f"\npage: {page}")


def explain_step(config: Config, max_rewrites: int | None):  # noqa: ANN201  (torch is imported late)
    """The explanation of the configuration's training step, measured on random tokens."""
    import torch

    from ..bench.explain import explain
    from ..compiler import jit
    from ..models import build
    from ..train.step import make_step

    model_config = config.model_config()
    torch.manual_seed(config.train.seed)
    init, step, _ = make_step(build(model_config, config.train.seed), config)
    shape = config.train.batch * config.train.accumulate, model_config.context + 1
    tokens = torch.randint(0, model_config.vocab_size, shape)
    return explain(jit(step, donate=0, max_rewrites=max_rewrites), init(), tokens).measure()
