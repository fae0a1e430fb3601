"""Training runs: configuration, the step, the trainer."""

from .trainer import load_run, run

__all__ = ["load_run", "run"]
