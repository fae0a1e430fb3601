"""Muon against its definition by singular values, torch.optim.Muon and optax's."""

import math

import jax
import numpy as np
import optax
import pytest
import torch

import neuralforge as nf
from neuralforge import optim
from neuralforge.errors import ConfigError
from neuralforge.optim.muon import COEFFICIENTS, orthogonal

LR, DECAY, STEPS = 0.02, 0.1, 50
SHAPES = {"tall": (17, 5), "wide": (6, 19), "square": (8, 8), "row": (1, 7), "one": (1, 1)}


def draw(seed, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run(optimizer, shapes=SHAPES, dtype=torch.float64, compiled=True):
    params = draw(0, shapes, dtype)
    state, update = optimizer.init(params), nf.jit(optimizer.update) if compiled else optimizer.update
    for n in range(STEPS):
        updates, state = update(draw(n + 1, shapes, dtype), state, params)
        params = optim.apply_updates(params, updates)
        yield params


def truth(p, grads, scale, nesterov, rows):
    """The polynomial of Newton–Schulz acts on the singular values alone; each block of `rows` rows by itself."""
    a, b, c = COEFFICIENTS
    m = 0 * p
    for g in grads:
        m = 0.95 * m + 0.05 * g
        parts = []
        for x in (0.05 * g + 0.95 * m if nesterov else m).split(rows):
            u, s, vt = torch.linalg.svd(x, full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            parts.append(u * s @ vt * scale(*x.shape))
        p = p - LR * (torch.cat(parts) + DECAY * p)
        yield p


SCALES = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=["float64", "float32"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scaling", SCALES)
def test_equals_the_paper(scaling, nesterov, dtype, tolerance):
    optimizer = optim.muon(LR, 0.95, nesterov, DECAY, scaling)
    expected = {
        name: truth(p, [draw(n + 1)[name] for n in range(STEPS)], SCALES[scaling], nesterov, len(p)) for name, p in draw(0).items()
    }
    for params in run(optimizer, dtype=dtype):
        for name, p in params.items():
            torch.testing.assert_close(p, next(expected[name]).to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_matrices_are_made_orthogonal_by_blocks(compiled):
    shapes = {"blocks.0.qkv.weight": (12, 4), "blocks.0.out.weight": (12, 4)}
    optimizer = optim.muon(LR, weight_decay=DECAY, blocks={"*.qkv.weight": 3})
    feeds = lambda name: [draw(n + 1, shapes)[name] for n in range(STEPS)]
    rows = {"blocks.0.qkv.weight": 4, "blocks.0.out.weight": 12}
    expected = {n: truth(p, feeds(n), SCALES["original"], True, rows[n]) for n, p in draw(0, shapes).items()}
    for params in run(optimizer, shapes, compiled=compiled):
        for name, p in params.items():
            torch.testing.assert_close(p, next(expected[name]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", SCALES)
def test_equals_torch(scaling, monkeypatch):
    """torch iterates in bfloat16: here it is kept from it, so that equality is to rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs = {name: p.requires_grad_() for name, p in draw(0).items()}
    reference = torch.optim.Muon(theirs.values(), LR, DECAY, momentum=0.95, adjust_lr_fn=scaling)
    for n, params in enumerate(run(optim.muon(LR, weight_decay=DECAY, scaling=scaling))):
        for name, g in draw(n + 1).items():
            theirs[name].grad = g
        reference.step()
        for name, p in params.items():
            torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-9, atol=1e-9)


def test_equals_torch_in_bfloat16():
    theirs = {name: p.requires_grad_() for name, p in draw(0, dtype=torch.float32).items()}
    reference = torch.optim.Muon(theirs.values(), LR, DECAY, momentum=0.95)
    ours = run(optim.muon(LR, weight_decay=DECAY, dtype=torch.bfloat16), dtype=torch.float32, compiled=False)
    for n, params in enumerate(ours):
        for name, g in draw(n + 1, dtype=torch.float32).items():
            theirs[name].grad = g
        reference.step()
        apart = max((p - theirs[name]).abs().max() for name, p in params.items())
        assert apart < LR * (0.1 + 0.02 * (n + 1)), "of what steps by LR bfloat16 knows two digits, and ours rounds elsewhere"


def test_equals_optax():
    """Its momentum is bias-corrected, which a matrix made orthogonal doesn't feel but for Nesterov's; so without."""
    shapes = {name: SHAPES[name] for name in ("tall", "wide", "square")}
    plain = {name: optax.contrib.MuonDimensionNumbers() for name in shapes}
    with jax.enable_x64(True):
        theirs = optax.chain(
            optax.contrib.scale_by_muon(
                COEFFICIENTS, 5, 0.95, eps=1e-12, nesterov=False, weight_dimension_numbers=lambda params: plain
            ),
            optax.add_decayed_weights(DECAY),
            optax.scale(-LR),
        )
        to_jax = lambda tree: {name: jax.numpy.asarray(x.numpy()) for name, x in tree.items()}
        params = to_jax(draw(0, shapes))
        state, update = theirs.init(params), jax.jit(theirs.update)
        square = lambda name: math.sqrt(max(1, shapes[name][0] / shapes[name][1]))
        ours = optim.muon(LR, nesterov=False, weight_decay=DECAY)
        previous, mine = params, draw(0, shapes)
        for n, found in enumerate(run(ours, shapes)):
            updates, state = update(to_jax(draw(n + 1, shapes)), state, previous)
            for name, p in found.items():
                step = np.asarray(updates[name] + LR * DECAY * previous[name]) * square(name)
                expected = mine[name] * (1 - LR * DECAY) + torch.tensor(step)
                torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)
            mine, previous = found, to_jax(found)


def test_orthogonal():
    x = torch.randn(3, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = orthogonal(x)
    left, values, right = torch.linalg.svd(found, full_matrices=False)
    assert 0.6 < values.min() and values.max() < 1.3
    inner = (u.mT @ found @ vt.mT).abs()
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9, "the same singular vectors"
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4)), "a gradient of zero is no NaN"


def test_empty_matrices():
    shapes = {"a": (0, 3), "b": (3, 0)}
    for params in run(optim.muon(LR), shapes):
        assert {name: tuple(p.shape) for name, p in params.items()} == shapes


@pytest.mark.parametrize(
    "make, shape, message",
    [
        (lambda: optim.muon(LR), (3,), r"muon: the parameter w has the shape \(3,\); expected a matrix. Give it to adamw"),
        (lambda: optim.muon(LR, blocks={"w": 3}), (7, 2), "muon: the 7 rows of w don't split into blocks=3"),
        (lambda: optim.muon(LR, blocks={"w": 0}), (7, 2), "muon: blocks={'w': 0}; expected whole numbers of at least 1"),
        (lambda: optim.muon(LR, scaling="none"), (2, 2), "muon: scaling='none'; expected original or match_rms_adamw"),
        (lambda: optim.muon(LR, steps=0), (2, 2), "muon: steps=0"),
        (lambda: optim.muon(LR, 1.0), (2, 2), "muon: momentum=1.0"),
    ],
)
def test_errors(make, shape, message):
    with pytest.raises(ConfigError, match=message):
        make().init({"w": torch.zeros(shape)})
