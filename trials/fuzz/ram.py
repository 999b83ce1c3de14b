"""The RAM of a guest that is just large enough for a kernel to be found in it: page tables, symbols, types."""

from __future__ import annotations

from struct import pack

from vmishim.guests.ramfile import KERNEL_MAP, TEXT

PAGE, BLOCK = 4096, 2 << 20
PAGE_OFFSET = 0xFFFF_8880_0000_0000
IMAGE, SIZE = 2 * BLOCK, 5 * BLOCK
"""Where the kernel's image is, two blocks long, and bytes of all RAM."""
BANNER = b"Linux version 6.12.0-small (builder@host) (gcc 14) #1 SMP\n\0"
_TOP, _LEVEL3, _LEVEL2, _DIRECT3, _DIRECT2 = (IMAGE + 0x10_0000 + number * PAGE for number in range(5))
_FACTS, _BANNER, _TABLES, _TYPES = IMAGE + 0x1000, IMAGE + 0x2000, IMAGE + 0x4000, IMAGE + 0x20_0000
_PRESENT, _LARGE = 0x63, 0xE3


def padded(data: bytes) -> bytes:
    """With zeros up to a multiple of 8."""
    return data + bytes(-len(data) % 8)


def entry(name: bytes) -> bytes:
    """A name in the kernel's table, of tokens that are one character each."""
    length = len(name)
    return (bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])) + name


def tokens(long: bytes = b"") -> bytes:
    """A token table and its index: letters, digits and ``_`` as they are, and ``long`` as the first of all."""
    texts = [bytes([code]) if (chr(code).isalnum() and code < 128) or code == 95 else b"x" for code in range(256)]
    texts[0] = long or texts[0]
    starts = [sum(len(text) + 1 for text in texts[:code]) for code in range(256)]
    return padded(b"".join(text + b"\0" for text in texts)) + pack("<256H", *starts)


def kallsyms(symbols: list[tuple[int, bytes]], base: int = TEXT, long: bytes = b"") -> bytes:
    """The tables of a kernel since 6.6. ``symbols``: address and name, which begins with its type."""
    names, markers = b"", []
    parts: list[bytes] = []
    for number, (_, name) in enumerate(symbols):
        if number % 256 == 0:
            names += b"".join(parts)
            parts.clear()
            markers.append(len(names))
        parts.append(entry(name))
    names += b"".join(parts)
    front = padded(pack("<I", len(symbols))) + padded(names) + padded(pack(f"<{len(markers)}I", *markers))
    offsets = padded(pack(f"<{len(symbols)}I", *((address - base) % (1 << 32) for address, _ in symbols)))
    return front + tokens(long) + offsets + pack("<Q", base)


def guest(btf: bytes, extra: bytes = b"") -> bytes:
    """All of its RAM. ``extra``: what a process has, in front of the kernel and behind it."""
    places = {
        b"D_text": IMAGE, b"Dphys_base": _FACTS, b"Dpage_offset_base": _FACTS + 8, b"D__num_online_cpus": _FACTS + 16,
        b"Rlinux_banner": _BANNER, b"Dinit_top_pgt": _TOP, b"R__start_BTF": _TYPES,
    }  # fmt: skip
    symbols = [(TEXT + place - IMAGE, name) for name, place in places.items()]
    symbols += [(TEXT + 0x3000 + number, b"Tfunction_%d" % number) for number in range(400)]
    ram = bytearray(SIZE)
    behind = IMAGE + 2 * BLOCK
    for at, data in (
        (0, extra[:IMAGE]),
        (behind, extra[: SIZE - behind]),
        (_FACTS, pack("<qQI", IMAGE - (TEXT - KERNEL_MAP), PAGE_OFFSET, 2)),
        (_BANNER, BANNER),
        (_TABLES, kallsyms(symbols)),
        (_TOP + 8 * 511, pack("<Q", _LEVEL3 | _PRESENT)),
        (_LEVEL3 + 8 * 510, pack("<Q", _LEVEL2 | _PRESENT)),
        (_LEVEL2 + 8 * ((TEXT - KERNEL_MAP) // BLOCK), pack("<QQ", IMAGE | _LARGE, IMAGE + BLOCK | _LARGE)),
        (_TOP + 8 * 273, pack("<Q", _DIRECT3 | _PRESENT)),
        (_DIRECT3, pack("<Q", _DIRECT2 | _PRESENT)),
        (_DIRECT2, pack("<5Q", *(number * BLOCK | _LARGE for number in range(5)))),
        (_TYPES, btf),
    ):
        ram[at : at + len(data)] = data
    return bytes(ram)
