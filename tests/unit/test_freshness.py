"""The scenes of docs/freshness.md over a byte buffer: without root, and in a moment, since the clock is the test's."""

from __future__ import annotations

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
