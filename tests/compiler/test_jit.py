"""nf.jit: the same results as eager code, one compilation a shape, donation, writes, errors."""

import re

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import CaptureError


def test_same_result_and_cache():
    calls = []

    @nf.jit
    def f(x, scale, *, shift=1.0):
        calls.append(1)
        return {"y": (x * scale).softmax(-1) + shift, "n": scale}

    x = torch.randn(3, 4)
    for _ in range(3):
        out = f(x, 2)
        assert torch.allclose(out["y"], (x * 2).softmax(-1) + 1) and out["n"] == 2
    assert len(calls) == 1
    assert torch.allclose(f(x, 3)["y"], (x * 3).softmax(-1) + 1), "another static value is another program"
    assert torch.allclose(f(x, 2, shift=0.0)["y"], (x * 2).softmax(-1))
    assert torch.allclose(f(x[:2], 2)["y"], (x[:2] * 2).softmax(-1) + 1)
    assert torch.allclose(f(x.t(), 2)["y"], (x.t() * 2).softmax(-1) + 1)
    assert torch.allclose(f(x.double(), 2)["y"], (x.double() * 2).softmax(-1) + 1)
    assert len(calls) == 6


def test_results_survive_the_next_call():
    f = nf.jit(lambda x: (x.exp(), x.exp()[0], x.t()))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    first = f(a)
    f(b)
    assert torch.allclose(first[0], a.exp()) and torch.allclose(first[1], a[0].exp()) and torch.equal(first[2], a.t())


def test_a_constant_result_is_a_copy():
    f = nf.jit(lambda x: (x, torch.arange(3)))
    out = f(torch.ones(1))[1]
    out.add_(5)
    assert f(torch.ones(1))[1].tolist() == [0, 1, 2]


def test_donation_reuses_memory_and_gives_the_same():
    def step(state, g):
        m = state["m"] * 0.9 + g
        return {"p": state["p"] - 0.1 * m, "m": m}, (m * m).sum()

    plain, donating = nf.jit(step), nf.jit(step, donate=0)
    g = torch.randn(100)
    state = {"p": torch.randn(100), "m": torch.randn(100)}
    expected, norm = plain(state, g)
    assert expected["p"].data_ptr() != state["p"].data_ptr()
    given = {k: v.clone() for k, v in state.items()}
    pointers = {t.data_ptr() for t in given.values()}
    found, norm2 = donating(given, g)
    assert {t.data_ptr() for t in found.values()} == pointers
    assert torch.equal(found["p"], expected["p"]) and torch.equal(found["m"], expected["m"]) and norm == norm2


def test_donated_input_that_is_still_read_later():
    def f(x, y):
        z = x + y
        return z, x * z

    x, y = torch.randn(5), torch.randn(5)
    expected = f(x, y)
    found = nf.jit(f, donate=0)(x.clone(), y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_donated_tensors_that_share_memory_are_copied():
    def f(a, b):
        return a + 1, b + 2

    x = torch.zeros(4)
    a, b = nf.jit(f, donate=(0, 1))(x, x)
    assert a.tolist() == [1] * 4 and b.tolist() == [2] * 4


def test_writes_to_arguments_take_effect():
    @nf.jit
    def f(x, y):
        x[0] += y
        return x.sum()

    x = torch.zeros(2, 3)
    assert f(x, torch.ones(3)) == 3
    assert x.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert f(x, torch.ones(3)) == 6


def test_jit_composes_with_gradients_both_ways():
    f = lambda w, x: F.gelu(x @ w).square().mean()
    w, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = nf.grad(f)(w, x)
    assert torch.allclose(nf.jit(nf.grad(f))(w, x), expected)
    assert torch.allclose(nf.grad(nf.jit(f))(w, x), expected)
    assert torch.allclose(nf.jit(nf.grad(nf.jit(f)))(w, x), expected)


def test_random_numbers_follow_torchs_generator():
    f = nf.jit(lambda x: F.dropout(x, 0.5))
    x = torch.ones(1000)
    torch.manual_seed(0)
    a, b = f(x), f(x)
    torch.manual_seed(0)
    assert torch.equal(f(x), a) and not torch.equal(a, b)


def test_shapes_with_no_elements_and_no_dimensions():
    f = nf.jit(lambda x, s: (x * s).sum(0))
    assert f(torch.ones(0, 3), torch.tensor(2.0)).tolist() == [0, 0, 0]
    assert f(torch.tensor(3.0).reshape(1), torch.tensor(2.0)) == 6


def test_one_program_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    f = nf.jit(lambda x: (x.exp() * 2).tanh().exp().sum())
    inputs = [torch.full((1000,), i / 20) for i in range(20)]
    expected = [f(x).item() for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: f(x).item(), inputs * 5)) == expected * 5


def test_unhashable_static_argument():
    class Odd:
        __hash__ = None

    with pytest.raises(CaptureError, match="neither a tensor nor hashable"):
        nf.jit(lambda x, o: x)(torch.ones(1), Odd())


def test_donate_out_of_range():
    with pytest.raises(CaptureError, match=r"donate=\(1,\) in a call with 1 positional"):
        nf.jit(lambda x: x, donate=1)(torch.ones(1))


def test_explain():
    @nf.jit(donate=0)
    def step(w, x):
        return w - 0.1 * nf.grad(lambda w: (x @ w).square().mean())(w), x @ w

    told = nf.explain(step, torch.randn(8, 4), torch.randn(3, 8))
    text = str(told)
    assert [name for name, _ in told.stages][0] == "captured"
    assert len(told.stages[-1][1].equations) < len(told.stages[0][1].equations)
    assert re.search(r"\b(aten\.|\w+_into_)mm\b", text) and "test_jit.py:" in text and "1 in that of donated arguments" in text
    assert told.program.startswith("def program(")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(kind, bias):
    """GRU's parts are views that don't say so (unsafe_split): the memory plan must not give their memory away."""
    torch.manual_seed(0)
    layer = kind(5, 6, 2, bidirectional=True, bias=bias)
    x = torch.randn(3, 7, 5)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p, x):
        y, _ = torch.func.functional_call(layer, p, (x,))
        return y.square().sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(layer(leaf)[0].square().sum(), [*layer.parameters(), leaf])
    for run in (lambda f: f, nf.jit):
        found, dx = run(nf.grad(loss, (0, 1)))(params, x)
        for a, b in zip([*found.values(), dx], expected):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_write_through_a_part_that_does_not_say_it_is_a_view():
    def f(x):
        y = x * 2
        torch.unsafe_split(y, 2)[0].mul_(3)
        return y

    x = torch.randn(4, 3)
    assert torch.equal(nf.jit(f)(x), f(x)) and torch.equal(nf.vmap(f)(x[None])[0], f(x))
