"""One look at a guest by all checks, within one hold; findings are confirmed by a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmishim.errors import LibvmiError, LinkError
from vmishim.guests.agent_profile import AgentProfile
from vmishim.guests.target import Target
from vmishim.inspection.again import Again
from vmishim.inspection.checks import CHECKS, Check
from vmishim.inspection.checks.code import LEAST_CALLS, MOST_CALLS
from vmishim.inspection.checks.view import View
from vmishim.inspection.findings import Finding
from vmishim.inspection.lists import TRIES, UNREADABLE, Damage
from vmishim.kernel.profile import Profile
from vmishim.libvmi import Libvmi, pause

FINDINGS_MAX = 10_000
"""Findings of one check that are kept; the guest decides how many there are."""


@dataclass(frozen=True)
class Scanned:
    """What a look at a guest gave.

    :ivar findings: in the order of the checks
    :ivar unchecked: checks that could not run, and why
    :ivar damage: what could not be read
    :ivar looked: numbers of processes, open files and modules that were read
    """

    findings: Sequence[Finding] = ()
    unchecked: Sequence[tuple[str, str]] = ()
    damage: Sequence[str] = ()
    looked: Sequence[int] = ()


class Scan:
    """Looks at one guest again and again. Each look after the first reads what the last one read in few requests.

    :param target: the guest; it stays the caller's to close
    :param checks: what to look for
    """

    def __init__(self, target: Target, checks: Sequence[Check] = CHECKS) -> None:
        self._vmi = Libvmi.over(Again(target))
        self._checks, self._known = checks, False
        self._profile = target.profile

    def look(self) -> Scanned:
        """Look at the guest.

        A process that begins or ends while two lists are read is in only one of them; so a finding counts if the next
        look has it too, and what cannot be read is tried again.

        :raises LibvmiError: nothing of it can be read
        :raises LinkError: the guest could not be reached
        """
        if not self._known:
            ask_names(self._profile, self._checks)
            self._known = True
        seen = self._held()
        if seen.findings:
            again = self._held()
            before = set(map(_identity, seen.findings))
            kept = [finding for finding in again.findings if _identity(finding) in before]
            seen = Scanned(kept, again.unchecked, again.damage, again.looked)
        return seen

    def _held(self) -> Scanned:
        for left in reversed(range(TRIES)):
            damage = Damage()
            with pause(self._vmi):
                seen = _look(self._vmi, damage, self._checks)
            if not seen.damage or not left:
                break
        return seen


def _identity(finding: Finding) -> tuple[str, str, int | None, tuple[tuple[str, int], ...]]:
    return finding.id, finding.subject, finding.pid, tuple(sorted(finding.evidence.items()))


def _look(vmi: Libvmi, damage: Damage, checks: Sequence[Check]) -> Scanned:
    view = View(vmi, damage)
    findings: list[Finding] = []
    unchecked: list[tuple[str, str]] = []
    for check in checks:
        why = check.missing(view)
        if why:
            unchecked.append((check.name, why))
            continue
        try:
            for number, finding in enumerate(check.run(view)):
                if number >= FINDINGS_MAX:
                    damage.add(f"{check.name}: there are more than the {FINDINGS_MAX:,} findings that are kept")
                    break
                findings.append(replace(finding, check=check.name))
        except UNREADABLE as error:
            damage.add(check.name, error)
        except LinkError:
            raise
        except LibvmiError as error:
            damage.add(check.name, error)
        except KeyError as unknown:
            unchecked.append((check.name, str(unknown.args[0])))
    return Scanned(findings, unchecked, damage.all, view.looked)


def ask_names(profile: Profile, checks: Sequence[Check]) -> None:
    """Ask an agent for all names that the checks need, in one request for each kind."""
    if not isinstance(profile, AgentProfile):
        return
    symbols = {each for check in checks for name in (*check.symbols, *check.optional) for each in name.split("|")}
    members = {each for check in checks for name in (*check.members, *check.fields) for each in name.split("|")}
    profile.ask(symbols, members)
    if "sys_call_table" in symbols:
        try:
            start = profile.symbol("sys_call_table")
        except KeyError:
            return
        profile.ask_names(range(start + 8 * LEAST_CALLS, start + 8 * MOST_CALLS, 8))
