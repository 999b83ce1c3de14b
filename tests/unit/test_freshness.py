"""The scenes of docs/freshness.md over a byte buffer: without root, and in a moment, since the clock is the test's."""

from __future__ import annotations

import struct
from typing import cast

import pytest

from tests.ground import freshness
from tests.ground.freshness import ARRAY, LINK, SIZE, TABLE, BufferGround, Ground, PlantedGuest, forward
from vmishim.errors import LibvmiError
from vmishim.libvmi import pause
from vmishim.memory.lifetimes import STALE
from vmishim.memory.reader import Extent
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD, Field
from vmishim.wire.messages import Walk
from vmishim.wire.plan import Step


@pytest.fixture
def ground() -> Ground:
    return BufferGround()


class TestLists(freshness.Lists): ...


class TestTrails(freshness.Trails): ...


class TestTables(freshness.Tables):
    def test_a_chain_whose_head_can_no_longer_be_read_is_not_empty(self) -> None:
        """The kernel took back the page that the end of the table was in."""
        ground = BufferGround()
        heads, at = 256, ground.memory.size - 8 * 256
        ground.put(TABLE - 16, ground.base + at, heads - 1)
        ground.put(at, *(number << 1 | 1 for number in range(heads)))
        fields = (Field((), LINK, WORD),)
        table = (ground.base + TABLE - 16, ground.base + TABLE - 8, 0)
        vmi = ground.read(KernelList("table", 0, Step.NULLS, LINK, 0, SIZE, fields, stride=8, table=table))
        last = ground.memory.address + ground.memory.size - 8
        cast(PlantedGuest, vmi.vmi).learned(
            [Extent(ground.base, bytes(8))]
        )  # so that there is more to know than the table
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        assert vmi.read_addr_va(last, 0) & 1
        ground.memory.size -= 8 * 16
        vmi.read_addr_va(ground.base + TABLE - 16, 0)
        with pytest.raises(LibvmiError, match="VMI_FAILURE"):
            vmi.read_addr_va(last, 0)


class TestAges(freshness.Ages): ...


class TestHolds(freshness.Holds):
    @pytest.mark.parametrize("reads", range(1, 25))
    def test_a_byte_that_changes_between_two_reads_of_one_walk_has_one_answer(self, reads: int) -> None:
        """Wanted are a node's pointers, all of it, and a part that overlaps; memory changes after so many reads."""
        ground = BufferGround()
        fields = (Field((), 0, SIZE), Field((), 40, SIZE - 8))
        place, nodes = freshness.tasks(ground, 3, *fields)
        vmi, read, count = ground.read(place), ground.memory.read, 0

        def changing(address: int, size: int) -> bytes | None:
            nonlocal count
            count += 1
            if count == reads:
                for node in nodes:
                    ground.put(node + 40, 7, 8, 9)
                ground.ring(nodes[0] + LINK, [nodes[2] + LINK, nodes[1] + LINK])
            return read(address, size)

        with pause(vmi), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ground.memory, "read", changing)
            vmi.read_addr_va(place.start, 0)
            ats = [ground.base + node for node in nodes]
            links = [struct.pack("<2Q", *(vmi.read_addr_va(at + LINK + each, 0) for each in (0, 8))) for at in ats]
            copies = [vmi.read_va(at, 0, SIZE)[0] for at in ats]
            parts = [vmi.read_va(at + 40, 0, SIZE - 8)[0] for at in ats]
        assert [copy[LINK : LINK + 16] for copy in copies] == links
        assert [copy[40:] for copy in copies] == [part[: SIZE - 40] for part in parts]

    def test_nothing_in_a_hold_expires(self, ground: Ground) -> None:
        """Neither the nodes of a list, nor a single read, nor an array, nor what a program brought."""
        place, nodes = freshness.tasks(ground, 6, Field((), 0, WORD))
        vmi = ground.read(place)
        array = [ARRAY + 8 * number for number in range(8)]
        with pause(vmi):
            forward(vmi, place.start)
            before = [vmi.read_64_va(ground.base + at, 0) for at in (*nodes, *array)]
            for at in (*nodes, *array):
                ground.put(at, 77)
            ground.let_pass(3 * STALE)
            assert [vmi.read_64_va(ground.base + at, 0) for at in (*nodes, *array)] == before
            assert len(forward(vmi, place.start)) == 5
            ground.link.requests.clear()
            vmi.read_64_va(ground.base + nodes[1] + 48, 0)
            assert Walk.KIND not in ground.link.requests


class TestForks(freshness.Forks): ...


class TestHistories(freshness.Histories): ...


class TestEncryption(freshness.Encryption): ...
