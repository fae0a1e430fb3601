"""What a memory budget costs: the planned and the measured peak of a step of `step.py`, and its time.

    python benchmarks/memory_budget.py [--model gpt] [--rounds 5]

Budgets go from what the step takes unasked down to the smallest that can be met. Times alternate in one process; each
measured peak is of a process of its own, beyond importing the libraries, as in `step.py`: weights, gradients and
optimizer state are in it, and not in the planned one, which is what a call allocates. That of the GPT draws docs/memory-budget.svg.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import step as steps

from neuralforge.bench import alternate, peak_resident_bytes, reset_peak, resident_bytes
from neuralforge.compiler.jitted import Jit
from neuralforge.errors import MemoryBudgetError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"
MB = 1e6


def start(model: str, budget: int | None) -> tuple[steps.Run, Jit]:
    """The step after its first call, and its jitted function."""
    made = []

    def jit(f, **options):
        made.append(plain(f, memory_budget=budget, **options))
        return made[0]

    plain, steps.nf.jit = steps.nf.jit, jit
    try:
        run = steps.start("ours", model, "fp32")
        run()
    finally:
        steps.nf.jit = plain
    return run, made[0]


def planned(jitted) -> int:
    return jitted.programs[0].program.plan.peak_bytes


def smallest(model: str) -> int:
    try:
        start(model, 1)
    except MemoryBudgetError as e:
        return int(re.search(r"at least memory_budget=(\d+)", str(e)).group(1))
    raise SystemExit("a budget of one byte was met")


def report_peak(model: str, budget: int | None) -> None:
    before = resident_bytes()
    run, _ = start(model, budget)
    reset_peak()
    for _ in range(2):
        run()
    print(peak_resident_bytes() - before)


def measured(model: str, budget: int | None) -> int:
    done = subprocess.run([sys.executable, __file__, f"--model={model}", f"--peak={budget or 0}"], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=steps.TASKS, default="gpt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        return report_peak(args.model, args.peak or None)
    runs, plans = {}, {}
    run, jitted = start(args.model, None)
    free, least = planned(jitted), smallest(args.model)
    budgets = [None, *(int(least + (free - least) * share) for share in (0.8, 0.6, 0.4, 0.2)), least]
    for budget in budgets:
        if budget is not None:
            run, jitted = start(args.model, budget)
        runs[budget], plans[budget] = run, planned(jitted)
    timings = alternate(runs, args.rounds)
    peaks = {budget: measured(args.model, budget) for budget in budgets}
    print("| budget MB | planned peak MB | measured peak MB, with the state | best ms | median ms | CPU ms (best) |\n|---|---|---|---|---|---|")
    for budget, t in timings.items():
        name = "none" if budget is None else f"{budget / MB:.1f}"
        print(f"| {name} | {plans[budget] / MB:.1f} | {peaks[budget] / MB:.0f} | {t.best * 1e3:.0f} | {t.median * 1e3:.0f} | {min(t.cpu) * 1e3:.0f} |")
    if args.model != "gpt":
        return
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    x = [plans[budget] / MB for budget in budgets]
    axis.plot(x, [min(timings[budget].cpu) * 1e3 for budget in budgets], "o-", color="tab:blue")
    axis.set(xlabel="planned peak of a call, MB", ylabel="CPU time of a step, ms", ylim=(0, None))
    beside = axis.twinx()
    beside.plot(x, [peaks[budget] / MB for budget in budgets], "s--", color="tab:orange")
    beside.set(ylabel="measured peak with the state, MB", ylim=(0, None))
    axis.yaxis.label.set_color("tab:blue")
    beside.yaxis.label.set_color("tab:orange")
    figure.savefig(DOCS / "memory-budget.svg")


if __name__ == "__main__":
    main()
