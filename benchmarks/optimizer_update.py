"""The optimizer's update alone, for the parameters of the benchmarks' GPT, beside published implementations.

    python benchmarks/optimizer_update.py [--only adamw lion] [--rounds 20]

Ours is one `nf.jit` of update and apply_updates with the state donated; torch's is `optimizer.step()`: fused where torch
has that, else foreach; `torch class` is the same rule as `nf.optim.torch` has it. lion-pytorch goes parameter by parameter, as it is published. Times alternate in one process.
Beside them stand the calls that our program makes, and what memory it takes beyond parameters, gradients and state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lion_pytorch
import schedulefree
import torch
from models import TASKS
from rich.console import Console

import neuralforge as nf
from neuralforge import optim
from neuralforge.bench import alternate, timing_table
from neuralforge.kernels.toolchain import cpu_model, isa

HIDDEN = "blocks.*.*.*.weight"

OURS: dict[str, Callable[[], optim.Optimizer]] = {
    "adamw": lambda: optim.adamw(1e-3, (0.9, 0.95), 1e-8, 0.1),
    "sgd": lambda: optim.sgd(1e-3, 0.9),
    "lion": lambda: optim.lion(1e-4, weight_decay=0.1),
    "adafactor": lambda: optim.adafactor(1e-3),
    "schedule_free_adamw": lambda: optim.schedule_free_adamw(1e-3, weight_decay=0.1),
    "muon": lambda: optim.groups({HIDDEN: optim.muon(1e-3, dtype=torch.bfloat16), "*": optim.adamw(1e-3)}),
}


CLASSES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: optim.torch.AdamW(params, 1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "sgd": lambda params: optim.torch.SGD(params, 1e-3, momentum=0.9),
    "lion": lambda params: optim.torch.Lion(params, 1e-4, weight_decay=0.1),
    "adafactor": lambda params: optim.torch.Adafactor(params, 1e-3),
    "schedule_free_adamw": lambda params: optim.torch.ScheduleFreeAdamW(params, 1e-3, weight_decay=0.1),
}


class MuonAndAdamW:
    """torch.optim.Muon for the hidden matrices, fused AdamW for the rest."""

    def __init__(self, named: dict[str, torch.Tensor]):
        hidden = {name for name in named if name.startswith("blocks.") and name.count(".") == 4 and named[name].dim() == 2}
        self.muon = torch.optim.Muon([named[name] for name in named if name in hidden], 1e-3)
        self.adamw = torch.optim.AdamW([named[name] for name in named if name not in hidden], 1e-3, fused=True)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


def schedule_free(named: dict[str, torch.Tensor]) -> Any:
    optimizer = schedulefree.AdamWScheduleFree(named.values(), 1e-3, weight_decay=0.1, foreach=True)
    optimizer.train()
    return optimizer


THEIRS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "adamw": lambda named: torch.optim.AdamW(named.values(), 1e-3, (0.9, 0.95), 1e-8, 0.1, fused=True),
    "sgd": lambda named: torch.optim.SGD(named.values(), 1e-3, 0.9, fused=True),
    "lion": lambda named: lion_pytorch.Lion(named.values(), 1e-4, weight_decay=0.1),
    "adafactor": lambda named: torch.optim.Adafactor(named.values(), 1e-3, foreach=True),
    "schedule_free_adamw": schedule_free,
    "muon": MuonAndAdamW,
}


def with_grads(weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    params = {name: p.clone().requires_grad_() for name, p in weights.items()}
    for name, p in params.items():
        p.grad = grads[name].clone()
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    console = Console(width=130)
    weights = {name: p.detach() for name, p in TASKS["gpt"].model().named_parameters()}
    generator = torch.Generator().manual_seed(0)
    grads = {name: torch.randn(p.shape, generator=generator) * 1e-3 for name, p in weights.items()}
    count = sum(p.numel() for p in weights.values())
    console.print(f"{len(weights)} parameters, {count / 1e6:.1f} M numbers; {cpu_model()}, {isa()}, {torch.get_num_threads()} threads")

    for name in args.only:
        optimizer = OURS[name]()

        def update(state: dict, grads: dict, optimizer: optim.Optimizer = optimizer) -> dict:
            updates, own = optimizer.update(grads, state["optimizer"], state["params"])
            return {"params": optim.apply_updates(state["params"], updates), "optimizer": own}

        step = nf.jit(update, donate=0)
        params = {key: p.clone() for key, p in weights.items()}
        held = {"state": {"params": params, "optimizer": optimizer.init(params)}}

        def ours(step: Callable = step, held: dict = held) -> None:
            held["state"] = step(held["state"], grads)

        candidates = {"theirs": THEIRS[name](with_grads(weights, grads)).step, "ours": ours}
        if name in CLASSES:
            candidates["ours, torch class"] = CLASSES[name](with_grads(weights, grads).values()).step
        timings = alternate(candidates, args.rounds)
        compiled, _ = step.lookup((held["state"], grads), {})
        calls, scratch = len(compiled.graph.equations), compiled.program.plan.arena_bytes
        console.print(timing_table(timings, f"{name}: ours is {calls} calls with {scratch / 1e6:.1f} MB of scratch"))


if __name__ == "__main__":
    main()
