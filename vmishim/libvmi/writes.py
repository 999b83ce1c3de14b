"""The calls that write. vmishim only reads: each checks its arguments as LibVMI's does, then fails as its file driver
does."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from vmishim.errors import failure
from vmishim.libvmi.symbols import Symbols
from vmishim.libvmi.values import AccessContext, signed_32, unsigned

READ_ONLY = "vmishim only reads: it never changes the guest"


class Writes(Symbols):
    """The calls ``write...``, which are refused."""

    __slots__ = ()

    def write(self, ctx: AccessContext, buffer: bytes) -> int:
        """Refused: vmishim only reads.

        :returns: 0 for an empty ``buffer``
        :raises LibvmiError: ``VMI_FAILURE`` for any other, as LibVMI's file driver does
        :raises TypeError: ``buffer`` holds no bytes

        Source: ``vmi_write``.
        """
        return self._refuse_buffer(buffer, ctx=ctx)

    def write_ksym(self, symbol: str, buffer: bytes) -> int:
        """Refused, as ``write``. The genuine binding raises ``TypeError``. Source: ``vmi_write_ksym``."""
        return self._refuse_buffer(buffer, symbol=symbol)

    def write_va(self, vaddr: int, pid: int, buffer: bytes) -> int:
        """Refused, as ``write``. Source: ``vmi_write_va``."""
        return self._refuse_buffer(buffer, address=vaddr, pid=pid)

    def write_pa(self, paddr: int, buffer: bytes) -> int:
        """Refused, as ``write``. Source: ``vmi_write_pa``."""
        return self._refuse_buffer(buffer, address=paddr)

    def write_8(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused: LibVMI would write 1 byte where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8``.
        """
        self._refuse_value(value, 1, ctx=ctx)

    def write_16(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused: LibVMI would write 2 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16``.
        """
        self._refuse_value(value, 2, ctx=ctx)

    def write_32(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused: LibVMI would write 4 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32``.
        """
        self._refuse_value(value, 4, ctx=ctx)

    def write_64(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64``.
        """
        self._refuse_value(value, 8, ctx=ctx)

    def write_addr(self, ctx: AccessContext, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes where ``ctx`` says.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr``.
        """
        self._refuse_value(value, 8, ctx=ctx)

    def write_8_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused: LibVMI would write 1 byte at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_ksym``.
        """
        self._refuse_value(value, 1, symbol=symbol)

    def write_16_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused: LibVMI would write 2 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_ksym``.
        """
        self._refuse_value(value, 2, symbol=symbol)

    def write_32_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused: LibVMI would write 4 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_ksym``.
        """
        self._refuse_value(value, 4, symbol=symbol)

    def write_64_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_ksym``.
        """
        self._refuse_value(value, 8, symbol=symbol)

    def write_addr_ksym(self, symbol: str, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at the kernel symbol ``symbol``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_ksym``.
        """
        self._refuse_value(value, 8, symbol=symbol)

    def write_8_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 1 byte at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_va``.
        """
        self._refuse_value(value, 1, address=vaddr, pid=pid)

    def write_16_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 2 bytes at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_va``.
        """
        self._refuse_value(value, 2, address=vaddr, pid=pid)

    def write_32_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 4 bytes at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_va``.
        """
        self._refuse_value(value, 4, address=vaddr, pid=pid)

    def write_64_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_va``.
        """
        self._refuse_value(value, 8, address=vaddr, pid=pid)

    def write_addr_va(self, vaddr: int, pid: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at ``vaddr`` in process ``pid`` (0: the kernel).

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_va``.
        """
        self._refuse_value(value, 8, address=vaddr, pid=pid)

    def write_8_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 1 byte at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_8_pa``.
        """
        self._refuse_value(value, 1, address=paddr)

    def write_16_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 2 bytes at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_16_pa``.
        """
        self._refuse_value(value, 2, address=paddr)

    def write_32_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 4 bytes at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_32_pa``.
        """
        self._refuse_value(value, 4, address=paddr)

    def write_64_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_64_pa``.
        """
        self._refuse_value(value, 8, address=paddr)

    def write_addr_pa(self, paddr: int, value: int) -> NoReturn:
        """Refused: LibVMI would write 8 bytes at guest physical address ``paddr``.

        :raises LibvmiError: ``VMI_FAILURE``, always
        :raises OverflowError: ``value`` does not fit

        Source: ``vmi_write_addr_pa``.
        """
        self._refuse_value(value, 8, address=paddr)

    def _refuse_value(
        self,
        value: int,
        size: int,
        ctx: AccessContext | None = None,
        symbol: str | None = None,
        address: int = 0,
        pid: int = 0,
    ) -> NoReturn:
        """Check arguments as a write of ``size`` bytes would, then refuse it."""
        # The genuine bindings write a 0 for None.
        if value is not None and operator.index(value) >> 8 * size:
            raise OverflowError(f"integer {value} does not fit into {size} bytes")
        self._refuse_buffer(bytes(size), ctx, symbol, address, pid)
        raise failure(READ_ONLY)

    def _refuse_buffer(
        self, buffer: Any, ctx: AccessContext | None = None, symbol: str | None = None, address: int = 0, pid: int = 0
    ) -> int:
        """Check arguments as a write would, then refuse it, unless there is nothing to write."""
        length = memoryview(buffer).nbytes
        if ctx is not None:
            self._locate(ctx)
        if symbol is not None:
            self.translate_ksym2v(symbol)
        unsigned(address), signed_32(pid)
        if length:
            raise failure(READ_ONLY)
        return 0
