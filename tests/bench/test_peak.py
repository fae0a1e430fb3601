import ctypes
import os

import pytest
import torch

from neuralforge.bench import bandwidth, peak, peak_flops
from neuralforge.errors import KernelError
from neuralforge.kernels import toolchain


@pytest.fixture(autouse=True)
def forget():
    peak_flops.cache_clear()
    yield
    peak_flops.cache_clear()


def test_peak_is_remembered_and_says_how():
    found = peak_flops("float32", 1)
    assert "multiply-adds on registers, 1 threads" in found.how
    assert 1e9 < found.value < 1e12  # of one core, in FLOP/s
    assert peak_flops("float32", 1) is found


def test_work_counted_is_work_done():
    """Each of the chains takes one multiply-add, x <- x * m + a, a turn of the loop."""
    source = peak._source("float64")
    summed = source.replace("return sink == 12345.678 ? 0 : end - start;", "return sink;")
    assert summed != source
    library = toolchain.load(summed, "peak-sum", toolchain.ISA_FLAGS[toolchain.best_isa()])
    library.run.restype = ctypes.c_double
    chains = [0.999 * j for j in range(peak.CHAINS)]
    for _ in range(5):
        chains = [x * 0.999 + 0.001 for x in chains]
    assert library.run(ctypes.c_long(5), 2, 0) == pytest.approx(2 * sum(chains))


def test_threads_keep_the_cpus_they_may_run_on():
    before = os.sched_getaffinity(0)
    peak_flops("float32", 2)
    assert os.sched_getaffinity(0) == before


def test_the_peak_is_the_machines_whatever_is_compiled_for(monkeypatch):
    monkeypatch.setenv("NEURALFORGE_ISA", "portable")
    assert f"vector_size({peak.WIDTH[toolchain.best_isa()]})" in peak._source("float32")
    assert peak_flops("float32", 1).value > 0


def test_without_a_compiler_products_are_timed(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    before = torch.get_num_threads()
    found = peak_flops("float32", 1)
    assert "large matrix products" in found.how and found.value > 1e9
    assert torch.get_num_threads() == before


def test_bfloat16_needs_its_instructions(monkeypatch):
    monkeypatch.setattr(peak, "amx_granted", lambda: False)
    monkeypatch.setattr(peak, "cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(KernelError, match="no bfloat16 arithmetic"):
        peak_flops("bfloat16")


@pytest.mark.skipif("avx512_bf16" not in toolchain.cpu_features(), reason="no bfloat16 instructions")
def test_bfloat16(monkeypatch):
    monkeypatch.setattr(peak, "amx_granted", lambda: False)
    found = peak_flops("bfloat16", 1)
    assert found.value > 1e9 and "multiply-adds" in found.how


@pytest.mark.skipif(not toolchain.amx_granted(), reason="no AMX")
def test_amx():
    found = peak_flops("bfloat16", 2)
    assert 1e10 < found.value < 1e13 and "AMX tile products" in found.how
    a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))  # oneDNN's own tiles after ours
    assert torch.allclose((a @ b).float(), a.float() @ b.float(), atol=0.5, rtol=0.02)


def test_peak_of_products(monkeypatch):
    """bfloat16 that the CPU lacks is computed in float32; six products of tiles are one of float32."""
    known = {"float32": peak.Peak(3.0, "vectors"), "float64": peak.Peak(1.5, "vectors")}

    def measured(dtype="float32"):
        if dtype not in known:
            raise KernelError("no such instructions")
        return known[dtype]

    monkeypatch.setattr(peak, "peak_flops", measured)
    monkeypatch.setattr(peak, "has_amx", lambda: False)
    values = lambda: [peak.product_peak(getattr(torch, name)).value for name in ("float32", "float64", "bfloat16")]
    assert values() == [3.0, 1.5, 3.0]
    known["bfloat16"] = peak.Peak(6.0, "vectors")
    assert values() == [3.0, 1.5, 6.0]
    known["bfloat16"] = peak.Peak(24.0, "tiles")
    monkeypatch.setattr(peak, "has_amx", lambda: True)
    assert values() == [4.0, 1.5, 24.0] and peak.product_peak().how == "tiles, six of which are one of float32"
    known["bfloat16"] = peak.Peak(12.0, "tiles")
    assert values() == [3.0, 1.5, 12.0] and peak.product_peak().how == "vectors"


def test_wrong_arguments():
    with pytest.raises(KernelError, match="'float8'; expected float32, float64 or bfloat16"):
        peak_flops("float8")
    with pytest.raises(KernelError, match="threads=0; expected 1 or more"):
        peak_flops("float32", 0)


def test_bandwidth():
    found = bandwidth()
    assert found.how == "triad" and 1e8 < found.value < 1e13  # bytes/s
