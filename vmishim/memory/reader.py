"""The contract of everything that reads guest memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from vmishim.errors import FaultError

KERNEL = 0
"""Space: kernel virtual addresses."""
PHYSICAL = 1
"""Space: guest physical addresses. Any other space is the physical address of a page-table root (a *dtb*); these are
page-aligned, so neither 0 nor 1 is one."""

PAGE_SIZE = 4096

ADDRESSES = 1 << 64
"""Number of addresses: arithmetic on what a guest says wraps around, as the kernel's own does."""
KERNEL_FLOOR = 0xFF00000000000000
"""Below this no x86-64 kernel maps anything for itself, five-level paging included
(Documentation/arch/x86/x86_64/mm.rst), so a kernel address below it is unreadable without asking."""


class Extent(NamedTuple):
    """What kernel memory held at an address at one instant."""

    address: int
    """Kernel virtual address of the first byte."""
    data: bytes


class MemoryReader(Protocol):
    """Reads guest memory. The agent, a snapshot of it, a RAM file: all are readers, and can be stacked."""

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """Return exactly ``count`` bytes of guest memory at ``address``.

        :param address: in ``space``; an unsigned 64-bit address
        :param space: ``KERNEL``, ``PHYSICAL``, or a dtb whose page tables translate ``address``
        :param text: only the bytes before the first NUL are wanted; a hint for readers that learn what to fetch
        :raises FaultError: some of it cannot be read; the error carries the bytes before the hole
        :raises LinkError: the guest could not be asked
        """
        ...


class ScatterReader(MemoryReader, Protocol):
    """A reader that also reads many places at once, and keeps nothing: each call asks the guest."""

    def scatter(self, addresses: Sequence[int], count: int = PAGE_SIZE) -> Iterator[Extent]:
        """Read ``count`` bytes of kernel memory at each of ``addresses``, in as few requests as fit: an agent sends
        about 250 pages in one reply, 31 if the guest's kernel encrypts.

        :param addresses: kernel virtual addresses, in any order
        :param count: 1 to 4096
        :returns: in the order of ``addresses``, without those whose bytes cannot all be read
        :raises ValueError: ``count`` is out of its range
        :raises LinkError: the guest could not be asked
        """
        ...


class OneByOne:
    """A `ScatterReader` over memory that is read without a network: a RAM file, a dump.

    :param reader: keeps nothing
    """

    def __init__(self, reader: MemoryReader) -> None:
        self.read = reader.read

    def scatter(self, addresses: Sequence[int], count: int = PAGE_SIZE) -> Iterator[Extent]:
        """See `ScatterReader.scatter`."""
        check_scatter(count)
        for address in addresses:
            with suppress(FaultError):
                yield Extent(address, self.read(address, count))


def check_scatter(count: int) -> None:
    """:raises ValueError: a scatter read cannot bring so many bytes of each address"""
    if not 0 < count <= PAGE_SIZE:
        raise ValueError(f"a scatter read brings 1 to {PAGE_SIZE} bytes of each address, not {count}")
