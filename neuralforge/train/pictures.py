"""Pictures of a run: one look, and files that are whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def picture(*paths: Path, height: float = 4) -> Iterator[Axes]:
    """Axes to draw on. When the block ends, the picture is saved at each of `paths`, as the kind that the name says."""
    from matplotlib.figure import Figure  # not pyplot, whose choice of a backend is the user's

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    for path in paths:
        data = io.BytesIO()
        figure.savefig(data, format=path.suffix[1:], dpi=150)
        write_atomic(path, data.getvalue())
