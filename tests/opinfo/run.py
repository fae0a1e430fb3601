"""Check every derivative against PyTorch's operator database and write docs/operators.md.

    python tests/opinfo/run.py --workers 2                 # all operators
    python tests/opinfo/run.py --filter 'linalg|^fft'      # some; the other rows of the table stay
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
from harness import CHECKS, Result  # noqa: E402

TABLE = Path(__file__).parents[2] / "docs" / "operators.md"


class Worker:
    """A process that checks one operator at a time. A crash or a hang costs that operator only."""

    def __init__(self, context, samples: int | None):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, samples), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int, variant: str) -> None:
        self.variant, self.started = variant, time.monotonic()
        self.pipe.send(index)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, samples: int | None) -> None:
    harness.quiet()
    ops = harness.variants()
    while True:
        op = ops[pipe.recv()]
        try:
            pipe.send(harness.check(op, samples))
        except Exception as e:
            pipe.send(_lost(op.formatted_name, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"))


def _lost(variant: str, reason: str) -> Result:
    return Result(variant, dict.fromkeys(CHECKS, "fail"), [reason])


def run(pattern: str, workers: int, samples: int | None, limit: float) -> list[Result]:
    ops = harness.variants()
    todo = [i for i, op in enumerate(ops) if re.search(pattern, op.formatted_name)][::-1]
    context = multiprocessing.get_context("fork")
    pool: list[Worker] = []
    results: list[Result] = []
    while todo or pool:
        while todo and len(pool) < workers:
            pool.append(Worker(context, samples))
            index = todo.pop()
            pool[-1].give(index, ops[index].formatted_name)
        ready = wait([w.pipe for w in pool], timeout=1.0)
        for worker in list(pool):
            result = None
            if worker.pipe in ready:
                try:
                    result = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    result = _lost(worker.variant, f"the process ended with code {worker.process.exitcode}")
            elif time.monotonic() - worker.started > limit:
                result = _lost(worker.variant, f"took more than {limit:.0f} s")
            if result is None:
                continue
            result.variant = worker.variant
            results.append(result)
            _tell(result, time.monotonic() - worker.started)
            if worker.process.is_alive() and worker.pipe in ready and todo:
                index = todo.pop()
                worker.give(index, ops[index].formatted_name)
            else:
                worker.stop()
                pool.remove(worker)
            if len(results) % 20 == 0:
                write(results)
    write(results)
    return results


def _tell(result: Result, seconds: float) -> None:
    marks = " ".join(result.status[c] for c in CHECKS)
    print(f"{result.variant}: {marks} ({result.samples} samples, {seconds:.1f} s) {'; '.join(result.reasons)}", flush=True)


def write(results: list[Result]) -> None:
    """Merge the results into the table."""
    rows = read()
    for r in results:
        reason = "; ".join(r.reasons).replace("|", "\\|")
        rows[r.variant] = [*(r.status[c] for c in CHECKS), reason]
    lines = [
        "# Operators and their derivatives",
        "",
        "Each variant of PyTorch's operator database that torch differentiates, all its sample inputs in float64 and",
        "complex128, against torch.autograd; written by `python tests/opinfo/run.py`. *unsupported*: it raises an error",
        "that says so; *fail*: a wrong number or another exception; *skip*: torch has no such derivative.",
        "*mixed* is forward over reverse and reverse over forward mode; *captured* the gradient function captured as a graph",
        "and interpreted; *in place* the reverse derivative of the in-place variant.",
        "",
        "| | pass | unsupported | fail | of | share |",
        "|---|---|---|---|---|---|",
    ]
    for i, name in enumerate(CHECKS):
        column = [row[i] for row in rows.values()]
        n = {s: column.count(s) for s in ("pass", "unsupported", "fail")}
        total = sum(n.values())
        lines.append(
            f"| {name} | {n['pass']} | {n['unsupported']} | {n['fail']} | {total} | {100 * n['pass'] / max(total, 1):.1f} % |"
        )
    lines += ["", f"| operator | {' | '.join(CHECKS)} | reason |", "|---" * (len(CHECKS) + 2) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in sorted(rows.items())]
    TABLE.write_text("\n".join(lines) + "\n")


def read() -> dict[str, list[str]]:
    """The rows of the table there is, by variant."""
    rows: dict[str, list[str]] = {}
    if TABLE.exists():
        for line in TABLE.read_text().split("| operator |")[-1].splitlines()[2:]:
            cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[cells[0]] = cells[1:]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="regular expression on the variant's name")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, help="at most so many sample inputs for each dtype")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one operator")
    arguments = parser.parse_args()
    done = run(arguments.filter, arguments.workers, arguments.samples, arguments.limit)
    bad = [r.variant for r in done if "fail" in r.status.values()]
    print(f"{len(done)} variants, {len(bad)} with a failure" + (": " + ", ".join(bad) if bad else ""))
    sys.exit(bool(bad))
