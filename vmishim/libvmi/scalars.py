"""The calls of LibVMI's API that differ only in width: ``read_8_va``, ``write_addr_ksym`` and 38 like them.

They are made here from one table, ``WIDTHS`` by ``FORMS``. ``scalars.pyi``, which the editor reads, is written from the
same table by ``compat/coverage.py`` (a test compares).

The path of a cached read is as short as Python allows, because an unchanged listing is thousands of them: for eight
bytes one look-up in ``words`` by exact address, for fewer one in ``cells`` and an ``unpack_from``. Everything else
goes to ``Libvmi``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "addr": 8}
"""Bytes of what ``read_WIDTH`` gives. An address is 8 bytes: guests are x86-64."""

FORMS = {"": "ctx", "_ksym": "symbol", "_va": "vaddr, pid", "_pa": "paddr"}
"""What names the place, by the end of the call's name."""

TYPES = {"ctx": "AccessContext", "symbol": "str", "vaddr": "int", "pid": "int", "paddr": "int", "value": "int"}

WHERE = {
    "": "where ``ctx`` says",
    "_ksym": "at the kernel symbol ``symbol``",
    "_va": "at address ``vaddr`` of process ``pid`` (0: the kernel)",
    "_pa": "at the guest physical address ``paddr``",
}

_CODES = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}

_RAISES = {
    "": "``VMI_FAILURE``: the address or its process does not exist, or is not mapped",
    "_ksym": "``VMI_FAILURE``: there is no such symbol, or its memory is not mapped",
    "_va": "``VMI_FAILURE``: not mapped, or no such process",
    "_pa": "``VMI_FAILURE``: the guest has no memory there",
}


def read_doc(width: str, form: str) -> str:
    """Docstring of ``read_{width}{form}``."""
    size = WIDTHS[width]
    what = "address" if width == "addr" else "unsigned integer"
    return (
        f"Read an {what} of {size} byte{'s' * (size > 1)}, little-endian, {WHERE[form]}.\n\n"
        f":raises LibvmiError: {_RAISES[form]}\n"
        ":raises LinkError: the guest could not be asked\n\n"
        f"Source: ``vmi_read_{width}{form}``."
    )


def write_doc(width: str, form: str) -> str:
    """Docstring of ``write_{width}{form}``."""
    size = WIDTHS[width]
    return (
        f"Refused. LibVMI would write {size} byte{'s' * (size > 1)} {WHERE[form]}.\n\n"
        ":raises LibvmiError: ``VMI_FAILURE``, always: vmishim reads only, like LibVMI's file driver\n"
        ":raises OverflowError: ``value`` does not fit\n\n"
        f"Source: ``vmi_write_{width}{form}``."
    )


def _read_ctx(size: int) -> Callable[..., int]:
    def read(self: Any, ctx: Any) -> int:
        address, space = self._place(ctx)
        return int.from_bytes(self._read(address, size, space), "little")

    return read


def _read_ksym(size: int) -> Callable[..., int]:
    unpack, short = struct.Struct(_CODES[size]).unpack_from, struct.error

    def read(self: Any, symbol: str) -> int:
        address = self.translate_ksym2v(symbol)
        try:
            return unpack(self._cells[address])[0]  # type: ignore[no-any-return]
        except (KeyError, short):
            return int.from_bytes(self._read(address, size, 0), "little")

    def read_word(self: Any, symbol: str) -> int:
        address = self.translate_ksym2v(symbol)
        try:
            return self._words[address]  # type: ignore[no-any-return]
        except KeyError:
            return int.from_bytes(self._read(address, size, 0), "little")

    return read_word if size == 8 else read


def _read_va(size: int) -> Callable[..., int]:
    unpack, short = struct.Struct(_CODES[size]).unpack_from, struct.error

    def read(self: Any, vaddr: int, pid: int) -> int:
        if pid == 0:
            try:
                return unpack(self._cells[vaddr])[0]  # type: ignore[no-any-return]
            except (KeyError, short):  # not known, or less of it is known
                pass
        return int.from_bytes(self._read(vaddr, size, self._space(pid)), "little")

    def read_word(self: Any, vaddr: int, pid: int) -> int:
        if pid == 0:
            try:
                return self._words[vaddr]  # type: ignore[no-any-return]
            except KeyError:
                pass
        return int.from_bytes(self._read(vaddr, size, self._space(pid)), "little")

    return read_word if size == 8 else read


def _read_pa(size: int) -> Callable[..., int]:
    def read(self: Any, paddr: int) -> int:
        return int.from_bytes(self._read(paddr, size, 1), "little")

    return read


def _write_ctx(size: int) -> Callable[..., None]:
    def write(self: Any, ctx: Any, value: int) -> None:
        self._refuse_write(value, size, ctx=ctx)

    return write


def _write_ksym(size: int) -> Callable[..., None]:
    def write(self: Any, symbol: str, value: int) -> None:
        self._refuse_write(value, size, symbol=symbol)

    return write


def _write_va(size: int) -> Callable[..., None]:
    def write(self: Any, vaddr: int, pid: int, value: int) -> None:
        self._refuse_write(value, size, address=vaddr, pid=pid)

    return write


def _write_pa(size: int) -> Callable[..., None]:
    def write(self: Any, paddr: int, value: int) -> None:
        self._refuse_write(value, size, address=paddr)

    return write


_READS = {"": _read_ctx, "_ksym": _read_ksym, "_va": _read_va, "_pa": _read_pa}
_WRITES = {"": _write_ctx, "_ksym": _write_ksym, "_va": _write_va, "_pa": _write_pa}


class Scalars:
    """What ``Libvmi`` inherits: every ``read_WIDTH...`` and ``write_WIDTH...``."""

    __slots__ = ()


for _verb, _makers, _doc in (("read", _READS, read_doc), ("write", _WRITES, write_doc)):
    for _form, _make in _makers.items():
        for _width, _size in WIDTHS.items():
            _call = _make(_size)
            _call.__name__ = f"{_verb}_{_width}{_form}"
            _call.__qualname__ = f"Libvmi.{_call.__name__}"
            _call.__doc__ = _doc(_width, _form)
            setattr(Scalars, _call.__name__, _call)
