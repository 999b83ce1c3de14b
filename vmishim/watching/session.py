"""One guest's session, kept open from look to look."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace

from vmishim.endpoint import address
from vmishim.errors import LibvmiError, LinkError, RebootedError
from vmishim.guests.domains import TIMEOUT
from vmishim.guests.target import Target
from vmishim.inspection.changes import LISTS, Key, Sight, look
from vmishim.inspection.objects import Socket as TcpSocket
from vmishim.libvmi import Libvmi
from vmishim.link import UnansweredError

ENTRIES_MAX = 200_000
"""Entries of one look that are kept, of all its lists together: what a guest says it has must not fill our memory."""

SOCKETS_PACE = 10.0
"""``sockets_pace`` of a fleet. A kernel with much memory has so many chains of sockets, most empty, that reading
them takes longer than all else (262,144 with 24 GiB)."""


@dataclass(frozen=True)
class Cost:
    """What looks have cost so far.

    :ivar requests: requests that were answered
    :ivar sent: bytes of them
    :ivar received: bytes of the replies
    :ivar seconds: time they took
    """

    requests: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.requests + other.requests,
            self.sent + other.sent,
            self.received + other.received,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Seen:
    """What one look brought.

    :ivar sight: the lists; None if they could not be read
    :ivar problem: why not, on one line
    :ivar answered: whether the guest answered at all
    :ivar renewed: the session broke, and another was made
    :ivar boot: which boot of the guest's kernel; empty if it is not known
    :ivar release: of that kernel
    :ivar cost: of this look alone
    """

    sight: Sight | None = None
    problem: str = ""
    answered: bool = True
    renewed: bool = False
    boot: str = ""
    release: str = ""
    cost: Cost = field(default_factory=Cost)


class Session:
    """Looks at one guest. Connects at the first look, and again after the session was lost.

    One thread at a time may use it.

    :param reach: opens the guest, for the length of a block
    :param endpoint: where its agent listens; empty if it has none
    :param timeout: seconds that connecting may take
    :param sockets_pace: a look with sockets that took a second is followed by so many seconds of looks without; they
        keep those of the look before
    :param lists: what to read, of `vmishim.inspection.changes.LISTS`

    :ivar release: of the guest's kernel; empty until it was reached
    """

    def __init__(
        self,
        reach: Callable[[], AbstractContextManager[Target]],
        lists: Collection[str] = LISTS,
        endpoint: str = "",
        timeout: float = TIMEOUT,
        sockets_pace: float = 0.0,
    ) -> None:
        self._reach, self._lists = reach, lists
        self._endpoint, self._timeout = endpoint, timeout
        self._sockets_pace = sockets_pace
        self._stack = ExitStack()
        self._vmi: Libvmi | None = None
        self._target: Target | None = None
        self._handshakes = 0
        self._counted = Cost()
        self._boot = self.release = ""
        self._sockets: Mapping[Key, TcpSocket] = {}
        self._sockets_due = 0.0

    def open(self) -> None:
        """Connect. :raises LibvmiError: the guest can't be reached"""
        if self._endpoint:
            knock(self._endpoint, self._timeout)
        self._target = self._stack.enter_context(self._reach())
        self._vmi = Libvmi.over(self._target)
        self._boot, self.release = self._target.profile.boot_id, self._target.profile.release
        self._handshakes = self._links()

    def close(self) -> None:
        """Close the session; the next look makes another."""
        self._target = self._vmi = None
        self._sockets_due = 0.0
        self._counted = Cost()
        self._stack.close()

    def look(self) -> Seen:
        """Look once. It raises nothing: whatever a guest sends, the next look is planned."""
        begun = time.monotonic()
        sight: Sight | None = None
        answered, renewed, problem, cost = True, False, "", Cost()
        for _ in range(2):
            sight, problem = None, ""
            try:
                if self._vmi is None:
                    self.open()
                assert self._vmi is not None
                sight = bounded(self._seen(self._vmi))
            except RebootedError as error:
                problem = one_line(error)  # unless the next try below connects
            except LinkError as error:
                problem, answered = one_line(error), False
            except LibvmiError as error:
                problem = one_line(error)
            except Exception as error:  # a mistake of ours that a guest's data found must not end the watch of others
                problem = f"{type(error).__name__}: {one_line(error)}"
            cost += self._spent()
            if not answered:
                self.close()
                break
            if self._links() <= self._handshakes:
                break
            # The guest may have rebooted and its kernel moved, so what was just read may be wrong.
            self.close()
            sight, renewed = None, True
        cost += Cost(seconds=time.monotonic() - begun)
        return Seen(sight, problem, answered, renewed, self._boot, self.release, cost)

    def _seen(self, vmi: Libvmi) -> Sight:
        """One look. Sockets may be those of an earlier look."""
        begun = time.monotonic()
        if "sockets" not in self._lists or begun >= self._sockets_due:
            sight = look(vmi, self._lists)
            self._sockets, ended = sight.sockets, time.monotonic()
            self._sockets_due = ended + self._sockets_pace * (ended - begun)
            return sight
        return replace(look(vmi, [name for name in self._lists if name != "sockets"]), sockets=self._sockets)

    def _links(self) -> int:
        agent = self._target.agent if self._target else None
        return agent.link.handshakes if agent else 0

    def _spent(self) -> Cost:
        """What the session has cost since this was asked last."""
        agent = self._target.agent if self._target else None
        if agent is None:
            return Cost()
        before, link = self._counted, agent.link
        self._counted = Cost(link.requests, link.bytes_sent, link.bytes_received)
        return Cost(
            link.requests - before.requests, link.bytes_sent - before.sent, link.bytes_received - before.received
        )


def knock(endpoint: str, timeout: float) -> None:
    """Connect, and let go. A link would wait for an agent until its deadline, which costs little for one guest and much
    for a thousand that are gone.

    :raises UnansweredError: nothing listens there, or nothing answered within ``timeout`` seconds
    """
    try:
        match address(endpoint):
            case (host, port):
                socket.create_connection((host, port), timeout).close()
            case path:
                with socket.socket(socket.AF_UNIX) as local:
                    local.settimeout(timeout)
                    local.connect(path)
    except OSError as error:
        raise UnansweredError(f"nothing answered at {endpoint} ({error.strerror or error})") from None


def bounded(sight: Sight) -> Sight:
    """The same. :raises LibvmiError: it has more entries than are kept of a guest"""
    held = len(sight.tasks) + len(sight.modules) + len(sight.sockets)
    if held > ENTRIES_MAX:
        raise LibvmiError(f"they have {held:,} entries, more than the {ENTRIES_MAX:,} that are kept of a guest")
    return sight


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
