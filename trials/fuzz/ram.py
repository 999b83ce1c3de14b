"""The RAM of a guest that is just large enough for a kernel to be found in it: page tables, symbols, types."""

from __future__ import annotations

from struct import pack

from vmishim.guests.ramfile import KERNEL_MAP, TEXT

PAGE, BLOCK = 4096, 2 << 20
PAGE_OFFSET = 0xFFFF_8880_0000_0000
IMAGE, SIZE = 2 * BLOCK, 5 * BLOCK
"""Where the kernel's image is, two blocks long, and bytes of all RAM."""
BANNER = b"Linux version 6.12.0-small (builder@host) (gcc 14) #1 SMP\n\0"
_PLACES = range(IMAGE + 0x10_0000, IMAGE + 0x20_0000, PAGE)
_TOP, _LEVEL3, _LEVEL2, _DIRECT3, _DIRECT2, _DIRECT2_HIGH, _FIXMAP = _PLACES[:7]
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


HIGH = 4 << 30
"""Where RAM goes on above a hole."""
_ROOT, _NAMES = _FACTS + 64, _FACTS + 256
"""``iomem_resource``, and the names of its children."""


def _resources(root: int, nodes: int, names: int, ranges: list[tuple[int, int, bytes]]) -> tuple[bytes, bytes]:
    """(the root, its children), for where the root, the children and the names are by kernel virtual address."""
    addresses = [nodes + 64 * number for number in range(len(ranges))]
    children = b"".join(
        pack("<8Q", start, end - 1, names + 16 * (name != b"System RAM"), 0, 0, root, following, 0)
        for (start, end, name), following in zip(ranges, [*addresses[1:], 0], strict=True)
    )
    return pack("<8Q", 0, 2**64 - 1, names, 0, 0, 0, 0, addresses[0]), children


def guest(btf: bytes, extra: bytes = b"", low: int = 0, tree_at: int = SIZE - PAGE) -> bytes:
    """All of its RAM.

    :param extra: what a process has, in front of the kernel and behind it
    :param low: bytes below the hole, a multiple of ``BLOCK``; the kernel then has a tree of resources
    :param tree_at: where in the RAM the tree is
    """

    def at(offset: int) -> int:
        return offset if offset < (low or SIZE) else offset - low + HIGH

    places = {
        b"D_text": IMAGE, b"Dphys_base": _FACTS, b"Dpage_offset_base": _FACTS + 8, b"D__num_online_cpus": _FACTS + 16,
        b"Rlinux_banner": _BANNER, b"Dinit_top_pgt": _TOP, b"R__start_BTF": _TYPES,
    }  # fmt: skip
    tree = b"", b""
    if low:
        places |= {b"Diomem_resource": _ROOT, b"Dmax_pfn": _FACTS + 24, b"Dmax_low_pfn": _FACTS + 32}
        ranges = [(0, low, b"System RAM"), (HIGH - PAGE, HIGH, b"PCI"), (HIGH, at(SIZE - 1) + 1, b"System RAM")]
        image = TEXT - IMAGE
        tree = _resources(_ROOT + image, PAGE_OFFSET + at(tree_at), _NAMES + image, ranges)
    symbols = [(TEXT + place - IMAGE, name) for name, place in places.items()]
    symbols += [(TEXT + 0x3000 + number, b"Tfunction_%d" % number) for number in range(400)]
    ram = bytearray(SIZE)
    behind = IMAGE + 2 * BLOCK
    blocks = range(0, SIZE, BLOCK)
    below = [at(offset) | _LARGE for offset in blocks if at(offset) < HIGH]
    above = [at(offset) | _LARGE for offset in blocks if at(offset) >= HIGH]
    for place, data in (
        (0, extra[:IMAGE]),
        (behind, extra[: SIZE - behind]),
        (_FACTS, pack("<qQI", at(IMAGE) - (TEXT - KERNEL_MAP), PAGE_OFFSET, 2)),
        (_FACTS + 24, pack("<QQ", (at(SIZE - 1) + 1) // PAGE, low // PAGE)),
        (_ROOT, tree[0]),
        (_NAMES, b"System RAM".ljust(16, b"\0") + b"PCI Bus 0000:00\0"),
        (_BANNER, BANNER),
        (_TABLES, kallsyms(symbols)),
        (_TOP + 8 * 511, pack("<Q", at(_LEVEL3) | _PRESENT)),
        (_LEVEL3 + 8 * 510, pack("<QQ", at(_LEVEL2) | _PRESENT, at(_FIXMAP) | _PRESENT)),
        (_LEVEL2 + 8 * ((TEXT - KERNEL_MAP) // BLOCK), pack("<QQ", at(IMAGE) | _LARGE, at(IMAGE + BLOCK) | _LARGE)),
        (_TOP + 8 * 273, pack("<Q", at(_DIRECT3) | _PRESENT)),
        (_DIRECT3, pack("<Q", at(_DIRECT2) | _PRESENT)),
        (_DIRECT2, pack(f"<{len(below)}Q", *below)),
        (_DIRECT3 + 8 * (HIGH >> 30), pack("<Q", at(_DIRECT2_HIGH) | _PRESENT) if low else b""),
        (_DIRECT2_HIGH, pack(f"<{len(above)}Q", *above)),
        (_TYPES, btf),
        (tree_at, tree[1]),
    ):
        ram[place : place + len(data)] = data
    return bytes(ram)
