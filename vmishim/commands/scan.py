"""``vmishim scan``: look for intrusions in a guest, or in many, by all checks at once."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmishim import files
from vmishim.commands import CommandError
from vmishim.commands.guests import Meter, target
from vmishim.foreign import printable
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.guests.target import Target
from vmishim.inspection import fleet
from vmishim.inspection.checks import CHECKS, Check
from vmishim.inspection.findings import VERSION, Baseline, Finding, Severity, worst
from vmishim.inspection.lists import Damage
from vmishim.inspection.scan import Scan, Scanned, ask_names
from vmishim.inspection.structures import Structures
from vmishim.libvmi import Libvmi
from vmishim.output import dump, show, watched
from vmishim.plural import counted

NOT_READ, PARTLY = 1, 3
"""Exit statuses without findings: a guest could not be read; only part of one, or a check could not run."""
STATUS = {Severity.LOW: 4, Severity.MEDIUM: 5, Severity.HIGH: 6}
"""Exit status by the highest severity. It wins over the others: a finding is never hidden by a guest that is down."""
LOCAL = "this machine"
"""The name of ``--local`` in a baseline and in JSON."""
WIDTH = 120
NOTHING = Scanned()


@dataclass(frozen=True)
class Result:
    """What was found in one guest, or why it could not be read.

    :ivar error: the reason, on one line; empty if it was read
    """

    domain: str
    scanned: Scanned = NOTHING
    error: str = ""


def scan(options: argparse.Namespace) -> int:
    """Look for intrusions. :raises LibvmiError: the guest can't be read"""
    checks = _chosen(options)
    if options.list:
        return _list(options, checks)
    if not (options.domain or options.local or options.domains):
        raise CommandError("name a DOMAIN, or use --domains PATTERN or --local")
    baseline = Baseline()
    if options.baseline:
        baseline = _read(options.baseline)
    found: dict[str, Sequence[Finding]] = {}
    statuses = {0}
    for result in _results(options, checks):
        if not result.error:
            found[result.domain] = result.scanned.findings
        new = baseline.unknown(result.domain, result.scanned.findings)
        shown = [] if options.write_baseline else new
        if options.json:
            print(json.dumps(_plain(result, shown)), flush=True)
        else:
            _show(result, shown, len(result.scanned.findings) - len(new))
        statuses.add(_said(result))
        highest = worst(shown)
        if highest is not None:
            statuses.add(STATUS[highest])
    if options.write_baseline:
        known = {**baseline.known, **Baseline.of(found).known}
        files.write(options.write_baseline, Baseline(known).text().encode(), 0o600)
        many = counted(sum(map(len, found.values())), "finding")
        print(
            f"vmishim: {many} of {counted(len(found), 'guest')} accepted in {options.write_baseline}", file=sys.stderr
        )
    return max(statuses)


def _chosen(options: argparse.Namespace) -> list[Check]:
    """The checks of ``--only`` and ``--skip``. :raises CommandError: there is no such check"""
    only, skip = ({name for text in texts for name in text.split(",")} for texts in (options.only, options.skip))
    unknown = (only | skip) - {check.name for check in CHECKS}
    if unknown:
        raise CommandError(f"no check is called {sorted(unknown)[0]!r}; list them with vmishim scan --list")
    chosen = [check for check in CHECKS if (not only or check.name in only) and check.name not in skip]
    if not chosen:
        raise CommandError("--only and --skip leave no check")
    return chosen


def _read(path: Path) -> Baseline:
    try:
        return Baseline.parse(files.read_trusted(path).decode())
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None


# Looking.


def _results(options: argparse.Namespace, checks: Sequence[Check]) -> Iterator[Result]:
    begun = time.perf_counter()
    if options.domains:
        chosen = fleet.matching(options.domains)
        if not chosen:
            raise CommandError(f"no domain matches {options.domains!r}; list them with `vmishim domains`")

        def failed(domain: Domain, error: BaseException) -> Result:
            return Result(domain.name, error=fleet.failed(domain, error).error)

        def late(domain: Domain) -> Result:
            return Result(domain.name, error=fleet.late(domain, options.deadline).error)

        asked = fleet.asked(chosen, partial(_one, checks), failed, late, options.deadline)
        yield from watched(asked, "guests")
        if options.stats:
            print(f"vmishim: {counted(len(chosen), 'guest')}, {time.perf_counter() - begun:.3f} s", file=sys.stderr)
        return
    meter = Meter("batch")
    with target(options.domain, options.local) as reached:
        meter.add(reached)
        yield Result(LOCAL if options.local else options.domain, Scan(reached, checks).look())
        if options.stats:
            meter.report()


def _one(checks: Sequence[Check], domain: Domain) -> Result:
    reached = reach(domain)
    try:
        return Result(domain.name, Scan(reached, checks).look())
    finally:
        reached.close()


# Showing.


def _plain(result: Result, findings: Sequence[Finding]) -> dict[str, object]:
    """One guest for JSON."""
    plain: dict[str, object] = {"version": VERSION, "domain": result.domain}
    if result.error:
        return plain | {"error": result.error}
    scanned = result.scanned
    return plain | {
        "findings": [finding.plain() for finding in findings],
        "accepted": len(scanned.findings) - len(findings),
        "unchecked": [{"check": name, "why": why} for name, why in scanned.unchecked],
        "damage": list(scanned.damage),
    }


def _show(result: Result, findings: Sequence[Finding], accepted: int) -> None:
    domain = printable(result.domain)
    if result.error:
        print(f"{domain} not read: {printable(result.error)}")
        return
    for finding in sorted(findings, key=lambda each: -each.severity):
        print(f"{domain}: {finding.severity.word.upper()} {finding.id}: {printable(finding.text)}")
        evidence = ", ".join(f"{name} {address:#x}" for name, address in finding.evidence.items())
        for title, text in (
            ("compared", finding.compared),
            ("evidence", evidence),
            ("look at", finding.look_next),
            ("ATT&CK", finding.technique),
        ):
            if text:
                lines = textwrap.wrap(printable(text), WIDTH - 14, break_on_hyphens=False)
                print(f"    {title:<8}  " + f"\n{' ' * 14}".join(lines))
    counts = Counter(finding.severity.word for finding in findings)
    told = ", ".join(f"{counts[each.word]} {each.word}" for each in reversed(Severity) if counts[each.word])
    tasks, opened, modules = (*result.scanned.looked, 0, 0, 0)[:3]
    known = f", {accepted:,} accepted" if accepted else ""
    read = f"{counted(tasks, 'process', 'processes')}, {counted(opened, 'open file')}, {counted(modules, 'module')}"
    print(f"{domain}: {told or 'no findings'}{known}; looked at {read}")


def _said(result: Result) -> int:
    """Say on standard error what was not checked or read. Returns the exit status."""
    where = printable(result.domain)
    for name, why in result.scanned.unchecked:
        print(f"vmishim: {where}: not checked: {name}: {printable(why)}", file=sys.stderr)
    for mark in result.scanned.damage:
        print(f"vmishim: {where}: not read: {printable(mark)}", file=sys.stderr)
    if result.error:
        return NOT_READ
    return PARTLY if result.scanned.unchecked or result.scanned.damage else 0


# The checks themselves.


def _list(options: argparse.Namespace, checks: Sequence[Check]) -> int:
    """List the checks, what each needs of a kernel, and whether a guest's kernel has it."""
    if options.domains:
        raise CommandError("--list shows one guest's kernel; name a DOMAIN, or leave out --domains")
    if not (options.domain or options.local):
        return _listed(options, checks, lambda check: "")
    with target(options.domain, options.local) as reached:
        return _listed(options, checks, _probe(reached, checks))


def _probe(reached: Target, checks: Sequence[Check]) -> Callable[[Check], str]:
    ask_names(reached.profile, checks)
    kernel = Structures(Libvmi.over(reached), Damage())
    return lambda check: check.missing(kernel) or "has all"


def _listed(options: argparse.Namespace, checks: Sequence[Check], answer: Callable[[Check], str]) -> int:
    answers = {check.name: answer(check) for check in checks}
    if options.json:
        dump(
            [
                {
                    "check": check.name,
                    "what": check.what,
                    "symbols": list(check.symbols),
                    "members": list(dict.fromkeys(check.members)),
                    "kernel": answers[check.name],
                }
                for check in checks
            ]
        )
        return 0
    if any(answers.values()):
        show(("CHECK", "THIS KERNEL"), [(check.name, answers[check.name]) for check in checks])
        return 0
    for check in checks:
        print(check.name)
        for title, words in (
            ("finds", check.what),
            ("symbols", ", ".join(check.symbols)),
            ("members", ", ".join(name.replace(" ", ".") for name in dict.fromkeys(check.members)) or "none"),
        ):
            lines = textwrap.wrap(words, WIDTH - 13, break_on_hyphens=False)
            print(f"    {title:<7}  " + f"\n{' ' * 13}".join(lines))
    return 0
