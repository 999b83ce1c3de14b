"""What a watch's findings are called, in the format of `vmishim.inspection.findings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmishim.inspection import changes
from vmishim.inspection.changes import Event
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.objects import Module, Socket, Task


@dataclass(frozen=True)
class Rule:
    """A kind of finding; the members are those of `Finding`."""

    id: str
    severity: Severity
    compared: str
    look_next: str
    technique: str = ""


RULES: Mapping[str, Rule] = {
    changes.DELETED: Rule(
        "deleted-executable",
        Severity.MEDIUM,
        "the process's executable with its links in the file system",
        "/proc/PID/exe in the guest, and whether a package was updated: an updated daemon runs a deleted file too",
        "T1070.004",
    ),
    changes.UNLISTED: Rule(
        "hidden-module",
        Severity.HIGH,
        "the list of modules with /sys/module (module_kset)",
        "the module's code in memory; take a dump before the guest is rebooted",
        "T1014",
    ),
    changes.BECAME_ROOT: Rule(
        "became-root",
        Severity.HIGH,
        "the process's credentials with those of the look before",
        "its parent and what it runs: sudo and su do the same, in a process that they start",
        "T1068",
    ),
    changes.LISTENS: Rule(
        "new-listener",
        Severity.LOW,
        "listening sockets with those of the look before",
        "the process that listens, and its executable",
    ),
}
"""By a finding's text in an `Event`."""


def found(event: Event) -> list[Finding]:
    """An event's findings; empty if it has none."""
    return [_found(event, text) for text in event.finding.split("; ") if text]


def _found(event: Event, text: str) -> Finding:
    rule = RULES[text]
    subject, pid, evidence = event.text, None, {}
    match event.entry:
        case Task() as task:
            subject, pid, evidence = task.comm, task.tgid, {"task_struct": task.address}
        case Socket() as socket:
            subject = f"{socket.local}:{socket.local_port}"
            pid, evidence = socket.pid, {"sock": socket.address}
        case Module() as module:
            subject, evidence = module.name, {"module": module.address}
    return Finding(
        rule.id,
        rule.severity,
        subject,
        f"{event.kind} {event.text}: {text}",
        rule.compared,
        evidence,
        rule.look_next,
        rule.technique,
        pid,
    )
