"""Grouped bars, and curves, on logarithmic scales, as SVG without external fonts, scripts or styles.

Written by hand, so that ``make bench`` needs no plotting library. Ink and colours have a medium brightness, so that you
can read them on a light page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {"scalar": "#d9534f", "page": "#d99a2b", "eBPFmonitor": "#a66bbe", "batch": "#2a9d8f", "native": "#7a86b8"}
INK = "#7b8794"
WIDTH, HEIGHT = 960, 450
LEFT, RIGHT, TOP, BOTTOM = 74, 6, 86, 50
"""Margins."""
GAP = 0.14
"""Share of a group's width that is left free."""

Group = tuple[str, Mapping[str, float]]
"""A name, which may have a second line, and milliseconds by the name of the bar."""


Chart = tuple[str, Sequence[Group]]
"""A title, and what is below it."""


def bars(charts: Sequence[Chart]) -> str:
    """Charts of milliseconds, one below the other; the bars of each group are side by side, bars without a value left
    out."""
    out = _opened([title for title, _ in charts])
    for number, (title, groups) in enumerate(charts):
        out += [f'<g transform="translate(0 {HEIGHT * number})">', *_chart(title, groups), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def _chart(title: str, groups: Sequence[Group]) -> list[str]:
    values = [value for _, costs in groups for value in costs.values()]
    # Room for the shortest bar to be seen, and for the figure above the longest.
    low, high = math.floor(math.log10(min(values) * 0.8)), math.ceil(math.log10(max(values) * 1.3))
    names = [name for name in COLOURS if any(name in costs for _, costs in groups)]
    floor = HEIGHT - BOTTOM

    def height(value: float) -> float:
        return floor - (math.log10(value) - low) / (high - low) * (floor - TOP)

    out = [*_titled(title, names), *_scaled(low, high, height)]
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    broad = room * (1 - GAP) / len(names)
    for number, (label, costs) in enumerate(groups):
        start = LEFT + room * (number + GAP / 2)
        for place, name in enumerate(names):
            if name not in costs:
                continue
            x, y = start + broad * place, height(costs[name])
            box = f'x="{x + 1:.1f}" y="{y:.1f}" width="{broad - 2:.1f}" height="{floor - y:.1f}"'
            out.append(f'<rect {box} rx="1.5" fill="{COLOURS[name]}"/>')
            text = duration(costs[name]).replace(" ", "")
            at = f"{x + broad / 2 + 4:.1f} {y - 5:.1f}"
            out.append(f'<text transform="translate({at}) rotate(-90)" font-size="11">{text}</text>')
        for line, words in enumerate(label.split("\n")):
            middle, below = start + room * (1 - GAP) / 2, floor + 18 + 15 * line
            out.append(f'<text x="{middle:.1f}" y="{below}" text-anchor="middle">{escape(words)}</text>')
    return out


@dataclass(frozen=True)
class Curve:
    """Milliseconds over milliseconds: what was measured, and what the model predicts."""

    name: str
    points: Sequence[tuple[float, float, bool]]
    """(x, y, whether it was measured to its end: a ring stands for one that was not)."""
    model: Sequence[tuple[float, float]]


def curves(charts: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Charts, one below the other: a title, the label of the x axis, and curves in the colours of their names."""
    out = _opened([title for title, _, _ in charts])
    for number, (title, bottom, drawn) in enumerate(charts):
        out += [f'<g transform="translate(0 {HEIGHT * number})">', *_curved(title, bottom, drawn), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def _curved(title: str, bottom: str, drawn: Sequence[Curve]) -> list[str]:
    xs = [x for curve in drawn for x, _ in curve.model]
    ys = [y for curve in drawn for y in (*(y for _, y in curve.model), *(y for _, y, _ in curve.points))]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, right = math.log10(min(xs)), math.log10(max(xs))
    floor = HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + 10 + (math.log10(value) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 40)

    def height(value: float) -> float:
        return floor - (math.log10(value) - low) / (high - low) * (floor - TOP)

    out = [*_titled(title, [curve.name for curve in drawn]), *_scaled(low, high, height)]
    for power in range(math.ceil(left), math.floor(right) + 1):
        x = across(10.0**power)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}" stroke="{INK}" stroke-opacity="0.25"/>'
        out += [line, f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{duration(10.0**power)}</text>']
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{floor + 38}" text-anchor="middle">{escape(bottom)}</text>')
    for curve in drawn:
        colour = COLOURS[curve.name]
        path = " ".join(f"{across(x):.1f},{height(y):.1f}" for x, y in curve.model)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y, whole in curve.points:
            inside = colour if whole else "none"
            out.append(f'<circle cx="{across(x):.1f}" cy="{height(y):.1f}" r="4" fill="{inside}" stroke="{colour}"/>')
    return out


def _opened(titles: Sequence[str]) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(titles)}" role="img"'
        f' font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape('; '.join(titles))}</title>",
    ]


def _titled(title: str, names: Sequence[str]) -> list[str]:
    """The title and the legend."""
    out = [f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text>']
    for number, name in enumerate(names):
        at = LEFT + 110 * number
        out.append(f'<rect x="{at}" y="30" width="11" height="11" rx="2" fill="{COLOURS[name]}"/>')
        out.append(f'<text x="{at + 16}" y="40">{name}</text>')
    return out


def _scaled(low: int, high: int, height: Callable[[float], float]) -> list[str]:
    """Horizontal lines at the powers of ten, each with its duration."""
    out = []
    for power in range(low, high + 1):
        y = height(10.0**power)
        stroke = f'stroke="{INK}" stroke-opacity="{0.9 if power == low else 0.25}"'
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" {stroke}/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{duration(10.0**power)}</text>')
    return out


def duration(ms: float) -> str:
    """Milliseconds in two digits or so, with the unit that suits: ``42 us``, ``1.3 ms``, ``2.5 s``."""
    value, unit = (ms / 1e3, "s") if ms >= 999.5 else (ms, "ms") if ms >= 0.0995 else (ms * 1e3, "us")
    return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + f" {unit}"
