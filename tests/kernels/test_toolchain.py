"""Building C: the cache and what can go wrong with it, the compiler and what can go wrong with it, threads."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from neuralforge.errors import KernelError
from neuralforge.kernels import toolchain
from neuralforge.kernels.toolchain import NoCompiler, cache_folder, compiler, isa, load, load_many

ANSWER = "int answer(void) { return 42; }"
OPENMP = """
#include <omp.h>
int threads(void) { int n = 0;
#pragma omp parallel reduction(+:n)
n += 1;
return n; }
void *runtime(void) { return (void *)omp_get_max_threads; }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no memory of private folders."""
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "_private", {})
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
    """The names of the libraries that get built."""
    built, build = [], toolchain._build
    monkeypatch.setattr(toolchain, "_build", lambda c, s, library: (built.append(library.name), build(c, s, library)))
    return built


@pytest.fixture
def unwritable(cache, monkeypatch):
    """Nothing can be written to the cache (even by root, whom permissions don't stop)."""
    cache.mkdir(exist_ok=True)
    make = tempfile.mkstemp

    def refuse(*args, **kwargs):
        if kwargs.get("dir") == cache:
            raise OSError(30, "Read-only file system")
        return make(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def answer(source=ANSWER, **kwargs):
    return load(source, "answer", **kwargs).answer()


def test_compiles_and_finds_it_again(cache, builds):
    assert answer() == answer() == 42
    assert len(builds) == 1
    assert [file.name for file in cache.iterdir()] == builds  # no temporary file is left


def test_the_key_tells_sources_flags_and_instruction_sets_apart(builds, monkeypatch):
    assert answer() == 42
    assert answer(ANSWER.replace("42", "43")) == 43
    flagged = "int answer(void) { return VALUE; }"
    assert answer(flagged, flags=["-DVALUE=1"]) == 1
    assert answer(flagged, flags=["-DVALUE=2"]) == 2
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset({"another", "cpu"}))
    assert answer() == 42
    assert len(set(builds)) == 5


def test_load_many_keeps_the_order():
    found = load_many([(f"int value(void) {{ return {n}; }}", f"value{n}") for n in range(5)])
    assert [library.value() for library in found] == list(range(5))
    assert load_many([]) == []


def test_processes_and_threads_may_build_the_same_library_at_once(cache):
    code = f"from neuralforge.kernels.toolchain import load; print(load({ANSWER!r}, 'answer').answer())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: answer(), range(4))) == [42] * 4
    assert [p.communicate()[0].split() for p in processes] == [[b"42"]] * 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 0.3, 0.99, "flipped"])
def test_a_damaged_library_is_built_again(cache, builds, keep):
    assert answer(ANSWER + "const char room[1 << 16] = {1};") == 42
    (library,) = cache.iterdir()
    content = bytearray(library.read_bytes())
    if keep == "flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[int(keep * len(content)) :]
    replacement = cache.parent / "damaged"
    replacement.write_bytes(content)
    os.replace(replacement, library)  # a new file: the old one is mapped by this process
    assert answer(ANSWER + "const char room[1 << 16] = {1};") == 42
    assert len(builds) == 2
    assert toolchain._intact(library)


def test_a_library_that_does_not_load_here_is_built_again(cache, builds, monkeypatch):
    assert answer() == 42
    opened = []

    def refuse_once(path):
        opened.append(path)
        if len(opened) == 1:
            raise OSError("wrong ELF class")
        return real(path)

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", refuse_once)
    assert answer() == 42
    assert len(builds) == 2


def test_an_unwritable_cache_gives_way_to_a_temporary_folder_with_one_warning(cache, unwritable):
    with pytest.warns(UserWarning, match=f"{cache} can't be used.*Read-only file system.*NEURALFORGE_CACHE") as said:
        found = load_many([(f"int value(void) {{ return {n}; }}", "value") for n in range(4)])
        assert answer() == 42
        private = cache_folder()
    assert [library.value() for library in found] == [0, 1, 2, 3]
    assert len(said) == 1
    assert private != cache and len(list(private.iterdir())) == 5 and not list(cache.iterdir())
    toolchain._clean(private, os.getpid() + 1)  # another process's folder stays
    assert private.exists()
    toolchain._clean(private, os.getpid())
    assert not private.exists()


def test_a_read_only_cache_that_has_the_library_is_used(cache, monkeypatch, request):
    assert answer() == 42
    request.getfixturevalue("unwritable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer() == 42


def test_a_cache_folder_that_is_a_file_gives_way_too(cache):
    cache.write_text("")
    with pytest.warns(UserWarning, match="can't be used"):
        assert answer() == 42


def test_a_disk_that_fills_up_while_compiling(cache, tmp_path, monkeypatch):
    real = compiler()[0]
    fake = tmp_path / "cc"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *"{cache}"*) echo "as: No space left on device" >&2; exit 1;; esac\nexec {real[0]} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.warns(UserWarning, match="can't be used.*No space left"):
        assert answer() == 42
    assert not list(cache.iterdir())


def test_no_room_anywhere_is_an_error(cache, unwritable, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KernelError, match="neither the kernel cache .* nor a temporary folder.*No space left"):
        answer()


def test_the_private_folder_may_fail_as_well(cache, unwritable):
    with pytest.warns(UserWarning):
        private = cache_folder()
    shutil.rmtree(private)
    with pytest.raises(KernelError, match="neither the kernel cache"):
        answer()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEURALFORGE_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("NEURALFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "neuralforge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "neuralforge"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert toolchain._wanted_folder() == Path("/.cache/neuralforge")


def test_a_compile_failure_names_the_error_and_keeps_the_source(cache):
    with pytest.raises(KernelError, match=r"error: .*undeclared_name") as caught:
        load("int answer(void) { return undeclared_name; }", "wrong")
    kept = re.search(r"kept in (\S+\.c)\.", str(caught.value)).group(1)
    assert "undeclared_name" in Path(kept).read_text()
    assert [file.suffix for file in cache.iterdir()] == [".c"]


def test_a_compile_failure_in_a_thread_reaches_the_caller():
    with pytest.raises(KernelError, match="undeclared_name"):
        load_many([(ANSWER, "answer"), ("int f(void) { return undeclared_name; }", "wrong")])


@pytest.mark.parametrize("cc", ["no-such-compiler", "false", "not-executable-format"])
def test_no_compiler(cc, tmp_path, monkeypatch):
    if cc == "not-executable-format":
        path = tmp_path / cc
        path.write_bytes(b"\x7fELF nonsense")
        path.chmod(0o755)
        cc = str(path)
    monkeypatch.setenv("CC", cc)
    with pytest.raises(NoCompiler, match=f"CC={cc}.*apt-get install gcc"):
        answer()


def test_cc_may_hold_options_and_a_blank_one_counts_as_none(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CC", f"{compiler()[0][0]} -DVALUE=7")
    assert answer("int answer(void) { return VALUE; }") == 7
    monkeypatch.setenv("CC", " ")
    assert answer() == 42


def test_instruction_sets(monkeypatch):
    names = list(toolchain.ISA_FLAGS)
    best = names.index(toolchain.best_isa())
    macros = {"amx": "__AVX512F__", "avx512": "__AVX512F__", "avx2": "__AVX2__", "portable": "1"}
    for name in names[best:]:
        monkeypatch.setenv("NEURALFORGE_ISA", name)
        assert isa() == name
        others = "\n".join(f"#ifdef {macros[other]}\n#error {other}\n#endif" for other in names[: names.index(name)] if macros[other] != macros[name])
        assert answer(f"#if !{macros[name]}\n#error missing\n#endif\n{others}\n{ANSWER}") == 42
    monkeypatch.setattr(toolchain, "cpu_features", lambda: frozenset({"sse2"}))
    for name in names[:-1]:
        monkeypatch.setenv("NEURALFORGE_ISA", name)
        with pytest.raises(KernelError, match=f"NEURALFORGE_ISA={name}: this CPU has portable only"):
            isa()
    monkeypatch.setenv("NEURALFORGE_ISA", "avx1024")
    with pytest.raises(KernelError, match="expected one of amx, avx512, avx2, portable"):
        isa()
    monkeypatch.delenv("NEURALFORGE_ISA")
    assert isa() == "portable"


@pytest.mark.usefixtures("threads_restored")
def test_one_pool_of_threads_shared_with_torch():
    library = load(OPENMP, "openmp")
    library.runtime.restype = ctypes.c_void_p
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1
    (home,) = [
        line.split()[-1] for line in maps
        if int(line.split("-")[0], 16) <= library.runtime() < int(line.split("-")[1].split()[0], 16)
    ]  # fmt: skip
    assert Path(home).is_relative_to(Path(torch.__file__).parent)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert library.threads() == count
