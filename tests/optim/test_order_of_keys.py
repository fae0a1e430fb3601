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


WRAPPERS = {
    "plain": lambda optimizer: optimizer,
    "lookahead": lambda optimizer: nf.optim.lookahead(optimizer, 2),
    "ema": lambda optimizer: nf.optim.ema(optimizer, 0.9),
    "scaled": nf.optim.loss_scaling,
    "clipped": lambda optimizer: nf.optim.chain(nf.optim.clip_adaptively(), optimizer, nf.optim.scale(0.5)),
    "master": nf.optim.master_weights,
    "rounded": nf.optim.stochastic_rounding,
    "groups": lambda optimizer: nf.optim.groups({"*": optimizer}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_there_is_no_parameter_nothing_is_kept(name, wrapper):
    optimizer = WRAPPERS[wrapper](OPTIMIZERS[name]())
    params = {"weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), "bias": None}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params, curvature=params)
        params = nf.optim.apply_updates(params, updates)
    alone = {"weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    own = optimizer.init(alone)
    for _ in range(3):
        updates, own = optimizer.update(alone, own, alone, curvature=alone)
        alone = nf.optim.apply_updates(alone, updates)
    assert params["bias"] is None and torch.equal(params["weight"], alone["weight"])
    assert torch.equal(optimizer.evaluate(params, state)["weight"], optimizer.evaluate(alone, own)["weight"])


def test_gradients_of_what_is_no_parameter():
    params = {"weight": torch.ones(3), "bias": None}
    loss = lambda p, x: (p["weight"] * x).square().sum()
    sums = nf.optim.accumulation.empty(params)
    for n in (1.0, 2.0):
        sums = nf.optim.accumulation.add(sums, *nf.value_and_grad(loss)(params, torch.full((3,), n)))
    grads = nf.optim.accumulation.mean(sums)[1]
    assert grads["bias"] is None and (grads["weight"] == 5).all()
    assert nf.optim.accumulation.statistics(sums).norms.tolist() == [pytest.approx(5 * 3**0.5), 0.0]
    estimate = nf.optim.hutchinson(lambda p: loss(p, 1.0), params, nf.random.key(0))
    assert estimate["bias"] is None and (estimate["weight"] == 2).all()
    _, grads = nf.optim.scaled_value_and_grad(loss)(torch.tensor(8.0), params, 1.0)
    assert grads["bias"] is None and (grads["weight"] == 2).all()


def test_parameters_that_are_none():
    optimizer, params = nf.optim.adamw(0.1), {"weight": torch.ones(2), "bias": None}
    grads, norm = nf.optim.clip_gradients({"weight": torch.ones(2), "bias": None}, 0.5)
    assert norm.item() == pytest.approx(2**0.5)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    params = nf.optim.apply_updates(params, updates)
    assert params["bias"] is None and params["weight"].lt(1).all() and state["m"]["bias"] is None
    assert nf.optim.clip_gradients({}, 1.0)[1] == 0
