"""Kernels built ahead: while a program is being captured, on a thread of their own."""

import os
import subprocess
import sys

PROGRAM = """
import sys, torch
import neuralforge as nf
from neuralforge.kernels import native, toolchain
built, build = [], toolchain._build
toolchain._build = lambda command, source, library: (built.append(library.stem), build(command, source, library))
x = torch.linspace(-1, 1, 64, dtype=getattr(torch, sys.argv[2]))
torch.testing.assert_close(nf.jit(lambda x: torch.exp(x) * 2)(x), torch.exp(x) * 2)
native.built_ahead()
kernels = [kernel for kernel in native._ALL if bool(kernel.defines) == (x.dtype == torch.bfloat16)]
assert all(kernel._loaded for kernel in kernels) == (sys.argv[1] == "first")
print(*sorted(built))
"""


def test_once_for_a_machine(tmp_path):
    def run(which: str, dtype: str = "float32", **env: str) -> tuple[list[str], str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, which, dtype], capture_output=True, text=True,
            env={**os.environ, "NEURALFORGE_CACHE": str(tmp_path), **env},
        )  # fmt: skip
        assert not done.returncode, done.stderr
        return done.stdout.split(), done.stderr

    built, said = run("first")
    names = {library.split("-")[0] for library in built}
    assert {"attention", "cross_entropy", "matmul", "fused"} <= names and len(set(built)) == len(built)
    assert said.startswith("building the kernels for this machine, once")
    assert run("second") == ([], "")
    built, said = run("first", "bfloat16")
    assert {"attention", "matmul"} <= {library.split("-")[0] for library in built} and "for bfloat16 for this machine" in said
    assert run("second", "bfloat16") == ([], "")
    built, said = run("second", CC="no-such-compiler")
    assert not built and "building" not in said and "no C compiler" in said
