"""The measurements as tables: for the terminal, for docs/benchmark.md, for the README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import plot
from bench.results import STRATEGIES, Case, Ground

# ---- figures ---------------------------------------------------------------------------------------------------------


def number(value: float | None, unit: str = "") -> str:
    """Three digits or so; a dash for none."""
    if value is None:
        return "-"
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:,.{digits}f}{unit}"


def size(count: int) -> str:
    """Bytes, in kB or MB from where that is shorter."""
    for limit, unit in ((10_000_000, "MB"), (10_000, "kB")):
        if count >= limit:
            return f"{count / (1_000_000 if unit == 'MB' else 1_000):,.0f} {unit}"
    return f"{count:,} B"


# ---- tables ----------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, ...]]


def time_rows(cases: Sequence[Case]) -> Rows:
    """Header, then median milliseconds and ratios of each case; without native where it was not measured."""
    strategies = [strategy for strategy in STRATEGIES if any(strategy in case.costs for case in cases)]
    ratios = [pair for pair in (("scalar", "batch"), ("page", "batch"), ("batch", "native")) if pair[1] in strategies]
    rows: Rows = [("listing", *(f"{strategy}\nms" for strategy in strategies), *("/\n".join(pair) for pair in ratios))]
    for case in cases:
        of = (_projected(number(case.times(*pair), "x"), case, *pair) for pair in ratios)
        rows.append((case.name, *_ms(case, strategies), *of))
    return rows


def _ms(case: Case, strategies: Sequence[str] = STRATEGIES) -> list[str]:
    """Median milliseconds by strategy."""
    return [
        _projected(number(case.costs[strategy].ms), case, strategy) if strategy in case.costs else "-"
        for strategy in strategies
    ]


def _projected(text: str, case: Case, *strategies: str) -> str:
    """``text``, marked when it rests on a projection."""
    return (
        f"~{text}"
        if any(strategy in case.costs and case.costs[strategy].projected for strategy in strategies)
        else text
    )


def request_rows(cases: Sequence[Case]) -> Rows:
    """Header, then the reads of each case, and the requests and bytes of each strategy."""
    strategies = STRATEGIES[:-1]
    rows: Rows = [
        ("listing", "reads", *(f"{strategy}\n{what}" for strategy in strategies for what in ("requests", "bytes")))
    ]
    for case in cases:
        figures = [
            text
            for strategy in strategies
            for cost in [case.costs.get(strategy)]
            for text in ((f"{cost.requests:,}", size(cost.carried)) if cost else ("-", "-"))
        ]
        rows.append((case.name, f"{case.reads:,}", *figures))
    return rows


def start_rows(ground: Ground) -> Rows:
    """Header, then what a first listing and a cached read cost, by strategy."""
    rows: Rows = [("", *(strategy for strategy in STRATEGIES if strategy in ground.first))]
    strategies = rows[0][1:]
    rows.append(
        (
            f"connect, and list {ground.first_of:,} processes, ms",
            *(number(ground.first.get(strategy)) for strategy in strategies),
        )
    )
    rows.append(("a read that needs no request, ns", *(number(ground.cached.get(strategy)) for strategy in strategies)))
    return rows


def part_rows(ground: Ground) -> Rows:
    """Header, then where a batch listing's time goes, the most costly first."""
    whole = sum(part.ms for part in ground.parts)
    rows: Rows = [("part", "where", "ms", "share")]
    for part in sorted(ground.parts, key=lambda part: -part.ms):
        rows.append((part.what, part.where, number(part.ms), f"{part.ms / whole:.0%}"))
    rows.append(("all of it", "", number(whole), "100%"))
    return rows


def terminal(title: str, rows: Rows, console: Console) -> None:
    """Print a table."""
    console.print(f"\n[bold]{title}[/bold]\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column, (name, cells) in enumerate(zip(rows[0], zip(*rows[1:], strict=True), strict=True)):
        left = not column or not any(any(map(str.isdigit, cell)) for cell in cells)
        table.add_column(name, justify="left" if left else "right", no_wrap=not column)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def markdown(rows: Rows) -> str:
    """A table in Markdown; its first column is text, the others are figures, except columns without a digit."""
    columns = list(zip(*rows[1:], strict=True))
    text = [not at or not any(any(map(str.isdigit, cell)) for cell in cells) for at, cells in enumerate(columns)]
    header = " | ".join(name.replace("/\n", "/").replace("\n", ", ") for name in rows[0])
    lines = [f"| {header} |", f"|{'|'.join('---' if left else '---:' for left in text)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows[1:])])


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and whether it is."""

    what: str
    reached: bool
    figures: str
    """The least and the greatest ratio by medians ..."""
    fastest: str = ""
    """... and by the fastest runs."""


def goals(ground: Ground) -> list[Goal]:
    """Each goal that this ground's figures can tell."""
    largest = max((case.buckets for case in ground.cases), default=0)
    tasks = [case for case in ground.cases if case.listing == "processes" and case.size >= 290]
    modules = [case for case in ground.cases if case.listing == "modules"]
    sockets = [case for case in ground.cases if case.listing == "sockets"]
    full = [case for case in sockets if case.buckets == largest >= 1 << 18]
    asked = (
        ("batch >= 20x faster than scalar, 300 processes and more", tasks, "scalar", "batch", 20.0, True),
        ("batch >= 20x faster than scalar, modules", modules, "scalar", "batch", 20.0, True),
        ("batch >= 20x faster than scalar, TCP hash", sockets, "scalar", "batch", 20.0, True),
        ("batch faster than page, all listings", ground.cases, "page", "batch", 1.0, True),
        ("batch <= 0.5x of native, 300 processes and more", tasks, "batch", "native", 0.5, False),
        ("batch <= 0.1x of native, full-size TCP hash", full, "batch", "native", 0.1, False),
    )
    found = []
    for what, cases, numerator, denominator, bound, least in asked:
        ratios = [ratio for case in cases if (ratio := case.times(numerator, denominator)) is not None]
        if not ratios:
            continue
        reached = min(ratios) >= bound if least else max(ratios) <= bound
        best = [ratio for case in cases if (ratio := case.times(numerator, denominator, fastest=True)) is not None]
        found.append(Goal(what, reached, _range(ratios), _range(best)))
    read = ground.cached.get("batch")
    if read is not None:
        found.append(Goal("a cached read costs <= 300 ns", read <= 300, f"{read:,.0f} ns"))
    return found


def _range(values: Sequence[float], unit: str = "x") -> str:
    return " to ".join(dict.fromkeys((number(min(values), unit), number(max(values), unit))))


def goal_rows(ground: Ground) -> Rows:
    """Header, then each goal."""
    rows: Rows = [("goal", "reached", "measured", "fastest runs")]
    rows += [(goal.what, "yes" if goal.reached else "no", goal.figures, goal.fastest) for goal in goals(ground)]
    return rows


# ---- documents -------------------------------------------------------------------------------------------------------


def show(ground: Ground, console: Console) -> None:
    """Print everything."""
    console.rule(f"Linux {ground.kernel}, {ground.where}")
    for title, rows in _tables(ground):
        terminal(title, rows, console)
    console.print(f"\n{ground.machine}; {ground.network}.")
    if busy(ground):
        console.print(busy(ground))


def busy(ground: Ground) -> str:
    """A warning when other work took the machine's time from what was measured; empty when none did."""
    return crowded(ground.load, ground.cpus)


def crowded(load: float, cpus: int) -> str:
    """The same of a load average and the machine's number of CPUs."""
    # Ours are two at most: the IDS and QEMU, or the IDS and the agent.
    if load <= max(cpus, 2) * 1.5:
        return ""
    return (
        f"Other work ran on this machine meanwhile: a load of up to {load:.0f} on {cpus} CPUs. Medians are longer than "
        "on a quiet machine, and ratios are off by as much as the load changed; the fastest runs suffer least."
    )


def _tables(ground: Ground) -> Iterator[tuple[str, Rows]]:
    yield "Time of a listing, medians", time_rows(ground.cases)
    yield "Requests and bytes of a listing", request_rows(ground.cases)
    yield "The first listing, and a cached read", start_rows(ground)
    if ground.parts:
        yield f"Where a batch listing of {ground.parts_of:,} processes spends its time", part_rows(ground)
    yield "Goals", goal_rows(ground)


def document(grounds: Sequence[Ground], command: str, of_fleet: dict[str, Any] | None = None) -> str:
    """docs/benchmark.md; ``of_fleet`` is what docs/fleet.json holds."""
    out = [
        "# Benchmark",
        "",
        f"Written by `{command}`; do not edit.",
        "",
        _METHOD,
        "",
        "![Time of a listing by each read strategy](benchmark.svg)",
    ]
    for ground in grounds:
        out += ["", f"## Linux {ground.kernel}, {ground.where}", ""]
        out += [f"{ground.date}; {ground.machine}; {ground.network}."]
        if busy(ground):
            out += ["", busy(ground)]
        if ground.emulated:
            out += ["", _EMULATED]
        for title, rows in _tables(ground):
            out += ["", f"### {title}", "", markdown(rows)]
        costs = sorted(ground.parts, key=lambda part: -part.ms)[:3]
        if costs:
            out += ["", f"What costs most: {', '.join(f'{part.what} ({number(part.ms)} ms)' for part in costs)}."]
        missed = [goal.what for goal in goals(ground) if not goal.reached]
        if missed:
            out += ["", f"Not reached here: {'; '.join(missed)}.", "", _bound(ground)]
    first, last = _marks("fleet")
    out += ["", first, *([fleet(of_fleet)] if of_fleet else []), last]
    return "\n".join([*out, ""])


_METHOD = """\
The measured code is one file, [`bench/workloads.py`](../bench/workloads.py): three listings, written as LibVMI's users
write them, one read at a time. In one run, the genuine bindings execute it on the VM's memory file, and vmishim
executes it through the agent in that VM. Figures of one table are of one run, side by side; native needs a VM's memory
file, so a table of this machine's own kernel has none:

- **scalar**: each read is a request, as in SEVmonitor.
- **page**: each 4 KiB page is a request, and is kept for the length of the listing, as in 00SEVen and MemProcFS.
- **batch**: a read of a list's head makes the agent walk the list in the guest's kernel. Listings follow one another,
  as in an IDS, and each has its own snapshot; the walk also brings what was learned in the first three listings.
- **native**: the genuine libvmi 3.7.1 on the VM's memory, with the VM paused and LibVMI's caches warm. No agent, no
  encryption, no confidential VM: this is the reference.

Times are medians of one run. Machines differ, and so do runs; ratios vary less than times. A ratio divides the first
strategy's time by the second's: scalar/batch says how many times faster batch is, batch/native what it costs compared
with native. Each measured listing, by any strategy, is checked to contain all planted processes and sockets. A time
marked ~ is projected, because that listing would take many minutes: it is the number of reads times the duration of the
first of them.

To measure on your machine: `make bench`, or `python -m bench --kernel 6.1 --local` for all that is on this page but the
fleet."""

_EMULATED = """\
The VM runs under software emulation (TCG): the agent's Python, its cryptography and the kernel's walk are interpreted,
several times slower than on hardware, and each request crosses QEMU's user-mode network stack. Native is not affected:
it reads a file on this machine. So ratios to native are worse here than under KVM. Scalar pays for the emulated round
trip with each read, so ratios to scalar are better."""


def _bound(ground: Ground) -> str:
    """Why no batch is faster."""
    text = (
        "What limits it: a batch listing is one round trip to the agent, the walk, unpacking its result into Python's "
        "dictionaries, and the script's own reads, each a call in Python."
    )
    most = max(ground.cases, key=lambda case: case.reads)
    calls = most.reads * ground.cached.get("batch", 0.0) / 1e6
    if calls:
        text += f" Listing {most.name} makes {most.reads:,} calls, {number(calls)} ms that no walk can save"
        text += f": {number(calls / most.costs['native'].ms, 'x')} of native." if "native" in most.costs else "."
    return text


def plotted(grounds: Sequence[Ground]) -> str:
    """docs/benchmark.svg: the cases that the README quotes; the tables have all."""
    return plot.bars(
        [
            (
                f"An unchanged script, Linux {ground.kernel.split('-')[0]}, {ground.where}",
                [
                    (
                        f"{case.size:,} {case.listing}" + (f"\n{case.buckets:,} buckets" if case.buckets else ""),
                        {strategy: cost.ms for strategy, cost in case.costs.items()},
                    )
                    for case in _quoted(ground)
                ],
            )
            for ground in grounds
        ]
    )


def _quoted(ground: Ground) -> list[Case]:
    """Of each listing the case that is nearest to 300 objects."""
    listings = dict.fromkeys(case.listing for case in ground.cases)
    return [
        min((case for case in ground.cases if case.listing == listing), key=lambda case: abs(case.size - 300))
        for listing in listings
    ]


def quote(grounds: Sequence[Ground]) -> str:
    """The README's block: the plot and a table of its cases."""
    rows: Rows = [("listing", "kernel", *(f"{strategy}\nms" for strategy in STRATEGIES))]
    for ground in grounds:
        for case in _quoted(ground):
            rows.append((case.name, f"{ground.kernel.split('-')[0]}, {ground.where.split(' (')[0]}", *_ms(case)))
    emulated = "The VM is emulated in software, agent and all. " if any(ground.emulated for ground in grounds) else ""
    text = (
        f"Medians of one run; {grounds[0].machine}{', busy' * any(map(busy, grounds))}. {emulated}All sizes, requests, "
        "bytes, the method, and the goals that were not reached: [docs/benchmark.md](docs/benchmark.md)."
    )
    plot = "![Time of a listing by each read strategy](docs/benchmark.svg)"
    return "\n\n".join([plot, markdown(rows), fill(text, 120, break_on_hyphens=False, break_long_words=False)])


def marked(page: str, name: str, text: str) -> str:
    """A page with ``text`` between the marks of that name, ``<!-- name -->`` and ``<!-- /name -->``.

    :raises ValueError: it has none
    """
    first, last = _marks(name)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page has no {first} ... {last}")
    return f"{before}{first}\n{text}\n{last}{after}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


# ---- a fleet ---------------------------------------------------------------------------------------------------------


def fleet_rows(result: dict[str, Any]) -> Rows:
    """Header, then each way to ask many guests; ``result`` is what docs/fleet.json holds."""
    rows: Rows = [
        ("asked by", "killed", "listings", "s", "listings/s", "CPU, asking\nms", "CPU, agent\nms", "failed", "wrong")
    ]
    for row in result["rows"]:
        failed = f"{row['failed']} of {row['lost']} due" if row["lost"] else f"{row['failed']}"
        figures = (row["seconds"], row["rate"], row["asking_ms"], row["agent_ms"])
        cells = (f"{row['listings']:,}", *map(number, figures), failed, f"{row['wrong']}")
        rows.append((row["name"], row["killed"] or "-", *cells))
    return rows


def fleet(result: dict[str, Any]) -> str:
    """The paragraph of docs/benchmark.md; ``result`` is what docs/fleet.json holds."""
    rows = result["rows"]
    asking = [row["asking_ms"] for row in rows if row["asking_ms"] is not None]
    agent = [row["agent_ms"] for row in rows if row["agent_ms"] is not None]
    text = f"""
        Written by `python -m bench.fleet`: {result["agents"]} agents on one machine. Each listing makes a new
        connection and handshake (unless sessions are kept), asks for the kernel's facts, and reads one list
        (`{result["list"]}`).
        {result["machine"]}; load {result["load"]}. Medians of {result["runs"]} runs. The agents share the processors
        with the asking side, so listings/s is what both sides cost together. Taken apart, a listing takes
        {_range(asking, " ms")} of processor time on the asking side, which limits how much one machine can ask for
        when the agents run elsewhere, and {_range(agent, " ms")} in the guest. In one run a worker was killed during
        the listings: another worker took over its guests. In another, agents were killed beforehand: their listings
        fail when their time is up; s is when all others had arrived."""
    text = " ".join(text.split())
    return "\n\n".join(["## A fleet", fill(text, 120, break_on_hyphens=False), markdown(fleet_rows(result))])
