"""`nf.jit`: capture once, transform, run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import MemoryBudgetError
from .buckets import Bucketed
from .jitted import Jit


def jit(
    f: Callable | None = None, *, donate: tuple[int, ...] | int = (), memory_budget: int | str | None = None,
    max_rewrites: int | None = None, buckets: dict | None = None, pad: dict | None = None,
) -> Any:  # fmt: skip
    """Compile `f`, a function of pytrees of tensors: its first call with given shapes captures it as one graph,
    optimises it and plans its memory; later calls run the result.

    `donate`: positions of arguments whose memory the results may take over (the training state); the tensors passed
    there must not be used afterwards. Leaves that aren't tensors (numbers, strings, modules) are static: another
    value compiles anew, so pass what changes from call to call as a tensor.

    `memory_budget`: bytes, or text such as "600MB", that a call may allocate at its peak beyond its arguments; values
    are then computed again rather than kept, as few and as cheap ones as will do (`compiler/planning/remat.py`). Raises
    MemoryBudgetError, with the smallest budget that can be met.

    `buckets`: sizes up to which arguments of varying length are padded, so that a few compiled forms serve all lengths:
    `buckets={"tokens": {1: (128, 256, 512)}, "targets": {1: (128, 256, 512)}}, pad={"targets": -100}` pads dimension 1 of
    both at its end to the next size, `targets` with -100 and `tokens` with 0. Arguments go by name or position; leaves
    within by a path, as "batch.tokens". Results along a padded dimension are cut back. `f` must mask what is padded, and
    whether it does is looked at: the first padded call of each compiled form (and of each new pattern of equal lengths)
    also runs `f` plainly on the arguments as they are, on copies, and raises CaptureError if a result differs by more
    than rounding, if its shape leaves open what to cut, or if `f` writes in place to a padded argument. Where `f` draws
    from torch's generator only shapes can be compared, which a warning says. A length beyond the last bucket raises.

    `max_rewrites`: how many rewrites (patterns and fusions, in the order that `nf.explain` lists them) to make at most. To
    find one that gives a wrong result, halve it until one more changes the result. The environment variable
    NEURALFORGE_MAX_REWRITES sets it for all functions.

    Usable as `nf.jit(f)`, `@nf.jit` and `@nf.jit(donate=0)`. Raises CaptureError where Python control flow depends on
    tensor data, and where `f` does what a graph can't do again in later calls (seeds torch's generator, returns a generator).
    In-place writes to arguments, and to tensors that `f` closes over (the running statistics of batch norms, say), take effect
    after the call. Such tensors are read anew in each call; modules whose mode, hooks, layers, parameters or buffers have been replaced,
    and tensors whose `.data` has come to be laid out otherwise, are captured anew. All else that `f` reads beside its arguments
    (global and closed-over numbers, attributes of objects) is as it was at the capture.
    """
    donate = (donate,) if isinstance(donate, int) else tuple(donate)
    budget = _bytes(memory_budget) if isinstance(memory_budget, str) else memory_budget

    def jitted(f: Callable) -> Any:
        form = Jit(f, donate, budget, max_rewrites)
        return form if buckets is None else Bucketed(form, buckets, pad)

    return jitted if f is None else jitted(f)


def _bytes(text: str) -> int:
    """The number in "600MB", "1.5 GB" or "2GiB"."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", text.upper())
    if found is None:
        raise MemoryBudgetError(f"memory_budget={text!r}; expected bytes, or a number with a unit, as 600MB or 1.5GiB.")
    return int(float(found.group(1)) * units[found.group(2)])
