"""Which connections the agent keeps, and whose request is next: policies without I/O, which `guest_agent.serve` obeys.

A connection costs a descriptor and what libzmq buffers for it, and anyone who reaches the port can make one. So each is
in one of three states, and only the last may stay:

====================  ========  ========  ========
event                 SILENT    GREETED   PROVEN
====================  ========  ========  ========
a new hello           GREETED   GREETED   PROVEN
an authentic request  PROVEN    PROVEN    PROVEN
any other frame       SILENT    GREETED   SILENT
SILENT_S without one  dropped   dropped   stays
====================  ========  ========  ========

Silent connections are bounded in all and by source, greeted and proven ones by key. Where all places are taken, the
source or key that has most loses the one it used longest ago.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

SILENT_S = 5.0
"""Seconds after which a connection is dropped that has carried no authentic request."""
SILENT_MAX, SILENT_PER_SOURCE = 512, 256
"""Connections that have proved nothing: in all, and from one address."""
GREETED_PER_KEY = 8
PROVEN_MAX, PROVEN_PER_KEY = 512, 64
"""Connections that have carried an authentic request: in all, and by one key; as many as it may have sessions."""

T = TypeVar("T")
Key = Hashable


class State(Enum):
    """What a connection has shown so far."""

    SILENT = "silent"
    GREETED = "greeted"
    PROVEN = "proven"


class Event(Enum):
    """What a frame has shown, see `vmishim.wire.sessions.Answered.outcome`."""

    GREETED = "greeted"
    PROVEN = "proven"
    REFUSED = "refused"


NEXT = {
    (State.SILENT, Event.GREETED): State.GREETED,
    (State.GREETED, Event.GREETED): State.GREETED,
    (State.PROVEN, Event.GREETED): State.PROVEN,
    (State.SILENT, Event.PROVEN): State.PROVEN,
    (State.GREETED, Event.PROVEN): State.PROVEN,
    (State.PROVEN, Event.PROVEN): State.PROVEN,
    (State.SILENT, Event.REFUSED): State.SILENT,
    (State.GREETED, Event.REFUSED): State.GREETED,
    (State.PROVEN, Event.REFUSED): State.SILENT,
}


@dataclass(slots=True)
class Connection:
    """One peer's connection.

    :ivar source: the peer's address, as it is counted by
    :ivar key: whose it is, once greeted
    :ivar since: when it came into its state, seconds
    :ivar owed: bytes of the last reply, until the peer asks again and so has read it
    :ivar taken: bytes of the frames that came by it
    """

    source: str
    since: float
    state: State = State.SILENT
    key: Key | None = None
    owed: int = 0
    taken: int = 0


class Connections:
    """All connections, by descriptor. Each method returns the descriptors to drop.

    :param descriptors: how many descriptors the process may spend on connections; places are fewer if they must
    """

    def __init__(self, descriptors: int = SILENT_MAX + PROVEN_MAX + 64) -> None:
        self._most = {
            State.SILENT: max(4, min(SILENT_MAX, descriptors // 2)),
            State.PROVEN: max(4, min(PROVEN_MAX, descriptors // 2)),
        }
        self._per_source = max(2, min(SILENT_PER_SOURCE, self._most[State.SILENT] * 3 // 4))
        self._connections: OrderedDict[int, Connection] = OrderedDict()
        """By descriptor; the one longest in its state, or longest unused if proven, first."""
        self._count: Counter[tuple[State, Key | None]] = Counter()
        """Connections of each state, by source if silent, by key otherwise."""
        self._in_all: Counter[State] = Counter()

    def __len__(self) -> int:
        return len(self._connections)

    def __getitem__(self, descriptor: int) -> Connection:
        return self._connections[descriptor]

    def get(self, descriptor: int) -> Connection | None:
        """The connection, None if there is none by this descriptor."""
        return self._connections.get(descriptor)

    def __iter__(self) -> Iterator[int]:
        return iter(self._connections)

    def __contains__(self, descriptor: int) -> bool:
        return descriptor in self._connections

    @property
    def waiting(self) -> int:
        """Connections that have yet to prove themselves."""
        return self._in_all[State.SILENT] + self._in_all[State.GREETED]

    @property
    def owed(self) -> int:
        """Bytes of replies that no peer has been seen to have read."""
        return sum(connection.owed for connection in self._connections.values())

    def accepted(self, descriptor: int, source: str, now: float) -> list[int]:
        """A peer has connected."""
        self.closed(descriptor)
        self._add(descriptor, Connection(source, now))
        return self._over(State.SILENT, source, self._per_source)

    def closed(self, descriptor: int) -> None:
        """A connection has ended."""
        connection = self._connections.pop(descriptor, None)
        if connection is not None:
            self._uncount(connection)

    def heard(self, descriptor: int, event: Event, key: Key | None, now: float) -> list[int]:
        """A frame came by a connection, and showed this."""
        connection = self._connections.get(descriptor)
        if connection is None:
            return []
        state = NEXT[connection.state, event]
        if state is connection.state:
            if state is State.PROVEN:
                self._connections.move_to_end(descriptor)
            return []
        self.closed(descriptor)
        connection.state, connection.since = state, now
        connection.key = None if state is State.SILENT else key
        self._add(descriptor, connection)
        limit = {State.SILENT: self._per_source, State.GREETED: GREETED_PER_KEY, State.PROVEN: PROVEN_PER_KEY}[state]
        return self._over(state, self._counted_by(connection), limit)

    def due(self, now: float) -> list[int]:
        """Connections whose time to prove themselves is over."""
        return [
            descriptor
            for descriptor, connection in self._connections.items()
            if connection.state is not State.PROVEN and connection.since + SILENT_S <= now
        ]

    def unproven(self) -> list[int]:
        """All that have proved nothing yet: what goes first when memory is short."""
        return [at for at, connection in self._connections.items() if connection.state is not State.PROVEN]

    def in_debt(self) -> list[int]:
        """All whose peers have not been seen to have read their last reply."""
        return [at for at, connection in self._connections.items() if connection.owed]

    def deepest_in_debt(self) -> list[int]:
        """The connections of the key whose peers have left most bytes unread."""
        owed: Counter[Key | None] = Counter()
        for connection in self._connections.values():
            owed[connection.key] += connection.owed
        # Not most_common(1): it imports heapq, and the confined agent can open no file.
        key = max(owed, key=owed.__getitem__, default=None)
        if not owed[key]:
            return []
        return [at for at, connection in self._connections.items() if connection.key == key and connection.owed]

    def _counted_by(self, connection: Connection) -> Key | None:
        return connection.source if connection.state is State.SILENT else connection.key

    def _add(self, descriptor: int, connection: Connection) -> None:
        self._connections[descriptor] = connection
        self._count[connection.state, self._counted_by(connection)] += 1
        self._in_all[connection.state] += 1

    def _uncount(self, connection: Connection) -> None:
        counted = connection.state, self._counted_by(connection)
        self._count[counted] -= 1
        if not self._count[counted]:
            del self._count[counted]
        self._in_all[connection.state] -= 1

    def _over(self, state: State, counted_by: Key | None, limit: int) -> list[int]:
        """The connection that must go so that ``state`` keeps its bounds; at most one, since one was added."""
        if self._count[state, counted_by] <= limit:
            if self._in_all[state] <= self._most.get(state, PROVEN_MAX):
                return []
            of_state = {by: number for (each, by), number in self._count.items() if each is state}
            counted_by = max(of_state, key=of_state.__getitem__)
        return [
            next(
                at
                for at, connection in self._connections.items()
                if connection.state is state and self._counted_by(connection) == counted_by
            )
        ]


class Turns(Generic[T]):
    """Requests that wait, answered key by key in turn: who asks much waits for itself, not others for it."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Key | None, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, key: Key | None, request: T) -> None:
        """``request`` is the last of its key's. None stands for all that have proved no key."""
        self._waiting.setdefault(key, deque()).append(request)

    def take(self) -> T:
        """The next request; its key's next one comes after one of every other key that waits."""
        key, requests = self._waiting.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._waiting[key] = requests
        return request
