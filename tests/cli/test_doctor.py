"""`neuralforge doctor`: what it tells of this machine, and its advice for machines that lack something."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from neuralforge.bench.machine import inspect_machine
from neuralforge.cli import doctor
from neuralforge.kernels.choices import Choices


def run_doctor(**environment: str) -> dict:
    command = [sys.executable, "-m", "neuralforge.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_of_the_command_itself():
    told = run_doctor()
    assert told["torch_version"] == torch.__version__ and told["threads"] >= 1
    assert told["peaks"]["float32"] > 1e9 and told["bandwidth"] > 1e8
    subjects = {check["subject"] for check in told["checks"]}
    assert subjects >= {
        "cpu", "usable cores", "vectors", "bf16", "caches", "numa nodes", "memory", "disk", "compiler", "torch", "oneDNN",
        "MKL", "peak", "bandwidth", "gpus", "CUDA", "NCCL", "Gloo", "triton",
    }  # fmt: skip
    assert all(check["state"] in ("ok", "warn", "missing") for check in told["checks"])


def test_text_has_a_line_a_check_and_advice_below(monkeypatch, capsys):
    checks = [("ok", "cpu", "fast", ""), ("warn", "memory", "little", "buy some")]
    monkeypatch.setattr(doctor, "lines", lambda machine: iter(checks))
    monkeypatch.setattr(doctor, "timed_products", list)
    doctor.main([])
    first, second, advice = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", "cpu", "fast"] and second.split() == ["warn", "memory", "little"]
    assert advice.split() == ["->", "buy", "some"]


@pytest.fixture(scope="module")
def machine():
    return replace(
        inspect_machine(), cores=4, usable_cores=4, threads=4, isa="avx2", vector_features=("avx2",), available_memory=8 << 30, free_disk={"/": 1 << 40},
        onednn=True, gloo=True, gpus=(), nvidia_driver=None, nccl=None, triton="3",
    )  # fmt: skip


@pytest.fixture
def check(monkeypatch):
    """`check(machine)`: what isn't ok, as {subject: (state, advice)}; measurements left out."""
    monkeypatch.setattr(doctor, "compiles", lambda: None)
    monkeypatch.setattr(doctor, "peaks", dict)
    return lambda m: {subject: (state, advice) for state, subject, _, advice in doctor.lines(m) if state != "ok"}


@pytest.mark.parametrize(
    "facts, subject, state, advice",
    [
        ({"usable_cores": 0.5}, "usable cores", "warn", "quota"),
        ({"vector_features": ("avx512_bf16", "amx_bf16"), "amx": False}, "bf16", "warn", "kernel refuses"),
        ({"isa": "portable"}, "vectors", "warn", "slower"),
        ({"available_memory": 1 << 30}, "memory", "warn", "--train.batch"),
        ({"free_disk": {"/": 1 << 20}}, "disk", "warn", "little room"),
        ({"threads": 8}, "threads", "warn", "OMP_NUM_THREADS"),
        ({"onednn": False}, "oneDNN", "missing", "stock build"),
        ({"gloo": False}, "Gloo", "missing", "stock build"),
        ({"nvidia_driver": "550.1"}, "gpus", "warn", "CUDA build"),
        ({"gpus": ("H100",)}, "NCCL", "missing", "NCCL"),
    ],
)
def test_advice(facts, subject, state, advice, machine, check):
    assert check(machine) == {}, "nothing to mend on a sound machine"
    told = check(replace(machine, **facts))
    assert told[subject][0] == state and advice in told[subject][1]


@pytest.mark.parametrize(
    "script, state, fact, advice",
    [
        ("echo 'error: no omp.h' >&2; exit 1", "warn", "brokencc 1.0", "error: no omp.h"),
        ("exit 0", "warn", "brokencc 1.0", "too short"),  # it makes an empty library
        (None, "missing", "none", "apt-get install gcc"),
    ],
)
def test_a_compiler_that_is_missing_or_does_not_work(script, state, fact, advice, tmp_path):
    compiler = tmp_path / "brokencc"
    if script:
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "brokencc 1.0" && exit 0\n{script}\n')
        compiler.chmod(0o755)
    told = run_doctor(CC=str(compiler), NEURALFORGE_CACHE=str(tmp_path / "cache"))
    (check,) = [check for check in told["checks"] if check["subject"] == "compiler"]
    assert (check["state"], check["fact"]) == (state, fact) and advice in check["advice"]


def test_table_of_timed_products(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "lines", lambda machine: iter([]))
    choices = Choices("products")
    choices.get("aten.mm (6, 40)(40, 1);(40, 30)(1, 40) threads=2 avx2", lambda: {"choice": "own", "seconds": {"aten": 2e-6, "own": 1e-6}})
    choices.get("aten.addmm (8,)(1,);(50, 60)(60, 1);(60, 8)(8, 1) threads=2", lambda: {"choice": "aten", "seconds": {"aten": 1e-3, "own": float("inf")}})
    for n in range(20):
        choices.get(f"aten.mm (2, {n})({n}, 1);({n}, 3)(3, 1)", lambda: {"choice": "aten", "seconds": {"aten": 1e-6}})
    choices.save()
    doctor.main([])
    told = capsys.readouterr().out
    assert "12 of 22, all with --products" in told
    assert "50x60 60x8" in told and "0.002 (7)" in told
    _, head, addmm, mm, *_ = [line for line in told.splitlines() if line]
    assert head.split() == ["product", "shapes", "and", "layouts", "aten", "own", "conditions"]
    assert addmm.split() == ["addmm", "8", "50x60", "60x8", "1.000", "(0)*", "-", "threads=2"]
    assert mm.split() == ["mm", "6x40", "40x30t", "0.002", "(7)", "0.001", "(14)*", "threads=2", "avx2"]
    doctor.main(["--products"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 22
