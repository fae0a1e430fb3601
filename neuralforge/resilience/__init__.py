"""Surviving failures: checkpoints."""

from .checkpoint import checkpoints, flatten, latest, load, save, unflatten

__all__ = ["checkpoints", "flatten", "latest", "load", "save", "unflatten"]
