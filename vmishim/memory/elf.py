"""The dynamic symbols of a shared object, read from its mapping in a process.

Source: ``elf(5)``; LibVMI's ``os/linux/elfparse.c`` reads the same tables for ``vmi_translate_sym2v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from struct import Struct

from vmishim.errors import FaultError
from vmishim.memory.reader import ADDRESSES, PAGE_SIZE

Read = Callable[[int, int], bytes]
"""``read(virtual address, count)``; raises ``FaultError``."""

_HEADER = Struct("<4s12xHHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_DYNAMIC = Struct("<QQ")
_SYMBOL = Struct("<IBBHQQ")
_GNU_HASH = Struct("<IIII")
_LOAD, _DYNAMIC_SEGMENT = 1, 2
_EXECUTABLE, _SHARED = 2, 3
_NULL, _HASH, _STRTAB, _SYMTAB, _STRSZ, _GNU = 0, 4, 5, 6, 10, 0x6FFF_FEF5
_SECTION_UNDEFINED = 0

MOST_SEGMENTS, MOST_TAGS, MOST_SYMBOLS, MOST_STRINGS, LONGEST_NAME = 64, 256, 1 << 20, 64 << 20, 4096
"""Bounds above any real object's: the image may be hostile."""
MOST_TEXT = 64 << 20
"""Characters of all names, which may share their ends."""
_BLOCK = 4096
"""Entries read at a time."""


def exports(read: Read, base: int) -> Iterator[tuple[str, int]]:
    """Names and values of the dynamic symbols that the object at ``base`` defines.

    :param base: where its ELF header is mapped
    :returns: (name, bytes from the object's start); of an object that is not position-independent, from address 0
    :raises FaultError: there is no 64-bit ELF image at ``base``, or one of its tables cannot be read
    """
    read = partial(_wrapped, read)
    magic, kind, _, _, _, programs, _, _, _, size, count, *_ = _HEADER.unpack(read(base, _HEADER.size))
    if magic != b"\x7fELF" or kind not in (_EXECUTABLE, _SHARED) or size != _PROGRAM.size or count > MOST_SEGMENTS:
        raise FaultError(base)
    segments = list(_PROGRAM.iter_unpack(read(base + programs, count * size)))
    first = next((segment[3] for segment in segments if segment[0] == _LOAD), 0)
    table = next((segment[3] for segment in segments if segment[0] == _DYNAMIC_SEGMENT), None)
    if table is None:
        raise FaultError(base)
    tags = _tags(read, base - first + table)

    def place(tag: int) -> int:
        # The dynamic linker adds the base to the pointers of what it loads; the vDSO keeps them as they are.
        value = tags[tag]
        return value if value >= base else base - first + value

    try:
        symbols, strings, length = place(_SYMTAB), place(_STRTAB), min(tags[_STRSZ], MOST_STRINGS)
        entries = _count(read, tags, place)
    except KeyError:
        raise FaultError(base) from None
    names = read(strings, length)
    left = MOST_TEXT
    for name, _, _, section, value, _ in _symbols(read, symbols, entries):
        if section != _SECTION_UNDEFINED and name < length:
            text = names[name : name + LONGEST_NAME].split(b"\0", 1)[0]
            left -= len(text)
            if left < 0:
                raise FaultError(base)
            yield text.decode("utf-8", "replace"), value - first


def _symbols(read: Read, at: int, entries: int) -> Iterator[tuple[int, ...]]:
    for done in range(0, entries, _BLOCK):
        count = min(_BLOCK, entries - done)
        yield from _SYMBOL.iter_unpack(read(at + done * _SYMBOL.size, count * _SYMBOL.size))


def _wrapped(read: Read, address: int, count: int) -> bytes:
    """Read at an address that the image gives, which may wrap around."""
    return read(address % ADDRESSES, count)


def _tags(read: Read, at: int) -> dict[int, int]:
    tags: dict[int, int] = {}
    for _ in range(MOST_TAGS):
        tag, value = _DYNAMIC.unpack(read(at, _DYNAMIC.size))
        if tag == _NULL:
            break
        tags[tag] = value
        at += _DYNAMIC.size
    return tags


def _count(read: Read, tags: dict[int, int], place: Callable[[int], int]) -> int:
    """The number of dynamic symbols, which only the hash tables tell."""
    if _HASH in tags:
        return min(int.from_bytes(read(place(_HASH) + 4, 4), "little"), MOST_SYMBOLS)
    at = place(_GNU)
    buckets, first, bloom, _ = _GNU_HASH.unpack(read(at, _GNU_HASH.size))
    at += _GNU_HASH.size + 8 * bloom
    buckets = min(buckets, MOST_SYMBOLS)
    last = max(memoryview(read(at, 4 * buckets)).cast("I"), default=0)
    if last < first:
        return int(first)
    at += 4 * buckets
    block = 1
    while last < MOST_SYMBOLS:  # the last chain ends with a set lowest bit
        chain = memoryview(read(at + 4 * (last - first), 4 * block)).cast("I")
        end = next((number for number, word in enumerate(chain) if word & 1), None)
        if end is not None:
            return int(last) + end + 1
        last += block
        # Most chains are short, and what follows the last one may be unmapped.
        block = max(min(2 * block, (PAGE_SIZE - (at + 4 * (last - first)) % PAGE_SIZE) // 4), 1)
    return MOST_SYMBOLS
