"""The journal of an unfinished dump: what is to be read, and what has been, so that it can go on after a break.

One JSON value a line: first the plan, then what happened, as it happened. A line that a break cut off, and all after
it, does not count. Values only: `vmishim.acquire.output` reads and writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vmishim.acquire.pieces import CHUNK, Piece
from vmishim.acquire.shapes import SHAPES, Image
from vmishim.guests.layout import Range

VERSION = 1
_ENDED = "ended"


@dataclass(frozen=True)
class Plan:
    """What a dump is of, fixed at its start."""

    name: str
    """The domain's."""
    format: str
    """A name in `SHAPES`."""
    kernel_only: bool
    ram: list[Range]
    """All of the guest's RAM, by its kernel's tree of resources."""
    ranges: list[Range]
    """What of it is read."""
    guest: dict[str, Any]
    """Facts of the guest: release, hostname, boot_id, page_offset, kaslr_offset ..."""
    image: Image
    vmcoreinfo: str
    vmcoreinfo_from: str
    """"the guest's memory", or "made up"."""
    attestation: dict[str, str] = field(default_factory=dict)
    """``report`` (base64), or why there is none."""

    @property
    def identity(self) -> dict[str, Any]:
        """What another boot of the guest, or another guest, has otherwise."""
        return {fact: self.guest.get(fact) for fact in ("release", "boot_id", "page_offset", "kaslr_offset")}


@dataclass
class Record:
    """What happened so far.

    :ivar sessions: for each start or resumption: ``begun``, ``ended`` (UTC; None if it broke off) and ``frozen``
    """

    pieces: list[Piece] = field(default_factory=list)
    unreadable: list[Range] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """All memory to be read below this guest physical address has been read."""
        ends = [each[-1].end for each in (self.pieces, self.unreadable) if each]
        return max(ends, default=0)

    def without(self, kept: int) -> Record:
        """Only what was read until the first ``kept`` pieces were there."""
        if kept >= len(self.pieces):
            return self
        end = self.pieces[kept].address
        return Record(self.pieces[:kept], [each for each in self.unreadable if each.end <= end], self.sessions)


def line_of_plan(plan: Plan) -> str:
    """The first line."""
    return json.dumps({"vmishim-journal": VERSION, **asdict(plan)}) + "\n"


def line(entry: Piece | Range | dict[str, Any]) -> str:
    """The line for a piece that was read, a range that cannot be read, or the start or end of a session."""
    return json.dumps(entry) + "\n"


def lines(plan: Plan, record: Record) -> str:
    """A whole journal."""
    entries: Iterable[Piece | Range | dict[str, Any]] = (*record.sessions, *record.unreadable, *record.pieces)
    return line_of_plan(plan) + "".join(map(line, entries))


def parse(text: str) -> tuple[Plan, Record]:
    """A journal's plan and record.

    :raises ValueError: it does not begin with a plan that can be followed
    """
    first, *rest = text.split("\n")
    plan = _plan(first)
    record = Record()
    for each in rest[:-1]:  # what follows the last line's end was cut off
        try:
            _take(record, json.loads(each))
        except (ValueError, TypeError):
            break
    return plan, record


def _take(record: Record, entry: Any) -> None:
    """:raises ValueError: it is not an entry, or not in the order of addresses"""
    match entry:
        case [int(address), int(size), int(offset), str(sha256)] if 0 < size <= CHUNK and offset >= 0:
            _check(not record.pieces or record.pieces[-1].end <= address)
            _check(not record.pieces or record.pieces[-1].offset + record.pieces[-1].size <= offset)
            record.pieces.append(Piece(address, size, offset, sha256))
        case [int(start), int(end)] if start < end:
            _check(not record.unreadable or record.unreadable[-1].end <= start)
            record.unreadable.append(Range(start, end))
        case {"begun": str(), "frozen": bool()}:
            record.sessions.append(entry)
        case {"ended": str(ended)} if record.sessions:
            record.sessions[-1] = record.sessions[-1] | {_ENDED: ended}
        case _:
            raise ValueError("not an entry")


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError("entries are not in order")


def _plan(text: str) -> Plan:
    try:
        values = json.loads(text)
        if values.pop("vmishim-journal") != VERSION:
            raise ValueError("it is of another version of vmishim")
        for name, fits in _KINDS.items():
            if not fits(values[name]):
                raise ValueError(f"its {name} is malformed")
        for name in ("ram", "ranges"):
            values[name] = [Range(*each) for each in values[name]]
        values["image"] = Image(*values["image"])
        if values.keys() != {each.name for each in fields(Plan)}:
            raise ValueError("it has other fields")
        return Plan(**values)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its first line is no plan: {error}") from None


def _is_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and all(type(at) is int for at in each) and 0 <= each[0] < each[1]
        for each in value
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value in SHAPES,
    "kernel_only": lambda value: type(value) is bool,
    "ram": _is_ranges,
    "ranges": _is_ranges,
    "image": lambda value: isinstance(value, list) and len(value) == 3 and all(type(each) is int for each in value),
    **dict.fromkeys(("name", "vmcoreinfo", "vmcoreinfo_from"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("guest", "attestation"), lambda value: isinstance(value, dict)),
}
