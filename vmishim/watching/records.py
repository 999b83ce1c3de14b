"""What a watch writes: one JSON object a line, with the field names of the Elastic Common Schema (ECS).

docs/watching.md has every field. `SCHEMA` changes when a field is renamed, removed, or changes its meaning; a new field
does not change it.
"""

from __future__ import annotations

import json
import time
from ipaddress import ip_address
from typing import Any

from vmishim.foreign import printable
from vmishim.inspection.changes import Event
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.objects import Module, Socket, Task
from vmishim.version import __version__
from vmishim.watching import history
from vmishim.watching.rules import found

SCHEMA = 1
"""Version of the records, in ``vmishim.schema``."""
ECS = "8.11.0"
"""Version of the Elastic Common Schema whose names are used."""
MESSAGE_MAX = 2000
"""Characters of one text."""

INFO, NOTICE = 0, 10
"""Values of ``event.severity`` where nothing was found."""
SEVERITIES = {Severity.LOW: 21, Severity.MEDIUM: 47, Severity.HIGH: 73}
"""Those of findings: Elastic's for low, medium and high."""
SIGNS = {"+": ("start", "started"), "-": ("end", "ended"), "!": ("info", "flagged")}
"""``event.type``, and the end of ``event.action``, by an event's sign."""
CATEGORIES = {"process": "process", "module": "driver", "socket": "network", "agent": "host", "guest": "host"}
"""``event.category`` by an event's kind."""

Record = dict[str, Any]


class Recorder:
    """Makes records, and numbers them: a number that is missing shows that a record was lost.

    :param run: names this run of the watch
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._number = 0

    def of(self, guest: str, event: Event, when: float) -> list[Record]:
        """One event's records: one for each of its findings, or one alone.

        :param when: seconds since 1970
        """
        return [self._of(guest, event, finding, when) for finding in (found(event) or (None,))]

    def _of(self, guest: str, event: Event, finding: Finding | None, when: float) -> Record:
        kind, severity = ("state", NOTICE) if event.kind in ("agent", "guest") else ("event", INFO)
        type_, ended = SIGNS[event.sign]
        action = _state(event) or f"{event.kind}-{ended}"
        message = f"{event.sign} {event.kind} {event.text}"
        more: Record = {}
        if finding:
            kind, severity = "alert", SEVERITIES[finding.severity]
            message = finding.text
            more["rule"] = {"id": finding.id, "name": finding.compared}
            if finding.technique:
                more["threat"] = {"framework": "MITRE ATT&CK", "technique": {"id": [finding.technique]}}
        record = self.made(guest, kind, action, message, when, severity=severity)
        record["event"] |= {"category": [CATEGORIES[event.kind]], "type": [type_]}
        if finding:
            texts = {name: plain(each) if isinstance(each, str) else each for name, each in finding.plain().items()}
            record["vmishim"]["finding"] = texts
        return record | more | _entry(event)

    def made(
        self, guest: str, kind: str, action: str, message: str, when: float, severity: int = NOTICE, **more: Any
    ) -> Record:
        """A record.

        :param guest: its name; empty for the watch itself
        :param kind: ``alert``, ``event``, ``state`` or ``metric``, as ECS has it
        :param more: fields below ``vmishim``
        """
        self._number += 1
        whole, part = divmod(round(when * 1000), 1000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:03}Z"
        record: Record = {
            "@timestamp": stamp,
            "message": printable(message, MESSAGE_MAX),
            "event": {
                "kind": kind,
                "action": action,
                "severity": severity,
                "sequence": self._number,
                "module": "vmishim",
                "dataset": "vmishim.watch",
            },
            "agent": {"type": "vmishim", "version": __version__, "ephemeral_id": self._run},
            "ecs": {"version": ECS},
            "vmishim": {"schema": SCHEMA} | more,
        }
        if guest:
            record["host"] = {"name": plain(guest)}
        return record


def _state(event: Event) -> str:
    """``event.action`` of what happens to an agent or to a whole guest; empty for other events."""
    if event.kind == "guest":
        return "guest-unreadable" if event.text.startswith(history.UNREADABLE) else "guest-damaged"
    if event.kind != "agent":
        return ""
    known = {history.BACK: "agent-back", history.REBOOTED: "guest-rebooted", history.RENEWED: "session-renewed"}
    return known.get(event.text, "agent-lost")


def _entry(event: Event) -> Record:
    """The fields of the process, module or socket."""
    match event.entry:
        case Task() as task:
            process: Record = {"pid": task.tgid, "name": plain(task.comm)}
            if task.ppid is not None:
                process["parent"] = {"pid": task.ppid}
            if task.uid is not None:
                process["user"] = {"id": str(task.uid)}
            return {"process": process}
        case Module() as module:
            return {"driver": {"name": plain(module.name)}}
        case Socket() as socket:
            fields: Record = {
                "network": {"transport": "tcp", "type": f"ipv{socket.version}"},
                "source": _end(socket.local, socket.local_port),
            }
            if socket.state != "listen":
                fields["destination"] = _end(socket.remote, socket.remote_port)
            if socket.pid:
                fields["process"] = {"pid": socket.pid, "name": plain(socket.comm)}
            return fields
    return {"driver": {"name": plain(event.text)}} if event.kind == "module" else {}


def _end(address: str, port: int) -> Record:
    try:
        return {"ip": str(ip_address(address)), "port": port}
    except ValueError:
        return {"address": plain(address), "port": port}


def plain(text: str) -> str:
    """Text that every reader of JSON accepts: half a surrogate pair is escaped."""
    return text[:MESSAGE_MAX].encode("utf-8", "backslashreplace").decode()


def line(record: Record) -> bytes:
    """A record as a line of JSON, ASCII only."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
