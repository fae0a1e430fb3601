"""Jitted functions in the places of plain ones: as methods, in modules, copied and pickled."""

import copy
import io
import pickle
from functools import partial

import torch
from torch import nn

import neuralforge as nf


@nf.jit
def double(x):
    return x * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.jitted = nf.jit(self.plain)

    def plain(self, x):
        return self.layer(x).tanh()

    def forward(self, x):
        return self.jitted(x)

    @nf.jit
    def method(self, x, sign=1):
        return self.plain(x) * sign

    @nf.jit(buckets={"x": {0: (4, 8)}})
    def padded(self, x):
        return self.plain(x)


class Holder:
    scale = nf.jit(nn.Linear(3, 3))  # a module as an attribute of a class is no method


def test_modules_are_not_bound():
    x = torch.randn(2, 3)
    torch.testing.assert_close(Holder().scale(x), Holder.scale.f(x))


def test_methods_are_bound():
    models, x = [Model(), Model()], torch.randn(2, 3)
    for _ in range(2):
        for model in models:
            torch.testing.assert_close(model.method(x), model.plain(x))
            torch.testing.assert_close(model.method(x, sign=-1), -model.plain(x))
            torch.testing.assert_close(model.padded(x), model.plain(x))
    models[0].method(x).sum().backward()
    assert models[0].layer.weight.grad is not None and models[1].layer.weight.grad is None


def test_copies_of_modules_that_hold_them_are_apart():
    model, x = Model(), torch.randn(2, 3)
    before = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(other(x), before)
        other(x).sum().backward()
        assert model.layer.weight.grad is None and other.layer.weight.grad is not None
        with torch.no_grad():
            other.layer.weight.zero_()
        torch.testing.assert_close(other(x), other.plain(x))
    torch.testing.assert_close(model(x), before)


def test_functions_go_by_their_names():
    assert pickle.loads(pickle.dumps(double)) is double and copy.deepcopy(double) is double
    again = pickle.loads(pickle.dumps(nf.jit(partial(torch.add, alpha=2), donate=0)))
    assert again.donate == (0,) and again(torch.ones(2), torch.ones(2)).tolist() == [3, 3]
    bucketed = copy.deepcopy(nf.jit(lambda x: x + 1, buckets={"x": {0: (4,)}}))
    assert bucketed(torch.ones(3)).tolist() == [2, 2, 2]


def test_modules_with_attributes_of_these_names():
    model = Model()
    model.form, model.lookup, model.compile_, model.donate = "a", {}, 1, (5,)
    x = torch.randn(2, 3)
    torch.testing.assert_close(nf.jit(model)(x), model.plain(x))
