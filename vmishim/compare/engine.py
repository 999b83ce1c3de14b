"""Runs a script on every backend, in an order that tells changed memory from wrong answers, and times it.

One round: first the backends that read the RAM file, with the guest stopped if possible; then the agents, with the
guest running, since an agent in a stopped guest cannot answer; then the reference again. Memory that did not change
between the reference's two runs did not change for the runs between them. A round in which memory changed is repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from vmishim.compare.backends import NATIVE, RAMFILE, Backend, Missing
from vmishim.compare.verdict import Run, Verdict, compare, moved
from vmishim.version import __version__

REFERENCE = (NATIVE, RAMFILE, "agent-scalar", "agent-page", "agent-batch")
"""The backend that the others are compared with: the first of these that is available."""
RESULTS = (("failed", "error"), ("differ", "differ"), ("nothing", "nothing"))
"""What the whole comparison is if a backend's answers are that, the first that applies; otherwise they agreed."""


class QmpError(Exception):
    """QEMU's monitor refused a command, or does not answer. The text says which."""


class Monitor:
    """QEMU's monitor protocol (docs/interop/qmp-spec.rst in QEMU), as far as stopping a guest needs it.

    :param path: its unix socket
    :param timeout: seconds to wait for QEMU; it serves one client at a time
    :raises QmpError: nothing answers there
    """

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            self._file = self._socket.makefile("rw", encoding="utf-8")
            self._next()
        except (OSError, ValueError) as error:
            self._socket.close()
            raise QmpError(f"{path}: no QEMU monitor answers there (is another client connected?): {error}") from None
        self.ask("qmp_capabilities")

    def ask(self, command: str) -> Any:
        """Run a command and return its result. :raises QmpError: QEMU refuses, or is gone"""
        try:
            self._file.write(json.dumps({"execute": command}) + "\n")
            self._file.flush()
            while True:
                answer = self._next()
                if "error" in answer:
                    raise QmpError(f"{self._path}: {command}: {answer['error'].get('desc')}")
                if "return" in answer:  # the rest are events
                    return answer["return"]
        except (OSError, ValueError) as error:
            raise QmpError(f"{self._path}: {command}: {error}") from None

    def _next(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise QmpError(f"{self._path}: QEMU closed the connection")
        return dict(json.loads(line))

    @property
    def running(self) -> bool:
        """Whether the guest's CPUs run."""
        return bool(self.ask("query-status")["running"])

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the guest's CPUs; they run again afterwards, even after an error."""
        self.ask("stop")
        try:
            yield
        finally:
            self.ask("cont")

    def close(self) -> None:
        """Disconnect from the monitor."""
        self._file.close()
        self._socket.close()


@dataclass
class Round:
    """Recorded runs of one round: the reference twice, the others once."""

    reference: str
    runs: dict[str, Run] = field(default_factory=dict)
    again: Run | None = None

    def witnesses(self) -> Iterator[tuple[str, Run]]:
        """Every run, with its backend's name."""
        yield from self.runs.items()
        if self.again is not None:
            yield self.reference, self.again


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to compare.

    :ivar runs: times each backend is timed
    :ivar rounds: maximum rounds, if memory changes
    :ivar timeout: seconds for one run of the script
    """

    script: str
    arguments: Sequence[str]
    domain: str
    release: str
    runs: int = 5
    rounds: int = 3
    timeout: float = 300.0


def run(
    job: Job,
    backends: Sequence[Backend],
    missing: Sequence[Missing] = (),
    monitor: Monitor | None = None,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Compare, and return the report that `report` shows and JSON holds.

    :raises QmpError: the monitor failed
    """
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        there = Path(folder)
        rounds: list[Round] = []
        verdicts: list[dict[str, Verdict]] = []
        for number in range(1, job.rounds + 1):
            rounds.append(_round(job, backends, there, monitor, lambda text, n=number: progress(f"round {n}: {text}")))  # type: ignore[misc]
            verdicts.append(judge(rounds, monitor is not None))
            if all(verdict.word == "same" for verdict in verdicts[-1].values()):
                break
            if any(each.failed for each in rounds[-1].runs.values()):
                break
        best = min(range(len(rounds)), key=lambda number: _badness(verdicts[number]))
        timed: dict[str, list[Run]] = {backend.name: [] for backend in backends}
        for number in range(1, job.runs + 1):
            for backend in backends:
                if not rounds[best].runs[backend.name].failed:
                    progress(f"timing: {backend.name}, {number} of {job.runs}")
                    timed[backend.name].append(
                        backend.run(job.script, job.arguments, there, record=False, timeout=job.timeout)
                    )
    # A difference on a stopped guest is wrong, even if other rounds had none.
    strict = {
        name: verdict
        for of_round in verdicts
        for name, verdict in of_round.items()
        if verdict.unexplained and monitor is not None and not name.startswith("agent")
    }
    return assemble(
        job,
        rounds[best],
        verdicts[best] | strict,
        timed,
        missing,
        len(rounds),
        monitor is not None,
    )


def _round(job: Job, backends: Sequence[Backend], folder: Path, monitor: Monitor | None, progress: Progress) -> Round:
    names = {backend.name: backend for backend in backends}
    done = Round(next(name for name in REFERENCE if name in names))
    reference = names[done.reference]
    order = sorted(backends, key=lambda backend: REFERENCE.index(backend.name))

    def go(some: Sequence[Backend]) -> Iterator[tuple[Backend, Run]]:
        for backend in some:
            progress(backend.name)
            yield backend, backend.run(job.script, job.arguments, folder, record=True, timeout=job.timeout)

    def still(backend: Backend) -> AbstractContextManager[None]:
        return monitor.stopped() if monitor is not None and backend.stands_still else nullcontext()

    with still(order[0]):
        for backend, result in go([backend for backend in order if backend.stands_still]):
            done.runs[backend.name] = result
    for backend, result in go([backend for backend in order if not backend.stands_still]):
        done.runs[backend.name] = result
    with still(reference):
        for _, result in go([reference]):
            done.again = result
    return done


def judge(rounds: Sequence[Round], stopped: bool) -> dict[str, Verdict]:
    """Compare the last round's runs with its reference, given the changes that all rounds have seen.

    :param stopped: the RAM file was read while the guest was stopped, so no difference there is excused
    """
    last = rounds[-1]
    reference = last.runs[last.reference]
    verdicts = {}
    for name, other in last.runs.items():
        if name == last.reference:
            continue
        moving: set[Any] = set()
        if not (stopped and not name.startswith("agent") and not last.reference.startswith("agent")):
            by_backend: dict[str, list[Run]] = {}
            for each in rounds:
                for witness, result in each.witnesses():
                    if witness != name:
                        by_backend.setdefault(witness, []).append(result)
            for results in by_backend.values():
                moving |= moved(results)
        verdicts[name] = compare(reference, other, moving)
    return verdicts


def _badness(verdicts: dict[str, Verdict]) -> tuple[int, int]:
    return sum(each.unexplained for each in verdicts.values()), sum(each.total for each in verdicts.values())


def assemble(
    job: Job,
    chosen: Round,
    verdicts: dict[str, Verdict],
    timed: dict[str, list[Run]],
    missing: Sequence[Missing] = (),
    rounds: int = 1,
    stopped: bool = False,
) -> dict[str, Any]:
    """The report as plain values, times in milliseconds."""
    rows: list[dict[str, Any]] = []
    for name in sorted(chosen.runs, key=REFERENCE.index):
        recorded, times = chosen.runs[name], [each for each in timed.get(name, ()) if not each.failed]
        verdict = verdicts.get(name, Verdict())
        first = times[0] if times else recorded
        rows.append(
            {
                "name": name,
                "answers": _answers(recorded, name == chosen.reference, verdict),
                "failed": recorded.failed,
                "calls": len(recorded.calls),
                "reads": recorded.reads,
                "pages": recorded.pages,
                "requests": first.requests,
                "bytes": first.carried,
                "status": recorded.status,
                "errors": recorded.errors[-2000:],
                "connecting": _median([each.connecting for each in times]),
                "reading": _median([each.seconds - each.connecting for each in times]),
                "whole": _median([each.seconds for each in times]),
                "times": [round(each.seconds * 1000, 3) for each in times],
                "differences": verdict.total,
                "unexplained": verdict.unexplained,
                "first": [vars(difference) for difference in verdict.differences],
            }
        )
    native = next((row for row in rows if row["name"] == NATIVE), None)
    for row in rows:
        for what in ("reading", "whole"):
            base = native[what] if native else None
            row[f"{what}_ratio"] = round(row[what] / base, 3) if base and row[what] is not None else None
    words = {row["answers"] for row in rows}
    return {
        "vmishim": __version__,
        "script": job.script,
        "arguments": list(job.arguments),
        "domain": job.domain,
        "guest": f"Linux {job.release}",
        "machine": f"Linux {os.uname().release}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "interpreter": sys.implementation.name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "stopped": stopped,
        "rounds": rounds,
        "runs": job.runs,
        "reference": chosen.reference,
        "result": next((result for word, result in RESULTS if word in words), "agreed"),
        "moved": "moved" in words,
        "backends": rows,
        "missing": [vars(each) for each in missing],
    }


def _answers(recorded: Run, is_reference: bool, verdict: Verdict) -> str:
    if recorded.failed:
        return "failed"
    if verdict.word == "same" and not recorded.asked:
        return "nothing"
    return "reference" if is_reference else verdict.word


def _median(seconds: Sequence[float]) -> float | None:
    return round(median(seconds) * 1000, 3) if seconds else None
