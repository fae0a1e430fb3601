"""check_grads finds what is wrong, and nothing else."""

import pytest
import torch

import neuralforge as nf


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_check_grads_finds_a_wrong_rule():
    x = f64(4)
    nf.testing.check_grads(lambda x: x.sin() * x.sum(), (x,), order=3)
    nf.testing.check_grads(lambda d: {"y": (d["z"] * d["z"].exp()).sum()}, ({"z": torch.randn(3, dtype=torch.complex128)},))
    wrong = nf.custom_jvp(lambda x: x.sin())
    wrong.defjvp(lambda p, t: (p[0].sin(), 1.01 * p[0].cos() * t[0]))
    for modes in (("fwd",), ("rev",)):
        with pytest.raises(AssertionError, match="central differences give"):
            nf.testing.check_grads(wrong, (x,), modes=modes)
    with pytest.raises(AssertionError, match="float64"):
        nf.testing.check_grads(torch.sin, (torch.ones(2),))


def test_nan_other_leaves_and_other_kinds_of_results():
    nan = nf.custom_jvp(lambda x: x * 2)
    nan.defjvp(lambda p, t: (p[0] * 2, t[0] * float("nan")))
    with pytest.raises(AssertionError, match="nan"):
        nf.testing.check_grads(nan, (f64(3),), order=1)
    f = lambda x, i, scale: {"y": x[i].sin() * scale, "at": x.argmax(), "n": 3}
    nf.testing.check_grads(f, (f64(3), torch.tensor([0, 2]), 2.0))
    with pytest.raises(AssertionError, match="mode 'forward'"):
        nf.testing.check_grads(torch.sin, (f64(2),), modes=("forward",))


def test_second_order_of_a_wrong_rule_is_found():
    """The first derivative is right where it is evaluated, its derivative isn't."""
    cube = nf.custom_jvp(lambda x: x**3)
    cube.defjvp(lambda p, t: (p[0] ** 3, 3 * p[0] * p[0].detach() * t[0]))
    nf.testing.check_grads(cube, (f64(3),), order=1)
    with pytest.raises(AssertionError, match="derivative of (fwd|rev) of f"):
        nf.testing.check_grads(cube, (f64(3),), order=2)
