"""Kernels built ahead: while a program is being captured, on a thread of their own."""

import os
import subprocess
import sys

PROGRAM = """
import sys, torch
import neuralforge as nf
from neuralforge.kernels import native, toolchain
build = toolchain._build
toolchain._build = lambda command, source, library: (built.append(library.stem), build(command, source, library))
for dtype in (torch.float32, torch.bfloat16):
    built = []
    x = torch.linspace(-1, 1, 64, dtype=dtype)
    torch.testing.assert_close(nf.jit(lambda x: torch.exp(x) * 2)(x), torch.exp(x) * 2)
    native.built_ahead()
    kernels = [kernel for kernel in native._ALL if bool(kernel.defines) == (dtype == torch.bfloat16)]
    assert all(kernel._loaded for kernel in kernels) == (sys.argv[1] == "first")
    print(*sorted(built))
"""


def test_once_for_a_machine(tmp_path):
    def run(which: str, **env: str) -> tuple[list[str], str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, which], capture_output=True, text=True,
            env={**os.environ, "NEURALFORGE_CACHE": str(tmp_path), **env},
        )  # fmt: skip
        assert not done.returncode, done.stderr
        return done.stdout.splitlines(), done.stderr

    (built, of_bfloat16), said = run("first")
    built, names = built.split(), {library.split("-")[0] for library in built.split()}
    assert {"attention", "cross_entropy", "matmul", "fused"} <= names and len(set(built)) == len(built)
    assert {"attention", "matmul"} <= {library.split("-")[0] for library in of_bfloat16.split()}
    once, also = said.splitlines()
    assert once.startswith("building the kernels for this machine, once") and "for bfloat16 for this machine" in also
    assert run("second") == (["", ""], "")
    built, said = run("second", CC="no-such-compiler")
    assert built == ["", ""] and "building" not in said and "no C compiler" in said
