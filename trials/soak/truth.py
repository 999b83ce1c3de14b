"""What a listing must, may and must not contain, according to the processes that planted it, not to any listing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from lab.vm import HOST_ADDRESS, LabVM

Kind = Literal["process", "socket", "module"]
KINDS: tuple[Kind, ...] = ("process", "socket", "module")
Entry = tuple[object, ...]
Phase = Literal["starting", "begun", "ending", "ended"]

PATIENCE = 60.0
"""Seconds that the guest may take to answer."""


@dataclass(eq=False)
class Planted:
    """Something that was planted. Several may have the same key, one after the other."""

    kind: Kind
    key: str
    phase: Phase = "starting"
    entries: list[Entry] = field(default_factory=list)
    """Its entries in a correct listing, once it has begun."""


class Interval:
    """The time from construction to `close`: what existed throughout, and what existed at some moment."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        truth.learn()
        self._first = [planted for planted in truth.living if planted.phase == "begun"]
        self.there = set(truth.living)
        """Everything that existed at some moment of the interval."""
        truth.open.append(self)

    def close(self) -> None:
        """End it."""
        self._truth.learn()
        self._truth.open.remove(self)
        self.throughout = [planted for planted in self._first if planted.phase == "begun"]

    def wrong(self, kind: Kind, listed: Iterable[tuple[str, Entry]]) -> list[str]:
        """What is wrong with a listing that was made meanwhile: keys and entries; nothing if it is right."""
        found: dict[str, list[Entry]] = {}
        for key, entry in listed:
            found.setdefault(key, []).append(entry)
        said = []
        must = {planted.key: planted for planted in self.throughout if planted.kind == kind}
        for key, planted in must.items():
            if sorted(found.get(key, []), key=repr) != sorted(planted.entries, key=repr):
                said.append(f"{kind} {key} is listed as {found.get(key, [])}, and is {planted.entries}")
        may = {planted.key for planted in self.there if planted.kind == kind}
        said += [f"{kind} {key} is listed as {found[key]}, and is not there" for key in found.keys() - may]
        # An end of a connection that is being made or let go may be in another state, but there are no more than two.
        most = {"process": 1, "socket": 2, "module": 1}[kind]
        passing = [key for key in found.keys() & may - must.keys() if len(found[key]) > most]
        return said + [f"{kind} {key} is listed {len(found[key])} times: {found[key]}" for key in passing]


class Truth:
    """What is planted, told by ``churn.py`` as it does it. Tells nothing by itself: `learn` listens."""

    def __init__(self) -> None:
        self.living: dict[Planted, None] = {}
        self.open: list[Interval] = []
        self.changes = dict.fromkeys(KINDS, 0)
        """How many of each kind have ended."""
        self._by_number: dict[int, Planted] = {}
        self._guest: socket.socket | None = None
        self._lines: IO[bytes] | None = None

    def plant(self, kind: Kind, key: str, *entries: Entry) -> None:
        """Something that is there now and stays."""
        self.living[Planted(kind, key, "begun", list(entries))] = None

    def tell(self, number: int, phase: Phase, *rest: object) -> None:
        """Take one line of ``churn.py``."""
        if phase == "starting":
            kind, key = rest
            planted = self._by_number[number] = Planted(kind, key)  # type: ignore[arg-type]
            self.living[planted] = None
            for interval in self.open:
                interval.there.add(planted)
            return
        planted = self._by_number[number]
        planted.phase = phase
        if phase == "begun":
            planted.entries = [tuple(entry) for entry in rest]  # type: ignore[arg-type]
        elif phase == "ended":
            del self.living[planted], self._by_number[number]
            self.changes[planted.kind] += 1

    # ---- the guest's word --------------------------------------------------------------------------------------------

    def churn(self, vm: LabVM, seed: str, modules: Iterable[str]) -> None:
        """Start ``churn.py`` in a guest."""
        vm.write("/run/soak/churn.py", Path(__file__).with_name("churn.py").read_bytes())
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(PATIENCE)
            port = str(server.getsockname()[1])
            command = ["python3", "-IS", "/run/soak/churn.py", HOST_ADDRESS, port, seed, *modules]
            vm.run("systemd-run", "--quiet", "--collect", "--unit=soak-churn", *command)
            self._guest = server.accept()[0]
        self._guest.settimeout(PATIENCE)
        self._lines = self._guest.makefile("rb")

    def learn(self) -> None:
        """Take all that has been told; returns when it is whole. :raises OSError: the guest does not answer"""
        if self._guest is None or self._lines is None:
            return
        self._order(b"s")
        while True:
            line = self._lines.readline()
            if not line:
                raise ConnectionError("churn.py has ended: see journalctl -u soak-churn in the guest")
            told = json.loads(line)
            if told == ["told"]:
                return
            self.tell(*told)

    def change(self) -> None:
        """Have something change, soon."""
        self._order(b"c")

    def hold_still(self) -> None:
        """Have nothing change, unless by `change`, until `go_on`."""
        self._order(b"h")

    def go_on(self) -> None:
        """End a stillness."""
        self._order(b"g")

    def _order(self, order: bytes) -> None:
        if self._guest is not None:
            self._guest.sendall(order)

    def close(self) -> None:
        """Let go of the guest. What comes and goes there is gone when this returns."""
        if self._guest is None or self._lines is None:
            return
        with self._guest, self._lines:
            self._guest.shutdown(socket.SHUT_WR)
            while self._lines.readline():
                pass
