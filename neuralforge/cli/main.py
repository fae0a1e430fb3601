"""The `neuralforge` command: a verb, then its options."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import sys
import textwrap
from importlib import import_module

from ..errors import NeuralForgeError

VERBS = {
    "train": "train a model on text, by default on this Python's own standard library",
    "sweep": "train over values of configuration keys and seeds, and compare",
    "lr": "look for a learning rate",
    "schedule": "draw the learning rate of a training run",
    "generate": "continue a prompt with a trained model",
    "explain": "show what the compiler makes of the training step, and what it costs",
    "doctor": "show what this machine has and what to do about what it hasn't",
}

USAGE = "usage: neuralforge VERB [options]\n\n{}\n\n`neuralforge VERB --help` tells its options.".format(
    "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where a reader that has gone is expected, and not at exit
        return code
    except NeuralForgeError as e:
        print(paragraph(f"error: {e}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {e.filename}" if e.filename else ""
        full = f"error: the disk is full{where}. Checkpoints already saved are intact. Free some space and --resume."
        print(paragraph(full), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        from .. import __version__

        print(f"neuralforge {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, [*VERBS, "--help", "--version"], 1)
        mean = f" Did you mean {close[0]}?" if close else ""
        print(paragraph(f"error: unknown verb {verb!r}; expected one of {', '.join(VERBS)}.{mean}"), file=sys.stderr)
        return 2
    import_module(f".{verb}", __package__).main(argv[1:])
    return 0


def paragraph(text: str) -> str:
    """Wrapped to the terminal's width, leaving words such as paths whole."""
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
