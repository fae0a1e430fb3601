"""Every optimizer on small problems that can be drawn, and on a real GPT.

    python benchmarks/optimizers.py --toy
    python benchmarks/optimizers.py --gpt [--only adamw,lion] [--steps 250] [--seeds 3] [--results runs/optimizers]
    python benchmarks/optimizers.py --time [--results runs/optimizers]
    python benchmarks/optimizers.py --report [--results runs/optimizers]

--toy: Rosenbrock, Rastrigin, an ill-conditioned quadratic and logistic regression, each optimizer at the best of its own
learning rates. Draws docs/optimizers-toy.svg and writes docs/optimizers-toy.json.

--gpt: a GPT-2 of 0.87 M parameters on this Python's standard library. Every optimizer sees the same tokens; its learning
rate is swept, from its own middle outwards until the best is no longer at an end; the best is run with more seeds; losses
are compared at the end of its own schedule. Each run is a file under --results, so it can be stopped and started again,
and taken in pieces with --only. --time measures a step of each, alternating, in CPU seconds. --report makes docs/optimizers.json, docs/optimizers.svg and the table of what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

import neuralforge as nf
from neuralforge import optim
from neuralforge.bench import alternate, peak_flops
from neuralforge.bench.machine import inspect_machine
from neuralforge.compiler.planning.cost import total
from neuralforge.data import Sampler, prepare, validation_batches
from neuralforge.graph import capture
from neuralforge.models import build
from neuralforge.train import config as configuration
from neuralforge.train.config import Config
from neuralforge.train.step import curvature_due, make_step, weights

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"

# ---- toy problems


@dataclass(frozen=True)
class Problem:
    """`loss(x)` is to be made small, down to `least`; `logits(x)` where it is a cross entropy of them."""

    start: torch.Tensor
    loss: Callable[[torch.Tensor], torch.Tensor]
    steps: int
    least: float = 0.0
    logits: Callable[[torch.Tensor], torch.Tensor] | None = None
    window: tuple[float, float, float, float] | None = None


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (1 - x[..., 0]) ** 2 + 100 * (x[..., 1] - x[..., 0] ** 2) ** 2


def rastrigin(x: torch.Tensor) -> torch.Tensor:
    return (10 + x**2 - 10 * torch.cos(2 * math.pi * x)).sum(-1)


def problems() -> dict[str, Problem]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(draw(30, 30))[0]
    hessian = turn @ torch.diag(torch.logspace(-4, 0, 30, dtype=torch.float64)) @ turn.T
    inputs = draw(400, 20) * torch.logspace(-1.5, 0.5, 20, dtype=torch.float64)  # features of very different sizes
    labels = (inputs @ draw(20, 3) * 2 + draw(400, 3)).argmax(-1)
    logits = lambda w: inputs @ w
    logistic = lambda w: torch.nn.functional.cross_entropy(logits(w), labels) + 1e-4 * w.square().sum()
    point = lambda *x: torch.tensor(x, dtype=torch.float64)
    return {
        "Rosenbrock": Problem(point(-1.5, 2.0), rosenbrock, 1000, window=(-2.0, 2.0, -1.0, 3.0)),
        "Rastrigin": Problem(point(-3.3, 3.8), rastrigin, 300, window=(-4.5, 4.5, -4.5, 4.5)),
        "quadratic, condition 10,000": Problem(draw(30), lambda x: x @ (hessian @ x) / 2, 500),
        "logistic regression": Problem(torch.zeros(20, 3, dtype=torch.float64), logistic, 500, minimum(logistic), logits),
    }


def minimum(loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Of the regression, by Newton's method."""
    x = torch.zeros(60, dtype=torch.float64)
    f = lambda x: loss(x.view(20, 3))
    for _ in range(30):
        x = x - torch.linalg.solve(nf.hessian(f)(x), nf.grad(f)(x))
    return f(x).item()


def descend(name: str, problem: Problem, rates: list[float]) -> tuple[float, torch.Tensor]:
    """The rate that ends lowest, and the way there, [steps + 1, ...]. The rate falls as half a cosine."""
    rule, shape = TOYS[name], optim.schedules.cosine(1.0, problem.steps, final=0.0)
    curvature = {"sophia_h": "hutchinson", "sophia_g": "gauss_newton_bartlett"}.get(name)

    def step(x: torch.Tensor, state: Any, rate: torch.Tensor, key: torch.Tensor, due: bool) -> tuple[torch.Tensor, Any]:
        extra = {}
        if due:
            estimate = getattr(optim, curvature)
            of = (lambda p: problem.loss(p["x"])) if curvature == "hutchinson" else (lambda p: problem.logits(p["x"]))
            extra = {"curvature": estimate(of, {"x": x}, key)}
        grads = nf.grad(lambda p: problem.loss(p["x"]))({"x": x})
        updates, state = rule(lambda n: rate * shape(n)).update(grads, state, {"x": x}, **extra)
        return optim.apply_updates({"x": x}, updates)["x"], state

    step = nf.jit(step)
    best = (math.inf, 0.0, problem.start[None])
    for rate in rates:
        x, state, way = problem.start, rule(0.0).init({"x": problem.start}), [problem.start]
        for n in range(problem.steps):
            due = curvature is not None and n % 10 == 0
            x, state = step(x, state, torch.tensor(rate, dtype=torch.float64), nf.random.key(n), due)
            way.append(x)
        end = problem.loss(way[-1]).item()
        if end < best[0]:
            best = (end, rate, torch.stack(way))
    return best[1], best[2]


TOYS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda lr: optim.sgd(lr, momentum=0.9),
    "adamw": lambda lr: optim.adamw(lr, weight_decay=0.0),
    "adafactor": lambda lr: optim.adafactor(lr),
    "lion": lambda lr: optim.lion(lr, weight_decay=0.0),
    "sophia_h": lambda lr: optim.sophia(lr, weight_decay=0.0),
    "sophia_g": lambda lr: optim.sophia(lr, weight_decay=0.0),
    "muon": lambda lr: optim.muon(lr, weight_decay=0.0),
    "schedule_free_adamw": lambda lr: optim.schedule_free_adamw(lr, weight_decay=0.0),
    "lookahead": lambda lr: optim.lookahead(optim.adamw(lr, weight_decay=0.0)),
}


def toy() -> None:
    """Each optimizer at the best of 13 rates, half a decade apart."""
    rates = [10 ** (e / 2) for e in range(-10, 3)]
    told: dict[str, dict[str, Any]] = {}
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    for axis, (title, problem) in zip(axes.flat, problems().items()):
        told[title] = {}
        for n, name in enumerate(TOYS):
            if (name == "sophia_g" and problem.logits is None) or (name == "muon" and problem.start.dim() != 2):
                continue
            rate, way = descend(name, problem, rates)
            losses = torch.stack([problem.loss(x) for x in way]) - problem.least
            told[title][name] = {"rate": rate, "excess loss": losses[-1].item()}
            print(f"{title:<30}{name:<22}rate {rate:<10.3g}excess loss {losses[-1]:.3g}", flush=True)
            look = {"color": f"C{n}", "label": f"{name} ({losses[-1]:.1g})", "linewidth": 1.2}
            if problem.window:
                axis.plot(way[:, 0], way[:, 1], **look)
            else:
                axis.semilogy(losses.clamp(min=1e-16), **look)
        if problem.window:
            contours(axis, problem)
        axis.set_title(title)
        axis.legend(fontsize=8, title="excess loss at the end" if problem.window else None)
    for axis in axes[1]:
        axis.set(xlabel="step", ylabel="excess loss")
        axis.grid(alpha=0.3)
    figure.savefig(DOCS / "optimizers-toy.svg")
    (DOCS / "optimizers-toy.json").write_text(json.dumps(told, indent=1) + "\n")


def contours(axis: plt.Axes, problem: Problem) -> None:
    left, right, bottom, top = problem.window
    x, y = torch.meshgrid(torch.linspace(left, right, 200), torch.linspace(bottom, top, 200), indexing="xy")
    levels = problem.loss(torch.stack([x, y], -1))
    axis.contourf(x, y, (levels + 1e-2).log(), levels=25, cmap="Greys", alpha=0.5).set_rasterized(True)
    axis.set(xlim=(left, right), ylim=(bottom, top))


# ---- a GPT


MIDDLE = {
    "adamw": 3e-3, "sgd": 0.3, "adafactor": 1e-2, "lion": 6e-4, "sophia_h": 1e-3, "sophia_g": 1e-3, "muon": 1e-2,
    "schedule_free_adamw": 3e-3, "lookahead": 3e-3,
}  # fmt: skip
"""Where each optimizer's sweep begins; it goes on in factors of sqrt(10)."""


def base(steps: int) -> Config:
    c = Config()
    return replace(
        c,
        model=replace(c.model, depth=3, d_model=128, context=64),
        data=replace(c.data, vocab_size=2048),
        train=replace(c.train, steps=steps, batch=16),
    )


def configured(name: str, rate: float, seed: int, steps: int) -> Config:
    """`lookahead` is around AdamW."""
    c = base(steps)
    rule = {"name": "adamw", "lookahead": 5} if name == "lookahead" else {"name": name}
    schedule = {"name": "constant"} if name == "schedule_free_adamw" else {"name": "cosine", "final": 0.0}
    return configuration.resolve(
        replace(
            c,
            optimizer=replace(c.optimizer, lr=rate, **rule),
            schedule=replace(c.schedule, warmup=steps // 10, **schedule),
            train=replace(c.train, seed=seed),
        )
    )


def train(c: Config, dataset: Any) -> dict[str, Any]:
    """One run: losses by step, validation losses, seconds and operations of the steps."""
    sampler = Sampler(dataset.train, batch=c.train.batch, context=c.model.context, seed=0)  # the same tokens for every seed
    model = build(c.model_config(dataset.tokenizer.vocab_size), c.train.seed)
    init, step_fn, loss_fn = make_step(model, c)
    step, evaluate, state = nf.jit(step_fn, donate=(0,)), nf.jit(loss_fn), init()
    held_out = [b["tokens"] for b in validation_batches(dataset.valid, c.train.batch, c.model.context, 16)]
    flops = cache(lambda due: total(capture(partial(step_fn, due=due), state, held_out[0]).graph).flops)
    losses, valid, seconds, work = [], [], [], []
    for n in range(c.train.steps):
        tokens, due = next(sampler)["tokens"], curvature_due(c, n)
        began = time.perf_counter()
        state, metrics = step(state, tokens, due)
        losses.append(metrics["loss"].item())
        seconds.append(time.perf_counter() - began)
        work.append(flops(due))
        if not math.isfinite(losses[-1]):
            break
        if (n + 1) % (c.train.steps // 10) == 0:
            valid.append((n + 1, statistics.fmean(evaluate(weights(c, state), b).item() for b in held_out)))
    final = valid[-1][1] if valid and valid[-1][0] == c.train.steps else None
    return {"losses": losses, "valid": valid, "final": final, "seconds": seconds, "flops": work}


def runs(results: Path, steps: int, seeds: int, only: list[str]) -> None:
    """Whatever is missing: each optimizer's sweep, then its best rate with more seeds."""
    c = base(steps)
    dataset = prepare(c.data.path, Path(c.data.cache), c.data.vocab_size, c.data.valid_fraction)

    def result(name: str, rate: float, seed: int) -> dict[str, Any]:
        path = results / f"{name}-{rate:.3g}-{seed}-{steps}.json"
        if not path.exists():
            began = time.perf_counter()
            found = {"name": name, "rate": rate, "seed": seed, **train(configured(name, rate, seed, steps), dataset)}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
            print(f"{name:<22}rate {rate:<9.3g}seed {seed}  loss {found['final']}  {time.perf_counter() - began:.0f} s", flush=True)
        return json.loads(path.read_text())

    for name in only:
        loss = lambda e, name=name: result(name, MIDDLE[name] * 10 ** (e / 2), 0)["final"] or math.inf
        tried = {e: loss(e) for e in (-1, 0, 1)}
        while (best := min(tried, key=tried.__getitem__)) in (min(tried), max(tried)) and len(tried) < 9:
            beyond = best + (1 if best == max(tried) else -1)
            tried[beyond] = loss(beyond)
        for seed in range(seeds):
            result(name, MIDDLE[name] * 10 ** (best / 2), seed)


def clock(results: Path, rounds: int = 5) -> None:
    """CPU seconds that a step of each optimizer takes: the least of ten steps, one of which sees the curvature if any does. The
    runs' own times are of whatever else the machine did."""
    tokens = torch.randint(0, 2000, (base(1).train.batch, base(1).model.context + 1))

    def ten(name: str) -> Callable[[], None]:
        c = configured(name, MIDDLE[name], 0, 250)
        init, step_fn, _ = make_step(build(c.model_config(2048), 0), c)
        step, held = nf.jit(step_fn, donate=(0,)), [init()]

        def go() -> None:
            for n in range(10):
                held[0], _ = step(held[0], tokens, curvature_due(c, n))

        return go

    timings = alternate({name: ten(name) for name in MIDDLE}, rounds)
    seconds = {name: min(t.cpu) / 10 for name, t in timings.items()}
    (results / "seconds").mkdir(parents=True, exist_ok=True)
    (results / "seconds" / "step.json").write_text(json.dumps(seconds))
    print({name: f"{t * 1e3:.1f} ms" for name, t in seconds.items()})


# ---- what came of it


def report(results: Path) -> None:
    """docs/optimizers.json and .svg, and the table in Markdown."""
    seconds = json.loads((results / "seconds" / "step.json").read_text())
    found: dict[str, dict[float, list[dict]]] = {}
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text())
        found.setdefault(run["name"], {}).setdefault(run["rate"], []).append(run)
    finals = lambda group: [run["final"] if run["final"] is not None else math.inf for run in group]
    best = {}
    for name, by_rate in found.items():
        rate = min(by_rate, key=lambda r: next(iter(finals(sorted(by_rate[r], key=lambda run: run["seed"])))))
        best[name] = by_rate[rate]
    mean = lambda name: statistics.fmean(finals(best[name]))
    order = sorted(best, key=mean)
    target = mean("adamw") if "adamw" in best else math.inf
    c = base(1)
    tokens = c.train.batch * c.model.context
    summary, lines = {}, []
    for name in order:
        group = best[name]
        steps = len(group[0]["losses"])
        first = [next((n for n, loss in run["valid"] if loss <= target), None) for run in group]
        reached = statistics.median(first) if all(first) else None
        summary[name] = {
            "rate": group[0]["rate"], "final": finals(group), "steps": steps, "tokens": steps * tokens,
            "flops": sum(group[0]["flops"]), "seconds_per_step": seconds[name], "steps_to_adamw": reached,
            "sweep": {f"{rate:.3g}": finals(runs)[0] for rate, runs in sorted(found[name].items())},
        }  # fmt: skip
        spread = f" ± {statistics.stdev(finals(group)):.3f}" if len(group) > 1 else ""
        lines.append(
            f"| {name} | {group[0]['rate']:.2g} | {mean(name):.3f}{spread} | {len(group)} | {steps} | {steps * tokens / 1e6:.2f} M | "
            f"{sum(group[0]['flops']) / 1e12:.2f} T | {steps * seconds[name]:.1f} | {seconds[name] * 1e3:.0f} | {reached or 'never'} |"
        )
    machine = inspect_machine()
    facts = {"cpu": machine.cpu, "threads": machine.threads, "peak": peak_flops().value, "optimizers": summary}
    (DOCS / "optimizers.json").write_text(json.dumps(facts, indent=1) + "\n")
    print("| | rate | validation loss | seeds | steps | tokens | FLOP | CPU seconds | ms a step | first validation as good as AdamW's last, step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    draw(best, found, order, tokens, seconds)


def draw(best: dict[str, list[dict]], found: dict[str, dict[float, list[dict]]], order: list[str], tokens: int, seconds: dict[str, float]) -> None:
    """Validation loss against steps, tokens, FLOPs and seconds; the sweeps; the ends."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), constrained_layout=True)
    along = {
        "steps": lambda run, n: n,
        "tokens": lambda run, n: n * tokens,
        "FLOP": lambda run, n: sum(run["flops"][:n]),
        "CPU seconds of training": lambda run, n: n * seconds[run["name"]],
    }
    for axis, (label, x) in zip(axes.flat, along.items()):
        for n, name in enumerate(order):
            curves = [run for run in best[name] if run["final"] is not None]
            if not curves:
                continue
            at = [statistics.fmean(x(run, step) for run in curves) for step, _ in curves[0]["valid"]]
            losses = [[loss for _, loss in run["valid"]] for run in curves]
            axis.plot(at, [statistics.fmean(column) for column in zip(*losses)], color=f"C{n}", label=name)
            axis.fill_between(at, [min(column) for column in zip(*losses)], [max(column) for column in zip(*losses)], color=f"C{n}", alpha=0.2)
        axis.set(xlabel=label, ylabel="validation loss (nats per token)")
    worst = max(run["final"] or 0 for name in order for run in best[name])
    for n, name in enumerate(order):
        sweep = [(rate, group[0]["final"]) for rate, group in sorted(found[name].items()) if group[0]["final"] is not None]
        axes[1, 1].semilogx(*zip(*sweep), marker="o", markersize=3, color=f"C{n}", label=name)
        ends = [run["final"] for run in best[name] if run["final"] is not None]
        axes[1, 2].plot(ends, [n] * len(ends), "o", color=f"C{n}", alpha=0.6)
    axes[1, 1].set(xlabel="learning rate, first seed", ylabel="validation loss at the end", ylim=(None, worst + 0.5))
    axes[1, 2].set(xlabel="validation loss at the end, a dot a seed", yticks=range(len(order)), yticklabels=order)
    axes[0, 0].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(DOCS / "optimizers.svg")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("toy", "gpt", "time", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(MIDDLE))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("runs/optimizers"))
    args = parser.parse_args()
    if args.toy:
        toy()
    if args.gpt:
        runs(args.results, args.steps, args.seeds, args.only)
    if args.time:
        clock(args.results)
    if args.report:
        report(args.results)


if __name__ == "__main__":
    main()
