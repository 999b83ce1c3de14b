"""A guest whose memory has one pointer changed, and a record of which pointers a program follows."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from struct import iter_unpack
from typing import Any

from vmishim.guests.target import Target
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR

WORD = 8
NEAR = 4096
"""Bytes around where a pointer points within which a read follows it."""
USER = 0x7FFF_1234_5000
KINDS = ("0", "self", "user space", "another object", "random")
"""What a pointer is changed to."""
READERS = ("pointer", "field", "number", "value", "text", "string", "words", "read", "whose", "comm")
"""Functions of the programs that read for others: the place is where these are called."""
NULLABLE = (
    ("linux", "files"),
    ("view", "files"),
    ("view", "_open"),
    ("objects", "_openers"),
    ("objects", "_one"),
    ("open_files", "_some"),
)
"""Where null is a value that the kernel writes too: a worker of its own may have no file table, a socket no file any
more, a descriptor no file yet."""
PROGRAMS = ("vmishim/inspection", "compat/ids")


@dataclass(frozen=True, order=True)
class Place:
    """A line of a program that reads pointers: one member of one structure, as a rule."""

    file: str
    function: str
    line: int

    @property
    def is_link(self) -> bool:
        """Whether it follows a list, which says itself what comes before and after."""
        return self.function in ("_one_way", "chains", "hashed_sockets")


@dataclass
class Trace:
    """The pointers that a program followed.

    :ivar pointers: their addresses and values, by place
    :ivar nullable: places where a null pointer was read too
    """

    pointers: dict[Place, dict[int, int]] = field(default_factory=dict)
    nullable: set[Place] = field(default_factory=set)

    @classmethod
    def of(cls, reads: Sequence[tuple[Place, int, bytes]]) -> Trace:
        """From the reads of a program: where in it, address and bytes."""
        made, addresses = cls(), sorted({address for _, address, _ in reads})
        for place, address, data in reads:
            if address % WORD or len(data) % WORD:
                continue
            for number, (value,) in enumerate(iter_unpack("<Q", data)):
                at = bisect_left(addresses, value - NEAR)
                if not value or (place.file, place.function) in NULLABLE:
                    made.nullable.add(place)
                if not value:
                    continue
                if value >= KERNEL_FLOOR and at < len(addresses) and addresses[at] < value + NEAR:
                    made.pointers.setdefault(place, {})[address + WORD * number] = value
        return made

    def damages(self, chance: Random, each: int) -> Iterator[tuple[Place, int, str, int]]:
        """What to change: the place that reads the pointer, its address, the kind of its value, and the value.

        :param each: pointers of a place
        """
        values = sorted({value for found in self.pointers.values() for value in found.values()})
        for place, found in sorted(self.pointers.items()):
            for address in chance.sample(sorted(found), min(each, len(found))):
                another = chance.choice([value for value in values if value != found[address]] or [USER])
                for kind, value in zip(KINDS, (0, address, USER, another, chance.getrandbits(64)), strict=True):
                    yield place, address, kind, value


class DamagedGuest:
    """A guest like another one, but for one word. Implements `vmishim.guests.target.Target`, without an agent.

    :param whole: the other one, whose memory must stand still
    :ivar reads: how many there were
    :ivar traced: each of them, if `tracing`
    """

    agent = None

    def __init__(self, whole: Target, address: int = 0, value: int = 0, tracing: bool = False) -> None:
        self._whole, self._address, self._value = whole, address, value.to_bytes(WORD, "little")
        self.name, self.profile, self.lookup = whole.name, whole.profile, whole.lookup
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.reads = 0
        self.tracing = tracing
        self.traced: list[tuple[Place, int, bytes]] = []

    @property
    def reader(self) -> DamagedGuest:
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        self.reads += 1
        data = self._whole.reader.read(address, count, space)
        if space == KERNEL and self._address and address - WORD < self._address < address + count:
            laid = bytearray(data)
            for at, byte in enumerate(self._value, self._address - address):
                if 0 <= at < count:
                    laid[at] = byte
            data = bytes(laid)
        if self.tracing:
            self.traced.append((place(), address, data))
        return data

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def place() -> Place:
    """Where a program reads right now."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name not in READERS and any(folder in code.co_filename for folder in PROGRAMS):
            return Place(Path(code.co_filename).stem, code.co_name, frame.f_lineno)
        frame = frame.f_back
    return Place("", "", 0)
