"""Break the connection between an IDS and its guest again and again, and measure the recovery."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lab.vm import LabVM
from trials.soak.forwarder import Forwarder

SERVICE = "vmishim-agent"
OF_THE_AGENT = ("agent killed", "agent restarted")
OF_THE_NETWORK = ("network cut", "network stalled")
KINDS = (*OF_THE_AGENT, *OF_THE_NETWORK)
RECOVERY_MAX = 60.0
"""Seconds after the end of an outage within which the guest must answer again."""
GAP = 1.0, 6.0
"""Seconds between two outages."""
LASTING = 0.2, 12.0
"""Lengths of network outages in seconds: below and above an answer's timeout."""


class Counts(NamedTuple):
    """What was done over the network so far."""

    answers: int
    handshakes: int


@dataclass
class Outage:
    """One failure of the network."""

    kind: str
    begun: float
    """By the monotonic clock, as are the others."""
    ended: float | None = None
    """When the agent was killed or restarted, or the network came back."""
    answered: float | None = None
    """When the guest had answered again."""

    @property
    def recovery(self) -> float | None:
        """Seconds from its end to the first answer."""
        return None if self.ended is None or self.answered is None else self.answered - self.ended


class Outages:
    """Makes them in a thread of its own, from ``start`` on until it is told to ``stop``.

    :param seed: decides on kinds, order and times
    :param counts: tells what was done so far over the network
    """

    def __init__(self, vm: LabVM, forwarder: Forwarder, seed: str, counts: Callable[[], Counts]) -> None:
        self.all: list[Outage] = []
        self.spare_agent = False
        """Set to leave the agent alone from then on."""
        self.error: BaseException | None = None
        """What ended the thread before its time."""
        self._vm, self._forwarder, self._counts = vm, forwarder, counts
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.quiet = threading.Lock()
        """While it is held there is no outage: all have ended, and the guest answers."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop making outages. The last one ends, and is over once the guest was asked again."""
        self._stop.set()

    @property
    def over(self) -> bool:
        """Whether there will be no more."""
        return not self._thread.is_alive()

    @property
    def complete(self) -> bool:
        """Whether there has been one of each kind."""
        return {outage.kind for outage in self.all if outage.answered is not None} == set(KINDS)

    def since(self, moment: float) -> bool:
        """Whether there has been an outage since then."""
        return any(outage.answered is None or outage.answered >= moment for outage in self.all)

    def _run(self) -> None:
        kinds: list[str] = []
        try:
            while not self._stop.wait(self._random.uniform(*GAP)):
                kinds = kinds or self._random.sample(KINDS, len(KINDS))
                kind, lasting = kinds.pop(), self._random.uniform(*LASTING)
                with self.quiet:
                    if kind in OF_THE_NETWORK or not self.spare_agent:
                        self._one(kind, lasting)
        except BaseException as error:  # the thread that joins this one reports it
            self.error = error

    def _one(self, kind: str, lasting: float) -> None:
        outage = Outage(kind, time.monotonic())
        self.all.append(outage)
        before = self._counts()
        if kind in OF_THE_AGENT:
            verb = ["kill", "--signal=KILL"] if kind == "agent killed" else ["restart"]
            self._vm.run("systemctl", *verb, SERVICE)
        else:
            (self._forwarder.cut if kind == "network cut" else self._forwarder.stall)()
            before = self._counts()
            self._stop.wait(lasting)
            # One answer may have been under way.
            if self._counts().answers > before.answers + 1:
                raise AssertionError(f"{kind}, and still there were answers")
            before = self._counts()
            self._forwarder.resume()
        outage.ended = time.monotonic()
        while not self._mended(before, kind):
            if time.monotonic() > outage.ended + RECOVERY_MAX:
                raise TimeoutError(f"{kind}: no answer {RECOVERY_MAX:g} s after it was over")
            time.sleep(0.01)
        outage.answered = time.monotonic()

    def _mended(self, before: Counts, kind: str) -> bool:
        """Whether there was an answer. Another agent takes another handshake; over a network that is back, the same
        session may go on."""
        now = self._counts()
        return now.answers > before.answers and (kind in OF_THE_NETWORK or now.handshakes > before.handshakes)
