"""When each guest is looked at: a state machine that is handed the clock, and does no I/O.

A guest has slots, one every interval, from a phase of its own: so a fleet's looks are spread over the interval, and a
look that takes long moves no later one. Within its slot each look is moved by chance, so that a guest can't know when
it is looked at. A guest that does not answer is tried again after 1, 2, 4, ... intervals, up to `BACKOFF_MAX` seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum, StrEnum

BACKOFF_MAX = 60.0
"""Seconds between two tries to reach a guest that does not answer, at most (and at least the interval)."""
JITTER = 0.2
"""Share of the interval by which chance moves a look."""


class State(IntEnum):
    """Where a guest is. The number is the column of `TABLE`."""

    WAITING = 0
    """It answered last time, or was never asked; the next look is planned."""
    LOOKING = 1
    """A look is under way."""
    LOST = 2
    """It did not answer; the next try is planned."""
    TRYING = 3
    """A try to reach it again is under way."""
    LEAVING = 4
    """It is no longer watched, and its last look is still under way."""
    GONE = 5
    """It is no longer watched, and its session is closed."""


class Event(StrEnum):
    """What happened. The value is how the table reads."""

    DUE = "its time has come"
    ANSWERED = "it answered"
    UNANSWERED = "it did not answer"
    REMOVED = "it is no longer to be watched"


class Action(StrEnum):
    """What to do about it."""

    LOOK = "look"
    PLAN = "plan the next look"
    BACK_OFF = "plan the next try, later each time"
    FINISH = "let the look end"
    CLOSE = "close its session"


Step = tuple[State, Action]

_LOOK, _TRY = (State.LOOKING, Action.LOOK), (State.TRYING, Action.LOOK)
_PLAN, _BACK_OFF = (State.WAITING, Action.PLAN), (State.LOST, Action.BACK_OFF)
_FINISH, _CLOSE = (State.LEAVING, Action.FINISH), (State.GONE, Action.CLOSE)

TABLE: dict[Event, tuple[Step | None, Step | None, Step | None, Step | None, Step | None, Step | None]] = {
    # None: in that state this cannot happen. Columns:
    #               WAITING, LOOKING, LOST, TRYING, LEAVING, GONE
    Event.DUE: (_LOOK, None, _TRY, None, None, None),
    Event.ANSWERED: (None, _PLAN, None, _PLAN, _CLOSE, None),
    Event.UNANSWERED: (None, _BACK_OFF, None, _BACK_OFF, _CLOSE, None),
    Event.REMOVED: (_CLOSE, _FINISH, _CLOSE, _FINISH, None, None),
}
"""Next state and action, by event and state."""


class Impossible(AssertionError):
    """An event that cannot happen in this state: a mistake of the caller's."""


class Schedule:
    """When one guest is looked at.

    :param interval: seconds between two looks
    :param now: the clock, in seconds
    :param chance: gives a number from 0 up to 1, each time another

    :ivar state: where the guest is
    :ivar due: when its next look or try is to begin, by the same clock
    :ivar failures: tries since it last answered
    :ivar skipped: slots that passed while a look was under way, or could not begin
    """

    __slots__ = ("_chance", "_interval", "_slot", "due", "failures", "skipped", "state")

    def __init__(self, interval: float, now: float, chance: Callable[[], float]) -> None:
        self._interval, self._chance = interval, chance
        self.state = State.WAITING
        self.failures = self.skipped = 0
        self._slot = self.due = now + interval * chance()

    def on(self, event: Event, now: float) -> Action:
        """Enter the next state. :raises Impossible: the event cannot happen in this state"""
        step = TABLE[event][self.state]
        if step is None:
            raise Impossible(f"{event.name} in state {self.state.name}")
        self.state, action = step
        if action is Action.PLAN:
            self._plan(now)
        elif action is Action.BACK_OFF:
            self._back_off(now)
        return action

    def _plan(self, now: float) -> None:
        """The next slot that has not begun, moved by chance."""
        missed = max(int((now - self._slot) // self._interval), 0)
        if not self.failures:
            self.skipped += missed
        self.failures = 0
        self._slot += (missed + 1) * self._interval
        self.due = max(self._slot + self._interval * JITTER * (self._chance() - 0.5), now)

    def _back_off(self, now: float) -> None:
        """After twice as long as last time, half of it by chance: guests that were lost together come one by one."""
        # The exponent is bounded, or the power would not fit in a float.
        longest = min(self._interval * 2.0 ** min(self.failures, 30), max(BACKOFF_MAX, self._interval))
        self.failures += 1
        self.due = now + longest * (0.5 + 0.5 * self._chance())


def rows() -> Sequence[tuple[str, ...]]:
    """`TABLE` as text, an event a row: its meaning, then for each state what is done and the state after."""
    return [
        (str(event), *("" if step is None else f"{step[1]} → {step[0].name}" for step in steps))
        for event, steps in TABLE.items()
    ]
