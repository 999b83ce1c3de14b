"""VMCOREINFO: what a kernel tells of itself to programs that read its dump.

Linux keeps this text ready for a crash (``CONFIG_VMCORE_INFO``, before 6.9 ``CONFIG_CRASH_CORE``). For a kernel without
it, the lines that `crash` and `drgn` cannot do without are made of what is known of the kernel.

Source: ``kernel/vmcore_info.c``, ``arch/x86/kernel/vmcore_info_64.c`` and
``Documentation/admin-guide/kdump/vmcoreinfo.rst`` of Linux.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

from vmishim.errors import FaultError
from vmishim.kernel.profile import Profile
from vmishim.memory.reader import MemoryReader

SIZE_MAX = 1 << 16
"""Bytes of the longest text that is taken from a guest; Linux has a page for it."""
KERNEL_IMAGE_SIZE = 1 << 30
"""Of every x86-64 kernel with KASLR (``arch/x86/include/asm/page_64_types.h``)."""
_LINE = re.compile(r"^([A-Z]+(?:\([\w.\-]+\))?|[A-Z\-]+)=(.*)$", re.M)


def read(profile: Profile, reader: MemoryReader) -> bytes:
    """The guest's own text; empty if its kernel has none, or something else is in its place.

    :raises LinkError: the guest could not be asked
    """
    try:
        at, size = (word(reader, profile.symbol(f"vmcoreinfo_{name}")) for name in ("data", "size"))
        if not 0 < size <= SIZE_MAX:
            return b""
        text = reader.read(at, size)
    except (KeyError, FaultError):
        return b""
    return text if text.startswith(b"OSRELEASE=") and text.isascii() and b"\0" not in text else b""


def make(profile: Profile, reader: MemoryReader) -> bytes:
    """The same, made up, for a kernel that has none.

    :raises LinkError: the guest could not be asked
    """
    return "".join(f"{line}\n" for line in _made(profile, reader)).encode()


def _made(profile: Profile, reader: MemoryReader) -> Iterator[str]:
    yield f"OSRELEASE={profile.release}"
    yield "PAGESIZE=4096"
    for name, symbols in _SYMBOLS.items():
        for symbol in symbols:
            with suppress(KeyError):
                yield f"SYMBOL({name})={profile.symbol(symbol):x}"
                break
    for struct, member in _MEMBERS:
        with suppress(KeyError):
            yield f"OFFSET({struct}.{member})={profile.member(struct, member).offset}"
    with suppress(KeyError):
        yield f"SIZE(page)={profile.size('page')}"
    with suppress(KeyError, FaultError):
        base = word(reader, profile.symbol("phys_base"))
        yield f"NUMBER(phys_base)={base - (1 << 64) if base >> 63 else base}"
    yield f"NUMBER(pgtable_l5_enabled)={int(profile.levels == 5)}"
    yield f"KERNELOFFSET={profile.kaslr_offset:x}"
    yield f"NUMBER(KERNEL_IMAGE_SIZE)={KERNEL_IMAGE_SIZE}"
    with suppress(KeyError, FaultError):
        yield f"NUMBER(sme_mask)={word(reader, profile.symbol('sme_me_mask'))}"


_SYMBOLS = {
    "init_uts_ns": ("init_uts_ns",),
    "_stext": ("_stext",),
    # Linux 4.13 (65ade2f872b4) renamed init_level4_pgt; swapper_pg_dir is a macro for it.
    "swapper_pg_dir": ("init_top_pgt", "init_level4_pgt"),
    "init_top_pgt": ("init_top_pgt", "init_level4_pgt"),
    "vmap_area_list": ("vmap_area_list",),
    "prb": ("prb",),
}
_MEMBERS = (
    *(("uts_namespace", "name"), ("list_head", "next"), ("list_head", "prev")),
    *(("page", "flags"), ("page", "_refcount"), ("page", "mapping"), ("page", "lru"), ("page", "_mapcount")),
    *(("page", "private"), ("page", "compound_head")),
)


def word(reader: MemoryReader, address: int) -> int:
    """The 64-bit word at a kernel virtual address. :raises FaultError: it cannot be read"""
    return int.from_bytes(reader.read(address, 8), "little")


def fields(text: bytes) -> dict[str, str]:
    """Its lines, ``{"NUMBER(PG_lru)": "4", ...}``; lines of another form are left out."""
    return dict(_LINE.findall(text.decode("ascii", "replace")))


def number(values: dict[str, str], name: str) -> int | None:
    """A number of `fields`, such as ``OFFSET(page.flags)``; None if it is missing or malformed."""
    text = values.get(name, "")
    return int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
