"""What a check found in a guest: one format for every command that reports findings. Pure.

A finding is a hint, not a verdict. It says what was compared with what, and where the evidence is, so that you can
look for yourself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

VERSION = 1
"""Of the format of a finding in JSON, and of a baseline. Members may be added without a new version."""
BASELINE_MAX = 16 << 20
"""Bytes of a baseline file that are read."""


class Severity(IntEnum):
    """How strongly a finding speaks for an attack."""

    LOW = 1
    """Honest systems have it too: an unsigned module, a raw socket."""
    MEDIUM = 2
    """Unusual, and rarely honest: a program whose file was deleted and not replaced."""
    HIGH = 3
    """No honest system has it: a process that is missing from one of the kernel's lists."""

    @property
    def word(self) -> str:
        """As it is shown, and in JSON."""
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """Something suspicious in a guest."""

    id: str
    """What kind of finding it is: ``hidden-process``. It stays the same in later versions."""
    severity: Severity
    subject: str
    """What it is about, without what differs from boot to boot: ``sleep``, ``sys_call_table[136]``. A baseline accepts
    all findings of the same ``id`` and ``subject``."""
    text: str
    """The finding, in one sentence."""
    compared: str
    """What was compared with what."""
    evidence: Mapping[str, int] = field(default_factory=dict)
    """Addresses in the guest's kernel, by what is there: ``{"task_struct": 0xffff...}``."""
    look_next: str = ""
    """What to look at next."""
    technique: str = ""
    """The technique of MITRE ATT&CK that fits it, such as ``T1014``; empty if none does."""
    pid: int | None = None
    """Number of the process that it is about, if it is about one."""
    check: str = ""
    """The check that found it, as ``vmishim scan --only`` takes it."""

    @property
    def key(self) -> tuple[str, str]:
        """What a baseline knows it by."""
        return self.id, self.subject

    def plain(self) -> dict[str, Any]:
        """For JSON: addresses are hex strings, as not every reader keeps numbers above 2^53."""
        return {
            "check": self.check,
            "id": self.id,
            "severity": self.severity.word,
            "subject": self.subject,
            "text": self.text,
            "compared": self.compared,
            "evidence": {name: f"{address:#x}" for name, address in self.evidence.items()},
            "look_next": self.look_next,
            "technique": self.technique,
            "pid": self.pid,
        }


def worst(findings: Iterable[Finding]) -> Severity | None:
    """The highest severity; None without findings."""
    return max((finding.severity for finding in findings), default=None)


@dataclass(frozen=True)
class Baseline:
    """Findings that were accepted.

    :ivar known: their keys, by guest
    """

    known: Mapping[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Sequence[Finding]]) -> Baseline:
        """Accepts these findings, by guest."""
        return cls({domain: frozenset(each.key for each in findings) for domain, findings in found.items()})

    @classmethod
    def parse(cls, text: str) -> Baseline:
        """From the text of a file. :raises ValueError: it is not a baseline of this version"""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        if not isinstance(data, dict) or data.get("vmishim_baseline") != VERSION:
            raise ValueError(f"it is not a baseline of version {VERSION}; write one with --write-baseline")
        domains = data.get("domains")
        if not isinstance(domains, dict):
            raise ValueError("'domains' is missing, or is not an object")
        known = {}
        for domain, entries in domains.items():
            if not isinstance(entries, list) or not all(map(_is_key, entries)):
                raise ValueError(f"the findings of {domain!r} are not a list of [id, subject]")
            known[domain] = frozenset((entry[0], entry[1]) for entry in entries)
        return cls(known)

    def text(self) -> str:
        """For a file: one finding per line, so that versions of it compare well."""
        parts = []
        for domain, keys in sorted(self.known.items()):
            lines = ",\n".join(f"   {json.dumps(list(key))}" for key in sorted(keys))
            parts.append(f"  {json.dumps(domain)}: [" + (f"\n{lines}\n  ]" if lines else "]"))
        return f'{{\n "vmishim_baseline": {VERSION},\n "domains": {{\n' + ",\n".join(parts) + "\n }\n}\n"

    def unknown(self, domain: str, findings: Iterable[Finding]) -> list[Finding]:
        """The findings that were not accepted for this guest."""
        known = self.known.get(domain, frozenset())
        return [finding for finding in findings if finding.key not in known]


def _is_key(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
