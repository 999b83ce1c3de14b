"""What is known of memory, and until when: on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import KERNEL
from vmishim.readahead.pieces import Pieces
from vmishim.readahead.store import Batch, Held, Live, Store

BASE = 0xFFFF888000000000


class Time:
    """A clock."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Nobody:
    """A reader that is not to be asked: a store never asks the guest."""

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        raise AssertionError("a store asked the guest")


class Ground:
    def __init__(self) -> None:
        self.time = Time()
        self.withheld: list[int] = []
        self.store = Store(Live(Nobody()), Held(Nobody()), lambda: self.withheld, now=self.time, background=False)
        self.words, self.cells = self.store.words, self.store.cells

    def put(self, words: dict[int, int], cells: dict[int, bytes] | None = None) -> Batch:
        batch = self.store.open()
        self.store.put(batch, dict(words), dict(cells or {}))
        return batch


@pytest.fixture
def ground() -> Ground:
    return Ground()


def test_a_batch_is_known_for_its_second_and_then_forgotten_whole(ground: Ground) -> None:
    batch = ground.put({BASE: 1, BASE + 8: 2}, {BASE + 16: b"abcd"})
    ground.time.seconds += STALE / 2
    ground.store.put(batch, {BASE + 24: 3}, {})  # what is added has the batch's time, not one of its own
    ground.time.seconds += STALE / 2 - 0.01
    assert ground.store.expire() == pytest.approx(0.01)
    assert (ground.words, ground.cells) == ({BASE: 1, BASE + 8: 2, BASE + 24: 3}, {BASE + 16: b"abcd"})
    assert ground.store.knows(batch)
    ground.time.seconds += 0.01
    assert ground.store.expire() is None
    assert (ground.words, ground.cells) == ({}, {})
    assert not ground.store.knows(batch)
    assert (batch.words, batch.cells) == ({}, {})  # or a list that is never read again would keep its memory for good


def test_what_comes_for_a_batch_whose_time_is_over_is_not_known(ground: Ground) -> None:
    batch = ground.put({BASE: 1})
    ground.time.seconds += STALE
    ground.store.expire()
    ground.store.put(batch, {BASE: 2}, {})
    assert ground.words == {}


@given(st.lists(st.tuples(st.sampled_from(["put", "wait", "drop", "renew"]), st.integers(0, 5), st.floats(0, 0.9))))
def test_nothing_is_known_past_its_time(steps: list[tuple[str, int, float]]) -> None:
    """Each word says when it came; renewing is for words that are as good now as they were then."""
    ground, batches = Ground(), dict[int, Batch]()
    every: list[Batch] = []
    good: dict[int, float] = {}
    for step, number, seconds in steps:
        address, batch = BASE + 8 * number, batches.get(number)
        if step == "put":
            batches[number] = ground.put({address: number})
            every.append(batches[number])
            good[number] = ground.time.seconds
        elif step == "wait":
            ground.time.seconds += seconds
        elif batch is not None and step == "drop":
            ground.store.drop(batch)
        elif batch is not None and step == "renew" and ground.store.renew(batch):
            good[number] = ground.time.seconds
        due = ground.store.expire()
        for at in ground.words:
            assert ground.time.seconds < good[(at - BASE) // 8] + STALE
        assert (due is None) == (not any(map(ground.store.knows, every)))


def test_the_dictionaries_are_always_the_same_objects(ground: Ground) -> None:
    """The hit path has them."""
    words, cells = ground.words, ground.cells
    ground.put({BASE: 1}, {BASE + 8: b"ab"})
    ground.store.hold()
    ground.put({BASE: 1}, {BASE + 8: b"ab"})
    ground.store.release()
    ground.store.clear()
    ground.store.after_fork()
    ground.put({BASE: 1}, {BASE + 8: b"ab"})
    assert (ground.store.words is words, ground.store.cells is cells) == (True, True)
    assert (words, cells) == ({BASE: 1}, {BASE + 8: b"ab"})


def test_newer_bytes_replace_older_ones_outside_a_hold_and_not_within(ground: Ground) -> None:
    def twice() -> dict[int, int]:
        ground.put({BASE: 1})
        ground.put({BASE: 2})
        return dict(ground.words)

    assert twice() == {BASE: 2}
    ground.store.hold()
    assert ground.words == {}
    assert twice() == {BASE: 1}
    ground.store.release()
    assert ground.words == {}
    assert twice() == {BASE: 2}


def test_within_a_hold_nothing_is_forgotten(ground: Ground) -> None:
    ground.store.hold()
    batch = ground.put({BASE: 1}, {BASE + 8: b"ab"})
    ground.time.seconds += 1e6
    assert ground.store.expire() is None
    ground.store.withdraw([BASE], [BASE + 8])
    ground.store.drop(batch)
    assert (ground.words, ground.cells) == ({BASE: 1}, {BASE + 8: b"ab"})


def test_what_was_answered_within_a_hold_is_known_from_then_on(ground: Ground) -> None:
    assert ground.store.answer(BASE, b"abcd") == b"abcd"
    assert ground.cells == {}
    ground.store.hold()
    assert ground.store.answer(BASE, b"abcd") == b"abcd"
    assert ground.store.answer(BASE + 2, b"xxyy") == b"cdyy"
    assert ground.store.answer(BASE, b"--------") == b"abcdyy--"
    ground.withheld = [BASE + 64]
    assert ground.store.answer(BASE + 64, b"abcd") == b"abcd"
    assert BASE + 64 not in ground.cells


def test_what_is_withheld_is_never_known(ground: Ground) -> None:
    ground.withheld = [BASE, BASE + 8]
    ground.put({BASE: 1, BASE + 16: 2}, {BASE + 8: b"ab"})
    assert (ground.words, ground.cells) == ({BASE + 16: 2}, {})


def test_words_that_another_batch_owns_are_known_with_the_rest(ground: Ground) -> None:
    """A table's empty heads: those that the walk has no word of, and both until their own time is over."""
    empty = {BASE: 1, BASE + 8: 3, BASE + 16: 5}
    heads = ground.store.open(empty)
    ground.time.seconds += 0.5
    batch = ground.store.open()
    ground.store.put(batch, {BASE + 8: 77}, {}, also=empty)
    assert ground.words == {BASE: 1, BASE + 8: 77, BASE + 16: 5}
    assert empty == {BASE: 1, BASE + 8: 3, BASE + 16: 5}
    assert ground.store.renew(heads)
    ground.time.seconds += 0.75
    ground.store.expire()
    assert ground.words == {BASE: 1, BASE + 8: 77, BASE + 16: 5}
    ground.time.seconds += 0.25
    ground.store.expire()
    assert ground.words == {}
    assert not ground.store.renew(heads)


def test_a_walk_keeps_head_and_neighbours_apart(ground: Ground) -> None:
    """Outside a hold another list may know the neighbours, older; within one the head is known like other memory."""
    head, neighbours = Pieces(), Pieces()
    head.update({BASE: 1}, {BASE + 64: b"ab"})
    neighbours.update({BASE + 8: 2}, {})
    ground.put({BASE + 8: 9, BASE + 16: 3})
    ground.store.walked(head, neighbours)
    assert ground.words == {BASE + 16: 3}
    ground.store.hold()
    ground.put({BASE: 7})
    ground.store.walked(head, neighbours)
    assert (ground.words, ground.cells) == ({BASE: 7}, {BASE + 64: b"ab"})
    assert head.words == {BASE: 1}


def test_due_and_expirations_say_when_a_head_has_to_be_told(ground: Ground) -> None:
    def state() -> tuple[Iterable[float], int]:
        return [ground.store.due], ground.store.expirations

    ground.put({BASE: 1})
    ground.time.seconds += 0.5
    ground.put({BASE + 8: 2})
    assert state() == ([100.0 + STALE], 0)
    ground.time.seconds = 100.0 + STALE
    ground.store.expire()
    assert state() == ([100.5 + STALE], 1)
    ground.store.clear()
    assert state() == ([float("inf")], 1)
