"""The explanation of a program as one HTML page that needs nothing from elsewhere: pictures are SVG, written here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from ..compiler.planning.cost import total
from ..kernels.toolchain import cpu_model
from .peak import bandwidth, product_peak

if TYPE_CHECKING:
    from .explain import Explanation, Row

WIDTH, HEIGHT, LEFT, BOTTOM = 920, 260, 64, 36
BARS = 24
COLOURS = {"fused C": "a", "our kernel": "b", "oneDNN": "c", "ATen": "d"}
STYLE = """
:root { --ink: #1d2430; --dim: #667085; --line: #d7dce3; --paper: #fff; --a: #1a73c8; --b: #0d8f6f; --c: #c2571a; --d: #8a5cc2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a2b3; --line: #3a4250; --paper: #14181f;
  --a: #5aa9f0; --b: #3cc3a0; --c: #f0904f; --d: #b592e8; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 980px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .5em } p.dim, td.dim, .dim { color: var(--dim) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th { text-align: left; color: var(--dim); font-weight: 500 }
td, th { padding: 2px 8px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top } .n { text-align: right }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: var(--dim) } svg .strong { fill: var(--ink) }
.axis { stroke: var(--line) } .area { fill: var(--a); fill-opacity: .25; stroke: var(--a) } .limit { stroke: var(--ink); stroke-dasharray: 4 3; fill: none }
.fa { fill: var(--a) } .fb { fill: var(--b) } .fc { fill: var(--c) } .fd { fill: var(--d) } .ghost { fill: none; stroke: var(--ink) }
pre { overflow-x: auto; font-size: 12px; border: 1px solid var(--line); padding: 8px } .scroll { overflow-x: auto } summary { cursor: pointer }
.key span { margin-right: 1.2em } .key i { display: inline-block; width: 10px; height: 10px; margin-right: 5px }
"""


def render(told: Explanation) -> str:
    """The page as text."""
    peak, stream, (predicted, measured) = product_peak().value, bandwidth().value, told.seconds
    c, plan = total(told.graph), told.plan
    facts = [
        f"{len(told.rows)} equations, {c.flops / 1e9:,.2f} GFLOP, {c.bytes / 1e6:,.1f} MB moved",
        f"one call: {predicted * 1e3:,.2f} ms predicted"
        + (f", {measured * 1e3:,.2f} ms measured" if measured else ", not measured"),
        f"predicted peak memory {plan.peak_bytes / 1e6:,.1f} MB, of which an arena of {plan.arena_bytes / 1e6:,.1f} MB",
        f"{cpu_model() or 'this CPU'}: peak of float32 products {peak / 1e9:,.0f} GFLOP/s, {stream / 1e9:,.1f} GB/s, both measured",
    ]
    parts = [
        f"<h1>{escape(told.name)}, explained</h1>",
        *(f"<p class=dim>{escape(fact)}</p>" for fact in facts),
        "<h2>Memory over the schedule</h2>", memory(told),
        f"<h2>Time of the {min(BARS, len(told.rows))} longest equations</h2>", key(), bars(told.rows),
        "<p class=dim>Filled: measured (predicted where nothing was measured). Outlined: predicted by the roofline.</p>",
        "<h2>Roofline</h2>", roofline(told.rows, peak, stream),
        "<p class=dim>Above the slope: data that a cache holds moves faster than memory does.</p>",
        "<h2>Equations</h2>", table(told.rows),
        "<h2>Rewrites</h2>", *rewrites(told),
        "<h2>Passes</h2>", *passes(told),
        "<h2>The program that runs</h2>",
        f"<details><summary>as equations</summary><pre>{escape(str(told.graph))}</pre></details>",
        f"<details><summary>as Python</summary><pre>{escape(told.program)}</pre></details>",
    ]  # fmt: skip
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(told.name)}, explained</title>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def key() -> str:
    spans = (
        f'<span><i style="background: var(--{letter})"></i>{name}</span>' for name, letter in COLOURS.items()
    )
    return f"<p class=key>{''.join(spans)}</p>"


def svg(height: float, label: str, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str = "axis") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def memory(told: Explanation) -> str:
    """Bytes in use at each equation, in the order that they run."""
    plan, equations, in_use = told.plan, told.graph.equations, told.memory_in_use()
    top = max([*in_use, plan.peak_bytes, 1])
    wide, high = WIDTH - LEFT - 10, HEIGHT - BOTTOM - 10
    x = lambda i: LEFT + wide * i / max(len(in_use), 1)
    y = lambda n: 10 + high * (1 - n / top)

    def shapes() -> Iterator[str]:
        for share in (0, 0.25, 0.5, 0.75, 1):
            yield line(LEFT, y(top * share), WIDTH - 10, y(top * share))
            yield text(LEFT - 6, y(top * share) + 4, f"{top * share / 1e6:,.1f} MB", "end")
        steps = "".join(f"L{x(i):.1f} {y(n):.1f}L{x(i + 1):.1f} {y(n):.1f}" for i, n in enumerate(in_use))
        yield f'<path class="area" d="M{LEFT} {y(0):.1f}{steps}L{x(len(in_use)):.1f} {y(0):.1f}Z"/>'
        yield line(LEFT, y(plan.peak_bytes), WIDTH - 10, y(plan.peak_bytes), "limit")
        yield text(
            WIDTH - 12,
            min(y(plan.peak_bytes) + 14, HEIGHT - BOTTOM - 4),
            "predicted peak of what a call allocates",
            "end",
        )
        yield text(LEFT, HEIGHT - 12, "first equation")
        yield text(WIDTH - 10, HEIGHT - 12, f"equation {len(equations)}", "end")
        if in_use:
            i = max(range(len(in_use)), key=in_use.__getitem__)
            yield f'<circle cx="{x(i + 0.5):.1f}" cy="{y(in_use[i]):.1f}" r="4" class="fa"/>'
            words = f"{in_use[i] / 1e6:,.1f} MB live at {equations[i].name} ({equations[i].source})"
            yield text(x(i + 0.5), HEIGHT - 12, words, "middle", "strong")

    return svg(HEIGHT, "memory in use at each equation", shapes())


def bars(rows: list[Row]) -> str:
    from .explain import ranked

    shown = ranked(rows)[:BARS]
    longest = max([*(r.seconds for r in shown), *(r.predicted for r in shown), 1e-9])
    label, step = 330, 20
    x = lambda seconds: (WIDTH - label - 70) * seconds / longest

    def shapes() -> Iterator[str]:
        for n, row in enumerate(shown):
            y = 4 + n * step
            yield f"<g><title>{escape(tip(row))}</title>"
            yield text(
                label - 8,
                y + 12,
                shortened(row.name.partition(".")[2] or row.name, 30) + "  " + shortened(row.source, 20),
                "end",
                "strong",
            )
            yield f'<rect x="{label}" y="{y + 2}" width="{max(x(row.seconds), 0.5):.1f}" height="13" class="f{COLOURS.get(row.runs, "d")}"/>'
            yield f'<rect x="{label}" y="{y + 2}" width="{max(x(row.predicted), 0.5):.1f}" height="13" class="ghost"/>'
            yield text(
                label + max(x(row.seconds), x(row.predicted)) + 6, y + 12, f"{row.seconds * 1e3:,.3f} ms"
            )
            yield "</g>"

    return svg(8 + step * len(shown), "time of the longest equations", shapes())


def roofline(rows: list[Row], peak: float, stream: float) -> str:
    """Operations per second against operations per byte, both on logarithmic scales, below what the machine can do."""
    points = [
        (row, row.intensity, row.flops / row.seconds) for row in rows if row.flops and row.seconds > 0
    ]
    lowest = min([rate for _, _, rate in points], default=peak / 1000)
    x0, x1 = -2.0, math.ceil(math.log10(max([1000, *(i for _, i, _ in points)])))
    y1 = math.ceil(math.log10(max([peak, *(rate for *_, rate in points)])))
    y0 = max(min(math.floor(math.log10(lowest)), y1 - 3), y1 - 6)
    high = HEIGHT + 100
    x = lambda i: LEFT + (WIDTH - LEFT - 10) * (math.log10(i) - x0) / (x1 - x0)
    y = lambda r: 10 + (high - BOTTOM - 10) * (1 - (math.log10(r) - y0) / (y1 - y0))

    def shapes() -> Iterator[str]:
        for e in range(math.ceil(x0), x1 + 1):
            yield line(x(10**e), 10, x(10**e), high - BOTTOM)
            yield text(x(10**e), high - BOTTOM + 14, f"{10**e:g}", "middle")
        for e in range(y0, y1 + 1):
            yield line(LEFT, y(10**e), WIDTH - 10, y(10**e))
            yield text(LEFT - 6, y(10**e) + 4, f"{10 ** (e - 9):g}", "end")
        ridge, low = peak / stream, max(10**x0, 10**y0 / stream)
        roof = [(low, low * stream), (ridge, peak), (10**x1, peak)]
        yield "".join(line(x(a), y(b), x(c), y(d), "limit") for (a, b), (c, d) in pairwise(roof))
        yield text(WIDTH - 12, y(peak) - 6, f"{peak / 1e9:,.0f} GFLOP/s", "end", "strong")
        yield text(LEFT + 4, 22, "GFLOP/s")
        yield text(WIDTH - 10, high - 6, "operations per byte moved", "end")
        longest = max([row.seconds for row, *_ in points], default=1)
        for row, intensity, rate in sorted(points, key=lambda p: -p[0].seconds):
            radius = 2.5 + 11 * math.sqrt(row.seconds / longest)
            place = f'cx="{x(min(max(intensity, 10**x0), 10**x1)):.1f}" cy="{y(max(rate, 10**y0)):.1f}" r="{radius:.1f}"'
            yield f'<circle {place} class="f{COLOURS.get(row.runs, "d")}" fill-opacity=".55"><title>{escape(tip(row))}</title></circle>'

    return svg(high, "operations per second against operations per byte", shapes())


def tip(row: Row) -> str:
    measured = f", measured {row.measured * 1e3:.3f} ms" if row.measured is not None else ""
    return (
        f"{row.name} at {row.source}, {row.runs}\n{row.why}\npredicted {row.predicted * 1e3:.3f} ms{measured}"
    )


def shortened(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def table(rows: list[Row]) -> str:
    """All equations, in the order that they run."""
    head = ["", "equation", "line", "runs", "GFLOP", "MB", "FLOP/byte", "ms predicted", "measured"]
    lines = [
        "<tr>"
        + "".join(f"<th{' class=n' if n == 0 or n > 3 else ''}>{name}</th>" for n, name in enumerate(head))
        + "</tr>"
    ]
    for n, row in enumerate(rows):
        measured = "" if row.measured is None else f"{row.measured * 1e3:,.3f}"
        numbers = (
            f"{row.flops / 1e9:,.3f}",
            f"{row.bytes / 1e6:,.2f}",
            f"{row.intensity:,.1f}",
            f"{row.predicted * 1e3:,.3f}",
            measured,
        )
        cells = "".join(f"<td class=n>{number}</td>" for number in numbers)
        words = f"{escape(row.name)}<br><span class=dim>{escape(row.why)}</span>"
        lines.append(
            f"<tr><td class=n>{n}</td><td>{words}</td><td>{escape(row.source)}</td><td>{escape(row.runs)}</td>{cells}</tr>"
        )
    return f"<details open><summary>{len(rows)} equations</summary><div class=scroll><table>{''.join(lines)}</table></div></details>"


def rewrites(told: Explanation) -> Iterator[str]:
    for title, of in (
        ("made", lambda stage: stage.made),
        ("looked at and left alone", lambda stage: stage.refused),
    ):
        found = [(stage.name, rewrite) for stage in told.passes for rewrite in of(stage)]
        lines = "".join(
            f"<tr><td class=n>{n}</td><td>{escape(r.rule)}</td><td>{escape(r.source)}</td><td>{escape(r.reason)}</td>"
            f"<td class=dim>{escape(name)}</td></tr>"
            for n, (name, r) in enumerate(found, 1)
        )
        yield f"<details><summary>{len(found)} {title}</summary><div class=scroll><table>{lines}</table></div></details>"


def passes(told: Explanation) -> Iterator[str]:
    from .explain import changed

    before = None
    for stage in told.passes:
        c = total(stage.graph)
        facts = f"{len(stage.graph.equations)} equations, {c.flops / 1e9:,.3f} GFLOP, {c.bytes / 1e6:,.1f} MB moved"
        told_of = str(stage.graph) if before is None else changed(before, stage.graph) or "nothing changed"
        yield f"<details><summary>{escape(stage.name)}: {facts}</summary><pre>{escape(told_of)}</pre></details>"
        before = stage.graph
