"""A jitted training step where kernels can't be built or kept: the right result, and one line that says what is wrong."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.fusion import codegen
from neuralforge.compiler.products.candidates import choose_products
from neuralforge.graph import capture
from neuralforge.kernels import toolchain
from neuralforge.kernels.choices import Choices

optimizer = nf.optim.adamw(1e-2)


def step(state, x, y):
    def loss_fn(p):
        h = F.gelu(F.layer_norm(x, (16,), p["scale"], p["shift"]) @ p["w"])
        return F.cross_entropy(h @ p["out"], y)

    loss, grads = nf.value_and_grad(loss_fn)(state["params"])
    grads, norm = nf.optim.clip_gradients(grads, 1.0)
    updates, new = optimizer.update(grads, state["optimizer"], state["params"])
    return {"params": nf.optim.apply_updates(state["params"], updates), "optimizer": new}, (loss, norm)


def train(step, steps=3):
    torch.manual_seed(0)
    params = {
        "scale": torch.ones(16),
        "shift": torch.zeros(16),
        "w": torch.randn(16, 24),
        "out": torch.randn(24, 9),
    }
    state = {"params": params, "optimizer": optimizer.init(params)}
    x, y = torch.randn(7, 16), torch.randint(0, 9, (7,))
    for _ in range(steps):
        state, metrics = step(state, x, y)
    return [*state["params"].values(), *metrics]


@pytest.fixture
def trains(monkeypatch, tmp_path):
    """`trains(environment)`: three jitted steps with an empty cache, checked against eager ones; the warnings."""
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "_private", {})
    monkeypatch.setattr(toolchain, "_told", set())
    monkeypatch.setattr(codegen, "_built", {})
    toolchain._compiler.cache_clear()

    def trains(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = train(nf.jit(step)) and train(nf.jit(step, donate=0))
        for a, b in zip(found, train(step)):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        return said

    yield trains
    toolchain._compiler.cache_clear()


def script(path, body):
    """A compiler that names its version and then does `body`."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "cc 1.0" && exit 0\n{body}\n')
    path.chmod(0o755)
    return path


def test_the_step_is_compiled_where_nothing_is_wrong(trains):
    assert not trains()
    assert any(name.startswith("fused") for name in os.listdir(toolchain.cache_folder()))


@pytest.mark.parametrize(
    "body, expected",
    [
        (None, "no C compiler found .*apt-get install gcc"),
        (
            "echo 'x.c:1: error: out of luck' >&2; exit 1",
            "refused a generated kernel: x.c:1: error: out of luck.*kept in",
        ),
        ("kill -9 $$", "killed by signal 9.*memory"),
        (
            "echo 'as: No space left on device' >&2; exit 1",
            "neither the kernel cache .* nor a temporary folder",
        ),
    ],
)
def test_a_compiler_that_fails_is_told_once_and_plain_operators_run(trains, tmp_path, body, expected):
    said = trains(CC=script(tmp_path / "cc", body) if body else tmp_path / "none")
    told = [w for w in said if "plain operators run in their place" in str(w.message)]
    assert len(told) == 1 and re.search(expected, str(told[0].message))
    assert told[0].filename == __file__, "points at the user's line"


def test_a_cache_that_can_not_be_written_is_told_once(trains, tmp_path):
    (tmp_path / "file").write_text("")
    (said,) = trains(NEURALFORGE_CACHE=tmp_path / "file")
    assert re.search("the kernel cache .*file can't be used.*NEURALFORGE_CACHE", str(said.message))


@pytest.mark.parametrize("options", ["size=16k", "ro", "noexec"])
def test_a_full_a_read_only_and_a_noexec_file_system(trains, mounted, options):
    (said,) = trains(NEURALFORGE_CACHE=mounted("mounted", options))
    assert "mounted can't be used" in str(said.message)
    assert any(name.startswith("fused") for name in os.listdir(toolchain.cache_folder())), "compiled all the same"


def test_a_cache_that_another_cpu_wrote_is_left_alone(trains, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(toolchain, "cpu_features", lambda: frozenset({"of", "another", "cpu"}))  # portable code
        assert not trains()
    theirs = set(os.listdir(toolchain.cache_folder()))
    codegen._built.clear()
    assert not trains()
    mine = set(os.listdir(toolchain.cache_folder())) - theirs
    assert len([name for name in mine if name.startswith("fused")]) == len(
        [n for n in theirs if n.startswith("fused")]
    )


def test_processes_that_share_an_empty_cache(tmp_path):
    command = [sys.executable, __file__]
    environment = {**os.environ, "NEURALFORGE_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    results = [p.communicate() for p in runs]
    assert all(not err or err.startswith(b"building the kernels") and err.count(b"\n") == 1 for _, err in results)
    found = [torch.tensor(json.loads(out)) for out, _ in results]
    for result in found:
        assert torch.allclose(result, torch.cat([x.flatten() for x in train(step)]), rtol=1e-4, atol=1e-5)
    libraries = [name.rsplit("-", 1)[0] for name in os.listdir(tmp_path) if name.endswith(".so")]
    assert libraries.count("embedding") == libraries.count("matmul") == 1, "both had the same ones to build"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".c")]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"aten.mm": {"choice": "gone", "seconds": {}}}', "{"]
)
def test_a_damaged_table_of_choices_counts_as_empty(monkeypatch, tmp_path, content):
    monkeypatch.setenv("NEURALFORGE_CACHE", str(tmp_path))
    Choices("products").path.write_text(content)
    graph = capture(lambda a, b: a @ b, torch.randn(4, 5), torch.randn(5, 6)).graph
    choose_products(graph.equations)
    (entry,) = Choices("products").table.values()
    assert entry["choice"] in entry["seconds"]
    assert oct(Choices("products").path.stat().st_mode & 0o777) == "0o644", "other users may read it"


if __name__ == "__main__":
    print(json.dumps(torch.cat([x.flatten() for x in train(nf.jit(step))]).tolist()))
