"""A hostile host between an IDS and its agent: what it does to frames, and whether one of them is ever accepted.

``python -m trials.hostile`` puts a million altered frames through both ends of sessions without sockets (`core`), ten
thousand between a real IDS and a real agent (`sockets`), and floods a real agent (`flood`).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vmishim.wire.session import HEADER

REMEMBERED = 64
"""How many genuine frames, of all sessions, are kept for replays."""


@dataclass
class Tally:
    """Counts of hostile frames and what they achieved.

    :ivar changes: how many, by what was done to them
    :ivar accepted: how many were accepted as genuine, and wrong answers
    :ivar crashed: how many raised another error than ``LinkError``
    """

    changes: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    crashed: int = 0

    @property
    def frames(self) -> int:
        """How many hostile frames there were."""
        return self.changes.total()

    def __str__(self) -> str:
        changes = ", ".join(f"{count:,} {change}" for change, count in sorted(self.changes.items()))
        return f"{self.frames:,} hostile frames ({changes}): {self.accepted} accepted, {self.crashed} crashes"


class Saboteur:
    """Alters frames as an attacker can who has no key but has seen all frames of all sessions.

    :ivar seen: genuine frames
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: deque[bytes] = deque([bytes(40)], maxlen=REMEMBERED)

    def altered(self, frame: bytes) -> tuple[str, bytes]:
        """Return the kind of change and a frame that differs from the given one."""
        while True:
            change = self.random.choice(_CHANGES)
            found = getattr(self, f"_{change}")(frame)
            if found != frame:
                return change, found

    def _flipped(self, frame: bytes) -> bytes:
        return flip(frame, self.random.randrange(len(frame) * 8))

    def _cut(self, frame: bytes) -> bytes:
        start = self.random.randrange(len(frame)) if self.random.random() < 0.3 else 0
        return frame[start : self.random.randrange(start, len(frame))]

    def _lengthened(self, frame: bytes) -> bytes:
        at = self.random.choice((0, HEADER.size, len(frame)))
        return frame[:at] + self.random.randbytes(self.random.randrange(1, 60)) + frame[at:]

    def _replayed(self, frame: bytes) -> bytes:
        return self.random.choice(self.seen)

    def _spliced(self, frame: bytes) -> bytes:
        other = self.random.choice(self.seen)
        at = self.random.choice((2, 10, HEADER.size, self.random.randrange(len(frame))))
        return self.random.choice((frame[:at] + other[at:], other[:at] + frame[at:]))

    def _relabelled(self, frame: bytes) -> bytes:
        """A different header before the same body."""
        version, kind, session, counter = HEADER.unpack_from(frame.ljust(HEADER.size, b"\0"))
        chance = self.random
        match chance.randrange(4):
            case 0:
                version = chance.randrange(256)
            case 1:
                kind = chance.randrange(8)
            case 2:
                session = chance.choice(self.seen)[2:10].ljust(8, b"\0")
            case _:
                counter = chance.choice((counter + 1, counter - 1, 0, chance.getrandbits(64))) % 2**64
        return HEADER.pack(version, kind, session, counter) + frame[HEADER.size :]

    def _invented(self, frame: bytes) -> bytes:
        return self.random.randbytes(self.random.randrange(200))


_CHANGES = ("flipped", "cut", "lengthened", "replayed", "spliced", "relabelled", "invented")


def flip(frame: bytes, bit: int) -> bytes:
    """The frame with one bit flipped."""
    altered = bytearray(frame)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


def every_bit(frame: bytes) -> Iterator[bytes]:
    """The frame with each of its bits flipped, in turn."""
    return (flip(frame, bit) for bit in range(len(frame) * 8))


def resident(pid: int | str = "self") -> int:
    """Resident memory of a process, in KiB."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
