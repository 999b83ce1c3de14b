"""The page cache, as values: what it answers is memory, what it asks is counted, the clock is the test's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from math import inf

import pytest

from vmishim.errors import FaultError, LinkError
from vmishim.memory.pagecache import BLOCK, GROWTH_MAX, HOLE_MAX, MODULES, PAGES_MAX, PageCache
from vmishim.memory.reader import KERNEL, PAGE_SIZE, PHYSICAL, Extent, OneByOne
from vmishim.wire.messages import BULK_MAX

START = 0xFFFF_8880_0000_0000
"""An address in the direct map, at the start of a block."""


def stopped() -> float:
    """A clock that stands still, so that a slow machine forgets nothing."""
    return 0.0


class Memory:
    """Pages of kernel memory, and what was asked of them. The rest is unreadable."""

    def __init__(self, *stretches: tuple[int, int], space: int = KERNEL) -> None:
        self.data = {
            at + page * PAGE_SIZE: random.Random(at + page).randbytes(PAGE_SIZE)
            for at, pages in stretches
            for page in range(pages)
        }
        self.space = space
        self.reads: list[tuple[int, int]] = []
        self.scattered: list[list[int]] = []
        self.broken = False

    @property
    def requests(self) -> int:
        return len(self.reads) + len(self.scattered)

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        if self.broken:
            raise LinkError("the agent is gone; start it")
        self.reads.append((address, count))
        return self.raw(address, count, space)

    def raw(self, address: int, count: int, space: int = KERNEL) -> bytes:
        data = b""
        while len(data) < count:
            at = address + len(data)
            page = self.data.get(at & -PAGE_SIZE) if space == self.space else None
            if page is None:
                raise FaultError(at, data)
            data += page[at % PAGE_SIZE :][: count - len(data)]
        return data

    def scatter(self, addresses: Sequence[int], count: int = PAGE_SIZE) -> Iterator[Extent]:
        if self.broken:
            raise LinkError("the agent is gone; start it")
        self.scattered.append(list(addresses))
        return OneByOne(Silent(self)).scatter(addresses, count)


class Silent:
    """The same memory, and nobody counts."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        return self._memory.raw(address, count, space)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_page_is_asked_for_once_within_its_lifetime(clock: Clock) -> None:
    memory = Memory((START, 1))
    cache = PageCache(memory, now=clock)
    for at in range(0, PAGE_SIZE, 8):
        assert cache.read(START + at, 8) == memory.data[START][at : at + 8]
    assert memory.reads == [(START, PAGE_SIZE)]


def test_a_byte_is_never_older_than_the_lifetime(clock: Clock) -> None:
    memory = Memory((START, 1))
    cache = PageCache(memory, lifetime=2.0, now=clock)
    before = cache.read(START, 8)
    memory.data[START] = bytes(PAGE_SIZE)
    clock.now += 1.999
    assert cache.read(START, 8) == before
    clock.now += 0.001
    assert cache.read(START, 8) == bytes(8)


def test_the_lifetime_begins_with_the_answer(clock: Clock) -> None:
    """Else a slow connection could bring nothing that is still of use."""

    class Slow(Memory):
        def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
            clock.now += 5
            return super().read(address, count, space)

    memory = Slow((START, 1))
    cache = PageCache(memory, lifetime=1.0, now=clock)
    for later, requests in ((0.0, 1), (0.9, 1), (0.1, 2)):
        clock.now += later
        cache.read(START, 8)
        assert memory.requests == requests


@pytest.mark.parametrize("space", [KERNEL, PHYSICAL, 0x5000])
@pytest.mark.parametrize("count", [1, 8, PAGE_SIZE, 3 * PAGE_SIZE, 3 * PAGE_SIZE + 1])
def test_a_read_over_pages_is_exact_and_one_request(space: int, count: int) -> None:
    memory = Memory((START, 6), space=space)
    cache = PageCache(memory, now=stopped)
    assert cache.read(START + 4000, count, space) == memory.raw(START + 4000, count, space)
    assert memory.requests == 1


def test_unreadable_memory_is_a_fault_with_the_bytes_before_it_and_is_not_asked_for_again(clock: Clock) -> None:
    memory = Memory((START, 2))
    cache = PageCache(memory, now=clock)
    hole = START + 2 * PAGE_SIZE
    for _ in range(3):
        with pytest.raises(FaultError) as caught:
            cache.read(hole - 100, 200)
        assert (caught.value.address, caught.value.data) == (hole, memory.data[hole - PAGE_SIZE][-100:])
        with pytest.raises(FaultError) as caught:
            cache.read(hole + 8, 8)
        assert (caught.value.address, caught.value.data) == (hole + 8, b"")
    assert memory.requests == 1
    memory.data[hole] = bytes(PAGE_SIZE)
    clock.now += 1
    assert cache.read(hole + 8, 8) == bytes(8)


def test_a_kernel_address_below_the_kernel_is_not_asked_for() -> None:
    memory = Memory((START, 1))
    for address in (0, 0x1000, 0x7FFF_FFFF_F000, 1 << 63):
        with pytest.raises(FaultError):
            PageCache(memory, now=stopped).read(address, 8)
    assert memory.requests == 0


def test_a_broken_connection_is_no_fault_and_nothing_is_remembered_of_it() -> None:
    memory = Memory((START, 1))
    cache = PageCache(memory, now=stopped)
    memory.broken = True
    for _ in range(2):
        with pytest.raises(LinkError, match="gone"):
            cache.read(START, 8)
    with pytest.raises(LinkError, match="gone"):
        cache.prefetch([START])
    memory.broken = False
    assert cache.read(START, 8) == memory.data[START][:8]


def test_a_sequence_of_reads_is_asked_for_in_growing_pieces_within_blocks_of_2_mib(clock: Clock) -> None:
    pages = 2 * BLOCK // PAGE_SIZE
    memory = Memory((START, pages + 50))
    cache = PageCache(memory, now=clock)
    whole = b"".join(cache.read(START + at, 64) for at in range(0, pages * PAGE_SIZE, 64))
    assert whole == memory.raw(START, pages * PAGE_SIZE)
    assert memory.requests <= 20
    assert max(count for _, count in memory.reads) == GROWTH_MAX * PAGE_SIZE
    assert all(at // BLOCK == (at + count - 1) // BLOCK for at, count in memory.reads)


def test_reads_here_and_there_bring_one_page_each() -> None:
    memory = Memory((START, 100))
    cache = PageCache(memory, now=stopped)
    for page in random.Random(1).sample(range(0, 100, 2), 50):
        cache.read(START + page * PAGE_SIZE, 8)
    assert {count for _, count in memory.reads} == {PAGE_SIZE}


def test_growth_touches_nothing_behind_an_unreadable_page() -> None:
    """What is behind a guard page may be a device's."""
    memory = Memory((START, 9), (START + 10 * PAGE_SIZE, 50))
    cache = PageCache(memory, now=stopped)
    for page in range(9):
        cache.read(START + page * PAGE_SIZE, 8)
    with pytest.raises(FaultError):
        cache.read(START + 9 * PAGE_SIZE, 8)
    assert not {(KERNEL, START // PAGE_SIZE + page) for page in range(10, 60)} & cache._pages.keys()


def test_holes_of_the_module_area_are_asked_about_in_growing_pieces() -> None:
    start, hole = MODULES + (1 << 29), 3 * HOLE_MAX
    memory = Memory((start, 2), (start + (hole + 2) * PAGE_SIZE, 3))
    cache = PageCache(memory, now=stopped)
    found = []
    for page in range(hole + 6):
        try:
            found.append(cache.read(start + page * PAGE_SIZE, PAGE_SIZE))
        except FaultError:
            found.append(b"")
    assert found == [memory.data.get(start + page * PAGE_SIZE, b"") for page in range(hole + 6)]
    assert memory.requests <= 20
    assert max(map(len, memory.scattered)) == HOLE_MAX


@pytest.mark.parametrize("start", [START, 0xFFFF_C900_0000_0000, 0xFFFF_FFFF_FF00_0000 - 3 * PAGE_SIZE])
def test_holes_elsewhere_are_asked_about_page_by_page(start: int) -> None:
    memory = Memory()
    cache = PageCache(memory, now=stopped)
    for page in range(3, 40):
        with pytest.raises(FaultError):
            cache.read(start + page * PAGE_SIZE, 8)
    assert memory.scattered == []
    assert {count for _, count in memory.reads} == {PAGE_SIZE}


def test_what_was_used_together_is_asked_for_together_the_next_time(clock: Clock) -> None:
    memory = Memory((START, 400))
    cache = PageCache(memory, now=clock)
    places = [START + page * PAGE_SIZE for page in random.Random(2).sample(range(0, 400, 2), 100)]
    for at in places:
        cache.read(at, 8)
    for later in (1, 2):
        for page in memory.data:
            memory.data[page] = random.Random(page + later).randbytes(PAGE_SIZE)
        clock.now += 1
        before = memory.requests
        assert [cache.read(at, 8) for at in places] == [memory.data[at][:8] for at in places]
        assert memory.requests - before == 1


def test_what_is_no_longer_used_is_no_longer_asked_for(clock: Clock) -> None:
    memory = Memory((START, 400))
    cache = PageCache(memory, now=clock)
    for page in range(0, 100, 2):
        cache.read(START + page * PAGE_SIZE, 8)
    for _ in range(2):
        clock.now += 1
        cache.read(START, 8)
    assert [len(addresses) for addresses in memory.scattered] == [50, 1]


def test_a_prefetch_is_one_request_for_what_is_not_known() -> None:
    memory = Memory((START, 64), (START + 65 * PAGE_SIZE, 1))
    cache = PageCache(memory, now=stopped)
    cache.read(START, 8)
    cache.prefetch([*range(START, START + 66 * PAGE_SIZE, 100), 0, 0x1000, START + 64], 8)
    assert [len(addresses) for addresses in memory.scattered] == [65]
    before = memory.requests
    assert cache.read(START, 64 * PAGE_SIZE) == memory.raw(START, 64 * PAGE_SIZE)
    with pytest.raises(FaultError):
        cache.read(START + 64 * PAGE_SIZE, 8)
    cache.read(START + 65 * PAGE_SIZE, 8)
    assert memory.requests == before


def test_a_plan_is_fetched_when_its_head_is_read_and_not_known(clock: Clock) -> None:
    memory = Memory((START, 3))
    cache = PageCache(memory, now=clock)
    fetched: list[float] = []

    def fetch() -> Iterator[Extent]:
        fetched.append(clock.now)
        yield Extent(START + 16, memory.raw(START + 16, 16))
        yield Extent(START + PAGE_SIZE - 8, memory.raw(START + PAGE_SIZE - 8, 16))

    cache.plan(START + 16, 16, fetch)
    for later in range(3):
        clock.now = 100.0 + later
        assert cache.read(START + 16, 8) == memory.raw(START + 16, 8)
        assert cache.read(START + PAGE_SIZE - 8, 16) == memory.raw(START + PAGE_SIZE - 8, 16)
        assert cache.read(START + PAGE_SIZE + 4, 4) == memory.raw(START + PAGE_SIZE + 4, 4)
    assert (fetched, memory.requests) == ([100.0, 101.0, 102.0], 0)
    assert cache.read(START + 8, 16) == memory.raw(START + 8, 16)  # what the plan brought is a part of it
    assert cache.read(START + 40, 8) == memory.raw(START + 40, 8)
    assert memory.requests == 1


def test_a_refresh_forgets_all_and_keeps_what_to_ask_for(clock: Clock) -> None:
    memory = Memory((START, 30))
    cache = PageCache(memory, lifetime=inf, now=clock)
    places = range(START, START + 30 * PAGE_SIZE, 2 * PAGE_SIZE)
    before = [cache.read(at, 8) for at in places]
    clock.now += 1e9
    memory.data = dict.fromkeys(memory.data, bytes(PAGE_SIZE))
    assert [cache.read(at, 8) for at in places] == before
    cache.refresh()
    asked = memory.requests
    assert [cache.read(at, 8) for at in places] == [bytes(8)] * 15
    assert memory.requests == asked + 1


def test_a_hold_keeps_everything_until_its_end(clock: Clock) -> None:
    memory = Memory((START, 1))
    cache = PageCache(memory, now=clock)
    cache.read(START, 8)
    memory.data[START] = b"1" * PAGE_SIZE
    cache.hold()
    assert cache.read(START, 8) == b"1" * 8
    memory.data[START] = b"2" * PAGE_SIZE
    clock.now += 1000
    assert cache.read(START, 8) == b"1" * 8
    cache.release()
    assert cache.read(START, 8) == b"2" * 8


def test_reads_of_more_than_is_kept_are_exact_and_asked_for_once() -> None:
    page = bytes(PAGE_SIZE)

    class Endless(Memory):
        def raw(self, address: int, count: int, space: int = KERNEL) -> bytes:
            return page * (count // PAGE_SIZE)

    memory = Endless()
    count = (PAGES_MAX + 300) * PAGE_SIZE
    cache = PageCache(memory, now=stopped)
    assert len(cache.read(START, count)) == count
    assert sum(count for _, count in memory.reads) - count <= GROWTH_MAX * PAGE_SIZE
    assert max(count for _, count in memory.reads) == BULK_MAX
    assert len(cache._pages) == PAGES_MAX


def test_a_scatter_read_has_a_size_that_one_page_holds() -> None:
    for count in (0, -1, PAGE_SIZE + 1):
        with pytest.raises(ValueError, match="1 to 4096"):
            list(OneByOne(Memory()).scatter([START], count))


def test_a_list_that_is_followed_for_long_is_fetched_again_as_a_list(clock: Clock) -> None:
    memory = Memory((START, 200))
    nodes = range(START, START + 200 * PAGE_SIZE, 2 * PAGE_SIZE)
    fetched = []

    def fetch() -> Iterator[Extent]:
        fetched.append(clock.now)
        yield from (Extent(node, memory.raw(node, 16)) for node in nodes[len(fetched) - 1 :])

    cache = PageCache(memory, now=clock)
    cache.plan(START, 8, fetch)
    for node in nodes:
        assert cache.read(node, 16) == memory.raw(node, 16)
        clock.now += 0.1
    assert len(fetched) == 10
    assert memory.requests == 0
    clock.now += 1
    assert cache.read(nodes[0], 16) == memory.raw(nodes[0], 16)  # which is no longer in the list
    assert cache.read(nodes[0], 16) == memory.raw(nodes[0], 16)
    assert (len(fetched), memory.requests) == (11, 1)
