"""The classes for torch's training loop, beside torch.optim's own."""

import copy
import pickle

import pytest
import schedulefree
import torch
from torch import nn

import neuralforge as nf
from neuralforge.errors import ConfigError

ours = nf.optim.torch
PAIRS = {
    "sgd": (lambda p: ours.SGD(p, 0.1, momentum=0.9, weight_decay=0.0), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
    "adamw": (lambda p: ours.AdamW(p, 0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
    "adafactor": (lambda p: ours.Adafactor(p, 0.01), lambda p: torch.optim.Adafactor(p, 0.01)),
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()


def data(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (16,), generator=g)


def train(model, optimizer, steps, first=0, scheduler=None):
    for n in range(first, first + steps):
        optimizer.zero_grad()
        x, y = data(n)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(a, b, tolerance=0.0):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_follows_torch_with_groups_schedulers_and_missing_gradients(name):
    models = build(), build()
    optimizers = []
    for model, make in zip(models, PAIRS[name]):
        groups = [{"params": list(model[0].parameters())}, {"params": [*model[2].parameters(), *model[3].parameters()], "lr": 0.003}]
        optimizers.append(make(groups))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 30) for o in optimizers]
    ids = [id(p) for p in models[0].parameters()], [p.data_ptr() for p in models[0].parameters()]
    for part in range(3):
        for model in models:
            model[2].requires_grad_(part != 1)  # frozen a while: its count of steps stands still
        for model, optimizer, scheduler in zip(models, optimizers, schedulers):
            train(model, optimizer, 10, 10 * part, scheduler)
        same(*models, 1e-9)
    assert ids == ([id(p) for p in models[0].parameters()], [p.data_ptr() for p in models[0].parameters()]), "in place"
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    if name == "adamw":
        steps = {optimizers[0].state[p]["step"] for p in models[0].parameters()}
        assert steps == {20, 30}


MAKERS = {
    **{name: make for name, (make, _) in PAIRS.items()},
    "lion": lambda p: ours.Lion(p, 1e-3, weight_decay=0.1),
    "schedule_free": lambda p: ours.ScheduleFreeAdamW(p, 0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_goes_on_bit_for_bit(name, tmp_path):
    whole = build()
    optimizer = MAKERS[name](whole.parameters())
    train(whole, optimizer, 5)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = build(1)
    again.load_state_dict(saved["model"])
    resumed = MAKERS[name](again.parameters())
    resumed.load_state_dict(saved["optimizer"])
    pickled = copy.deepcopy(whole)
    third = MAKERS[name](pickled.parameters())
    third.load_state_dict(pickle.loads(pickle.dumps(optimizer)).state_dict())
    for model, o in ((whole, optimizer), (again, resumed), (pickled, third)):
        train(model, o, 5, 5)
    same(whole, again)
    same(whole, pickled)


def test_closure():
    model = build()
    optimizer = ours.SGD(model.parameters(), 0.1)
    x, y = data(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_muon_by_names():
    model = build()
    hidden = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    optimizer = ours.Muon(hidden, 0.01, blocks={"2.*": 2})
    before = [p.clone() for _, p in hidden]
    rule = nf.optim.muon(0.01, blocks={"2.*": 2})
    x, y = data(0)
    nn.functional.cross_entropy(model(x), y).backward()
    named = dict(hidden)
    updates, _ = rule.update({n: p.grad for n, p in named.items()}, rule.init(named), named)
    optimizer.step()
    for (name, p), old in zip(hidden, before):
        torch.testing.assert_close(p.detach(), (old + updates[name]).detach())


def test_schedule_free_evaluates_the_average():
    model, other = build(), build()
    optimizer = ours.ScheduleFreeAdamW(model.parameters(), 0.01)
    theirs = schedulefree.AdamWScheduleFree(other.parameters(), 0.01)
    theirs.train()
    train(model, optimizer, 12)
    train(other, theirs, 12)
    same(model, other, 1e-9)
    trained = copy.deepcopy(model)
    theirs.eval()
    with optimizer.evaluating():
        same(model, other, 1e-9)
        assert not torch.allclose(model[0].weight, trained[0].weight)
    same(model, trained)


def test_any_rule_becomes_a_class():
    class Slow(ours.Optimizer):
        rule = staticmethod(lambda lr, every=5: nf.optim.lookahead(nf.optim.adamw(lr), every))

    model, p = build(), {n: p.detach().clone() for n, p in build().named_parameters()}
    optimizer, rule = Slow(model.parameters(), 0.01, every=3), nf.optim.lookahead(nf.optim.adamw(0.01), 3)
    state = rule.init(p)
    for n in range(7):
        x, y = data(n)
        loss = lambda p: nn.functional.cross_entropy(torch.func.functional_call(model, p, (x,)), y)
        updates, state = rule.update(nf.grad(loss)(p), state, p)
        p = nf.optim.apply_updates(p, updates)
        train(model, optimizer, 1, n)
    for name, q in model.named_parameters():
        torch.testing.assert_close(q.detach(), p[name], rtol=1e-9, atol=1e-9)
    assert sorted(optimizer.state[model[0].weight]) == ["optimizer.m", "optimizer.step", "optimizer.v", "slow", "step"]


def test_errors():
    p = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ConfigError, match="Lion: unknown option momentum; expected one of lr, betas, weight_decay, decay"):
        ours.Lion(p, 0.1, momentum=0.9)
    with pytest.raises(ConfigError, match="adamw: lr=-1"):
        ours.AdamW(p, -1)
    with pytest.raises(ConfigError, match="expected a matrix"):
        ours.Muon(p, 0.1)
    optimizer = ours.SGD(p, 0.1)
    with pytest.raises(ConfigError, match="sgd: momentum=2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "momentum": 2})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="a gradient is sparse"):
        ours.SGD(embedding.parameters(), 0.1).step()
