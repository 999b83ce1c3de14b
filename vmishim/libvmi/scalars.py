"""The reads of one number: ``read_8_va``, ``read_addr_ksym`` and 18 like them. Numbers are unsigned, little-endian.

A hit, a read of memory that the read-ahead knows, is as short as Python allows, because an unchanged listing is
thousands of them: eight bytes are one look-up in ``_words`` by exact address, fewer are one in ``_cells`` and an
unpacking. Everything else goes to ``OpenedGuest._read``. All calls raise ``LinkError`` if the guest cannot be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from struct import error as _TooShort

from vmishim.libvmi.symbols import Symbols
from vmishim.libvmi.values import AccessContext
from vmishim.memory.reader import KERNEL, PHYSICAL

from_bytes = int.from_bytes
_u16: Callable[[bytes], tuple[int]] = Struct("<H").unpack_from
_u32: Callable[[bytes], tuple[int]] = Struct("<I").unpack_from


class Scalars(Symbols):
    """The calls ``read_WIDTH``, ``read_WIDTH_ksym``, ``read_WIDTH_va`` and ``read_WIDTH_pa``."""

    __slots__ = ()

    def read_8(self, ctx: AccessContext) -> int:
        """Read a byte where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol or process

        Source: ``vmi_read_8``.
        """
        address, space = self._locate(ctx)
        return from_bytes(self._read(address, 1, space), "little")

    def read_16(self, ctx: AccessContext) -> int:
        """Read an unsigned 2-byte integer where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol or process

        Source: ``vmi_read_16``.
        """
        address, space = self._locate(ctx)
        return from_bytes(self._read(address, 2, space), "little")

    def read_32(self, ctx: AccessContext) -> int:
        """Read an unsigned 4-byte integer where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol or process

        Source: ``vmi_read_32``.
        """
        address, space = self._locate(ctx)
        return from_bytes(self._read(address, 4, space), "little")

    def read_64(self, ctx: AccessContext) -> int:
        """Read an unsigned 8-byte integer where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol or process

        Source: ``vmi_read_64``.
        """
        address, space = self._locate(ctx)
        return from_bytes(self._read(address, 8, space), "little")

    def read_addr(self, ctx: AccessContext) -> int:
        """Read a pointer, 8 bytes, where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol or process

        Source: ``vmi_read_addr``.
        """
        address, space = self._locate(ctx)
        return from_bytes(self._read(address, 8, space), "little")

    def read_8_ksym(self, symbol: str) -> int:
        """Read a byte at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol

        Source: ``vmi_read_8_ksym``.
        """
        address = self.translate_ksym2v(symbol)
        try:
            return self._cells[address][0]
        except (KeyError, IndexError):
            return from_bytes(self._read(address, 1, KERNEL), "little")

    def read_16_ksym(self, symbol: str) -> int:
        """Read an unsigned 2-byte integer at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol

        Source: ``vmi_read_16_ksym``.
        """
        address = self.translate_ksym2v(symbol)
        try:
            return _u16(self._cells[address])[0]
        except (KeyError, _TooShort):
            return from_bytes(self._read(address, 2, KERNEL), "little")

    def read_32_ksym(self, symbol: str) -> int:
        """Read an unsigned 4-byte integer at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol

        Source: ``vmi_read_32_ksym``.
        """
        address = self.translate_ksym2v(symbol)
        try:
            return _u32(self._cells[address])[0]
        except (KeyError, _TooShort):
            return from_bytes(self._read(address, 4, KERNEL), "little")

    def read_64_ksym(self, symbol: str) -> int:
        """Read an unsigned 8-byte integer at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol

        Source: ``vmi_read_64_ksym``.
        """
        address = self.translate_ksym2v(symbol)
        try:
            return self._words[address]
        except KeyError:
            return from_bytes(self._read(address, 8, KERNEL), "little")

    def read_addr_ksym(self, symbol: str) -> int:
        """Read a pointer, 8 bytes, at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such symbol

        Source: ``vmi_read_addr_ksym``.
        """
        address = self.translate_ksym2v(symbol)
        try:
            return self._words[address]
        except KeyError:
            return from_bytes(self._read(address, 8, KERNEL), "little")

    def read_8_va(self, vaddr: int, pid: int) -> int:
        """Read a byte at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process

        Source: ``vmi_read_8_va``.
        """
        if pid == 0:
            try:
                return self._cells[vaddr][0]
            except (KeyError, IndexError):
                pass
        return from_bytes(self._read(vaddr, 1, self._space(pid)), "little")

    def read_16_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned 2-byte integer at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process

        Source: ``vmi_read_16_va``.
        """
        if pid == 0:
            try:
                return _u16(self._cells[vaddr])[0]
            except (KeyError, _TooShort):
                pass
        return from_bytes(self._read(vaddr, 2, self._space(pid)), "little")

    def read_32_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned 4-byte integer at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process

        Source: ``vmi_read_32_va``.
        """
        if pid == 0:
            try:
                return _u32(self._cells[vaddr])[0]
            except (KeyError, _TooShort):
                pass
        return from_bytes(self._read(vaddr, 4, self._space(pid)), "little")

    def read_64_va(self, vaddr: int, pid: int) -> int:
        """Read an unsigned 8-byte integer at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process

        Source: ``vmi_read_64_va``.
        """
        if pid == 0:
            try:
                return self._words[vaddr]
            except KeyError:
                pass
        return from_bytes(self._read(vaddr, 8, self._space(pid)), "little")

    def read_addr_va(self, vaddr: int, pid: int) -> int:
        """Read a pointer, 8 bytes, at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``: not mapped, or no such process

        Source: ``vmi_read_addr_va``.
        """
        if pid == 0:
            try:
                return self._words[vaddr]
            except KeyError:
                pass
        return from_bytes(self._read(vaddr, 8, self._space(pid)), "little")

    def read_8_pa(self, paddr: int) -> int:
        """Read a byte at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: no memory there

        Source: ``vmi_read_8_pa``.
        """
        return from_bytes(self._read(paddr, 1, PHYSICAL), "little")

    def read_16_pa(self, paddr: int) -> int:
        """Read an unsigned 2-byte integer at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: no memory there

        Source: ``vmi_read_16_pa``.
        """
        return from_bytes(self._read(paddr, 2, PHYSICAL), "little")

    def read_32_pa(self, paddr: int) -> int:
        """Read an unsigned 4-byte integer at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: no memory there

        Source: ``vmi_read_32_pa``.
        """
        return from_bytes(self._read(paddr, 4, PHYSICAL), "little")

    def read_64_pa(self, paddr: int) -> int:
        """Read an unsigned 8-byte integer at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: no memory there

        Source: ``vmi_read_64_pa``.
        """
        return from_bytes(self._read(paddr, 8, PHYSICAL), "little")

    def read_addr_pa(self, paddr: int) -> int:
        """Read a pointer, 8 bytes, at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``: no memory there

        Source: ``vmi_read_addr_pa``.
        """
        return from_bytes(self._read(paddr, 8, PHYSICAL), "little")
