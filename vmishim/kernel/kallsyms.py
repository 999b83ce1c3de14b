"""The kernel's own symbol table, decoded from its memory.

The tables lie in the kernel's read-only data, one after another, without pointers to each other. The token table is
easy to find, because each digit is a token in it. The others are recognised from there by what must hold for them.

Pure: bytes in, symbols out. The bytes may come from a hostile guest: what is read, tried and kept is bounded by the
kernel's own limits, and nothing is copied before it is known to be a table.

Source: ``scripts/kallsyms.c`` and ``kernel/kallsyms.c`` of the kernel. The order of the tables changed in 6.6
(404bad70fcf7): before it, offsets and base come first, since then last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import chain, islice, pairwise
from struct import unpack_from

DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
"""Part of every token table: the digits, each a token. Search memory for this."""

BEFORE = 48 << 20
"""Bytes before the token table that hold the other tables: names and offsets of half a million symbols."""
NAME_MAX = 512
"""Characters of a name, its type included (``KSYM_NAME_LEN``, b8a94bfb3395). A token is part of a name."""
SYMBOLS_MAX, TEXT_MAX = 1 << 20, 64 << 20
"""Symbols of a kernel, and characters of all their names: twice as many as a kernel with everything built in."""
CANDIDATES, STARTS = 4, 256
"""Sequences of numbers tried as the markers, and places tried as the start of the names: a kernel's are among the first
few, hostile memory could hold thousands."""
TOKENS, MARKED = 256, 256
"""Number of tokens; symbols from one marker to the next."""
_LONGEST = NAME_MAX + 2
"""Bytes of a name in the table, its length included."""
_MARKERS = 4 << 20
"""Bytes before the token table in which markers are searched: a marker and three bytes for each of ``SYMBOLS_MAX``."""


class NotTokensError(ValueError):
    """These digits are not in a token table."""


class Symbols:
    """Decoded symbols.

    :ivar addresses: by name; the first, if a name occurs twice
    :ivar names: the first name at each address
    :raises ValueError: more than ``SYMBOLS_MAX``
    """

    def __init__(self, pairs: Iterable[tuple[int, str]]) -> None:
        self.addresses: dict[str, int] = {}
        self.names: dict[int, str] = {}
        for address, name in pairs:
            self.addresses.setdefault(name, address)
            self.names.setdefault(address, name)
            if len(self.addresses) > SYMBOLS_MAX or len(self.names) > SYMBOLS_MAX:
                raise ValueError(f"it has more than {SYMBOLS_MAX} symbols")


def of_map(data: bytes) -> Symbols:
    """The symbols of a ``System.map``, or of a copy of ``/proc/kallsyms``.

    LibVMI takes the first line of a name, and so do we; but a module's symbol never hides the kernel's own.

    :raises ValueError: it is neither, or its addresses were hidden
    """
    own: list[tuple[int, str]] = []
    modules: list[tuple[int, str]] = []
    zeros = 0
    for raw in BytesIO(data):
        line = raw.decode("ascii", "replace")
        columns = line.split(None, 3)
        if len(columns) < 3:
            continue
        try:
            address = int(columns[0], 16) if columns[0].isalnum() else -1
        except ValueError:
            address = -1
        if not 0 <= address < 1 << 64:
            raise ValueError(f"there is no address in {line[:80]!r}")
        (modules if columns[3:] and columns[3].startswith("[") else own).append((address, columns[2]))
        zeros += not address
        if len(own) + len(modules) > SYMBOLS_MAX:
            raise ValueError(f"it has more than {SYMBOLS_MAX} symbols")
    if not own and not modules:
        raise ValueError("it has no symbols")
    if 2 * zeros > len(own) + len(modules):
        raise ValueError(
            f"{zeros} of its {len(own) + len(modules)} addresses are zero: the kernel hid them (kernel.kptr_restrict) "
            "from the user who copied /proc/kallsyms; copy it again as root"
        )
    return Symbols(chain(own, modules))


def decode(memory: bytes | memoryview, digits: int) -> Symbols:
    """Decode the tables around a token table.

    :param memory: what holds the kernel's read-only data, starting at a multiple of 8; names are searched in the
        ``BEFORE`` bytes before the token table
    :param digits: where in ``memory`` ``DIGITS`` was found
    :raises NotTokensError: this is not a token table
    :raises ValueError: the tables around it cannot be decoded
    """
    try:
        return Symbols(_pairs(memory, digits))
    except IndexError:
        raise ValueError("the names reach beyond the memory") from None


def pairs(memory: bytes | memoryview, digits: int) -> list[tuple[int, str]]:
    """As ``decode``: all symbols in the order of the table, as (address, name), those of the same name too."""
    try:
        return list(_pairs(memory, digits))
    except IndexError:
        raise ValueError("the names reach beyond the memory") from None


def _pairs(memory: bytes | memoryview, digits: int) -> Iterator[tuple[int, str]]:
    table, index_at, tokens = _tokens(memory, digits)
    count, names_at, names_end = next(_names(memory, table), (0, 0, 0))
    if not count:
        raise ValueError("no names before the tokens")
    addresses = _addresses(memory, names_at, index_at + 2 * TOKENS, count)
    names = bytes(memory[names_at:names_end])
    return zip(addresses, _expand(names, count, tokens), strict=True)


def _aligned(position: int) -> int:
    return (position + 7) & -8


def _tokens(memory: bytes | memoryview, digits: int) -> tuple[int, int, list[bytes]]:
    """(where the token table is, where its index is, the tokens)."""
    # 256 tokens of 1 to some 20 bytes; the index of their starts follows, aligned.
    for index_at in range(_aligned(digits + len(DIGITS)), digits + 8192, 8):
        if index_at + 2 * TOKENS > len(memory):
            break
        if memory[index_at] or memory[index_at + 1]:
            continue
        index = unpack_from(f"<{TOKENS}H", memory, index_at)
        table = digits - index[ord("0")]
        if table < 0 or any(not 0 < high - low <= NAME_MAX for low, high in pairwise(index)):
            continue
        # Each token ends with a 0, and the last one up to 7 bytes of padding before the index.
        if index_at - table - index[-1] > NAME_MAX + 7:
            continue
        text = bytes(memory[table:index_at])
        if any(text[start - 1] for start in index[1:]):
            continue
        ends = [*(start - 1 for start in index[1:]), text.find(b"\0", index[-1])]
        if _aligned(table + ends[-1] + 1) == index_at:
            return table, index_at, [text[a:b] for a, b in zip(index, ends, strict=True)]
    raise NotTokensError("no index of tokens after the digits")


def _markers(memory: bytes | memoryview, table: int) -> Iterator[tuple[int, list[int]]]:
    """(where the markers may be, their values): the 32-bit place in the names of every 256th symbol, the first being 0.

    They end at the token table; or, from 6.2 to 6.5 (60443c88f3a8), at the sequence numbers before it, which take three
    bytes for each symbol.
    """
    start = max(table - _MARKERS, table % 4)
    words = array("I")
    words.frombytes(memory[start:table])
    first = len(words)
    for end in range(len(words), 2, -2):
        last = end - 1 if words[end - 1] else end - 2  # padding to 8 bytes
        if not 0 < words[last] - words[last - 1] < _LONGEST * MARKED:
            continue
        first = min(first, last)  # a run that a later end has scanned already starts where that scan stopped
        while first > 0 and 0 < words[first] - words[first - 1] < _LONGEST * MARKED:
            first -= 1
        count = last - first + 1
        symbols = 4 * (len(words) - end) // 3
        if (
            words[first] == 0
            and 1 < count <= SYMBOLS_MAX // MARKED
            and (end == len(words) or (count - 1) * MARKED <= symbols <= count * MARKED + 2)
        ):
            yield start + 4 * first, list(words[first : last + 1])


def _names(memory: bytes | memoryview, table: int) -> Iterator[tuple[int, int, int]]:
    """(how many symbols, where their names are, where these end)."""
    for markers_at, markers in islice(_markers(memory, table), CANDIDATES):
        first = max(markers_at - markers[-1] - MARKED * _LONGEST, table - BEFORE, 8)
        yield from _names_before(memory, markers_at, markers, first)


def _names_before(
    memory: bytes | memoryview, markers_at: int, markers: list[int], first: int
) -> Iterator[tuple[int, int, int]]:
    last = markers[-1]
    most = len(markers) * MARKED
    tried = 0
    # After the last marker there are at most 256 names of at most 512 bytes.
    for names_at in range((markers_at - last) & -8, first, -8):
        count: int = unpack_from("<I", memory, names_at - 8)[0]
        if not most - MARKED < count <= most:
            continue
        tried += 1
        if tried > STARTS:
            return
        if _end(memory, names_at, MARKED, markers_at) - names_at != markers[1]:
            continue
        end = _end(memory, names_at + last, count - most + MARKED, markers_at)
        if _aligned(end) == markers_at:
            yield count, names_at, end


def _end(memory: bytes | memoryview, at: int, entries: int, limit: int) -> int:
    """Where the next ``entries`` names end, or a position past ``limit``."""
    for _ in range(entries):
        if at >= limit:
            break
        at = _entry(memory, at)[1]
    return at


def _entry(memory: bytes | memoryview, at: int) -> tuple[int, int]:
    """(start, end) of the tokens of the name at ``at``. Since 6.1 (73bbb94466fd) a set top bit means a longer name."""
    length = memory[at]
    at += 1
    if length & 0x80:
        length = length & 0x7F | memory[at] << 7
        at += 1
    return at, at + length


def _expand(names: bytes, count: int, tokens: list[bytes]) -> Iterator[str]:
    at = length = 0
    for _ in range(count):
        start, at = _entry(names, at)
        if at - start > NAME_MAX:
            raise ValueError(f"a name has {at - start} tokens, more than the kernel's limit of {NAME_MAX} characters")
        name = b"".join([tokens[token] for token in names[start:at]])
        length += len(name)
        if len(name) > NAME_MAX or length > TEXT_MAX:
            raise ValueError(f"a name is longer than the kernel's limit of {NAME_MAX}, or all of them than {TEXT_MAX}")
        # The first character is the symbol's type, as nm shows it.
        yield name[1:].decode("ascii", "replace")


def _addresses(memory: bytes | memoryview, names_at: int, index_end: int, count: int) -> list[int]:
    size = _aligned(4 * count)
    before = names_at - 16 - size
    places = [(_aligned(index_end), _aligned(index_end) + size), (before, before + size)]
    for offsets_at, base_at in places:
        if offsets_at < 0 or base_at + 8 > len(memory):
            continue
        base: int = unpack_from("<Q", memory, base_at)[0]
        # Offsets are from _text; KASLR moves the image within the last 2 GiB.
        if base < 0xFFFF_FFFF_8000_0000 or base % 4096:
            continue
        offsets = array("i")
        offsets.frombytes(memory[offsets_at : offsets_at + 4 * count])
        if offsets[-1] < 0:
            # Until 6.15 per-CPU symbols are absolute and positive, others negative: base - 1 - offset (2213e9a66bb8).
            return [base - 1 - offset if offset < 0 else offset for offset in offsets]
        return [base + offset % (1 << 32) for offset in offsets]
    raise ValueError("no offsets beside the names")
