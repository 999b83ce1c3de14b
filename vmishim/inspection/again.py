"""A guest whose every hold begins by reading, all at once, what the last one read.

Looks at a guest read almost the same memory each time: a thousand structures, each found through the one before. The
second look gets all of it in a few requests, and asks one by one only for what is new. Nothing is older than the hold
in which it is read (docs/freshness.md).
"""

from __future__ import annotations

from vmishim.guests.target import Agent, Target
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, MemoryReader

LINE = 64
"""Bytes that are read together; most members that are read of a structure are near others."""
LINES_MAX = 1 << 18
"""Lines of one hold that are remembered: 16 MiB."""


class Again:
    """Implements `vmishim.guests.target.Target` over another one.

    :param target: stays the caller's to close
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.name, self.profile = target.name, target.profile
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self._wanted: dict[int, None] = {}
        self._used: dict[int, None] = {}
        self._lines: dict[int, bytes] = {}
        self._held = False

    @property
    def agent(self) -> Agent | None:
        """See `Target.agent`."""
        return self._target.agent

    @property
    def reader(self) -> MemoryReader:
        """See `Target.reader`."""
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        if not self._held or space != KERNEL or address < KERNEL_FLOOR or not 0 < count <= 4096:
            return self._target.reader.read(address, count, space, text=text)
        first, last = address & -LINE, (address + count - 1) & -LINE
        used, lines = self._used, self._lines
        if first == last:
            used[first] = None
            line = lines.get(first)
            if line is not None:
                return line[address - first : address - first + count]
        else:
            parts = [lines.get(at) for at in range(first, last + LINE, LINE)]
            used.update(dict.fromkeys(range(first, last + LINE, LINE)))
            if None not in parts:
                whole = b"".join(part for part in parts if part is not None)
                return whole[address - first : address - first + count]
        return self._target.reader.read(address, count, space, text=text)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """See `Target.lookup`."""
        return self._target.lookup(dtb, address)

    def hold(self) -> None:
        """See `Target.hold`; reads again what the last hold read."""
        self._target.hold()
        self._used = {}
        self._lines = {}
        self._held = True
        agent = self._target.agent
        if agent is not None and self._wanted:
            self._lines = dict(agent.direct.scatter(list(self._wanted), LINE))

    def release(self) -> None:
        """See `Target.release`."""
        if self._held:
            self._wanted = self._used if len(self._used) <= LINES_MAX else {}
            self._used, self._lines, self._held = {}, {}, False
        self._target.release()

    def flush(self) -> None:
        """See `Target.flush`."""
        self._lines = {}
        self._target.flush()

    def close(self) -> None:
        """Let go; the other guest stays open."""
        self.release()
