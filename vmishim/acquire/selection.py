"""Which memory the kernel itself uses: all but what is free, and but for the memory of processes and files.

The kernel has a ``struct page`` for each page of memory, in an array in virtual memory (``vmemmap``). VMCOREINFO says
how to read them; makedumpfile decides by the same fields what to leave out of a dump (levels 2 to 16). A page is left
out only if its ``struct page`` says so; one that cannot be read, or says nothing, belongs to the kernel.

Source: ``include/linux/page-flags.h``, ``include/linux/mm_types.h``, ``mm/internal.h`` (``buddy_order``) of Linux;
``__exclude_unnecessary_pages`` of makedumpfile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vmishim.guests.layout import Range
from vmishim.kernel import vmcoreinfo
from vmishim.memory.reader import PAGE_SIZE

GAP = 16 * PAGE_SIZE
"""A gap between two parts of the kernel's memory that is shorter is read too: a request costs more."""
RUNS_MAX = 60_000
"""Parts of the kernel's memory, so that an ELF core has room for their headers; beyond that, gaps are read."""
PAGES_MAX = 1 << 14
"""Pages whose ``struct page`` are looked at together."""
ORDER_MAX = 20
"""A free block has 2^order pages, 2^10 on any kernel so far."""
SLAB, HUGE = "NUMBER(PG_slab)", "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)"
"""What VMCOREINFO says on some kernels only."""
ANON = 1
"""In ``mapping``: the page is anonymous memory of a process (``PAGE_MAPPING_ANON``)."""
_TYPES = range(0xF000_0000, 0xFFFF_FFFF)
"""Values of ``_mapcount`` of a page that has a type, and so is neither a process's nor a file's: before Linux 6.12
cleared bits of ``PAGE_TYPE_BASE``, since then (4ffca5a96678) a number in the highest byte."""


@dataclass(frozen=True)
class Layout:
    """Where the fields of a ``struct page`` are, and the values to compare them with."""

    size: int
    flags: int
    mapping: int
    head: int
    private: int
    mapcount: int
    free: int
    """``_mapcount`` of a free block's first page."""
    lru: int
    """In ``flags``: the page is on a list of memory that can be reclaimed, so it is a process's or a file's."""
    slab: int
    """In ``flags``: a page of a slab, before Linux 6.10; 0: slabs have a type."""
    huge: int | None
    """``_mapcount`` of a page of hugetlbfs, since Linux 6.10."""


def layout(text: bytes) -> Layout | None:
    """From VMCOREINFO; None if it does not say enough, or what it says is not possible."""
    values = vmcoreinfo.parse(text)

    def number(name: str) -> int:
        return int(values[name])

    try:
        size = number("SIZE(page)")
        offsets = [
            number(f"OFFSET(page.{name})") for name in ("flags", "mapping", "compound_head", "private", "_mapcount")
        ]
        free, lru = number("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)"), number("NUMBER(PG_lru)")
        slab = number(SLAB) if SLAB in values else None
        huge = number(HUGE) if HUGE in values else None
    except (KeyError, ValueError):
        return None
    *words, mapcount = offsets
    if not (0 < size <= 512 and size % 8 == 0 and all(0 <= at < size and at % 8 == 0 for at in words)):
        return None
    if not (0 <= mapcount < size and mapcount % 4 == 0 and 0 <= lru < 64 and (slab is None or 0 <= slab < 64)):
        return None
    flags, mapping, head, private = words
    return Layout(
        *(size, flags, mapping, head, private, mapcount, free % (1 << 32), 1 << lru),
        0 if slab is None else 1 << slab,
        None if huge is None else huge % (1 << 32),
    )


Read = Callable[[int, int], bytes]
"""``read(kernel virtual address, count)``: so many bytes, or fewer if the next cannot be read."""


def kernel(ram: Iterable[Range], layout: Layout, array: int, read: Read) -> list[Range]:
    """The kernel's part of ``ram``, in the order of addresses; gaps shorter than `GAP` are in it too.

    :param array: kernel virtual address of the ``struct page`` of physical address 0
    """
    return _few(_parts(ram, layout, array, read))


def _parts(ram: Iterable[Range], layout: Layout, array: int, read: Read) -> Iterator[Range]:
    for start, end in ram:
        begun = -1
        for page, keep in _changes(start // PAGE_SIZE, -(-end // PAGE_SIZE), layout, array, read):
            if keep:
                begun = page
            else:
                yield Range(max(begun * PAGE_SIZE, start), min(page * PAGE_SIZE, end))


def _changes(first: int, last: int, layout: Layout, array: int, read: Read) -> Iterator[tuple[int, bool]]:
    """Numbers of pages where the kernel's memory begins (true) and ends (false), in turn."""
    was = False
    page, free_until = first, first
    tail, head_kept = 0, True  # of the last page that is not a tail: how its tails point to it, and whether it is kept
    while page < last:
        wanted = min(PAGES_MAX, last - page)
        table = read(array + page * layout.size, wanted * layout.size)
        for flags, mapping, head, private, count in _columns(table, layout):
            if page < free_until:
                keep = False
            elif head & 1:
                keep = head_kept or head != tail
            else:
                keep = True
                if count == layout.free and private <= ORDER_MAX:
                    keep, free_until = False, page + (1 << private)
                elif count in _TYPES:
                    keep = layout.huge is None or count >> 24 != layout.huge >> 24
                elif not flags & layout.slab:
                    keep = not (flags & layout.lru or mapping & ANON)
                tail, head_kept = array + page * layout.size + 1, keep
            if keep != was:
                yield page, keep
                was = keep
            page += 1
            wanted -= 1
        if wanted:
            # The array cannot be read here, so it says nothing of the pages up to where it may be readable again.
            if not was:
                yield page, True
                was = True
            at = array + page * layout.size
            page = min(-((array - (at // PAGE_SIZE + 1) * PAGE_SIZE) // layout.size), last)
    if was:
        yield last, False


def _columns(table: bytes, layout: Layout) -> Iterator[tuple[int, ...]]:
    """Of each whole ``struct page``: flags, mapping, compound head, private and mapcount."""
    whole = memoryview(table)[: len(table) // layout.size * layout.size]
    step = layout.size // 8
    words, halves = whole.cast("Q"), whole.cast("I")
    places = (layout.flags, layout.mapping, layout.head, layout.private)
    columns = [words[at // 8 :: step].tolist() for at in places]
    return zip(*columns, halves[layout.mapcount // 4 :: 2 * step].tolist(), strict=True)


def _few(parts: Iterable[Range]) -> list[Range]:
    gap, found = GAP, _closed(parts, GAP)
    while len(found) > RUNS_MAX:
        gap *= 2
        found = _closed(found, gap)
    return found


def _closed(parts: Iterable[Range], gap: int) -> list[Range]:
    """Parts, joined where the gap between them is shorter."""
    found: list[Range] = []
    for part in parts:
        if found and part.start - found[-1].end < gap:
            found[-1] = Range(found[-1].start, part.end)
        else:
            found.append(part)
    return found
