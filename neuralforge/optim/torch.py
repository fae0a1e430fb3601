"""The optimizers as torch.optim ones: for a loop with `loss.backward()` and `optimizer.step()`, the update compiled.

    optimizer = nf.optim.torch.Lion(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

Options are those of the functions they stand for; `lr` is a number that schedulers may change at each step, other options
are compiled in. Each parameter group may have its own. State lies in `optimizer.state[parameter]`: state_dict and
load_state_dict are torch's. Any rule becomes such a class:

    class Slow(nf.optim.torch.Optimizer):
        rule = staticmethod(lambda lr, every=5: nf.optim.lookahead(nf.optim.adamw(lr), every))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..compiler import jit
from ..errors import ConfigError
from ..graph.tree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten
from . import base
from .adafactor import adafactor
from .adamw import adamw
from .groups import path_name
from .lion import lion
from .muon import muon
from .schedule_free import schedule_free_adamw
from .sgd import sgd


class _Update(NamedTuple):
    """The compiled update of some parameters, and how its state comes from theirs."""

    run: Callable[..., tuple[Any, Any]]
    optimizer: base.Optimizer
    tree: TreeSpec
    leaves: list[tuple[str, str | None, torch.dtype]]
    """Of each leaf of the state: its name, whose it is (None: it is a scalar of all of them), and its dtype."""


class Optimizer(torch.optim.Optimizer):
    """Base of the classes here. Parameters without a gradient are left alone, and so is their count of steps. Raises
    ConfigError for options that the rule doesn't have or accept, and for sparse gradients."""

    rule: Callable[..., base.Optimizer]

    def __init__(self, params: Iterable, lr: float = 1e-3, **options: Any):
        self._updates: dict[Any, _Update] = {}
        known = {name: p.default for name, p in inspect.signature(self.rule).parameters.items() if name != "lr"}
        for name in options:
            if name not in known:
                raise ConfigError(f"{type(self).__name__}: unknown option {name}; expected one of lr, {', '.join(known)}.")
        super().__init__(params, {"lr": lr, **known, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.rule(**self._options(self.param_groups[-1])).init(_named(self.param_groups[-1]))
        except ConfigError:
            self.param_groups.pop()
            raise

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in inspect.signature(self.rule).parameters}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_updates": {}}  # compiled again where it is unpickled

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure` returns, which is called first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # One update takes those whose scalars (the count of steps) are equal: nearly always all.
            alike: dict[Any, dict[str, torch.Tensor]] = {}
            for name, p in _named(group).items():
                if p.grad is not None:
                    own = self.state.get(p, {})
                    scalars = tuple(item for item in own.items() if not isinstance(item[1], torch.Tensor))
                    alike.setdefault(scalars, {})[name] = p
            for scalars, named in alike.items():
                self._step(group, dict(scalars), named)
        return loss

    def _step(self, group: dict[str, Any], scalars: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
        params = {name: p.detach() for name, p in named.items()}
        grads = {name: p.grad for name, p in named.items()}
        if any(g.is_sparse for g in grads.values()):
            raise ConfigError(f"{type(self).__name__}: a gradient is sparse; expected dense ones. Build nn.Embedding with sparse=False.")
        update = self._update(group, params)
        if scalars:
            value = lambda name, dtype, p: self.state[named[p]][name] if p else torch.tensor(scalars[name], dtype=dtype)
            state = tree_unflatten([value(name, dtype, p) for name, p, dtype in update.leaves], update.tree)
        else:
            state = update.optimizer.init(params)
        rate = torch.as_tensor(group["lr"], dtype=torch.float64)
        params, state = update.run(params, state, grads, rate)

        found = tree_flatten(state)[0]
        homes = {p.data_ptr() for p in named.values()}
        # Results lie in what was given to the program, usually each in its own place.
        moved = {name: new for name, new in params.items() if new.data_ptr() != named[name].data_ptr()}
        if moved:
            moved = {name: new.clone() for name, new in moved.items()}
            found = [x.clone() if x.data_ptr() in homes else x for x in found]
        for name, p in named.items():
            if name in moved:
                p.copy_(moved[name])
            else:
                torch.autograd.graph.increment_version(p)
        for (name, owner, _), x in zip(update.leaves, found):
            if owner is not None:
                self.state[named[owner]][name] = x
            else:
                for p in named.values():  # numbers: load_state_dict would cast tensors to the parameter's dtype
                    self.state[p][name] = x.item()

    def _update(self, group: dict[str, Any], params: dict[str, torch.Tensor]) -> _Update:
        options = self._options(group)
        key = (repr({**options, "lr": None}), tuple(params))
        if key not in self._updates:
            optimizer = self.rule(**options)
            paths, tree = tree_flatten_with_path(optimizer.init(params))
            leaves = []
            for path, leaf in paths:
                owner = path_name(path[-1:])
                mine = owner in params and len(path) > 1
                leaves.append((path_name(path[:-1] if mine else path), owner if mine else None, leaf.dtype))

            def run(params: Any, state: Any, grads: Any, rate: torch.Tensor) -> tuple[Any, Any]:
                updates, state = self.rule(**{**options, "lr": lambda done: rate}).update(grads, state, params)
                return base.apply_updates(params, updates), state

            self._updates[key] = _Update(jit(run, donate=(0, 1)), optimizer, tree, leaves)
        return self._updates[key]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the parameters are those to validate and to save (Schedule-Free's average); else this does nothing."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for group in self.param_groups:
                for name, p in _named(group).items():
                    if self.state.get(p):
                        update = self._update(group, {name: p.detach()})
                        own = [self.state[p][key] for key, _, _ in update.leaves]
                        own = [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in own]
                        new = update.optimizer.evaluate({name: p.detach()}, tree_unflatten(own, update.tree))[name]
                        kept.append((p, p.clone()))
                        p.copy_(new)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in kept:
                    p.copy_(old)


def _named(group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters of a group by name, or by number where only tensors were given."""
    return dict(zip(group.get("param_names", map(str, range(len(group["params"])))), group["params"]))


class SGD(Optimizer):
    rule = staticmethod(sgd)


class AdamW(Optimizer):
    rule = staticmethod(adamw)


class Adafactor(Optimizer):
    rule = staticmethod(adafactor)


class Lion(Optimizer):
    rule = staticmethod(lion)


class Muon(Optimizer):
    """For matrices; `blocks` goes by the names of `model.named_parameters()`, where these are given."""

    rule = staticmethod(muon)


class ScheduleFreeAdamW(Optimizer):
    """Validate and save under `with optimizer.evaluating():`."""

    rule = staticmethod(schedule_free_adamw)
