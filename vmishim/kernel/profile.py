"""What must be known about a guest kernel to read its structures: symbols, layouts, the direct map."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Member(NamedTuple):
    """A member of a kernel structure."""

    offset: int
    """Bytes from the start of the structure."""
    size: int
    """Bytes; 0 for a flexible array, and for a bit field the bytes of its storage unit."""


class Profile(Protocol):
    """What a guest kernel says about itself, asked for as needed and remembered."""

    release: str
    """``uname -r`` of the guest."""
    hostname: str
    """Its host name; empty when unknown."""
    boot_id: str
    """Which boot of it this is (``/proc/sys/kernel/random/boot_id``); empty when unknown."""
    page_offset: int
    """Kernel virtual address of physical address 0 in the direct map (``PAGE_OFFSET``); 0 when it cannot be known."""
    kaslr_offset: int
    """How far the kernel image was moved by KASLR, in bytes."""
    memory_size: int
    """Bytes up to the end of the highest RAM (what ``vmi_get_memsize`` means by it), 0 when unknown."""
    vcpus: int
    """Online virtual CPUs."""
    levels: int
    """Page-table levels: 4 or 5."""

    def symbol(self, name: str) -> int:
        """Address of a kernel symbol, KASLR applied. :raises KeyError: no such symbol"""
        ...

    def symbol_at(self, address: int) -> str:
        """Name of the symbol that starts exactly at ``address``. :raises KeyError: none does"""
        ...

    def member(self, struct: str, member: str) -> Member:
        """Where ``member`` is in ``struct``.

        :param member: may be dotted (``"f_path.dentry"``); members of anonymous structures are found as in C
        :raises KeyError: no such structure or member in this kernel
        """
        ...

    def size(self, struct: str) -> int:
        """``sizeof(struct NAME)``. :raises KeyError: no such structure"""
        ...

    def forget(self) -> None:
        """Forget the symbols that were asked for, and ask again (LibVMI's ``vmi_symcache_flush``)."""
        ...
