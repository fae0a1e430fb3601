"""What a compiled form depends on beside its arguments: tensors that it closes over, and modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import TensorGuards

from ..graph.refused import check_module


class Outside:
    """The tensors that a form closes over, with the layouts that it was captured for (`x.data = y` changes them); and the modules
    that it met, with all of them that can change: their modes, hooks, modules in them, the numbers that layers of torch.nn were made
    with (`dropout.p`), and where they keep those tensors (`load_state_dict(assign=True)` puts others there)."""

    def __init__(self, tensors: Iterable[torch.Tensor], modules: Iterable[nn.Module]):
        known = {id(t): t for t in tensors}  # once each: torch's guard never holds for a tensor given twice
        self.tensors, self.modules = list(known.values()), tuple(modules)
        self.alike = alike(self.tensors)
        self.training = [m.training for m in self.modules]
        hooks = [h for m in self.modules for h in (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)]
        tables = [table for m in self.modules for table in (m._parameters, m._buffers, m._modules)]
        self.sized = [*hooks, *tables]
        self.sizes = [*map(len, self.sized)]
        self.hooks = [*filter(len, hooks)]
        self.hooked = [*chain.from_iterable(self.hooks)]
        held = ((table, name, x) for table in tables for name, x in table.items())
        self.places = [(table, name, x) for table, name, x in held if not isinstance(x, torch.Tensor) or id(x) in known]
        # Modules of one's own may change theirs in each forward pass.
        layers = [vars(m) for m in self.modules if type(m).__module__.startswith("torch.nn.")]
        self.numbers = [(layer, name) for layer in layers for name, x in layer.items() if type(x) in (int, float, bool) and name != "training"]
        self.values = [layer[name] for layer, name in self.numbers]

    def holds(self) -> bool:
        return (
            self.alike(*self.tensors)
            and [m.training for m in self.modules] == self.training
            and [*map(len, self.sized)] == self.sizes
            and all([table.get(name) is x for table, name, x in self.places])
            and [*chain.from_iterable(self.hooks)] == self.hooked
            and [layer.get(name) for layer, name in self.numbers] == self.values
        )


def alike(tensors: list[torch.Tensor]) -> Callable[..., bool]:
    """Do other tensors look like these? Asked in C++."""
    if not tensors:
        return lambda: True
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


_getattr = nn.Module.__getattr__
_watching: list[dict[nn.Module, None]] = []
_lock = threading.Lock()
_LISTS = nn.ModuleList, nn.ModuleDict


def _watched(module: nn.Module, name: str) -> Any:
    found = _getattr(module, name)
    lists = found.modules() if isinstance(found, _LISTS) else ()  # which are asked for nothing by name
    for met in _watching:
        met.update(dict.fromkeys((module, *(part for part in lists if isinstance(part, _LISTS)))))
    return found


def _computed(module: nn.Module) -> list[str]:
    """The attributes that hooks of torch.nn.utils compute in each forward pass: prune's, and the old weight_norm's and spectral_norm's."""
    hooks = module._forward_pre_hooks.values()
    names = [getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks]
    return [name for name in names if isinstance(vars(module).get(name), torch.Tensor)]


@contextmanager
def modules_met() -> Iterator[dict[nn.Module, None]]:
    """Collects the modules that are called within, or asked for what they hold (as methods other than forward do). Weights that hooks
    computed within, of fake tensors, are as they were before."""
    met: dict[nn.Module, None] = {}
    before: dict[tuple[nn.Module, str], Any] = {}

    def meet(module: nn.Module, args: tuple) -> None:
        check_module(module)
        met.setdefault(module)
        for name in _computed(module):
            before.setdefault((module, name), vars(module)[name])

    handle = nn.modules.module.register_module_forward_pre_hook(meet)
    with _lock:
        _watching.append(met)
        nn.Module.__getattr__ = _watched
    try:
        yield met
    finally:
        handle.remove()
        for (module, name), x in before.items():
            vars(module)[name] = x
        with _lock:
            _watching[:] = [other for other in _watching if other is not met]
            if not _watching:
                nn.Module.__getattr__ = _getattr
