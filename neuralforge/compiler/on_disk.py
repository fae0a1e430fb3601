"""Optimised programs on disk: a process that captures what another one captured before takes it as the passes left it then.

A program goes by its text (operators, shapes, strides, numbers, lines of the user's code), by its literals' contents, and by all
else that passes look at: this package's files, versions, instruction set, compiler, threads. What a function closes over
isn't saved: the program found reads the tensors of the capture at hand. Files are pickles, beside the compiled
kernels, which are no less a program.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelError
from ..graph.ir import Graph, Value
from ..graph.literals import is_literal
from ..kernels.toolchain import cache_folder, checksum, compiler, cpu_features, isa, read_whole, replacing

LEAST = 300
"""Equations: programs of fewer are optimised in no time."""
KEPT = 64
"""Programs; the oldest are removed."""
_PLAIN = (Value, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Unsaved(Exception):
    """Why a program isn't saved."""


def place_of(graph: Graph) -> Path | None:
    """Where the optimised form of `graph` is, or is to be saved; None for a program that isn't."""
    if len(graph.equations) < LEAST:
        return None
    try:
        return cache_folder() / f"program-{_key(graph)}.pickle"
    except (_Unsaved, KernelError):
        return None


def find(place: Path, graph: Graph) -> Graph | None:
    """The optimised form of `graph`, with its inputs and constants, if it is there and whole."""
    content = read_whole(place)
    try:
        return None if content is None else _Reader(content, graph).load()
    except Exception:  # whatever a pickle may raise, the program can be made again
        return None


def save(place: Path, optimised: Graph, graph: Graph) -> None:
    """Save the optimised form of `graph`. What can't be saved is only made again by the next process."""
    try:
        content = _content(optimised, graph)
        with replacing(place) as temporary:
            temporary.write_bytes(content + checksum(content))
        for old in sorted(place.parent.glob("program-*.pickle"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, pickle.PicklingError, TypeError, AttributeError, RecursionError):
        pass


def _key(graph: Graph) -> str:
    """Raises _Unsaved for what the text doesn't tell from another program, and KernelError without a C compiler."""
    around = sys.version, torch.__version__, isa(), *sorted(cpu_features()), compiler()[1]
    digest = hashlib.sha256("\0".join([*_files(), *around, str(torch.get_num_threads())]).encode())
    for v in (*graph.inputs, *graph.constants):
        digest.update(f"{v.typed} {v.strides} {v.device}\n".encode())
    for eq in graph.equations:
        if not isinstance(eq.op, torch._ops.OpOverload) or not _plain((eq.args, eq.kwargs)):
            raise _Unsaved(repr(eq))
        digest.update(f"{eq!r} {[v.strides for v in eq.results]}\n".encode())
        if is_literal(eq, graph.constants):
            digest.update(pickle.dumps(graph.constants[eq.args[0]].tolist()))
    digest.update(str(graph.outputs).encode())
    return digest.hexdigest()[:20]


def _plain(tree: Any) -> bool:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return all(map(_plain, tree)) if isinstance(tree, (tuple, list)) else isinstance(tree, _PLAIN)


@cache
def _files() -> list[str]:
    package = Path(__file__).parents[1]
    files = sorted(path for kind in ("*.py", "*.c", "*.h") for path in package.rglob(kind))
    return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]


def _given(graph: Graph) -> list[Any]:
    """What a saved program takes from the capture at hand."""
    return [*graph.inputs, *graph.constants, *graph.constants.values()]


def _content(optimised: Graph, graph: Graph) -> bytes:
    file = io.BytesIO()
    _Writer(file, {id(x): n for n, x in enumerate(_given(graph))}).dump(optimised)
    return file.getvalue()


class _Writer(pickle.Pickler):
    """What is given goes by its number, operators by name, and values without their fake tensors."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int]):
        super().__init__(file, protocol=5)
        self.numbers = numbers

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, (Value, torch.Tensor)) and id(x) in self.numbers:
            return _given_at, (self.numbers[id(x)],)
        if type(x) is Value:
            return _value, (x.name, tuple(x.shape), x.strides, x.dtype, x.device)
        if isinstance(x, torch._ops.OpOverload):
            return _operator, (x.namespace, x._schema.name.split("::")[1], x._overloadname)
        return NotImplemented


def _operator(namespace: str, packet: str, overload: str) -> torch._ops.OpOverload:
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _given_at(number: int) -> Value | torch.Tensor:
    raise TypeError("only a _Reader knows what is given")


def _value(name: str, shape: tuple, strides: tuple, dtype: torch.dtype, device: torch.device) -> Value:
    raise TypeError("only a _Reader knows the fake tensors' mode")


class _Reader(pickle.Unpickler):
    """Values of one type share a fake tensor."""

    def __init__(self, content: bytes, graph: Graph):
        super().__init__(io.BytesIO(content))
        self._given = _given(graph)
        self._mode = next(v.fake.fake_mode for v in (*graph.inputs, *graph.equations[0].results))
        self._fakes: dict[tuple, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {_given_at.__name__: self._given.__getitem__, _value.__name__: self._value} if module == __name__ else {}
        return known.get(name) or super().find_class(module, name)

    def _value(self, name: str, *described: Any) -> Value:
        if described not in self._fakes:
            shape, strides, dtype, device = described
            with self._mode:
                self._fakes[described] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return Value(name, self._fakes[described])
