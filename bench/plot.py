"""Bars and curves on logarithmic scales, as SVG without external fonts, scripts or styles: one style for all plots.

Written by hand, so that no benchmark needs a plotting library. Ink and colours have a medium brightness, so that you
can read them on a light page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {"scalar": "#d9534f", "page": "#d99a2b", "eBPFmonitor": "#a66bbe", "batch": "#2a9d8f", "native": "#7a86b8"}
OTHERS = ("#2a9d8f", "#d9534f", "#d99a2b", "#7a86b8", "#a66bbe")
"""Of curves without a colour of their own, in their order."""
INK = "#7b8794"
WIDTH, HEIGHT = 960, 450
LEFT, RIGHT, TOP, BOTTOM = 74, 6, 106, 50
"""Margins of curves."""
NAMES, FIGURES, BAR, SPACE = 190, 70, 17, 14
"""Of bars: the margin for their names and for their figures, their height, and the space between groups."""

Group = tuple[str, Mapping[str, float]]
"""A name, which may have a second line, and milliseconds by the name of the bar."""


Chart = tuple[str, Sequence[Group]]
"""A title, and what is below it."""


def bars(charts: Sequence[Chart]) -> str:
    """Charts of milliseconds, one below the other; the bars of each group are one below the other, bars without a
    value left out."""
    drawn, total = [], 0
    for title, groups in charts:
        parts, high = _chart(title, groups)
        drawn += [f'<g transform="translate(0 {total})">', *parts, "</g>"]
        total += high
    return "\n".join([*_opened([title for title, _ in charts], total), *drawn, "</svg>", ""])


def _chart(title: str, groups: Sequence[Group]) -> tuple[list[str], int]:
    """A chart's elements, and its height."""
    values = [value for _, costs in groups for value in costs.values()]
    # Room for the shortest bar to be seen.
    low, high = math.floor(math.log10(min(values) * 0.8)), math.ceil(math.log10(max(values)))
    names = [name for name in COLOURS if any(name in costs for _, costs in groups)]
    top = 76
    floor = top + sum(BAR * len(costs) + SPACE for _, costs in groups)

    def across(value: float) -> float:
        return NAMES + (math.log10(value) - low) / (high - low) * (WIDTH - NAMES - FIGURES)

    out = _titled(title, {name: COLOURS[name] for name in names})
    for power in range(low, high + 1):
        x = across(10.0**power)
        stroke = f'stroke="{INK}" stroke-opacity="{0.9 if power == low else 0.25}"'
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{floor}" {stroke}/>')
        out.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{duration(10.0**power)}</text>')
    out.append(
        f'<text x="{(NAMES + WIDTH - FIGURES) / 2}" y="{floor + 38}" text-anchor="middle">median time of a listing, '
        "logarithmic scale</text>"
    )
    y = float(top)
    for label, costs in groups:
        lines = label.split("\n")
        for number, words in enumerate(lines):
            middle = y + BAR * len(costs) / 2 + 4 + 15 * (number - (len(lines) - 1) / 2)
            out.append(f'<text x="{NAMES - 10}" y="{middle:.1f}" text-anchor="end">{escape(words)}</text>')
        for name in names:
            if name not in costs:
                continue
            end = across(costs[name])
            box = f'x="{NAMES}" y="{y + 1:.1f}" width="{end - NAMES:.1f}" height="{BAR - 2}"'
            out.append(f'<rect {box} rx="1.5" fill="{COLOURS[name]}"/>')
            # The figure keeps clear of the lines behind it.
            out.append(f'<text x="{end + 6:.1f}" y="{y + 13:.1f}">{duration(costs[name])}</text>')
            y += BAR
        y += SPACE
    return out, floor + 60


@dataclass(frozen=True)
class Curve:
    """Milliseconds over milliseconds: what was measured, and what the model predicts."""

    name: str
    points: Sequence[tuple[float, float, bool]]
    """(x, y, whether it was measured to its end: a ring stands for one that was not)."""
    model: Sequence[tuple[float, float]]


def duration(ms: float) -> str:
    """Milliseconds in two digits or so, with the unit that suits: ``42 us``, ``1.3 ms``, ``2.5 s``."""
    value, unit = (ms / 1e3, "s") if ms >= 999.5 else (ms, "ms") if ms >= 0.0995 else (ms * 1e3, "us")
    return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + f" {unit}"


def curves(
    charts: Sequence[tuple[str, str, Sequence[Curve]]],
    side: str = "time of a listing, logarithmic scale",
    told: Callable[[float], str] = duration,
) -> str:
    """Charts, one below the other: a title, the label of the x axis, and curves in the colours of their names.

    :param side: the label of the y axis
    :param told: names a value of the x axis
    """
    out = _opened([title for title, _, _ in charts], HEIGHT * len(charts))
    for number, (title, bottom, drawn) in enumerate(charts):
        out += [f'<g transform="translate(0 {HEIGHT * number})">', *_curved(title, bottom, drawn, side, told), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def _curved(title: str, bottom: str, drawn: Sequence[Curve], side: str, told: Callable[[float], str]) -> list[str]:
    colours = {curve.name: COLOURS.get(curve.name, OTHERS[number % len(OTHERS)]) for number, curve in enumerate(drawn)}
    xs = [x for curve in drawn for x, _ in curve.model]
    ys = [y for curve in drawn for y in (*(y for _, y in curve.model), *(y for _, y, _ in curve.points))]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, right = math.log10(min(xs)), math.log10(max(xs))
    floor = HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + 10 + (math.log10(value) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 40)

    def height(value: float) -> float:
        return floor - (math.log10(value) - low) / (high - low) * (floor - TOP)

    out = [*_titled(title, colours), *_scaled(low, high, height)]
    out.append(f'<text x="6" y="{TOP - 18}">{escape(side)}</text>')
    for power in range(math.ceil(left), math.floor(right) + 1):
        x = across(10.0**power)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}" stroke="{INK}" stroke-opacity="0.25"/>'
        out += [line, f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{told(10.0**power)}</text>']
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{floor + 38}" text-anchor="middle">{escape(bottom)}</text>')
    for curve in drawn:
        colour = colours[curve.name]
        path = " ".join(f"{across(x):.1f},{height(y):.1f}" for x, y in curve.model)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y, whole in curve.points:
            inside = colour if whole else "none"
            out.append(f'<circle cx="{across(x):.1f}" cy="{height(y):.1f}" r="4" fill="{inside}" stroke="{colour}"/>')
    return out


def _opened(titles: Sequence[str], height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f"<title>{escape('; '.join(titles))}</title>",
    ]


def _titled(title: str, colours: Mapping[str, str]) -> list[str]:
    """The title and the legend."""
    out, at = [f'<text x="6" y="20" font-size="15" font-weight="600">{escape(title)}</text>'], 6
    for name, colour in colours.items():
        out.append(f'<rect x="{at}" y="36" width="11" height="11" rx="2" fill="{colour}"/>')
        out.append(f'<text x="{at + 16}" y="46">{escape(name)}</text>')
        at += 40 + 7 * len(name)
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
