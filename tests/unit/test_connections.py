"""Which connections an agent keeps, and whose request is next: the policies, without a socket or a clock."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.connections import (
    GREETED_PER_KEY,
    NEXT,
    PROVEN_MAX,
    PROVEN_PER_KEY,
    SILENT_MAX,
    SILENT_PER_SOURCE,
    SILENT_S,
    Connections,
    Event,
    State,
    Turns,
)
from guest_agent.serve import OWED_MAX, OWED_MIN, QUEUE_MAX


def test_the_table_has_each_state_and_event_once() -> None:
    assert set(NEXT) == {(state, event) for state in State for event in Event}


def test_only_a_request_that_opens_proves_a_connection() -> None:
    into_proven = {(state, event) for (state, event), after in NEXT.items() if after is State.PROVEN}
    assert into_proven == {(state, Event.PROVEN) for state in State} | {(State.PROVEN, Event.GREETED)}


def test_a_connection_that_proves_nothing_is_due_and_one_that_does_is_not() -> None:
    connections = Connections()
    for descriptor in (1, 2, 3):
        connections.accepted(descriptor, "here", now=0.0)
    connections.heard(2, Event.GREETED, "key", now=1.0)
    connections.heard(3, Event.PROVEN, "key", now=1.0)
    assert connections.due(SILENT_S - 0.1) == []
    assert connections.due(SILENT_S) == [1]
    assert connections.due(SILENT_S + 1.0) == [1, 2]  # a hello bought one more term
    connections.heard(3, Event.REFUSED, None, now=100.0)  # its session has ended
    assert 3 not in connections.due(100.0 + SILENT_S - 0.1)
    assert 3 in connections.due(100.0 + SILENT_S)


def test_what_has_proved_nothing_goes_first_when_memory_is_short() -> None:
    connections = Connections()
    for at, event in ((1, None), (2, Event.GREETED), (3, Event.PROVEN)):
        connections.accepted(at, "here", now=0.0)
        if event:
            connections.heard(at, event, "key", now=0.0)
    assert connections.unproven() == [1, 2]
    assert connections.waiting == 2
    assert connections.heard(4, Event.PROVEN, "key", now=0.0) == []  # it has ended
    assert list(connections) == [1, 2, 3]


def test_one_source_takes_no_place_from_another() -> None:
    connections = Connections()
    assert connections.accepted(1, "modest", now=0.0) == []
    dropped = []
    for at in range(2, 1200):
        for each in connections.accepted(at, "greedy", now=0.0):
            connections.closed(each)
            dropped.append(each)
    assert dropped == list(range(2, 1200 - SILENT_PER_SOURCE))
    assert 1 in connections


def test_many_sources_lose_by_the_one_that_has_most() -> None:
    connections = Connections()
    sources = [*"a" * SILENT_PER_SOURCE, *"b" * (SILENT_PER_SOURCE - 1), "c"]
    for at, source in enumerate(sources):
        assert connections.accepted(at, source, now=0.0) == []
    assert connections.waiting == SILENT_MAX
    assert connections.accepted(SILENT_MAX, "d", now=0.0) == [0]


def test_a_greeted_connection_is_not_displaced_by_silent_ones() -> None:
    connections = Connections()
    connections.accepted(1, "here", now=0.0)
    connections.heard(1, Event.GREETED, "key", now=0.0)
    assert 1 not in {each for at in range(2, 2000) for each in connections.accepted(at, "here", now=0.0)}


@pytest.mark.parametrize(("event", "limit"), [(Event.GREETED, GREETED_PER_KEY), (Event.PROVEN, PROVEN_PER_KEY)])
def test_a_key_displaces_its_own_connections_only(event: Event, limit: int) -> None:
    connections = Connections()
    connections.accepted(1, "here", now=0.0)
    connections.heard(1, event, "modest", now=0.0)
    dropped = []
    for at in range(2, 200):
        connections.accepted(at, "there", now=0.0)
        for each in connections.heard(at, event, "greedy", now=0.0):
            connections.closed(each)
            dropped.append(each)
    assert dropped == list(range(2, 200 - limit))


def test_the_connection_used_longest_ago_goes_first() -> None:
    connections = Connections()
    for at in range(PROVEN_PER_KEY):
        connections.accepted(at, "here", now=0.0)
        connections.heard(at, Event.PROVEN, "key", now=0.0)
    connections.heard(0, Event.PROVEN, "key", now=1.0)
    connections.accepted(1000, "here", now=2.0)
    assert connections.heard(1000, Event.PROVEN, "key", now=2.0) == [1]


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from("abc"), st.sampled_from([None, *Event])), max_size=400))
def test_the_bounds_hold_whatever_happens(steps: list[tuple[int, str, Event | None]]) -> None:
    few = Connections(descriptors=16)
    for at, name, event in steps:
        dropped = few.accepted(at, name, 0.0) if event is None else few.heard(at, event, name, 0.0)
        for each in dropped:
            few.closed(each)
        states = Counter(few[each].state for each in few)
        assert states[State.SILENT] <= 8
        assert states[State.PROVEN] <= 8
    for each in list(few):
        few.closed(each)
    assert (len(few), few.waiting, few.owed) == (0, 0, 0)


def test_what_must_be_dropped_for_unread_replies_is_of_the_key_that_reads_least() -> None:
    connections = Connections()
    for at, key, owed in ((1, "modest", 10), (2, "greedy", 8), (3, "greedy", 8), (4, "greedy", 0)):
        connections.accepted(at, "here", 0.0)
        connections.heard(at, Event.PROVEN, key, 0.0)
        connections[at].owed = owed
    assert connections.owed == 26
    assert connections.in_debt() == [1, 2, 3]
    assert connections.deepest_in_debt() == [2, 3]
    assert Connections().deepest_in_debt() == []


def test_all_limits_fit_into_the_descriptors_of_the_process() -> None:
    assert SILENT_MAX + PROVEN_MAX + 64 < 4096


@given(st.lists(st.sampled_from("aaaaaaab"), max_size=60))
def test_a_request_waits_for_one_of_every_other_key_at_most(keys: str) -> None:
    turns = Turns[tuple[str, int]]()
    sent: dict[str, int] = defaultdict(int)
    for key in keys:
        turns.put(key, (key, sent[key]))
        sent[key] += 1
    taken = []
    while turns:
        taken.append(turns.take())
    assert Counter(key for key, _ in taken) == Counter(keys)
    for key in set(keys):
        own = [number for other, number in taken if other == key]
        assert own == sorted(own)  # in order
    places = [place for place, (key, _) in enumerate(taken) if key == "b"]
    assert all(place <= 2 * number + 1 for number, place in enumerate(places))


def test_replies_too_short_to_be_watched_fit_into_the_bound_of_those_that_are() -> None:
    assert QUEUE_MAX * OWED_MIN * PROVEN_MAX <= OWED_MAX
