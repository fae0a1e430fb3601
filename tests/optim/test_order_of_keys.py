"""Gradients and states belong to parameters by name: a dictionary from a file, say, has its keys in another order."""

from __future__ import annotations

import pytest
import torch

import neuralforge as nf
from neuralforge.errors import NeuralForgeError

OPTIMIZERS = {
    "sgd": lambda: nf.optim.sgd(0.1, momentum=0.9),
    "adamw": lambda: nf.optim.adamw(0.1),
    "lion": lambda: nf.optim.lion(0.1),
    "muon": lambda: nf.optim.muon(0.1),
    "sophia": lambda: nf.optim.sophia(0.1),
    "schedule_free": lambda: nf.optim.chain(nf.optim.clip_by_global_norm(1.0), nf.optim.schedule_free_adamw(0.1)),
}


def turned(tree):
    """With the keys of all dictionaries in the opposite order."""
    if isinstance(tree, tuple):
        return tuple(map(turned, tree))
    return {k: turned(v) for k, v in reversed(tree.items())} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_order_gives_the_same(name):
    torch.manual_seed(0)
    optimizer = OPTIMIZERS[name]()
    params = {"first": torch.randn(4, 4), "second": torch.randn(4, 4), "third": {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}}
    grads = [nf.optim.apply_updates(params, params), params]
    state = other = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        found, other = optimizer.update(turned(g), turned(other), params)
        for key in ("first", "second"):
            assert torch.equal(updates[key], found[key]) and updates[key].abs().sum() > 0
        assert torch.equal(updates["third"]["b"], found["third"]["b"])


def test_other_keys_are_refused():
    optimizer, params = nf.optim.adamw(0.1), {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(NeuralForgeError, match="gradients must be like its parameters.*missing.*'b'"):
        optimizer.update({"a": torch.ones(2), "c": torch.ones(2)}, optimizer.init(params), params)


def test_parameters_that_are_none():
    optimizer, params = nf.optim.adamw(0.1), {"weight": torch.ones(2), "bias": None}
    grads, norm = nf.optim.clip_gradients({"weight": torch.ones(2), "bias": None}, 0.5)
    assert norm.item() == pytest.approx(2**0.5)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    params = nf.optim.apply_updates(params, updates)
    assert params["bias"] is None and params["weight"].lt(1).all() and state["m"]["bias"] is None
    assert nf.optim.clip_gradients({}, 1.0)[1] == 0
