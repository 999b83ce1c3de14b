"""A list's head as a state machine: the table, row by row, and what no path through it may do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.readahead.head import TABLE, Action, Event, Head, Impossible, Phase, rows

UNKNOWN, PEEKED, AT_HEAD, MOVING, STALE = Phase
ROWS = [(event, phase, step) for event, steps in TABLE.items() for phase, step in zip(Phase, steps, strict=True)]
LOOKS = {Event.LOOK, Event.EARLY_LOOK}
ENDS = {Event.FLUSH, Event.HOLD, Event.RELEASE}
WALKS = {Action.WALK, Action.WALK_ON}

# Said again in sentences, and not in the table's order: (phase, event) -> (phase, action).
EXPECTED = {
    # The last expected look brings the list, whatever was known; one before it brings the head alone.
    **{(phase, Event.LOOK): (AT_HEAD, Action.WALK) for phase in Phase},
    **{(phase, Event.EARLY_LOOK): (PEEKED, Action.PEEK) for phase in Phase},
    # If you read a table's pointer and its first chain, or the head's own node and the head, you have looked once.
    (AT_HEAD, Event.LATER_HEAD): (AT_HEAD, Action.ANSWER),
    # Within a hold a list is walked once; nothing is peeked at, and nothing grows stale.
    (UNKNOWN, Event.HELD_LOOK): (AT_HEAD, Action.WALK),
    (AT_HEAD, Event.HELD_LOOK): (AT_HEAD, Action.ANSWER),
    (MOVING, Event.HELD_LOOK): (MOVING, Action.ANSWER),
    # The head's own node begins a listing when nothing is known of it; else it is a node like any other.
    **{(phase, Event.HEAD_NODE): (AT_HEAD, Action.WALK) for phase in (UNKNOWN, PEEKED, STALE)},
    # After a head alone the list comes late, but it comes.
    (PEEKED, Event.NEIGHBOUR): (MOVING, Action.WALK_ON),
    (PEEKED, Event.NODE): (MOVING, Action.WALK_ON),
    (AT_HEAD, Event.NEIGHBOUR): (MOVING, Action.PUBLISH),
    (AT_HEAD, Event.NODE): (AT_HEAD, Action.LEARN),
    (MOVING, Event.NODE): (MOVING, Action.LEARN),
    # A listing that takes longer than a second goes on, on fresh memory.
    (AT_HEAD, Event.EXPIRE): (STALE, Action.DROP),
    (MOVING, Event.EXPIRE): (STALE, Action.DROP),
    (STALE, Event.NODE): (MOVING, Action.WALK_ON),
    # What failed leaves nothing.
    **{(phase, Event.FAIL): (UNKNOWN, Action.FORGET) for phase in (PEEKED, AT_HEAD, MOVING)},
    **{(phase, event): (UNKNOWN, Action.FORGET) for phase in Phase for event in ENDS},
}


@pytest.mark.parametrize(
    ("event", "phase", "step"), ROWS, ids=[f"{event.name}-{phase.name}" for event, phase, _ in ROWS]
)
def test_each_row(event: Event, phase: Phase, step: tuple[Phase, Action] | None) -> None:
    head = Head()
    head.phase = phase
    expected = EXPECTED.get((phase, event))
    assert step == expected
    assert head.knows(event) == (expected is not None)
    if expected is None:
        with pytest.raises(Impossible, match=f"^{event.name} in phase {phase.name}$"):
            head.on(event)
        assert head.phase is phase
    else:
        assert (head.on(event), head.phase) == (expected[1], expected[0])


def test_the_table_is_complete() -> None:
    assert list(TABLE) == list(Event)
    assert list(Phase) == list(range(len(Phase)))
    assert {step[1] for _, _, step in ROWS if step} == set(Action)
    assert {step[0] for _, _, step in ROWS if step} == set(Phase)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs/freshness.md").read_text()
    head = "| | " + " | ".join(phase.name for phase in Phase) + " |"
    lines = ["| " + " | ".join(cells) + " |" for cells in rows()]
    assert "\n".join([head, "|---|---|---|---|---|---|", *lines]) in text


class History:
    """What a head's script was answered from, as far as the table says."""

    def __init__(self) -> None:
        self.head = Head()
        self.now = 0
        self.last_look = -1
        """When the guest was asked for the head last."""
        self.walk = -1
        """When the walk was made that is answered from; -1 for none."""
        self.held = False

    def happens(self, event: Event) -> Action:
        self.now += 1
        if event in LOOKS:
            self.last_look = self.now
        action = self.head.on(event)
        if action in WALKS:
            self.walk = self.now
        elif action in (Action.DROP, Action.FORGET, Action.PEEK):
            self.walk = -1
        self.held = event is Event.HOLD or (self.held and event is not Event.RELEASE)
        return action

    def may_happen(self) -> list[Event]:
        """Events that can come next: within a hold nothing grows old, and looks are not counted."""
        outside = {*LOOKS, Event.LATER_HEAD, Event.EXPIRE, Event.HOLD}
        never = outside if self.held else {Event.HELD_LOOK, Event.RELEASE}
        return [event for event in Event if event not in never and self.head.knows(event)]


@given(st.data())
def test_no_path_serves_memory_of_before_the_last_look(data: st.DataObject) -> None:
    """Neighbours, nodes and later heads alike; nor any of a walk that was dropped."""
    history = History()
    for _ in range(data.draw(st.integers(0, 30))):
        action = history.happens(data.draw(st.sampled_from(history.may_happen())))
        if action in (Action.ANSWER, Action.PUBLISH, Action.LEARN, *WALKS):
            assert history.walk >= history.last_look
            assert history.walk > 0


@given(st.data())
def test_a_hold_peeks_at_nothing_and_lets_nothing_grow_stale(data: st.DataObject) -> None:
    history = History()
    for _ in range(data.draw(st.integers(0, 10))):
        history.happens(data.draw(st.sampled_from(history.may_happen())))
    if not history.held:
        history.happens(Event.HOLD)
    walks = 0
    for _ in range(data.draw(st.integers(0, 20))):
        event = data.draw(st.sampled_from([each for each in history.may_happen() if each not in ENDS | {Event.FAIL}]))
        walks += history.happens(event) in WALKS
        assert history.head.phase not in (PEEKED, STALE)
    assert walks <= 1


@given(st.lists(st.sampled_from(Event)))
def test_every_look_asks_the_guest(events: list[Event]) -> None:
    """But for a later head of the same listing, and within a hold."""
    head = Head()
    for event in events:
        if head.knows(event):
            action = head.on(event)
            assert event not in LOOKS or action in (Action.PEEK, Action.WALK)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=8))
def test_looks_before_the_last_bring_the_head_alone_from_the_second_listing_on(listings: list[int]) -> None:
    """Each listing: so many looks, then on to the first node."""
    head, before = Head(), 0
    for looks in listings:
        events = [head.look(0, thread=1) for _ in range(looks) if head.on(Event.FLUSH)]
        assert events == [Event.EARLY_LOOK if number < before else Event.LOOK for number in range(1, looks + 1)]
        head.moved_on()
        before = looks


def test_a_listing_that_never_looked_does_not_change_how_many_looks_are_expected() -> None:
    head = Head()
    for _ in range(2):
        head.look(0, thread=1)
    head.moved_on()
    head.moved_on()  # a ring walked from another node, that grew old on the way
    assert [head.look(0, thread=1) for _ in range(2)] == [Event.EARLY_LOOK, Event.LOOK]


@pytest.mark.parametrize(
    ("phase", "thread", "number", "expected"),
    [
        (AT_HEAD, 1, 1, Event.LATER_HEAD),
        (AT_HEAD, 1, 0, Event.LOOK),  # the same head again
        (AT_HEAD, 2, 1, Event.LOOK),  # another thread's listing
        (MOVING, 1, 1, Event.LOOK),
        (STALE, 1, 1, Event.LOOK),
        (PEEKED, 1, 1, Event.LOOK),
    ],
)
def test_which_look_is_of_a_later_head(phase: Phase, thread: int, number: int, expected: Event) -> None:
    head = Head()
    head.on(head.look(0, thread=1))
    head.walked(thread=1)
    head.last_head = 0
    head.phase = phase
    assert head.look(number, thread) == expected
