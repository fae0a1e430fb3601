"""Building C at run time: find a compiler, compile for this CPU, keep the libraries on disk.

    library = load("void twice(float *x, long n) { for (long i = 0; i < n; i++) x[i] *= 2; }", "twice")

The cache (`$NEURALFORGE_CACHE`, else `$XDG_CACHE_HOME/neuralforge`, else `~/.cache/neuralforge`) is keyed by the
source, the flags, the compiler's version and the CPU's features, and safe under several processes. Libraries are
built with OpenMP and loaded after torch, whose OpenMP runtime they then share: one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP runtime that our libraries bind to)

from ..errors import KernelError

ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}  # fmt: skip
_NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma", "f16c"}}
FLAGS = ["-O2", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class NoCompiler(KernelError):
    """There is no C compiler on this machine."""


@cache
def cpu_features() -> frozenset[str]:
    """The flags line of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@cache
def cpu_model() -> str:
    """What /proc/cpuinfo calls the processor; "" where it doesn't say."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


def isa() -> str:
    """The instruction set to compile for: "avx512", "avx2" or "portable". `$NEURALFORGE_ISA` overrides it downwards."""
    best = next((name for name, needs in _NEEDS.items() if needs <= cpu_features()), "portable")
    wanted = os.environ.get("NEURALFORGE_ISA")
    if not wanted:
        return best
    order = list(ISA_FLAGS)
    if wanted not in order:
        raise KernelError(f"NEURALFORGE_ISA={wanted}: expected one of {', '.join(order)}. Correct it or unset it.")
    if order.index(wanted) < order.index(best):
        raise KernelError(f"NEURALFORGE_ISA={wanted}: this CPU has {best} only. Unset the variable.")
    return wanted


@cache
def compiler(command: str | None = None) -> tuple[str, str]:
    """Path and version line of the C compiler: `$CC`, gcc, clang or cc. Raises NoCompiler."""
    asked = os.environ.get("CC") if command is None else command
    for name in [asked] if asked else ["gcc", "clang", "cc"]:
        path = shutil.which(name)
        if path:
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            if done.returncode == 0:
                return path, done.stdout.splitlines()[0]
    raise NoCompiler(
        f"no C compiler found ({'CC=' + asked if asked else 'gcc, clang and cc were tried'}); everything runs, slower. "
        f"Install one: apt-get install gcc, dnf install gcc, or xcode-select --install."
    )


@cache
def _default_cache() -> Path:
    asked = os.environ.get("NEURALFORGE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(asked) if asked else Path(base) / "neuralforge"


_private: dict[Path, Path] = {}


def cache_folder() -> Path:
    """The folder of built libraries, made if missing; a private temporary one, with a warning, if it can't be
    written to."""
    folder = _default_cache()
    if folder in _private:
        return _private[folder]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
        return folder
    except OSError as e:
        return _use_private(folder, e)


def _use_private(folder: Path, why: OSError) -> Path:
    _private[folder] = Path(tempfile.mkdtemp(prefix="neuralforge-"))
    warnings.warn(
        f"the kernel cache {folder} can't be written ({why.strerror or why}): compiled kernels go to {_private[folder]} "
        f"and are built again in the next process. Free some space or set NEURALFORGE_CACHE to a writable folder.",
        stacklevel=3,
    )
    return _private[folder]


def load(source: str, name: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile C `source` (unless built before) and load it. Raises NoCompiler, or KernelError with the compiler's
    words and the path of the kept source."""
    return load_many([(source, name)], flags)[0]


def load_many(sources: Sequence[tuple[str, str]], flags: Sequence[str] = ()) -> list[ctypes.CDLL]:
    """As `load` for several (source, name) pairs, compiled side by side."""
    if len(sources) <= 1:
        return [_load(source, name, flags) for source, name in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: _load(*pair, flags), sources))


def _load(source: str, name: str, flags: Sequence[str]) -> ctypes.CDLL:
    path, version = compiler(os.environ.get("CC"))
    command = [path, *FLAGS, *ISA_FLAGS[isa()], *flags]
    key = "\0".join([source, version, *command, *sorted(cpu_features())])
    stem = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    library = cache_folder() / f"{stem}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # truncated, or built for another machine
            library.unlink(missing_ok=True)
    try:
        _build(command, source, library)
    except OSError as e:  # the disk filled up
        library = _use_private(library.parent, e) / library.name
        _build(command, source, library)
    return ctypes.CDLL(str(library))


def _build(command: list[str], source: str, library: Path) -> None:
    """Compile into a temporary file beside the library and rename it: other processes see all or nothing."""
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=library.stem + "-", dir=library.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-x", "c", "-", "-o", temporary, "-lm"], input=source, capture_output=True, text=True
        )
        if done.returncode:
            if "No space left" in done.stderr:
                raise OSError(28, "No space left on device")
            kept = library.with_suffix(".c")
            kept.write_text(source)
            lines = [line for line in done.stderr.splitlines() if "error" in line][:5] or done.stderr.splitlines()[:5]
            raise KernelError(
                f"the C compiler {command[0]} refused a generated kernel: {' | '.join(lines)}. The source is kept in "
                f"{kept}. Please report it; meanwhile CC=<another compiler> may help."
            )
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
