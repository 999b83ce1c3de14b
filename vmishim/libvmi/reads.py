"""The reads of bytes and strings."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from vmishim.errors import FaultError, failure
from vmishim.libvmi import limits
from vmishim.libvmi.scalars import Scalars
from vmishim.libvmi.values import AccessContext, signed_32, unsigned
from vmishim.memory.reader import ADDRESSES, KERNEL, PAGE_SIZE, PHYSICAL

STRING_CHUNK = 256
"""Bytes asked for first when a string is read: a name or a path fits, and one request is enough."""

NOT_WINDOWS = "only Windows has unicode strings (UNICODE_STRING); the guest runs Linux"


class Reads(Scalars):
    """The calls ``read...``."""

    __slots__ = ()

    def read(self, ctx: AccessContext, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes where ``ctx`` says.

        :returns: (the bytes, how many)
        :raises LibvmiError: ``VMI_FAILURE``: some of it is not mapped, or the symbol or process does not exist
        :raises LinkError: the guest could not be asked

        Source: ``vmi_read``.
        """
        address, space = self._locate(ctx)
        return self._bytes(address, count, space)

    def read_va(self, vaddr: int, pid: int, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes at the virtual address ``vaddr`` of a process.

        :param vaddr: virtual address; bits above the translated ones are ignored, as in LibVMI
        :param pid: the process whose page tables are used; 0 is the kernel
        :param count: bytes; 0 gives ``(b"", 0)``
        :returns: (the bytes, how many), NULs included
        :raises LibvmiError: ``VMI_FAILURE``: some of it is not mapped, or there is no such process
        :raises LinkError: the guest could not be asked
        :raises ValueError: ``count`` is negative

        Source: ``vmi_read_va``.
        """
        if pid == 0:
            cell = self._cells.get(vaddr)
            if cell is not None and 0 <= count <= len(cell):
                return cell[:count], count
        return self._bytes(vaddr, count, self._space(pid))

    def read_ksym(self, symbol: str, count: int) -> tuple[bytes, int]:
        """Read ``count`` bytes at a kernel symbol, and cut them at the first NUL.

        :returns: (the bytes before the first NUL, ``count``): the number is that of the bytes read, as in LibVMI's
            bindings
        :raises LibvmiError: ``VMI_FAILURE``: there is no such symbol, or its memory is not mapped

        Source: ``vmi_read_ksym``.
        """
        data, read = self._bytes(self.translate_ksym2v(symbol), count, KERNEL)
        return data.split(b"\0", 1)[0], read

    def read_pa(self, paddr: int, count: int, padding: bool = False) -> tuple[bytes, int]:
        """Read ``count`` bytes at the guest physical address ``paddr``.

        :param padding: fill with NULs what cannot be read, instead of failing
        :returns: (the bytes, how many of them were read)
        :raises LibvmiError: ``VMI_FAILURE``: the guest has no memory there, and ``padding`` is not set

        Source: ``vmi_read_pa``.
        """
        try:
            return self._bytes(paddr, count, PHYSICAL)
        except FaultError as fault:
            if not padding:
                raise
            return fault.data.ljust(count, b"\0"), len(fault.data)

    def read_str(self, ctx: AccessContext) -> str:
        """Read a NUL-terminated string where ``ctx`` says.

        :returns: the text before the NUL, or before the first page that cannot be read
        :raises LibvmiError: ``VMI_FAILURE``: its first byte cannot be read, or it has no end within 16 MiB
        :raises UnicodeDecodeError: it is not UTF-8

        Source: ``vmi_read_str``.
        """
        address, space = self._locate(ctx)
        return self._string(address, space)

    def read_str_va(self, vaddr: int, pid: int) -> str:
        """Read a NUL-terminated string at the virtual address ``vaddr`` of process ``pid`` (0: the kernel).

        :returns: the text before the NUL, or before the first page that cannot be read
        :raises LibvmiError: ``VMI_FAILURE``: its first byte cannot be read, or it has no end within 16 MiB
        :raises UnicodeDecodeError: it is not UTF-8

        Source: ``vmi_read_str_va``.
        """
        if pid == 0:
            cell = self._cells.get(vaddr)
            if cell is not None:
                end = cell.find(0)
                if end >= 0:
                    return cell[:end].decode()
        return self._string(vaddr, self._space(pid))

    def read_str_pa(self, paddr: int) -> str:
        """Read a NUL-terminated string at the guest physical address ``paddr``; as ``read_str_va``.

        Source: ``vmi_read_str_pa``.
        """
        return self._string(paddr, PHYSICAL)

    def read_unicode_str(self, ctx: AccessContext) -> NoReturn:
        """Refused: only Windows has such strings.

        :raises LibvmiError: ``VMI_FAILURE``, as LibVMI does for a Linux guest

        Source: ``vmi_read_unicode_str``.
        """
        ctx.to_ffi()
        raise failure(NOT_WINDOWS)

    def read_unicode_str_va(self, vaddr: int, pid: int) -> NoReturn:
        """Refused: only Windows has such strings.

        :raises LibvmiError: ``VMI_FAILURE``, as LibVMI does for a Linux guest

        Source: ``vmi_read_unicode_str_va``.
        """
        unsigned(vaddr), signed_32(pid)
        raise failure(NOT_WINDOWS)

    def free_unicode_str(self, unicode_str: Any) -> NoReturn:
        """Refused: ``read_unicode_str`` returns none that could be freed.

        :raises TypeError: always

        Source: ``vmi_free_unicode_str``.
        """
        raise TypeError(f"{type(unicode_str).__name__} is not a unicode string of LibVMI")

    def _bytes(self, address: int, count: int, space: int) -> tuple[bytes, int]:
        """(``count`` bytes, ``count``); the errors for a wrong ``count`` are those of the genuine bindings."""
        count = operator.index(count)
        if count < 0:
            raise ValueError("negative array length")
        if count >> 63:
            raise OverflowError("array size would overflow a ssize_t")
        if count > limits.COUNT_LIMIT:
            raise MemoryError(f"a read of {count} bytes")
        data = self._read(address, count, space) if count else b""
        return data, len(data)

    def _string(self, address: int, space: int) -> str:
        """The text before the first NUL. :raises UnicodeDecodeError: it is not UTF-8"""
        return self._text(address, space).decode()

    def _text(self, address: int, space: int, wide: int = 1) -> bytes:
        """Bytes up to the first NUL, page by page like LibVMI: a hole ends the string, unless it starts with one.

        :param wide: bytes of a character
        """
        address = unsigned(address)
        text = bytearray()
        chunk = STRING_CHUNK
        while len(text) < limits.STRING_LIMIT:
            count = min(chunk, PAGE_SIZE - address % PAGE_SIZE)
            chunk = PAGE_SIZE
            try:
                data = self._read(address, count, space, text=wide == 1)
            except FaultError:
                if not text:
                    raise
                return bytes(text)
            searched = len(text)
            text += data
            end = text.find(0, searched) if wide == 1 else _end_of_wide(text)
            if end >= 0:
                return bytes(text[:end])
            address = (address + count) % ADDRESSES
        raise failure(f"the string has no end within {limits.STRING_LIMIT >> 20} MiB")


def _end_of_wide(text: bytearray) -> int:
    """Where the first character of two NULs begins in UTF-16 text; -1: there is none."""
    end = text.find(b"\0\0")
    while end >= 0 and end % 2:
        end = text.find(b"\0\0", end + 1)
    return end
