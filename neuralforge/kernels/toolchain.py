"""Building C at run time: find a compiler, compile for this CPU, keep the libraries on disk.

    library = load("void twice(float *x, long n) { for (long i = 0; i < n; i++) x[i] *= 2; }", "twice")

The cache (`$NEURALFORGE_CACHE`, else `$XDG_CACHE_HOME/neuralforge`, else `~/.cache/neuralforge`) is keyed by the
source, the flags, the compiler's version and the CPU's features, and safe under several processes. Libraries are
built with OpenMP and loaded after torch, whose OpenMP runtime they then share: one pool of threads. (gcc's do; clang's
bring LLVM's runtime and a second pool, so gcc is tried first.)
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP runtime that our libraries bind to)

from ..errors import KernelError, warn

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISA_FLAGS = {"amx": _AVX512, "avx512": _AVX512, "avx2": ["-mavx2", "-mfma", "-mf16c"], "portable": []}
_NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma", "f16c"}}
FLAGS = ["-O2", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class NoCompiler(KernelError):
    """There is no C compiler on this machine."""


_told: set[type] = set()


def plain_operators_instead(why: KernelError) -> None:
    """One notice a process, of each kind of failure, that something can't be built and PyTorch's operators run in its
    place."""
    if type(why) not in _told:
        _told.add(type(why))
        warn(f"fused kernels can't be built, and plain operators run in their place: {why}")


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


def best_isa() -> str:
    """The widest instruction set of this CPU that code is generated for: "amx" (AVX-512 and tiles), "avx512", "avx2" or
    "portable"."""
    vectors = next((name for name, needs in _NEEDS.items() if needs <= cpu_features()), "portable")
    return "amx" if vectors == "avx512" and amx_granted() else vectors


def isa() -> str:
    """The instruction set to compile for: `best_isa()`, or a lesser one that `$NEURALFORGE_ISA` asks for."""
    best = best_isa()
    wanted = os.environ.get("NEURALFORGE_ISA")
    if not wanted:
        return best
    order = list(ISA_FLAGS)
    if wanted not in order:
        raise KernelError(f"NEURALFORGE_ISA={wanted}: expected one of {', '.join(order)}. Correct it or unset it.")
    if order.index(wanted) < order.index(best):
        raise KernelError(f"NEURALFORGE_ISA={wanted}: this CPU has {best} only. Unset the variable.")
    return wanted


def has_bfloat16() -> bool:
    """Has the instruction set to compile for bfloat16 arithmetic?"""
    return isa() in ("amx", "avx512") and "avx512_bf16" in cpu_features()


@cache
def amx_granted() -> bool:
    """Has the CPU AMX's tiles of bfloat16, and does the kernel let this process use them? It is asked once: tile registers
    enlarge every thread's saved state, so Linux hands them out on request
    (https://docs.kernel.org/arch/x86/xstate.html)."""
    if not {"amx_tile", "amx_bf16"} <= cpu_features():
        return False
    arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, ARCH_REQ_XCOMP_PERM, ctypes.c_long(XFEATURE_XTILEDATA)) == 0


def has_amx() -> bool:
    """Has the instruction set to compile for AMX, and may this process use it?"""
    return isa() == "amx"


def fast_dot() -> bool:
    """Do vectors multiply bfloat16 faster than float32? AMD's do, at twice the rate; those of CPUs made for AMX at half."""
    return has_bfloat16() and "amx_bf16" not in cpu_features()


def compiler() -> tuple[tuple[str, ...], str]:
    """Command and version line of the C compiler: $CC, which may hold options too; else gcc, clang or cc. Raises NoCompiler."""
    return _compiler(os.environ.get("CC"))


@cache
def _compiler(asked: str | None) -> tuple[tuple[str, ...], str]:
    for name, *options in [shlex.split(asked)] if asked and asked.strip() else [["gcc"], ["clang"], ["cc"]]:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run([path, *options, "--version"], capture_output=True, text=True)
        except OSError:  # not a program for this machine
            continue
        if done.returncode == 0 and done.stdout:
            return (path, *options), done.stdout.splitlines()[0]
    raise NoCompiler(
        f"no C compiler found ({'CC=' + asked if asked else 'gcc, clang and cc were tried'}); everything runs, slower. "
        f"Install one: apt-get install gcc, or dnf install gcc."
    )


_private: dict[Path, Path] = {}
_private_lock = threading.Lock()


def _wanted_folder() -> Path:
    asked, base = os.environ.get("NEURALFORGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if asked:
        return Path(os.path.expanduser(asked))
    try:
        return (Path(base) if base else Path.home() / ".cache") / "neuralforge"
    except RuntimeError:  # a user without a home folder
        return Path("/.cache/neuralforge")


def cache_folder() -> Path:
    """The folder of built libraries, made if missing; a private temporary one, with a warning, if it can't be
    written to. Raises KernelError if there is no such place either."""
    folder = _wanted_folder()
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


def _use_private(failed: Path, why: OSError) -> Path:
    """A temporary folder in place of `failed`, the same one for all threads, removed when the process ends."""
    wanted, reason = _wanted_folder(), why.strerror or why
    with _private_lock:
        try:
            if failed in _private.values():
                raise why
            if wanted not in _private:
                _private[wanted] = Path(tempfile.mkdtemp(prefix="neuralforge-"))
                atexit.register(_clean, _private[wanted], os.getpid())
                warn(
                    f"the kernel cache {wanted} can't be used ({reason}): compiled kernels go to {_private[wanted]} and "
                    f"are built again in the next process. Free some space, or set NEURALFORGE_CACHE to a folder that "
                    f"can be written to and run programs from."
                )
            return _private[wanted]
        except OSError as e:
            raise KernelError(
                f"neither the kernel cache {wanted} nor a temporary folder can hold compiled kernels "
                f"({e.strerror or e}). Free some space, or set NEURALFORGE_CACHE to a folder with room."
            ) from e


def _clean(folder: Path, owner: int) -> None:
    if os.getpid() == owner and not any(folder.glob("*.c")):  # a source that didn't compile is kept to be read
        shutil.rmtree(folder, ignore_errors=True)


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
    command, file = _place(source, name, flags)
    wanted = _wanted_folder()
    for folder in dict.fromkeys((wanted, _private.get(wanted, wanted))):  # a cache that is read-only may still have it
        if _intact(folder / file):
            try:
                return ctypes.CDLL(str(folder / file))
            except OSError:  # misses something that this machine hasn't got
                pass
    folder = cache_folder()
    while True:
        try:
            _build(command, source, folder / file)
            return ctypes.CDLL(str(folder / file))
        except OSError as e:  # the disk filled up, or programs can't be run from it
            folder = _use_private(folder, e)


def in_cache(source: str, name: str) -> bool:
    """Would `load` find the library built? Raises NoCompiler."""
    _, file = _place(source, name, ())
    wanted = _wanted_folder()
    return _intact(wanted / file) or _intact(_private.get(wanted, wanted) / file)


def _place(source: str, name: str, flags: Sequence[str]) -> tuple[list[str], str]:
    """The compiler's command, and the library's file name in the cache."""
    call, version = compiler()
    command = [*call, *FLAGS, *ISA_FLAGS[isa()], *flags]
    key = "\0".join([source, version, *command, *sorted(cpu_features())])
    return command, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"


def _intact(library: Path) -> bool:
    """Mapping a truncated library would kill the process."""
    return read_whole(library) is not None


def read_whole(path: Path) -> bytes | None:
    """What a file that ends with its checksum holds before it; None if it isn't there, or not whole, as a crash may leave it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[:-32]
    return content if data[-32:] == checksum(content) else None


def checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place if the block ends well: other processes see all or nothing. Everybody may read
    it: a cache may be made by one user and read by others."""
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _build(command: list[str], source: str, library: Path) -> None:
    """Compile into the file, which ends with its checksum."""
    with replacing(library) as temporary:
        done = subprocess.run(
            [*command, "-x", "c", "-", "-o", str(temporary), "-lm"], input=source, capture_output=True, text=True,
            env={**os.environ, "TMPDIR": str(library.parent), "LC_ALL": "C"},
        )  # fmt: skip
        if done.returncode:
            for code in (errno.ENOSPC, errno.EDQUOT):
                if os.strerror(code) in done.stderr:
                    raise OSError(code, os.strerror(code))
            kept = library.with_suffix(".c")
            kept.write_text(source)
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            if done.returncode < 0:
                lines = [f"it was killed by signal {-done.returncode}, perhaps for lack of memory"]
            raise KernelError(
                f"the C compiler {command[0]} refused a generated kernel: {' | '.join(lines[:5])}. The source is kept "
                f"in {kept}. Please report it; meanwhile CC=<another compiler> may help."
            )
        with open(temporary, "r+b") as built:
            built.write(checksum(built.read()))
