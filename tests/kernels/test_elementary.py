"""The elementary functions of `vector.h` over all of float32, against float64, on every instruction set."""

import math
from pathlib import Path

import pytest
import torch

from neuralforge.compiler.fusion import codegen
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
    "sin": (torch.sin, 2), "cos": (torch.cos, 2),
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


OTHERS = """
void run_pow(const float *x, const float *y, float *z, long n) {
    for (long i = 0; i < n; i += L) store_f(z + i, pow_f(load_f(x + i), load_f(y + i)));
}
void run_exp_d(const double *x, double *y, long n) { for (long i = 0; i < n; i += L) store_d(y + i, exp_d(load_d(x + i))); }
"""


def library():
    more = Path(codegen.__file__).with_name("vector_math.h").read_text()
    return toolchain.load(prelude() + more + "".join(map(loop, [*FUNCTIONS, "gelu", "gelu_tanh"])) + OTHERS, "elementary")


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    getattr(library(), f"run_{name}")(pointer(x), pointer(y), long(len(x)))
    return y


def ulps(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Errors in units of the last place."""
    return (found.double() - exact).abs() / 2.0 ** (exact.abs().clamp(min=TINY).log2().floor() - 23)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(name):
    truth, bound = FUNCTIONS[name]
    x = floats()
    found, exact = run(name, x), truth(x.double())
    rounded = exact.float()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found[rounded.isinf()], rounded[rounded.isinf()])
    error = ulps(found, exact)
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


def test_powers():
    """Of all kinds of numbers, by the C library's double precision: exact where that is special, else to 2 ulp."""
    generator = torch.Generator().manual_seed(0)
    special = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 1e-40, -1e-40, TINY, math.inf, -math.inf, math.nan, 1e30, 16777217.0, 8388609.0, -5e9]
    grid = torch.cartesian_prod(torch.tensor(special), torch.tensor(special))
    wide = (torch.randn(100_000, 2, generator=generator) * 20).exp2() * torch.randn(100_000, 2, generator=generator).sign()
    near_one = 1 + torch.randn(50_000, 2, generator=generator) * torch.tensor([0.01, 3000.0])
    whole = torch.stack([torch.randn(50_000, generator=generator) * 3, torch.randint(-9, 10, (50_000,), generator=generator).float()], 1)
    # each kind by itself: one number that is left to the C library takes its vector with it
    for pairs in (grid, wide, near_one, near_one.abs(), whole):
        x, y = torch.cat([pairs, pairs.new_ones(-len(pairs) % 16, 2)]).unbind(1)
        x, y = x.contiguous(), y.contiguous()
        found, exact = torch.empty_like(x), torch.pow(x.double(), y.double())
        library().run_pow(pointer(x), pointer(y), pointer(found), long(len(x)))
        rounded = exact.float()
        assert torch.equal(found.isnan(), exact.isnan())
        finite = rounded.isfinite()
        assert torch.equal(found[~finite & ~exact.isnan()], rounded[~finite & ~exact.isnan()])
        assert torch.equal(found.signbit()[finite], rounded.signbit()[finite])
        error = torch.where(finite, ulps(found, exact), 0)
        worst = error.argmax()
        assert error[worst] <= 2, f"pow({x[worst]}, {y[worst]}) = {found[worst]}, expected {exact[worst]}: {error[worst]} ulp"


def test_exponential_in_double():
    x = torch.cat([torch.linspace(-760, 720, 100_001), torch.randn(50_000), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]).double()
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    found, exact = torch.empty_like(x), x.exp()
    library().run_exp_d(pointer(x), pointer(found), long(len(x)))
    torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(torch.float64).eps, atol=5e-324, equal_nan=True)
