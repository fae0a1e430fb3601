"""The errors a user meets.

Every one is a `NeuralForgeError`: one paragraph that names the value, what was expected and how to mend it.
The command line prints it and leaves with exit code 2; a library user catches it by class.
"""

from __future__ import annotations


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
