"""A list's head: what a read of it, or near it, means, and what is to be done.

A look at a head always asks the guest, and the last look before the listing moves on brings the list. So a head is a
state machine, and this is all of it: no I/O, no lock, no clock. `Lists` tells it what happens and does what it
says; where a list's memory is kept and until when is the store's business.

One listing, by a script that looks once::

    UNKNOWN --LOOK--> AT_HEAD --NEIGHBOUR--> MOVING --EXPIRE--> STALE --NODE--> MOVING
               walk              publish               drop             walk on

and by one that looks twice, as it has been known to: the first look brings the head alone::

    MOVING --EARLY_LOOK--> PEEKED --LOOK--> AT_HEAD --NEIGHBOUR--> MOVING
                peek                walk               publish

In AT_HEAD and PEEKED the nodes one step from the head (its neighbours) are kept apart from what is known: reading one
says that the listing moves on. Whatever asks the guest may fail; then nothing of the list is known (FAIL).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import IntEnum, StrEnum


class Phase(IntEnum):
    """Where a listing is. The number is the column of `TABLE`."""

    UNKNOWN = 0
    """Nothing is known of the list."""
    PEEKED = 1
    """The head was brought alone: the list is walked when the listing moves on."""
    AT_HEAD = 2
    """The list was walked at a look, and the listing has not moved on to a neighbour."""
    MOVING = 3
    """The listing is past the head's neighbours, which are known like all other nodes."""
    STALE = 4
    """The walk is too old: where its nodes were is known, what they held is not."""


class Event(StrEnum):
    """What happened. The value is how docs/freshness.md says it."""

    LOOK = "a look at the head"
    EARLY_LOOK = "a look, where more are expected"
    """The last listing had more looks at this head than this one has had so far."""
    LATER_HEAD = "a later head of the same listing"
    """By the thread that the walk was for, further on than its last head: a table's first chain after the pointer
    to it, or any head after a read of its own node, which began the listing."""
    HELD_LOOK = "a look within a hold"
    HEAD_NODE = "a read of the node that the head is in"
    """Beside the head, such as ``init_task.pid``."""
    NEIGHBOUR = "a read of a node next to the head"
    """The listing moves on."""
    NODE = "a read of another node's unknown memory"
    """A node of the last walk."""
    EXPIRE = "the walk's second is over"
    FAIL = "the guest could not be asked"
    """In the middle of what the event before asked for."""
    FLUSH = "a flush, or a fork"
    HOLD = "a hold begins"
    RELEASE = "a hold ends"


class Action(StrEnum):
    """What to do about it."""

    ANSWER = "answer"
    """From the walk."""
    PEEK = "read the head"
    """Alone, and forget the walk before."""
    WALK = "walk"
    """Walk the list; keep the head and its neighbours apart."""
    PUBLISH = "publish neighbours"
    """Know the neighbours like all other nodes; the next look begins a listing."""
    WALK_ON = "walk, publish neighbours"
    """The listing goes on, on fresh memory."""
    LEARN = "learn"
    """Learn what was read, and fetch it for all nodes; or read it alone."""
    DROP = "drop memory"
    """Forget what the nodes held."""
    FORGET = "forget all"
    """Forget where the nodes were, too."""


Step = tuple[Phase, Action]

_UNKNOWN, _PEEKED, _AT_HEAD, _MOVING, _STALE = Phase
_WALK, _PEEK, _FORGET = (_AT_HEAD, Action.WALK), (_PEEKED, Action.PEEK), (_UNKNOWN, Action.FORGET)
_WALK_ON, _PUBLISH, _DROP = (_MOVING, Action.WALK_ON), (_MOVING, Action.PUBLISH), (_STALE, Action.DROP)

TABLE: dict[Event, tuple[Step | None, Step | None, Step | None, Step | None, Step | None]] = {
    # None: in that phase this cannot happen, or means nothing. Columns:
    #                 UNKNOWN, PEEKED, AT_HEAD, MOVING, STALE
    Event.LOOK: (_WALK, _WALK, _WALK, _WALK, _WALK),
    Event.EARLY_LOOK: (_PEEK, _PEEK, _PEEK, _PEEK, _PEEK),
    Event.LATER_HEAD: (None, None, (_AT_HEAD, Action.ANSWER), None, None),
    Event.HELD_LOOK: (_WALK, None, (_AT_HEAD, Action.ANSWER), (_MOVING, Action.ANSWER), None),
    Event.HEAD_NODE: (_WALK, _WALK, None, None, _WALK),
    Event.NEIGHBOUR: (None, _WALK_ON, _PUBLISH, None, None),
    Event.NODE: (None, _WALK_ON, (_AT_HEAD, Action.LEARN), (_MOVING, Action.LEARN), _WALK_ON),
    Event.EXPIRE: (None, None, _DROP, _DROP, None),
    Event.FAIL: (None, _FORGET, _FORGET, _FORGET, None),
    Event.FLUSH: (_FORGET, _FORGET, _FORGET, _FORGET, _FORGET),
    Event.HOLD: (_FORGET, _FORGET, _FORGET, _FORGET, _FORGET),
    Event.RELEASE: (_FORGET, _FORGET, _FORGET, _FORGET, _FORGET),
}
"""Next phase and action, by event and phase."""


class Impossible(AssertionError):
    """An event that cannot happen in this phase: a mistake of the caller's."""


class Head:
    """One list's head.

    :ivar phase: where the listing is
    :ivar last_head: of a table, number of the head that was read last since the walk; -1 for none
    :ivar owner_thread: the thread that the last walk was for
    """

    __slots__ = ("_looks", "_looks_last_time", "last_head", "owner_thread", "phase")

    def __init__(self) -> None:
        self.phase = Phase.UNKNOWN
        self.last_head = -1
        self.owner_thread = 0
        self._looks: Counter[int] = Counter()
        self._looks_last_time: Counter[int] = Counter()

    def on(self, event: Event) -> Action:
        """Enter the next phase. :raises Impossible: the event cannot happen in this phase"""
        step = TABLE[event][self.phase]
        if step is None:
            raise Impossible(f"{event.name} in phase {self.phase.name}")
        self.phase, action = step
        return action

    def knows(self, event: Event) -> bool:
        """Whether ``event`` can happen in this phase."""
        return TABLE[event][self.phase] is not None

    @property
    def is_walked(self) -> bool:
        """Whether there is a walk that is not too old."""
        return self.phase is Phase.AT_HEAD or self.phase is Phase.MOVING

    def look(self, number: int, thread: int) -> Event:
        """Count a look at a head outside a hold. Returns which event it is.

        Scripts look more than once (LibVMI's process-list.c at the end, its process-list.py before it begins). No two
        of these looks need lie close together, so none is answered by another's walk.

        :param number: of the head in its table; a ring's two pointers are one head, 0
        :param thread: who looks: another thread's walk is not the beginning of this one's listing
        """
        self._looks[number] += 1
        if self.phase is Phase.AT_HEAD and thread == self.owner_thread and number > self.last_head:
            return Event.LATER_HEAD
        return Event.EARLY_LOOK if self._looks[number] < self._looks_last_time[number] else Event.LOOK

    def walked(self, thread: int) -> None:
        """The list was walked for ``thread``, none of whose looks it has answered so far."""
        self.owner_thread, self.last_head = thread, -1

    def moved_on(self) -> None:
        """The listing is past the head: it had so many looks, and the next may have as many."""
        if self._looks:
            self._looks_last_time, self._looks = self._looks, Counter()


def rows() -> Sequence[tuple[str, ...]]:
    """`TABLE` as text, an event a row: its meaning, then for each phase what is done and the phase after."""
    return [
        (str(event), *("" if step is None else f"{step[1]} → {step[0].name}" for step in steps))
        for event, steps in TABLE.items()
    ]
