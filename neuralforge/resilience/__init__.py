"""Surviving failures: checkpoints."""

from .checkpoint import flatten, latest, load, save, steps, unflatten

__all__ = ["flatten", "latest", "load", "save", "steps", "unflatten"]
