"""The C code under gcc's address and undefined-behaviour sanitizers, and from several threads at once.

Tensors are guarded by the address sanitizer as it replaces malloc. The thread sanitizer can't be used: it doesn't know the
barriers of gcc's OpenMP runtime, and takes every parallel loop for a race.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neuralforge.kernels.toolchain import compiler

sys.path.insert(0, str(Path(__file__).parent))
from odd_shapes import cases  # noqa: E402

ROOT = Path(__file__).parents[2]
CALLS = "--param asan-instrumentation-with-call-threshold=0"  # checks by calls, which gcc compiles in two thirds of the time
SANITIZERS = f"-fsanitize=address,undefined -fno-sanitize-recover=all -g1 {CALLS}"
BEYOND_THE_END = """
import torch
from neuralforge.kernels.native import long, pointer
from neuralforge.kernels.toolchain import load
x = torch.ones(1000)
load("float last(const float *x, long n) { return x[n - 1]; }", "last").last(pointer(x), long(LENGTH))
print("read")
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sanitized():
    """The environment in which kernels are built with sanitizers."""
    (path, *_), version = compiler()
    find = lambda name: subprocess.run([path, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    libraries = [find("libasan.so"), find("libubsan.so")]
    if "gcc" not in version or not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("needs gcc with its sanitizers")
    return {"CC": f"{path} {SANITIZERS}", "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def test_no_kernel_leaves_its_memory_or_does_what_is_undefined(sanitized):
    done = run("tests/kernels/odd_shapes.py", **sanitized)
    assert done.returncode == 0 and "all kernels agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("length, message", [(1000, ""), (1001, "heap-buffer-overflow")])
def test_the_sanitizer_sees_a_read_beyond_a_tensors_end(length, message, sanitized):
    done = run("-c", BEYOND_THE_END.replace("LENGTH", str(length)), **sanitized)
    assert ("read" in done.stdout.split()) == (not message) and message in done.stderr


def test_several_threads_at_once():
    """Each calls every kernel, which shares its work out among the threads of OpenMP."""
    together = cases()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: [case() for case in together[n:] + together[:n]], range(0, len(together), 6)))
