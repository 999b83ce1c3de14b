"""The page and the figure of ``python -m bench.paper``, on figures made up for the purpose."""

from __future__ import annotations

import json
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from bench import paper_page, plot, results
from bench.paper_page import Delay, Distance, Paper
from bench.results import Case, Cost

SVG = "{http://www.w3.org/2000/svg}"
COSTS = {
    "scalar": Cost([0.9], 900, 176_400, projected=True),
    "eBPFmonitor": Cost([0.012], 1, 29_000),
    "page": Cost([0.3], 300, 1_262_000),
    "batch": Cost([0.004], 1, 21_700),
    "batch, flushed": Cost([0.006]),
    "eBPFmonitor, first": Cost([0.05]),
    "batch, first": Cost([0.04]),
    "native": Cost([0.001]),
    "native, flushed": Cost([0.075]),
    "native, first": Cost([0.5]),
}
DISTANCE = Distance(
    "processes",
    300,
    900,
    {"scalar": Cost([0.5], 900, 176_400), "batch": Cost([0.002], 1, 21_700)},
    [
        Delay(0.1, 0.25, {"scalar": Cost([0.6]), "batch": Cost([0.0022])}),
        Delay(10.0, 10.2, {"scalar": Cost([9.6], projected=True), "batch": Cost([0.0121])}),
    ],
)
PAPER = Paper(
    kernel="6.1.0-56-cloud-amd64",
    where="lab VM (tcg, 1 CPU)",
    here="Linux 6.18, this machine",
    machine="a machine",
    date="2026-01-02",
    load=1.0,
    cpus=2,
    direct=0.15,
    floor=0.05,
    cases=[Case("processes", 300, 900, COSTS)],
    distances=[DISTANCE],
)


@pytest.mark.parametrize(("strategy", "added", "ms"), [("scalar", 0.1, 635.0), ("batch", 10.0, 12.05)])
def test_the_model_is_requests_times_round_trip_and_the_base(strategy: str, added: float, ms: float) -> None:
    assert DISTANCE.model(strategy, added, floor=0.05) == pytest.approx(ms)


def test_the_page_has_every_way_and_marks_what_is_projected() -> None:
    text = paper_page.document(PAPER)
    assert "| 300 processes | 3.00x | 0.05x |" in text
    assert "| 300 processes | 1.25x | 0.08x | 0.08x |" in text
    assert "| scalar | 900 | 500 | 600 (635) | ~9,600 (9,545) |" in text
    assert "`python -m bench.paper`" in text
    assert "Other work ran" not in text
    assert all(line.endswith("|") for line in text.splitlines() if line.startswith("|"))


def test_the_record_is_json() -> None:
    record = json.loads(json.dumps(results.rounded(asdict(PAPER))))
    assert record["distances"][0]["delays"][1]["costs"]["scalar"]["projected"]


def test_the_figure_has_a_dot_for_each_point_and_a_line_for_each_strategy() -> None:
    drawing = ElementTree.fromstring(paper_page.drawn(PAPER))
    rings = [dot.get("fill") for dot in drawing.iter(f"{SVG}circle")]
    assert sorted(rings, key=str) == sorted([plot.COLOURS["scalar"], "none", *[plot.COLOURS["batch"]] * 2])
    assert [line.get("stroke") for line in drawing.iter(f"{SVG}polyline")] == [
        plot.COLOURS[w] for w in ("scalar", "batch")
    ]


def test_dots_lie_where_their_logarithms_are() -> None:
    points = [(1.0, 10.0, True), (10.0, 100.0, True), (100.0, 1000.0, True)]
    curve = plot.Curve("batch", points, [(x, y) for x, y, _ in points])
    dots = list(ElementTree.fromstring(plot.curves([("t", "x", [curve])])).iter(f"{SVG}circle"))
    for axis, way in (("cx", 1), ("cy", -1)):
        first, second, third = (float(dot.get(axis, "nan")) for dot in dots)
        assert (second - first) * way > 0
        assert third - second == pytest.approx(second - first, abs=0.2)
