"""The comparison with earlier work: its figures as values, as docs/paper.md and as docs/paper.svg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import plot, report, results
from bench.report import Rows
from bench.results import Case, Cost

THEIRS = "eBPFmonitor"
STRATEGIES = ("scalar", THEIRS, "page", "batch")
"""Those that ask an agent."""


@dataclass(frozen=True)
class Delay:
    """A network with an added delay, milliseconds."""

    added: float
    """What it was made to take."""
    measured: float
    """Round trip of an empty request."""
    costs: dict[str, Cost]
    """Of a listing, by strategy."""


@dataclass
class Distance:
    """One listing over all delays."""

    listing: str
    size: int
    reads: int
    """Calls of the API."""
    base: dict[str, Cost]
    """Without the forwarder: what it takes beside the round trips."""
    delays: list[Delay] = field(default_factory=list)

    def model(self, strategy: str, added: float, floor: float) -> float:
        """Milliseconds that a listing should take: requests x round trip + base."""
        return self.base[strategy].requests * (added + floor) + self.base[strategy].ms


@dataclass
class Paper:
    """All that was measured."""

    kernel: str
    where: str
    here: str
    machine: str
    date: str
    load: float
    cpus: int
    direct: float
    """Milliseconds of an empty request on this machine without the forwarder ..."""
    floor: float
    """... and what a forwarder without a delay adds."""
    cases: list[Case]
    distances: list[Distance]


def tables(paper: Paper) -> Iterator[tuple[str, Rows]]:
    # Ratios within this run only: benchmark.md has each strategy's milliseconds, and two runs differ.
    yield (
        "A listing: eBPFmonitor's time divided by batch's, and batch's by native's after a flush",
        _ratios(paper.cases, ((THEIRS, "batch"), ("batch", "native, flushed"))),
    )
    pairs = ((f"{THEIRS}, first", "batch, first"), ("batch, first", "native, first"))
    yield (
        "The first listing, including the connection, and a listing after all caches were flushed",
        _ratios(paper.cases, (*pairs, ("batch, flushed", "native, flushed"))),
    )
    yield "Requests and bytes of a listing", _requests(paper.cases)
    for distance in paper.distances:
        yield (
            f"{distance.size:,} {distance.listing} over a slower network: milliseconds, measured (and by the model)",
            _delays(paper, distance),
        )


def _ratios(cases: Sequence[Case], pairs: Sequence[tuple[str, str]]) -> Rows:
    rows: Rows = [("listing", *("/\n".join(pair) for pair in pairs))]
    for case in cases:
        rows.append(
            (case.name, *(_mark(case.costs[one], report.number(case.times(one, two), "x")) for one, two in pairs))
        )
    return rows


def _requests(cases: Sequence[Case]) -> Rows:
    rows: Rows = [
        ("listing", "reads", *(f"{strategy}\n{what}" for strategy in STRATEGIES for what in ("requests", "bytes")))
    ]
    for case in cases:
        costs = [case.costs[strategy] for strategy in STRATEGIES]
        figures = [_mark(cost, text) for cost in costs for text in (f"{cost.requests:,}", report.size(cost.carried))]
        rows.append((case.name, f"{case.reads:,}", *figures))
    return rows


def _delays(paper: Paper, distance: Distance) -> Rows:
    names = [f"+ {plot.duration(each.added)}" for each in distance.delays]
    rows: Rows = [("strategy", "requests", "base", *names)]
    for strategy, base in distance.base.items():
        cells = []
        for each in distance.delays:
            cost = each.costs[strategy]
            by_model = report.number(distance.model(strategy, each.added, paper.floor))
            cells.append(f"{_mark(cost, report.number(cost.ms))} ({by_model})")
        rows.append((strategy, _mark(base, f"{base.requests:,}"), _mark(base, report.number(base.ms)), *cells))
    return rows


def _mark(cost: Cost, text: str) -> str:
    return f"~{text}" if cost.projected else text


def document(paper: Paper) -> str:
    """docs/paper.md."""
    texts = [f"### {title}\n\n{report.markdown(rows)}" for title, rows in tables(paper)]
    measured = len(texts) - len(paper.distances)
    parts = [
        "# Comparison with earlier work",
        "Written by `python -m bench.paper`; do not edit.",
        _METHOD,
        _EARLIER,
        f"## Linux {paper.kernel}, {paper.where}",
        " ".join(filter(None, [f"{paper.date}; {paper.machine}.", report.crowded(paper.load, paper.cpus)])),
        *texts[:measured],
        f"## The network: {paper.here}",
        _NETWORK.format(direct=paper.direct * 1e3, floor=paper.floor * 1e3),
        "![Time of a listing over the round-trip time, measured and by the model](paper.svg)",
        *texts[measured:],
    ]
    return "\n\n".join(parts) + "\n"


_METHOD = """\
[`bench/workloads.py`](../bench/workloads.py), unchanged, lists 100, 300 and 1,000 processes, kernel modules and TCP
sockets of one VM in one run, by five strategies:

- **scalar**: each read is a request, as in SEVmonitor.
- **eBPFmonitor**: an eBPF program collects the addresses of all objects in one run. The agent's user space then copies
  one object after the other and sends all of them in one reply, which the IDS's side keeps.
- **page**: each 4 KiB page is a request, and is kept for the length of the listing, as in 00SEVen.
- **batch**: vmishim's. The eBPF program that walks the list also copies what is wanted.
- **native**: the genuine libvmi 3.7.1 on the VM's memory file, with the VM paused, in an environment of its own.

The others are modelled by how they read, as we understand it: neither their code nor their transport is used. All but
native run over our link, with its encryption, our Python and our agent. For eBPFmonitor's strategy the agent differs in
one place, [`bench/sequential.py`](../bench/sequential.py): its walk brings only addresses, and each object is copied by
a separate run of the program that reads memory, from the first wanted byte to the last. Our read-ahead, which knows the
wanted fields, keeps the result as usual. Where the original does less, it is slower than this model; the difference
that remains between the two is where the copying is done.

Every strategy is checked against what was planted: a listing that lacks a planted object ends the run. The modules are
copies of one small module under different names. Each listing reads fresh memory in the steady state: three listings
before it learned what an unchanged script reads. **flushed**: all caches were flushed, names too, so that the head's
address is looked up again; native does this in its symbol map, ours by a request. **first**: from nothing to the end of
the first listing; for ours this includes connection, handshake and the kernel's facts, for native its constructor.
Ratios are of medians: a/b is a's time divided by b's, of this run. What each strategy takes in milliseconds is in
[benchmark.md](benchmark.md), so that there is one source of it. A figure marked ~ was not run to its end: it is
projected from the reads that were done."""

_EARLIER = """\
## The earlier work

- **SEVmonitor**: 能野智玄, 光来健一 (Kenichi Kourai), *AMD SEV を用いてメモリが暗号化された VM に対する IDS
  オフロード* (IDS offloading for VMs whose memory AMD SEV encrypts), IPSJ SIG Technical Report 2021-OS-153, July 2021:
  [kyutech.repo.nii.ac.jp/records/7444](https://kyutech.repo.nii.ac.jp/records/7444). An agent in the VM sends memory to
  an IDS in another VM that SEV protects.
- **eBPFmonitor**: 上杉貫太, 光来健一, *AMD SEV で保護された VM の eBPF を用いた高速な監視* (fast monitoring, by
  eBPF, of VMs that AMD SEV protects), IPSJ SIG Technical Report (OS), May 2023:
  [ipsj.ixsq.nii.ac.jp/records/225757](https://ipsj.ixsq.nii.ac.jp/records/225757).
- **00SEVen**: Fabian Schwarz, Christian Rossow, *00SEVen - Re-enabling Virtual Machine Forensics: Introspecting
  Confidential VMs Using Privileged in-VM Agents*, USENIX Security 2024:
  [usenix.org](https://www.usenix.org/conference/usenixsecurity24/presentation/schwarz),
  [the author's page](https://fa-schwarz.github.io/portfolio/00seven). Its agent runs at a higher privilege level of
  SEV-SNP (VMPL) than the guest's kernel, so that it does not have to trust that kernel, as vmishim does."""

_NETWORK = """\
The lists of this machine, read from its agent at a TCP port through our own forwarder
([`bench/delay.py`](../bench/delay.py)), which delays everything by half a round trip in each direction. Without it, an
empty request takes {direct:.0f} us. The forwarder itself, which wakes and copies once in each direction, adds
{floor:.0f} us: that is the floor, no round trip through it can be shorter. The model has no fitted parameters:

    time = requests x (round trip + floor) + base

where the requests are counted and the base is the listing without the forwarder. Lines are the model, dots are
measured, rings are projected."""


def from_json(record: dict[str, Any]) -> Paper:
    """The record of a run: docs/paper.json."""

    def costs(of: dict[str, Any]) -> dict[str, Cost]:
        return {strategy: Cost(**cost) for strategy, cost in of.items()}

    distances = [
        Distance(
            **each
            | {"base": costs(each["base"])}
            | {"delays": [Delay(**delay | {"costs": costs(delay["costs"])}) for delay in each["delays"]]}
        )
        for each in record["distances"]
    ]
    cases = [results.case_from_json(case) for case in record["cases"]]
    return Paper(**record | {"cases": cases, "distances": distances})


def drawn(paper: Paper) -> str:
    """docs/paper.svg."""
    charts = []
    for distance in paper.distances:
        curves = [
            plot.Curve(
                strategy,
                [(each.added, each.costs[strategy].ms, not each.costs[strategy].projected) for each in distance.delays],
                [(added, distance.model(strategy, added, paper.floor)) for added in _steps(distance.delays)],
            )
            for strategy in distance.base
        ]
        title = (
            f"Listing {distance.size:,} {distance.listing}, {paper.here}: measured, and requests x round trip + base"
        )
        charts.append((title, "round trip that the network adds", curves))
    return plot.curves(charts)


def _steps(delays: Sequence[Delay], count: int = 40) -> list[float]:
    """From the shortest delay to the longest, evenly by logarithm."""
    low, high = delays[0].added, delays[-1].added
    return [low * (high / low) ** (step / count) for step in range(count + 1)]
