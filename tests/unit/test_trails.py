"""Trails: what is on them, what is taken off, and that none grows without bound."""

from __future__ import annotations

import struct

from vmishim.memory.lifetimes import STALE
from vmishim.readahead.snapshot import Snapshot
from vmishim.readahead.trails import IMAGE, LINE, READ_MAX, READS_MAX, TRAILS, Trail, Trails, cut, lines_of

HEAP = 0xFFFF_8880_0000_0000
APART = 0x4000
"""Further than a pointer reaches."""


def word(value: int) -> bytes:
    return struct.pack("<Q", value)


def walked(links: list[int]) -> Trail:
    """The trail of a pass along ``links``, each of which holds the address of the next."""
    trail = Trail()
    trail.start(word(links[0]))
    for link, after in zip(links, [*links[1:], 0], strict=True):
        assert trail.leads_to(link)
        trail.meet(link, word(after), text=False)
    trail.begin(0.0)
    return trail


def test_what_was_met_is_brought_in_the_next_pass_and_for_a_second() -> None:
    trail = Trail()
    trail.start(word(HEAP))
    trail.begin(0.0)
    trail.meet(HEAP, word(0), text=False)
    assert not trail.has(HEAP, 8, 0.0)  # so a script that polls it sees what is there now
    trail.begin(0.0)
    assert trail.has(HEAP, 8, STALE / 2)
    assert not trail.has(HEAP, 8, STALE)


def test_a_pointer_reaches_a_page_up_and_to_what_holds_the_member_that_it_points_to() -> None:
    trail = Trail()
    trail.start(word(HEAP + APART))
    assert all(trail.leads_to(HEAP + APART + distance) for distance in (-1024, 0, 4095))
    assert not any(trail.leads_to(HEAP + APART + distance) for distance in (-APART, APART))


def test_in_the_image_where_symbols_are_a_pointer_reaches_less_far() -> None:
    trail = Trail()
    trail.start(word(IMAGE + APART))
    assert trail.leads_to(IMAGE + APART + 255)
    assert not any(trail.leads_to(IMAGE + APART + distance) for distance in (-256, 1024))


def test_what_no_pointer_leads_to_any_more_is_taken_off() -> None:
    links = [HEAP + APART * number for number in range(1000)]
    trail = walked(links)
    known = dict(zip(links, [*links[1:], 0], strict=True)) | {links[599]: 0}
    trail.sweep(Snapshot(), known)
    assert [link for link in links if trail.has(link, 8, 0.0)] == links[:600]


def test_a_guest_that_turns_a_trail_around_costs_one_look_at_each_read() -> None:
    """Each word leads to the one that was met before it: looking through them in order would find one a round."""
    links = [HEAP + APART * number for number in range(READS_MAX)]
    trail = walked(links)
    known = dict(zip(links, [0, *links], strict=False)) | {links[0]: links[-1]}
    trail.sweep(Snapshot(), known)
    assert len(trail) == READS_MAX


def test_what_cannot_be_read_any_more_is_taken_off() -> None:
    trail = walked([HEAP, HEAP + APART])
    trail.lose([HEAP], [])
    assert not trail.has(HEAP, 8, 0.0)
    assert trail.has(HEAP + APART, 8, 0.0)


def test_a_trail_has_a_bound() -> None:
    trail = Trail()
    trail.meet(HEAP, bytes(READ_MAX + 1), text=False)
    assert not len(trail)
    for number in range(READS_MAX + 10):
        trail.meet(HEAP + 8 * number, word(0), text=False)
    assert len(trail) == READS_MAX
    trail.meet_all({HEAP - 8: 0}, {})
    assert len(trail) == READS_MAX


def test_the_trails_that_are_used_stay() -> None:
    trails = Trails()
    trails.add(HEAP, word(HEAP), 0.0)
    for number in range(1, TRAILS + 10):
        trails.add(HEAP + APART * number, word(HEAP), 0.0)
        trails.use(HEAP)
    assert trails.at(HEAP) is not None
    assert trails.at(HEAP + APART) is None
    assert len(list(trails)) == TRAILS


def test_what_holds_no_pointer_begins_no_trail() -> None:
    trails = Trails()
    trails.add(HEAP, word(77), 0.0)
    assert trails.at(HEAP) is None


def test_words_and_cells_are_cut_from_lines() -> None:
    """One that reaches into the next line, and one of a line that cannot be read."""
    memory = bytes(range(256))
    words, cells = [8, 56, 192], {60: 10, 124: 8}
    assert lines_of(words, cells) == [0, 64, 128, 192]
    lines = {at: memory[at : at + LINE] for at in (0, 64, 128)}
    found, whole = cut(lines, words, cells)
    assert found == {at: int.from_bytes(memory[at : at + 8], "little") for at in (8, 56)}
    assert whole == {at: memory[at : at + count] for at, count in cells.items()}
