"""Walks of damaged lists end soon, give what can be read, and say what could not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.ground.buffer import ADDRESS, Buffer
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.inspection import lists
from vmishim.inspection.lists import MARKS_MAX, STRICT, Damage, chains, ring, whole
from vmishim.libvmi import Libvmi

NODES, SIZE, LINK = 20, 64, 16
HEAD = ADDRESS + 0x8000
NULLS = 1 << 29
CHAINS = 64
NOWHERE = [0, 0x7FFF_1234_5000, ADDRESS - 0x1000, (1 << 64) - 1, 0xDEAD_0000_0000_0100]
ALL = [ADDRESS + number * SIZE for number in range(NODES)]


class Guest:
    """Reads a buffer as `Libvmi` would, and counts."""

    def __init__(self) -> None:
        self.memory, self.reads = Buffer(), 0

    def read_addr_va(self, address: int, pid: int) -> int:
        self.reads += 1
        found = self.memory.read(address, 8)
        if found is None:
            raise FaultError(address)
        return int.from_bytes(found, "little")

    def word(self, address: int, value: int) -> None:
        self.memory.words(address - ADDRESS, value)

    def pause_vm(self) -> None: ...

    def resume_vm(self) -> None: ...

    def as_libvmi(self) -> Libvmi:
        return cast(Libvmi, self)


def ringed() -> Guest:
    """A ring of all nodes."""
    guest = Guest()
    places = [HEAD, *(node + LINK for node in ALL)]
    for before, here, after in zip([places[-1], *places], places, [*places[1:], HEAD], strict=False):
        guest.word(here, after)
        guest.word(here + 8, before)
    return guest


def tabled() -> Guest:
    """The nodes in chains of a table, two in each."""
    guest = Guest()
    for number in range(CHAINS):
        at = HEAD + 8 * number
        for node in ALL[2 * number : 2 * number + 2]:
            guest.word(at, node + LINK)
            guest.word(node + LINK + 8, at)
            at = node + LINK
        guest.word(at, (NULLS + number) * 2 + 1)
    return guest


def walk_ring(guest: Guest, damage: Damage) -> list[int]:
    return list(ring(guest.as_libvmi(), HEAD, LINK, 1000, damage, "the list"))


def walk_table(guest: Guest, damage: Damage) -> list[int]:
    return list(chains(guest.as_libvmi(), HEAD, CHAINS, 8, LINK, NULLS, 1000, damage, "the table"))


Walk = Callable[[Guest, Damage], list[int]]


@pytest.mark.parametrize(("made", "walk"), [(ringed, walk_ring), (tabled, walk_table)])
def test_a_sound_list_is_given_in_order(made: Callable[[], Guest], walk: Walk) -> None:
    assert walk(made(), STRICT) == ALL


POINTERS = [HEAD, HEAD + 8, *(node + LINK + far for node in ALL for far in (0, 8))]


LINKS = [HEAD, *(node + LINK for node in ALL), ADDRESS + 0x4000]


@given(at=st.sampled_from(POINTERS), value=st.sampled_from([*NOWHERE, *LINKS]))
def test_one_wrong_pointer_of_a_ring_loses_nothing(at: int, value: int) -> None:
    guest, damage = ringed(), Damage()
    before = guest.read_addr_va(at, 0)
    guest.word(at, value)
    guest.reads = 0
    found = walk_ring(guest, damage)
    assert sorted(found) == ALL
    assert guest.reads <= 4 * NODES + 8
    assert bool(damage.count) == (value != before)


@given(
    damaged=st.dictionaries(st.sampled_from(POINTERS), st.sampled_from([*NOWHERE, *POINTERS]), min_size=2, max_size=9)
)
def test_several_wrong_pointers_give_each_entry_once_at_most(damaged: dict[int, int]) -> None:
    guest, damage = ringed(), Damage()
    for at, value in damaged.items():
        guest.word(at, value)
    guest.reads = 0
    found = walk_ring(guest, damage)
    assert len(set(found)) == len(found)
    # Pointers that are wrong together may unlink an entry as the kernel does.
    if not set(POINTERS) & set(damaged.values()):
        assert damage.count
    assert guest.reads <= 4 * NODES + 8


SLOTS = [*(HEAD + 8 * number for number in range(CHAINS)), *(node + LINK + far for node in ALL for far in (0, 8))]


@given(at=st.sampled_from(SLOTS), value=st.sampled_from([*NOWHERE, *SLOTS]))
@example(at=ALL[2] + LINK, value=HEAD)  # the head after it leads back to the node
def test_a_wrong_pointer_of_a_chain_is_said_and_costs_that_chain(at: int, value: int) -> None:
    guest, damage = tabled(), Damage()
    before = guest.read_addr_va(at, 0)
    guest.word(at, value)
    guest.reads = 0
    found = walk_table(guest, damage)
    assert len(set(found)) == len(found) >= NODES - 2
    assert set(found) <= set(ALL)
    assert bool(damage.count) == (value != before)
    assert guest.reads <= CHAINS + 2 * NODES + 8


def test_a_node_that_points_to_itself_ends_at_once() -> None:
    guest, damage = ringed(), Damage()
    guest.word(ALL[0] + LINK, ALL[0] + LINK)
    assert sorted(walk_ring(guest, damage)) == ALL
    assert damage.marks == [f"the list: it loops: {ALL[0] + LINK:#x} leads back to {ALL[0] + LINK:#x}"]


def test_a_table_that_is_none_is_given_up() -> None:
    guest, damage = tabled(), Damage()
    for number in range(CHAINS):
        guest.word(HEAD + 8 * number, 0)
    assert walk_table(guest, damage) == []
    assert damage.count == lists.BROKEN_MAX + 1
    assert damage.marks[-1].endswith("and the rest was not read")


@pytest.mark.parametrize("walk", [walk_ring, walk_table])
def test_without_a_place_to_note_it_damage_is_an_error(walk: Walk) -> None:
    guest = ringed() if walk is walk_ring else tabled()
    guest.word(ALL[0] + LINK, 0x7FFF_1234_5000)
    with pytest.raises(LibvmiError, match="leads to 0x7fff12345000: no readable memory at 0x7fff12345000"):
        walk(guest, STRICT)


def test_marks_are_counted_beyond_those_kept() -> None:
    damage = Damage()
    for number in range(MARKS_MAX + 5):
        damage.add(str(number))
    assert damage.all == [*map(str, range(MARKS_MAX)), "and 5 more"]


def test_a_list_is_read_again_before_it_counts_as_damaged() -> None:
    readings: list[Any] = [["torn", "list"], [], []]

    def read(vmi: Libvmi, damage: Damage) -> Iterator[int]:
        for mark in readings.pop(0):
            damage.add(mark)
        yield len(readings)

    assert whole(Guest().as_libvmi(), read) == ([1], [])
    readings[:] = [["a"], ["b"], ["c"]]
    assert whole(Guest().as_libvmi(), read) == ([0], ["c"])


@pytest.mark.parametrize(("error", "tries"), [(LibvmiError("x"), 3), (LinkError("x"), 1)])
def test_what_cannot_be_read_at_all_is_an_error(error: LibvmiError, tries: int) -> None:
    asked = []

    def read(vmi: Libvmi, damage: Damage) -> Iterator[int]:
        asked.append(1)
        raise error
        yield 0

    with contextlib.suppress(LibvmiError):
        whole(Guest().as_libvmi(), read)
    assert len(asked) == tries
