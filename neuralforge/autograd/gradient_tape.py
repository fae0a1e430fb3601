"""An imperative tape, for code that isn't written as functions (after TensorFlow's)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from ..errors import DifferentiationError
from ..graph import gradient_mode
from ..graph.source import user_line
from ..graph.tree import tree_flatten, tree_unflatten
from .tape import Tape
from .transforms import check_input


class GradientTape:
    """Records what is computed from the tensors it is told to watch, between `with` and its end:

        with nf.GradientTape() as tape:
            tape.watch(x)
            y = (x * x).sum()
        dx = tape.gradient(y, x)

    `gradient` frees the tape as it goes and can be called once, any number of times if `persistent`. Tapes nest: what
    an inner one computes inside an outer one's `with`, its gradients included, the outer one records.

    In-place writes are followed inside, but what the tape keeps is in the memory that they would change: a written
    tensor that somebody, or the tape, still holds at the end of the `with` raises DifferentiationError.
    """

    def __init__(self, persistent: bool = False):
        self.persistent = persistent
        self._tape = Tape()
        self._spent = False
        self._mode = gradient_mode.differentiating()
        self._watched: list[torch.Tensor] = []

    def __enter__(self) -> GradientTape:
        self._mode.__enter__()
        self._tape.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tape.__exit__(kind, error, trace)
        self._mode.__exit__(kind, error, trace)
        written = self._tape.live_writes()
        if written and error is None:
            raise DifferentiationError(
                f"{user_line()}: inside the tape's `with`, a tensor of shape {tuple(written[0].shape)} was written in place "
                f"that outlives it, while the tape may need the old value. Write x = x + y for x += y, or use nf.grad, "
                f"which follows such writes."
            )

    def watch(self, tensors: Any) -> None:
        """Follow these tensors (a tensor or a pytree) from here on. Raises DifferentiationError for one that isn't
        floating point or complex."""
        for x in tree_flatten(tensors)[0]:
            check_input(x)
            if self._tape.node(x) is None:
                self._tape.watch_itself(x)
                self._watched.append(x)

    def gradient(self, target: Any, sources: Any) -> Any:
        """The gradient of `target` (a real tensor; a pytree of them, or elements of one, are added up) with respect to
        `sources`, watched tensors or computed from those: a pytree like them, zeros where the target doesn't depend on
        them.

        Raises DifferentiationError for a source that isn't on the tape, and a second call on a tape that isn't persistent.
        """
        if self._spent:
            raise DifferentiationError(
                f"{user_line()}: this tape's gradient has been taken and the tape freed. For more than one, make it with "
                f"nf.GradientTape(persistent=True)."
            )
        tape = self._tape
        flat, tree = tree_flatten(sources)
        for x in flat:
            if tape.node(x) is None:
                raise DifferentiationError(
                    f"{user_line()}: the gradient with respect to a tensor of shape {tuple(getattr(x, 'shape', ()))} that "
                    f"wasn't watched. Call tape.watch(tensor) before computing with it."
                )
        targets = tree_flatten(target)[0]
        for y in targets:
            if not isinstance(y, torch.Tensor) or not y.is_floating_point():
                what = f"a tensor of {y.dtype}" if isinstance(y, torch.Tensor) else type(y).__name__
                raise DifferentiationError(f"{user_line()}: the gradient of {what}; expected real tensors.")
        self._spent = not self.persistent
        with gradient_mode.no_autograd():
            targets = [tape.now(y) for y in targets]
            grads = tape.pull(targets, [torch.ones_like(y) for y in targets], flat, keep=self.persistent)
            found = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads)]
        if self._spent:
            for x in self._watched:
                tape.forget(x)
            self._watched.clear()
        return tree_unflatten(found, tree)
