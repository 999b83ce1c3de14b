"""Walks of the guest kernel's lists that end, whatever the lists hold, and that say what they could not read.

A list may be damaged: by a rootkit that unlinked an entry carelessly, by a dump that lacks pages, or because it changed
while it was read. A walk remembers where it was, so it costs no more than the list is long; it checks each entry's
pointer back, so a pointer that leads elsewhere is noticed; and a ring that is broken is read from its other end too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, NamedTuple, NoReturn, TypeVar

from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.libvmi import Libvmi, pause
from vmishim.memory.reader import ADDRESSES

Entry = TypeVar("Entry")

TRIES = 3
"""Tries to read a list before it counts as damaged."""
MARKS_MAX = 100
"""Sentences about damage that are kept; the rest is counted."""
BROKEN_MAX = 64
"""Broken entries after which a whole table counts as invalid: each may cost a request."""
UNREADABLE = (FaultError, OverflowError)
"""What a read behind a damaged pointer raises: no memory there, or an address that is none."""


class Damage:
    """What of a guest could not be read, or was given up.

    :ivar marks: a sentence for each, `MARKS_MAX` at most
    :ivar count: how many there are
    """

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.count = 0

    def add(self, what: str, error: Exception | None = None) -> str:
        """Note one. Returns the sentence, which ends with what ``error`` says."""
        mark = f"{what}: {reason(error)}" if error else what
        self.count += 1
        if len(self.marks) < MARKS_MAX:
            self.marks.append(mark)
        return mark

    @property
    def all(self) -> list[str]:
        """The marks, and one that counts those that were not kept."""
        more = self.count - len(self.marks)
        return [*self.marks, f"and {more} more"] if more else self.marks


class _Strict(Damage):
    """For callers that want all or an error."""

    def add(self, what: str, error: Exception | None = None) -> NoReturn:
        """Raise. :raises LibvmiError: always"""
        raise error or LibvmiError(what)


STRICT: Damage = _Strict()
"""Raises an error at the first damage."""


class Listed(NamedTuple, Generic[Entry]):
    """What `whole` read.

    :ivar entries: the list
    :ivar damage: a sentence for each thing that could not be read; empty for a whole list
    """

    entries: list[Entry]
    damage: list[str]


def whole(vmi: Libvmi, read: Callable[[Libvmi, Damage], Iterable[Entry]], tries: int = TRIES) -> Listed[Entry]:
    """A list read within one hold; read again if it is not consistent.

    The first reading takes several requests, and a process that ends between two of them leaves dangling pointers. The
    next reading takes about one request, since the read-ahead has learned from the first. What is damaged in the last
    of ``tries`` tries is given up, and said.

    :param read: a reader of a list, such as `vmishim.inspection.objects.tasks`
    :raises LibvmiError: nothing of it can be read
    :raises LinkError: the guest could not be reached
    """
    while True:
        tries -= 1
        damage = Damage()
        with pause(vmi):
            try:
                entries = list(read(vmi, damage))
                if tries <= 0 or not damage.count:
                    return Listed(entries, damage.all)
            except LibvmiError as error:
                if tries <= 0 or isinstance(error, LinkError):
                    raise


def ring(vmi: Libvmi, head: int, link: int, most: int, damage: Damage, what: str) -> Iterator[int]:
    """Addresses of the structures on a ``list_head`` ring, without the head's own.

    A ring that is broken is read backward too, up to what was met; so nothing is lost where one pointer is wrong.

    :param link: offset of the ``list_head`` in a structure
    :param most: entries that the kernel can have
    :param what: its name, for marks
    """
    met: set[int] = set()
    broken = yield from _one_way(vmi, head, link, most, met, 0)
    if broken:
        damage.add(f"{what}: {broken}")
        met.add(head)
        broken = yield from _one_way(vmi, head, link, most, met, 8)
        if broken:
            damage.add(f"{what}, backward: {broken}; entries may be missing")


def _one_way(vmi: Libvmi, head: int, link: int, most: int, met: set[int], ahead: int) -> Generator[int, None, str]:
    """Walk a ring by its pointers at ``ahead`` (0: next, 8: prev). Returns why it ended, empty if it closed, or joined
    what the other way met."""
    read, back = vmi.read_addr_va, 8 - ahead
    joins = set(met)
    before, node = head, head
    try:
        node, last = read(head + ahead, 0), read(head + back, 0)
        while node != head and node not in joins:
            if node in met:
                return f"it loops: {before:#x} leads back to {node:#x}"
            if len(met) >= most:
                return f"it has more than {most} entries"
            after, behind = read(node + ahead, 0), read(node + back, 0)
            if behind != before:
                return f"{before:#x} leads to {node:#x}, which leads back to {behind:#x}"
            met.add(node)
            yield (node - link) % ADDRESSES
            before, node = node, after
    except UNREADABLE as error:
        return f"{before:#x} leads to {node:#x}: {reason(error)}"
    return "" if node != head or before == last else f"it ends with {before:#x}, but should with {last:#x}"


def chains(
    vmi: Libvmi, first: int, count: int, stride: int, link: int, nulls: int, most: int, damage: Damage, what: str
) -> Iterator[int]:
    """Addresses of the structures in a table of ``hlist_nulls`` chains.

    :param first: address of the first head
    :param stride: bytes from one head to the next
    :param link: offset of the ``hlist_nulls_node`` in a structure
    :param nulls: number that ends the first chain
    :param most: entries that the kernel can have
    :param what: its name, for marks
    """
    read = vmi.read_addr_va
    met: set[int] = set()
    broken = 0
    heads = range(first, first + count * stride, stride)
    for end, head in zip(range(2 * nulls + 1, 2 * (nulls + count) + 1, 2), heads, strict=True):
        try:
            node = read(head, 0)
        except UNREADABLE as error:
            damage.add(f"{what}: its heads from {head:#x} on cannot be read", error)
            return
        if node == end:
            continue
        before, why = head, ""
        try:
            while not node & 1:
                after, behind = read(node, 0), read(node + 8, 0)
                if node in met:
                    why = f"it loops: {before:#x} leads back to {node:#x}"
                elif behind != before:
                    why = f"{before:#x} leads to {node:#x}, which leads back to {behind:#x}"
                elif heads.start <= node < heads.stop:  # the word after it may lead back all the same
                    why = f"{before:#x} leads to {node:#x}, which is among the heads"
                elif len(met) >= most:
                    damage.add(f"{what}: it has more than {most} entries")
                    return
                if why:
                    break
                met.add(node)
                yield (node - link) % ADDRESSES
                before, node = node, after
            else:
                if node != end:
                    why = f"it ends like chain {(node >> 1) - nulls}"
        except UNREADABLE as error:
            why = f"{before:#x} leads to {node:#x}: {reason(error)}"
        if why:
            damage.add(f"{what}, chain {(end >> 1) - nulls}: {why}")
            broken += 1
            if broken >= BROKEN_MAX:
                damage.add(f"{what}: {broken} chains are broken, and the rest was not read")
                return


def reason(error: Exception) -> str:
    """What an error says, on one line: a note if it has one, as `FaultError` does."""
    return "; ".join(getattr(error, "__notes__", ())) or str(error)
