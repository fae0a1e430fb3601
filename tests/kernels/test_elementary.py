"""The elementary functions of `vector.h` over all of float32, against float64, on every instruction set."""

import math
from pathlib import Path

import pytest
import torch

from neuralforge.compiler import codegen
from neuralforge.kernels import toolchain
from neuralforge.kernels.native import long, pointer, prelude

STEP = 4099
"""Every so many-th of the 2^32 floats is tried: some of each exponent, and the lower bits differ."""
TINY = torch.finfo(torch.float32).tiny


pytestmark = pytest.mark.usefixtures("isa")


def gelu(x):
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x):
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


FUNCTIONS = {
    "exp": (torch.exp, 2), "tanh": (torch.tanh, 2), "erf": (torch.erf, 2), "log": (torch.log, 2),
    "expm1": (torch.expm1, 2), "exp2": (torch.exp2, 2), "log2": (torch.log2, 2),
    "log1p": (torch.log1p, 3), "sigmoid": (torch.sigmoid, 3),  # a sum and a quotient more
}  # fmt: skip
"""The truth, and the greatest error in units of the last place."""


def floats() -> torch.Tensor:
    """Of all kinds: normal, subnormal, zero, infinite, NaN."""
    bits = torch.arange(-(2**31), 2**31, STEP).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0])])
    return torch.cat([x, x.new_zeros(-len(x) % 16)])


def loop(name: str) -> str:
    body = f"for (long i = 0; i < n; i += L) store_f(y + i, {name}_f(load_f(x + i)));"
    return f"\nvoid run_{name}(const float *x, float *y, long n) {{ {body} }}"


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    more = Path(codegen.__file__).with_name("vector_math.h").read_text()
    library = toolchain.load(prelude() + more + "".join(map(loop, [*FUNCTIONS, "gelu", "gelu_tanh"])), "elementary")
    y = torch.empty_like(x)
    getattr(library, f"run_{name}")(pointer(x), pointer(y), long(len(x)))
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(name):
    truth, bound = FUNCTIONS[name]
    x = floats()
    found, exact = run(name, x), truth(x.double())
    rounded = exact.float()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found[rounded.isinf()], rounded[rounded.isinf()])
    ulp = 2.0 ** (exact.abs().clamp(min=TINY).log2().floor() - 23)
    error = (found.double() - exact).abs() / ulp
    counts = rounded.isfinite()
    if name == "sigmoid":  # which is zero where it were subnormal, as in PyTorch
        assert (found[exact < TINY] <= TINY).all()
        counts &= exact >= TINY
    worst = torch.where(counts, error, 0).argmax()
    assert error[worst] <= bound, f"{name}({x[worst]}) = {found[worst]}, expected {exact[worst]}: {error[worst]} ulp"


@pytest.mark.parametrize("name, truth", [("gelu", gelu), ("gelu_tanh", gelu_tanh)])
def test_gelu_is_as_exact_as_its_argument(name, truth):
    """On the negative side rounding x^2 costs digits: the error is bounded in units of x, not of the result."""
    x = floats()
    x = x[x.abs() < 1e12]  # below, no power of x overflows
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    found, exact = run(name, x), truth(x.double())
    assert ((found.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * x.abs().clamp(min=TINY)).all()
    assert torch.equal(found[x > 10], x[x > 10])
