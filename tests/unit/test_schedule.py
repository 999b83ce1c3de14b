"""When each guest is looked at: the whole table, even pace, chance, and later tries. The clock is handed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.watching.schedule import BACKOFF_MAX, JITTER, TABLE, Action, Event, Impossible, Schedule, State, rows


def at_half() -> float:
    """A chance that moves no look: the middle of what is possible."""
    return 0.5


def in_state(state: State) -> Schedule:
    """A schedule that came there by events."""
    paths = {
        State.WAITING: [],
        State.LOOKING: [Event.DUE],
        State.LOST: [Event.DUE, Event.UNANSWERED],
        State.TRYING: [Event.DUE, Event.UNANSWERED, Event.DUE],
        State.LEAVING: [Event.DUE, Event.REMOVED],
        State.GONE: [Event.REMOVED],
    }
    made = Schedule(1.0, 0.0, at_half)
    for event in paths[state]:
        made.on(event, made.due)
    assert made.state is state
    return made


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_each_event_in_each_state_does_what_the_table_says(event: Event, state: State) -> None:
    schedule, step = in_state(state), TABLE[event][state]
    if step is None:
        with pytest.raises(Impossible):
            schedule.on(event, schedule.due)
        assert schedule.state is state
    else:
        assert (schedule.on(event, schedule.due), schedule.state) == (step[1], step[0])


def test_a_look_under_way_is_never_begun_again_and_one_that_left_is_closed_once() -> None:
    begin = [state for state in State if (step := TABLE[Event.DUE][state]) and step[1] is Action.LOOK]
    assert begin == [State.WAITING, State.LOST]
    assert [*TABLE[Event.REMOVED]].count((State.GONE, Action.CLOSE)) == 2
    assert all(steps[State.GONE] is None for steps in TABLE.values())
    assert len(rows()) == len(Event)
    assert rows()[0][1] == "look → LOOKING"


def test_the_pace_is_even_however_long_looks_take() -> None:
    schedule = Schedule(1.0, 100.0, at_half)
    begun = []
    for took in (0.1, 0.9, 0.5, 0.01):
        begun.append(schedule.due)
        schedule.on(Event.DUE, schedule.due)
        schedule.on(Event.ANSWERED, begun[-1] + took)
    assert begun == [100.5, 101.5, 102.5, 103.5]
    assert schedule.skipped == 0


def test_a_look_that_takes_longer_than_the_interval_leaves_slots_out_and_says_how_many() -> None:
    schedule = Schedule(1.0, 0.0, at_half)
    schedule.on(Event.DUE, 0.5)
    schedule.on(Event.ANSWERED, 3.6)
    assert (schedule.due, schedule.skipped) == (4.5, 3)


@given(st.lists(st.floats(0, 0.9999), min_size=10, max_size=30), st.floats(0.01, 3600))
def test_chance_moves_a_look_within_its_slot_only(chances: list[float], interval: float) -> None:
    coming = iter(chances * 2)
    schedule = Schedule(interval, 0.0, lambda: next(coming))
    base = schedule.due
    assert 0 <= base < interval
    for number in range(1, len(chances) - 1):
        schedule.on(Event.DUE, schedule.due)
        schedule.on(Event.ANSWERED, schedule.due)
        slot = base + number * interval
        assert abs(schedule.due - slot) <= interval * JITTER / 2 + 1e-6 * slot
    assert schedule.skipped == 0


def test_fleets_are_spread_over_the_interval() -> None:
    chances = [each / 100 for each in range(100)]
    due = [Schedule(1.0, 0.0, lambda at=at: at).due for at in chances]  # type: ignore[misc]
    assert due == chances


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_a_silent_guest_is_tried_later_each_time_up_to_a_minute(chance: float) -> None:
    schedule = Schedule(1.0, 0.0, lambda: chance)
    waits = []
    for _ in range(40):
        now = schedule.due
        schedule.on(Event.DUE, now)
        schedule.on(Event.UNANSWERED, now)
        waits.append(schedule.due - now)
    share = 0.5 + chance / 2
    assert waits == pytest.approx([min(2.0**number, BACKOFF_MAX) * share for number in range(40)])
    assert schedule.failures == 40


def test_a_guest_that_is_back_has_its_old_slots_and_left_none_out() -> None:
    schedule = Schedule(1.0, 0.0, at_half)
    schedule.on(Event.DUE, 0.5)
    schedule.on(Event.UNANSWERED, 5.5)
    schedule.on(Event.DUE, schedule.due)
    schedule.on(Event.ANSWERED, 7.0)
    assert (schedule.due, schedule.failures, schedule.skipped) == (7.5, 0, 0)
    schedule.on(Event.DUE, 7.5)
    schedule.on(Event.UNANSWERED, 7.5)
    assert schedule.due - 7.5 <= 1.0  # it begins with the shortest wait again


@given(st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 1e4)), max_size=60))
def test_any_history_keeps_the_next_look_ahead_of_now(history: list[tuple[Event, float]]) -> None:
    schedule, now = Schedule(2.0, 0.0, at_half), 0.0
    for event, passed in history:
        now += passed
        if TABLE[event][schedule.state] is None:
            continue
        schedule.on(event, now)
        if event in (Event.ANSWERED, Event.UNANSWERED) and schedule.state in (State.WAITING, State.LOST):
            assert now <= schedule.due <= now + BACKOFF_MAX
