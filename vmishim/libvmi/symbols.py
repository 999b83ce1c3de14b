"""Symbols: the kernel's, and those that shared objects export."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.errors import UnknownNameError, failure
from vmishim.libvmi.constants import TranslateMechanism
from vmishim.libvmi.opened import NO_OS
from vmishim.libvmi.processes import Processes
from vmishim.libvmi.values import AccessContext, unsigned
from vmishim.memory.reader import ADDRESSES, KERNEL, PHYSICAL


class Symbols(Processes):
    """The calls that turn symbols into addresses and back."""

    __slots__ = ()

    def translate_ksym2v(self, symbol: str) -> int:
        """Virtual address of a kernel symbol, KASLR applied.

        :raises LibvmiError: ``VMI_FAILURE``: this kernel has no such symbol

        Source: ``vmi_translate_ksym2v``.
        """
        if self._symbols:
            known = self._symbols.get((0, 0, symbol))
            if known is not None:
                return known
        symbol.encode()
        if not self._os:
            raise failure(NO_OS)
        return self._symbol(symbol)

    def translate_sym2v(self, ctx: AccessContext, symbol: str) -> int:
        """Virtual address of a symbol that a shared object exports, in a process that has it mapped.

        :param ctx: ``addr``: where the object's ELF header is mapped; ``PROCESS_PID`` or ``PROCESS_DTB``
        :raises LibvmiError: ``VMI_FAILURE``: no ELF image there, or no such symbol in it

        Source: ``vmi_translate_sym2v``.
        """
        symbol.encode()
        dtb, exports = self._image(ctx)
        known = self._symbols.get((ctx.addr, dtb, symbol))
        if known is not None:
            return known
        for name, value in exports:
            if name == symbol:
                return (ctx.addr + value) % ADDRESSES
        raise failure(f"the image at {ctx.addr:#x} exports no {symbol}")

    def translate_v2sym(self, ctx: AccessContext, addr: int) -> str:
        """Name of the symbol that a shared object exports at ``addr`` bytes from its start.

        :param ctx: as for ``translate_sym2v``
        :param addr: relative to ``ctx.addr``
        :raises LibvmiError: ``VMI_FAILURE``: no ELF image there, or nothing exported at ``addr``

        Source: ``vmi_translate_v2sym``.
        """
        unsigned(addr)
        dtb, exports = self._image(ctx)
        known = self._names.get((ctx.addr, dtb, addr))
        if known is not None:
            return known
        for name, value in exports:
            if value == addr:
                return name
        raise failure(f"the image at {ctx.addr:#x} exports nothing at {addr:#x}")

    def translate_v2ksym(self, ctx: AccessContext, addr: int) -> str:
        """Name of the kernel symbol that starts exactly at ``addr``.

        :param ctx: ``PROCESS_PID`` with pid 0, or ``PROCESS_DTB`` with the kernel's page tables
        :param addr: kernel virtual address
        :raises LibvmiError: ``VMI_FAILURE``: no symbol starts there, or ``ctx`` is not the kernel

        Source: ``vmi_translate_v2ksym``.
        """
        dtb = self._tables_in(ctx)
        known = self._names.get((ctx.addr, dtb, addr))
        if known is not None:
            return known
        if dtb != self._kernel_tables():
            raise failure("only the kernel's own symbols are known by address; use pid 0")
        try:
            return self._profile.symbol_at(unsigned(addr))
        except KeyError:
            raise UnknownNameError(f"symbol at {addr:#x}") from None

    def _locate(self, ctx: AccessContext) -> tuple[int, int]:
        """(address, space) that an ``AccessContext`` means."""
        mechanism = ctx.tr_mechanism
        if mechanism is TranslateMechanism.NONE:
            return ctx.addr, PHYSICAL
        if mechanism is TranslateMechanism.KERNEL_SYMBOL:
            return self.translate_ksym2v(ctx.ksym), KERNEL
        if mechanism is TranslateMechanism.PROCESS_DTB:
            return ctx.addr, self._root(ctx.dtb)
        return ctx.addr, self._space(ctx.pid)

    def _tables_in(self, ctx: AccessContext) -> int:
        """The page tables that an ``AccessContext`` means. :raises LibvmiError: it is not virtual."""
        if ctx.tr_mechanism is TranslateMechanism.PROCESS_PID:
            return self.pid_to_dtb(ctx.pid)
        if ctx.tr_mechanism is TranslateMechanism.PROCESS_DTB:
            return unsigned(ctx.dtb)
        raise failure(f"an AccessContext of {ctx.tr_mechanism.name} names no page tables")

    def _image(self, ctx: AccessContext) -> tuple[int, Iterator[tuple[str, int]]]:
        """(dtb, exported symbols) of the ELF image at ``ctx.addr``. :raises LibvmiError: ``ctx`` is not virtual."""
        from vmishim.memory import elf

        dtb, space = self._tables_in(ctx), self._locate(ctx)[1]
        return dtb, elf.exports(lambda address, count: self._reader.read(address, count, space), ctx.addr)
