"""The benchmark's tables and plot, on figures made up for the purpose."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench import pages, plot, report, results, scale
from bench.results import Case, Cost, Ground, Part

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parents[2]


def case(listing: str, size: int, buckets: int = 0, **ms: float) -> Case:
    return Case(
        listing,
        size,
        3 * size,
        {strategy: Cost([1e3, one / 1e3, one / 2e3], 7, 7_000) for strategy, one in ms.items()},
        buckets,
    )


GROUND = Ground(
    kernel="6.1.0-56-cloud-amd64",
    where="lab VM (tcg, 1 CPU)",
    machine="a machine",
    date="2026-01-02",
    cases=[
        case("processes", 100, scalar=90.0, page=30.0, batch=2.0, native=0.5),
        case("processes", 1000, scalar=900.0, page=300.0, batch=3.0, native=7.5),
        case("modules", 38, scalar=80.0, page=30.0, batch=5.0, native=0.1),
        case("sockets", 2001, 8192, scalar=2500.0, page=400.0, batch=20.0, native=30.0),
        case("sockets", 2000, 1 << 18, scalar=41000.0, page=540.0, batch=50.0, native=400.0),
    ],
    first={"scalar": 220.0, "batch": 29.6, "native": 800.0},
    first_of=300,
    cached={"batch": 63.2, "native": 1500.0},
    parts=[Part("the walk", 1.0, "guest, eBPF"), Part("the reads", 3.0, "IDS, Python")],
    parts_of=1000,
    emulated=True,
    network="a wire",
)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0421, "42 us"),
        (0.61, "0.6 ms"),
        (1.0, "1 ms"),
        (9.949, "9.9 ms"),
        (9.96, "10 ms"),
        (999.6, "1 s"),
        (49_671, "50 s"),
    ],
)
def test_a_duration_has_the_unit_that_suits(ms: float, text: str) -> None:
    assert plot.duration(ms) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.613, "0.61x"), (9.96, "10.0x"), (99.6, "100x"), (5719.2, "5,719x")]
)
def test_a_ratio_has_about_three_digits(value: float | None, text: str) -> None:
    assert report.number(value, "x") == text


@pytest.mark.parametrize(("count", "text"), [(7_477, "7,477 B"), (176_400, "176 kB"), (29_700_000, "30 MB")])
def test_bytes_are_short(count: int, text: str) -> None:
    assert report.size(count) == text


def test_a_cost_is_the_median() -> None:
    assert GROUND.cases[0].costs["batch"].ms == 2.0


def test_ratios_are_the_first_by_the_second() -> None:
    assert report.time_rows(GROUND.cases)[1] == (
        "100 processes",
        "90.0",
        "30.0",
        "2.00",
        "0.50",
        "45.0x",
        "15.0x",
        "4.00x",
    )


def test_a_way_that_was_not_measured_is_a_dash() -> None:
    row = report.time_rows([case("modules", 38, scalar=80.0, page=30.0, batch=4.0), GROUND.cases[0]])[1]
    assert row == ("38 modules", "80.0", "30.0", "4.00", "-", "20.0x", "7.50x", "-")


def test_what_is_projected_is_marked() -> None:
    costs = {"scalar": Cost([40.0], projected=True), "page": Cost([0.5]), "batch": Cost([0.05])}
    row = report.time_rows([Case("sockets", 20, 262_264, costs, 1 << 18)])[1]
    assert row == ("20 sockets in 262,144 buckets", "~40,000", "500", "50.0", "~800x", "10.0x")


def test_goals_say_what_is_not_reached() -> None:
    reached = {goal.what: (goal.reached, goal.figures) for goal in report.goals(GROUND)}
    assert reached == {
        "batch >= 20x faster than scalar, 300 processes and more": (True, "300x"),
        "batch >= 20x faster than scalar, modules": (False, "16.0x"),
        "batch >= 20x faster than scalar, TCP hash": (True, "125x to 820x"),
        "batch faster than page, all listings": (True, "6.00x to 100x"),
        "batch <= 0.5x of native, 300 processes and more": (True, "0.40x"),
        "batch <= 0.1x of native, full-size TCP hash": (False, "0.12x"),
        "a cached read costs <= 300 ns": (True, "63 ns"),
    }


def test_the_fastest_runs_are_compared_too() -> None:
    assert report.goal_rows(GROUND)[1] == (
        "batch >= 20x faster than scalar, 300 processes and more",
        "yes",
        "300x",
        "300x",
    )
    costs = {"batch": Cost([0.2, 0.1, 0.3]), "native": Cost([0.6, 0.4, 0.5])}
    assert Case("processes", 300, 900, costs).times("batch", "native", fastest=True) == pytest.approx(0.25)


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (2.9, False), (10.2, True)])
def test_a_busy_machine_is_told_of(load: float, warned: bool) -> None:
    ground = replace(GROUND, load=load, cpus=2)
    assert ("a load of up to 10 on 2 CPUs" in report.document([ground], "bench")) is warned
    assert ("a machine, busy." in report.quote([ground])) is warned


def test_native_has_no_column_where_it_was_not_measured() -> None:
    header, row = report.time_rows([case("processes", 300, scalar=90.0, page=30.0, batch=2.0)])
    assert header == ("listing", "scalar\nms", "page\nms", "batch\nms", "scalar/\nbatch", "page/\nbatch")
    assert row == ("300 processes", "90.0", "30.0", "2.00", "45.0x", "15.0x")


def test_two_pages_never_have_different_figures_of_one_listing() -> None:
    """Of one listing by one strategy on one kernel: milliseconds have one source, docs/benchmark.json."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        kernel, header = "", [""]
        for line in path.read_text().splitlines():
            if line.startswith("## "):
                kernel = "".join(re.findall(r"Linux (\d+\.\d+\.\d+)", line))
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if cells and cells[0] == "listing":
                header = cells
            if len(cells) != len(header) or header[0] != "listing" or not re.search(r"\d", cells[-1]):
                continue
            of = cells[header.index("kernel")].split(",")[0] if "kernel" in header else kernel
            for title, cell in zip(header, cells, strict=True):
                if title.endswith(", ms") and cell != "-":
                    found.setdefault((of, cells[0], title), set()).add(cell)
    assert ("6.1.0", "300 processes", "batch, ms") in found
    assert {key: figures for key, figures in found.items() if len(figures) > 1} == {}


def test_tables_fit_a_terminal_of_100_columns() -> None:
    out = io.StringIO()
    report.show(GROUND, Console(file=out, width=100, highlight=False))
    text = out.getvalue()
    assert "…" not in text
    assert text.count("2,000 sockets in 262,144 buckets") == 2  # on one line, in two tables
    assert max(map(len, text.splitlines())) <= 100


def test_the_document_names_what_costs_most_and_what_was_missed() -> None:
    text = report.document([GROUND], "python -m bench")
    assert "What costs most: the reads (3.00 ms), the walk (1.00 ms)." in text
    assert "Not reached here: batch >= 20x faster than scalar, modules; batch <= 0.1x of native" in text
    assert "Listing 2,001 sockets in 8,192 buckets makes 6,003 calls, 0.38 ms that no walk can save" in text
    assert "software emulation" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_only_the_marked_part_of_a_page_changes() -> None:
    page = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    text = report.marked(page, "bench", report.quote([GROUND]))
    assert text.startswith("before\n<!-- bench -->\n![Time of a listing")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert report.marked(text, "bench", report.quote([GROUND])) == text


def test_the_readme_quotes_one_case_of_each_listing() -> None:
    assert [line for line in report.quote([GROUND]).splitlines() if line.startswith("|")] == [
        "| listing | kernel | scalar, ms | page, ms | batch, ms | native, ms |",
        "|---|---:|---:|---:|---:|---:|",
        "| 100 processes | 6.1.0, lab VM | 90.0 | 30.0 | 2.00 | 0.50 |",
        "| 38 modules | 6.1.0, lab VM | 80.0 | 30.0 | 5.00 | 0.10 |",
        "| 2,000 sockets in 262,144 buckets | 6.1.0, lab VM | 41,000 | 540 | 50.0 | 400 |",
    ]


def test_our_pages_are_what_their_records_give() -> None:
    changed = [path.name for path, text in pages.written().items() if path.read_text() != text]
    assert not changed, "python -m bench.pages writes them"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no <!-- bench -->"):
        report.marked("nothing\n", "bench", "")


@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "bench"), ("docs/benchmark.md", "fleet"), ("docs/security.md", "sealed")]
)
def test_our_pages_have_the_marks(page: str, name: str) -> None:
    report.marked((ROOT / page).read_text(), name, "")


FLEET = {
    "machine": "a machine",
    "load": 1.5,
    "list": "ps",
    "agents": 50,
    "runs": 5,
    "rows": [
        {"name": "threads", "killed": "", "listings": 50, "seconds": 2.0, "rate": 25.0, "asking_ms": 12.0}
        | {"agent_ms": 30.0, "failed": 0, "wrong": 0, "lost": 0},
        {"name": "threads", "killed": "5 agents", "listings": 50, "seconds": 20.0, "rate": 2.25, "asking_ms": None}
        | {"agent_ms": None, "failed": 5, "wrong": 0, "lost": 5},
    ],
}


def test_the_fleet_has_a_paragraph_that_stays() -> None:
    text = report.document([GROUND], "python -m bench", FLEET)
    assert "| threads | - | 50 | 2.00 | 25.0 | 12.0 | 30.0 | 0 | 0 |" in text
    assert "| threads | 5 agents | 50 | 20.0 | 2.25 | - | - | 5 of 5 due | 0 |" in text
    assert report.marked(text, "fleet", report.fleet(FLEET)) == text


def test_the_record_is_json() -> None:
    assert json.loads(json.dumps(results.as_json(GROUND)))["cases"][0]["costs"]["page"]["requests"] == 7


def boxes(drawing: str) -> list[float]:
    """Widths of a plot's boxes, those of its legends among them."""
    return [float(box.get("width", "0")) for box in ElementTree.fromstring(drawing).iter(f"{SVG}rect")]


def test_the_plot_has_a_bar_for_each_way_of_each_quoted_listing() -> None:
    drawing = report.plotted([GROUND, GROUND])
    # Of processes, modules and sockets one case each.
    assert len(boxes(drawing)) == 2 * (len(results.STRATEGIES) + 3 * 4)
    texts = {text.text for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")}
    assert {"scalar", "page", "batch", "native", "100 processes", "262,144 buckets", "41 s"} <= texts
    assert "median time of a listing, logarithmic scale" in texts


def test_bars_are_as_long_as_the_logarithm_of_their_time() -> None:
    _, *widths = boxes(
        plot.bars([("t", [(name, {"batch": ms}) for name, ms in (("a", 1.0), ("b", 10.0), ("c", 100.0))])])
    )
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=0.2)
    assert widths[1] > widths[0] > 0


def test_no_text_of_the_plot_lies_on_another_or_outside() -> None:
    drawing = ElementTree.fromstring(report.plotted([GROUND, GROUND]))
    right, bottom = (float(edge) for edge in drawing.get("viewBox", "").split()[2:])
    for chart in drawing.iter(f"{SVG}g"):
        areas: list[tuple[float, float, float, float]] = []
        for text in chart.iter(f"{SVG}text"):
            wide = 7.2 * len(text.text or "")  # a wide letter at 13 pixels
            x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
            start = x - wide * {"end": 1.0, "middle": 0.5}.get(text.get("text-anchor", ""), 0.0)
            assert start >= 0
            assert start + wide <= right
            assert 0 < y <= bottom
            area = (start, start + wide, y - 11, y + 2)
            assert not [a for a in areas if a[0] < area[1] and area[0] < a[1] and a[2] < area[3] and area[2] < a[3]]
            areas.append(area)


def test_the_walks_of_lists_are_drawn_from_their_record() -> None:
    curves = scale.from_json(json.loads((ROOT / "docs" / "scale.json").read_text()))
    drawing = ElementTree.fromstring(scale.drawn(curves))
    assert len(list(drawing.iter(f"{SVG}circle"))) == sum(len(curve.points) for curve in curves)
    texts = {text.text for text in drawing.iter(f"{SVG}text")}
    assert {"nodes in the list, logarithmic scale", "100,000", "Linux 6.12, lab VM (tcg)"} <= texts
