"""The errors a user meets.

Every one is a `NeuralForgeError`: one paragraph that names the value, what was expected and how to mend it.
The command line prints it and leaves with exit code 2; a library user catches it by class.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_NOT_THE_USERS = (str(Path(__file__).parent), os.path.dirname(os.__file__), "<")


class NeuralForgeError(Exception):
    """Base of all errors that are the caller's to mend."""


class ConfigError(NeuralForgeError):
    """A configuration key or value is wrong."""


class DataError(NeuralForgeError):
    """A corpus, tokenizer or token file can't be used."""


class CheckpointError(NeuralForgeError):
    """A checkpoint is missing, corrupted, or doesn't fit."""


class CaptureError(NeuralForgeError):
    """A function can't be captured as a graph."""


class DifferentiationError(NeuralForgeError):
    """A derivative was asked for that doesn't exist or has no rule."""


class MemoryBudgetError(NeuralForgeError):
    """A program can't be made to fit its memory budget."""


class KernelError(NeuralForgeError):
    """A native kernel can't be built or loaded."""


def warn(message: str) -> None:
    """A UserWarning that points at the user's line: the innermost outside this package, torch and Python's library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and not _is_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_users(filename: str) -> bool:
    return not filename.startswith(_NOT_THE_USERS) and "/torch/" not in filename
