"""The choice between kernels for a matrix product: each gives the same result, and what was chosen runs."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler.products import candidates
from neuralforge.graph import capture
from neuralforge.kernels import matmul, toolchain


def linear_and_gradients(x, w, bias):
    y = torch.nn.functional.linear(x, w, bias)
    return y, *nf.grad(lambda x, w, bias: (torch.nn.functional.linear(x, w, bias) ** 2).sum(), (0, 1, 2))(x, w, bias)


@pytest.mark.parametrize("choice", ["aten", "onednn", "own"])
def test_every_candidate(choice, monkeypatch):
    asked, run = [], []

    def get(self, key, measure):
        asked.append(measure.args[0])
        return choice

    monkeypatch.setattr(candidates.Choices, "get", get)
    forward = matmul.forward
    monkeypatch.setattr(matmul, "forward", lambda *args, **kwargs: run.append(args) or forward(*args, **kwargs))
    torch.manual_seed(0)
    x, w, bias = torch.randn(3, 20, 12), torch.randn(17, 12), torch.randn(17)
    found = nf.jit(linear_and_gradients)(x, w, bias)
    for a, b in zip(found, linear_and_gradients(x, w, bias)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert asked and all(set(candidates) == {"aten", "onednn", "own"} for candidates in asked)
    assert bool(run) == (choice == "own")


def test_batches_have_our_kernel_too(monkeypatch):
    monkeypatch.setattr(candidates.Choices, "get", lambda self, key, measure: "own")
    a, b = torch.randn(5, 7, 8), torch.randn(5, 9, 8)
    torch.testing.assert_close(nf.jit(lambda a, b: a @ b.mT)(a, b), a @ b.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["aten", "own"])
def test_candidates_of_bfloat16(choice, monkeypatch):
    """The same function in both types, whose choices are apart."""
    asked, run = {}, []

    def get(self, key, measure):
        asked[key] = set(measure.args[0])
        return choice

    monkeypatch.setattr(candidates.Choices, "get", get)
    monkeypatch.setattr(candidates, "_fastest", lambda candidates, *rest: set(candidates))
    forward = matmul.forward
    monkeypatch.setattr(matmul, "forward", lambda *args, **kwargs: run.append(args) or forward(*args, **kwargs))
    torch.manual_seed(0)
    args = torch.randn(3, 20, 12), torch.randn(17, 12), torch.randn(17)
    narrow = [a.bfloat16() for a in args]
    for a, b in zip(nf.jit(linear_and_gradients)(*narrow), linear_and_gradients(*narrow)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(b.abs().max()))
    others = "aten" if toolchain.has_bfloat16() else "float32"
    assert asked and all(names == {others, "own"} for names in asked.values())
    assert bool(run) == (choice == "own")
    known = set(asked)
    nf.jit(linear_and_gradients)(*args)
    assert known.isdisjoint(set(asked) - known) and len(asked) == 2 * len(known)


def test_timing_remembers_every_candidate(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path))
    nf.jit(lambda a, b: a @ b)(torch.randn(30, 40), torch.randn(40, 50))
    (entry,) = candidates.Choices("products").table.values()
    assert set(entry["seconds"]) == {"aten", "onednn", "own"}
    assert entry["choice"] == min(entry["seconds"], key=entry["seconds"].get)


def test_another_length_takes_over_the_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path))
    f = nf.jit(lambda x, w: x @ w)
    f(torch.randn(30, 40), torch.randn(40, 50))
    (timed,) = candidates.Choices("products").table
    monkeypatch.setattr(candidates, "_fastest", lambda *args: pytest.fail("timed again"))
    x, w = torch.randn(90, 40), torch.randn(40, 50)
    torch.testing.assert_close(f(x, w), x @ w)
    entry = list(candidates.Choices("products").table.values())[1]
    assert entry["like"] == timed
    monkeypatch.setattr(candidates, "_fastest", lambda *args: {"choice": "aten", "seconds": {"aten": 1.0}, "copy": 1.0})
    for rows, columns in ((300, 50), (31, 51)):  # too far, and two lengths at once
        f(torch.randn(rows, 40), torch.randn(40, columns))
    f(torch.randn(1, 40).expand(30, 40), torch.randn(40, 50))  # a stride of zero
    assert ["like" in entry for entry in candidates.Choices("products").table.values()] == [False, True, False, False, False]


def test_gaps_between_rows_are_not_for_onednn():
    def served(x):
        (product,) = capture(lambda x, w: x @ w, x, torch.ones(8, 8)).graph.equations
        return candidates.onednn(product)

    assert served(torch.ones(8, 8)) and served(torch.ones(8, 8).t())
    assert served(torch.ones(8, 16)[:, :8]) is None


def test_long_products_are_timed_on_a_part(monkeypatch):
    monkeypatch.setattr(candidates, "LONGEST", 8)
    seen = []

    def get(self, key, measure):
        timed = {name: lambda *tensors, call=call: seen.append((tensors, call(*tensors))) for name, call in measure.args[0].items()}
        found = candidates._fastest(timed, *measure.args[1:3])
        assert min(found["seconds"].values()) > 0
        return found["choice"]

    monkeypatch.setattr(candidates.Choices, "get", get)
    x, w, bias = torch.randn(20, 12), torch.randn(17, 12), torch.randn(17)
    torch.testing.assert_close(nf.jit(torch.nn.functional.linear)(x, w, bias), torch.nn.functional.linear(x, w, bias))
    for (c, a, b), _ in seen:
        assert (a.shape, b.shape, c.shape) == ((8, 8), (8, 8), (8,))
        assert (a.stride(), b.stride()) == ((8, 1), (1, 8))
    assert {tuple(y.shape) for _, y in seen if y is not None} == {(8, 8)}


def test_times_are_those_of_the_whole_product(monkeypatch):
    monkeypatch.setattr(candidates, "LONGEST", 8)
    clock = iter(range(1000))
    monkeypatch.setattr(candidates.time, "perf_counter", lambda: next(clock))  # everything takes one second
    captured = capture(lambda a, b: a @ b, torch.ones(16, 24), torch.ones(24, 32))
    (product,) = captured.graph.equations
    found = candidates._fastest({"aten": product.op}, product.args, {})
    assert found == {"choice": "aten", "seconds": {"aten": 24.0}, "copy": 8.0}


def test_ours_unless_another_is_clearly_faster():
    assert candidates.chosen({"aten": 2.0, "onednn": 1.0, "own": 1.05}) == "own"
    assert candidates.chosen({"aten": 2.0, "onednn": 1.0, "own": 1.3}) == "onednn"
    assert candidates.chosen({"aten": 1.0, "onednn": 2.0, "own": 1.1}) == "aten"
    assert candidates.chosen({"aten": 1.0, "onednn": 0.95}) == "onednn"
