"""What is learned from reads: fields on the second meeting, rings at once, companions for one use."""

from __future__ import annotations

import pytest

from vmishim.readahead.catalogue import InnerRing, KernelList
from vmishim.readahead.companions import COMPANION_MAX, COMPANIONS, Companions
from vmishim.readahead.fields import BLOCK, RING, ROW, WORD, Field, Hop
from vmishim.readahead.learning import LONG_TEXT, TEXT, learn
from vmishim.readahead.listing import Listing
from vmishim.wire.plan import Step, Take, Text

HEAD = 0xFFFF888000000000
LINK = Field((), 16, WORD)
SIGNAL = (Hop(64),)
THREADS = (*SIGNAL, Hop(8, span=RING, link=32))
RINGS = InnerRing(Field(SIGNAL, 8, WORD), (Field(THREADS, 32, WORD), Field(THREADS, 40, WORD)), "task_struct", 128)


@pytest.fixture
def listing() -> Listing:
    return Listing(KernelList("tasks", HEAD, Step.RING, 16, 0, 128, (LINK,), inner=(RINGS,)))


def test_a_field_is_learned_the_second_time_it_is_met(listing: Listing) -> None:
    """Once may be a look at one node only."""
    field = Field((), 24, 4)
    assert learn(listing, field) is None
    assert field not in listing.fields
    lesson = learn(listing, field)
    assert lesson is not None
    assert (lesson.stage.root, lesson.stage.ops, lesson.stage.sources) == ((), (Take(0, 24, 4),), (((), 24),))
    assert not lesson.rings
    assert field in listing.fields
    assert Take(0, 24, 4) in listing.plan.ops


def test_what_comes_along_already_is_not_learned_again(listing: Listing) -> None:
    assert [learn(listing, LINK) for _ in range(3)] == [None] * 3


def test_a_string_that_turned_out_longer_is_brought_longer(listing: Listing) -> None:
    name = Field((), 48, TEXT, text=True)
    learn(listing, name)
    assert learn(listing, name) is not None
    assert learn(listing, name) is not None  # it is met again although it comes along: it was cut
    assert Text(0, 48, LONG_TEXT) in listing.plan.ops
    assert Text(0, 48, TEXT) not in listing.plan.ops


def test_a_row_of_words_becomes_an_array(listing: Listing) -> None:
    for number in range(ROW):
        learn(listing, Field((), 200 + WORD * number, WORD))
        lesson = learn(listing, Field((), 200 + WORD * number, WORD))
    assert lesson is not None
    assert lesson.stage.ops == (Take(0, 200, BLOCK),)


def test_a_ring_that_hangs_from_each_node_is_learned_at_once(listing: Listing) -> None:
    lesson = learn(listing, RINGS.head)
    assert lesson is not None
    assert lesson.rings
    assert lesson.stage.root == THREADS
    assert all(field in listing.fields for field in (*RINGS.fields, Field((), 64, WORD)))


def test_what_no_plan_can_hold_is_not_learned(listing: Listing) -> None:
    fields = [Field((), 4096 * number, 4096) for number in range(1, 8)]
    lessons = [(learn(listing, field), learn(listing, field))[1] for field in fields]
    held = [field for field in fields if field in listing.fields]
    assert [field for field, lesson in zip(fields, lessons, strict=True) if lesson] == held == fields[:3]
    assert listing.plan.record.size <= 16384


def test_a_single_read_comes_along_once_it_was_met_twice() -> None:
    companions = Companions()
    companions.meet((HEAD, 4))
    assert companions.wanted == []
    companions.meet((HEAD, 4))
    companions.meet((HEAD + 8, 8))
    assert companions.wanted == [(HEAD, 4)]


def test_what_came_along_is_used_once() -> None:
    companions = Companions()
    companions.bring({(HEAD, 4): b"abcd"}, until=7.5)
    assert companions.take((HEAD, 8)) is None
    assert companions.take((HEAD, 4)) == (b"abcd", 7.5)
    assert companions.take((HEAD, 4)) is None


def test_companions_are_few_and_small_and_those_in_use_stay() -> None:
    companions = Companions()
    for number in range(COMPANIONS):
        companions.meet((HEAD + 8 * number, 8))
        companions.meet((HEAD + 8 * number, 8))
    companions.meet((HEAD, COMPANION_MAX + 1))
    assert companions.wanted == [(HEAD + 8 * number, 8) for number in range(COMPANIONS)]
    companions.bring({(HEAD, 8): bytes(8)}, until=1.0)
    companions.take((HEAD, 8))
    companions.meet((HEAD + 4096, 8))
    companions.meet((HEAD + 4096, 8))
    assert (HEAD, 8) in companions.wanted
    assert (HEAD + 8, 8) not in companions.wanted
    assert len(companions.wanted) == COMPANIONS
