"""Optimised programs on disk: found by the same program again, and by no other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler import compiled, on_disk
from neuralforge.graph import capture

LAYERS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Of programs; kernels stay where they are."""
    monkeypatch.setattr(on_disk, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def optimised(monkeypatch):
    """Grows whenever the passes run."""
    calls, optimise = [], compiled.optimise
    monkeypatch.setattr(compiled, "optimise", lambda *args: calls.append(args) or optimise(*args))
    return calls


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = {f"w{i}": torch.randn(48, 48, generator=generator) / 7 for i in range(LAYERS)}
    return params | {f"b{i}": torch.randn(48, generator=generator) for i in range(LAYERS)}


def step(closed: torch.Tensor, literal: float = 0.5):
    """A training step of some hundred equations that closes over a tensor and holds a literal."""

    def loss(params, x):
        for i in range(LAYERS):
            x = x + torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (48,)) @ params[f"w{i}"] + params[f"b{i}"])
        return ((x * closed - torch.tensor([literal, 1.0]).sum()) ** 2).mean()

    def update(params, x):
        value, grads = nf.value_and_grad(loss)(params, x)
        return {name: p - 0.1 * grads[name] / (grads[name].square().mean().sqrt() + 1e-3) for name, p in params.items()}, value

    return update


def results(f, x, **options) -> list[torch.Tensor]:
    params, value = nf.jit(f, **options)(parameters(), x)
    return [*params.values(), value]


def close(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_found_again_with_the_tensors_at_hand(optimised, cache):
    x = torch.randn(32, 48)
    first = results(step(torch.ones(48)), x)
    assert len(optimised) == 1 and len(list(cache.glob("program-*.pickle"))) == 1
    again = results(step(torch.ones(48)), x)
    assert len(optimised) == 1 and all(map(torch.equal, first, again))
    doubled = torch.full((48,), 2.0)  # closed over: not part of what is saved
    other = results(step(doubled), x)
    assert len(optimised) == 1
    params, value = step(doubled)(parameters(), x)
    close(other, [*params.values(), value])


def test_another_program_is_another(optimised):
    x, ones = torch.randn(32, 48), torch.ones(48)
    for n, f in enumerate((step(ones), step(ones, 0.25), step(torch.ones(32, 1))), 1):
        params, value = f(parameters(), x)
        close(results(f, x), [*params.values(), value])
        assert len(optimised) == n
    results(step(ones), x[:16])
    results(step(ones), x.t().contiguous().t())
    assert len(optimised) == 5


def test_what_passes_look_at_belongs_to_it(monkeypatch, threads_restored):
    graph = capture(step(torch.ones(48)), parameters(), torch.randn(32, 48)).graph
    places = {on_disk.place_of(graph)}
    torch.set_num_threads(torch.get_num_threads() + 1)
    places.add(on_disk.place_of(graph))
    monkeypatch.setenv("NEURALFORGE_ISA", "portable")
    places.add(on_disk.place_of(graph))
    monkeypatch.setattr(on_disk, "_files", lambda: ["changed"])
    places.add(on_disk.place_of(graph))
    assert len(places) == 4 and None not in places
    monkeypatch.setenv("CC", "no-such-compiler")
    assert on_disk.place_of(graph) is None


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: c[:100] + b"x" + c[101:], lambda c: b""])
def test_damaged(optimised, cache, damage):
    x = torch.randn(32, 48)
    first = results(step(torch.ones(48)), x)
    (place,) = cache.glob("program-*.pickle")
    whole = place.read_bytes()
    place.write_bytes(damage(whole))
    assert all(map(torch.equal, first, results(step(torch.ones(48)), x)))
    assert len(optimised) == 2 and place.stat().st_size == len(whole)


def test_limited_rewrites_are_made_anew(optimised):
    x = torch.randn(32, 48)
    results(step(torch.ones(48)), x)
    close(results(step(torch.ones(48)), x, max_rewrites=0), results(step(torch.ones(48)), x))
    assert len(optimised) == 2


def test_a_budget_is_kept_by_what_is_found(optimised):
    x = torch.randn(32, 48)
    whole = results(step(torch.ones(48)), x)
    close(results(step(torch.ones(48)), x, memory_budget="100MB"), whole)
    assert len(optimised) == 1


def test_the_oldest_are_removed(monkeypatch, cache):
    monkeypatch.setattr(on_disk, "KEPT", 2)
    for literal in (0.1, 0.2, 0.3):
        results(step(torch.ones(48), literal), torch.randn(32, 48))
    assert len(list(cache.glob("program-*.pickle"))) == 2


def test_a_folder_that_cannot_be_written_to(optimised, monkeypatch, cache):
    monkeypatch.setattr(on_disk, "cache_folder", lambda: cache / "missing")
    x = torch.randn(32, 48)
    assert all(map(torch.equal, results(step(torch.ones(48)), x), results(step(torch.ones(48)), x)))
    assert len(optimised) == 2


def test_another_process_finds_it(tmp_path):
    code = """if True:
        import pathlib, sys, torch
        sys.path.insert(0, sys.argv[1])
        import test_on_disk as test
        test.on_disk.cache_folder = lambda: pathlib.Path(sys.argv[3])
        if sys.argv[2] == "second":
            test.compiled.optimise = None
        x = torch.ones(32, 48).cumsum(0)
        print([r.double().sum().item() for r in test.results(test.step(torch.ones(48)), x)])"""

    def run(which: str) -> str:
        command = [sys.executable, "-c", code, str(Path(__file__).parent), which, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run("first") == run("second")
