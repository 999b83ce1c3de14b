"""Ordinary VMs: the guest's RAM in a file, read without an agent.

The file is a ``memory-backend-file`` of QEMU (``share=on``), which shows the running guest; or a dump of its memory: a
raw image, an ELF core or a compressed dump (``vmishim.guests.dumps``).
The kernel, its position under KASLR, its page tables, symbols and structure layouts are all found in that memory.

This is the backend for VMs that are not confidential, and the reference for the agent: same API, same contract. Like
LibVMI's file driver it cannot stop the guest: a hold only keeps translations.
"""

from __future__ import annotations

import logging
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, islice
from operator import attrgetter
from struct import unpack_from

from vmishim import files
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.foreign import printable
from vmishim.guests import dumps, layout
from vmishim.guests.dumps import Segment
from vmishim.guests.formats import Format
from vmishim.guests.image import BLOCK, REGION, Image, Images
from vmishim.guests.layout import GIB, Range
from vmishim.guests.packed import CHUNK, DamagedError, Store
from vmishim.kernel import btf, kallsyms
from vmishim.kernel.btf import Btf
from vmishim.kernel.profile import Member
from vmishim.memory import pagetable
from vmishim.memory.pagetable import PRESENT, Translation
from vmishim.memory.reader import ADDRESSES, KERNEL, PAGE_SIZE, PHYSICAL

log = logging.getLogger(__name__)

KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""``__START_KERNEL_map``: where the kernel image is mapped, less ``phys_base``."""
TEXT = 0xFFFF_FFFF_8100_0000
"""Where ``_text`` is without KASLR."""
IMAGE_ALIGN = 2 << 20
"""Alignment of the kernel image, virtual and physical (``CONFIG_PHYSICAL_ALIGN`` of x86-64)."""
BANNER = b"Linux version "
RELEASE_MAX = 64
"""Characters of a kernel's release (``__NEW_UTS_LEN``)."""
DIGITS_MAX, TABLES_MAX = 4096, 16
"""Places in kernel images tried as token tables, and token tables whose neighbours are tried as symbol tables. A kernel
has one, and few of the other; hostile memory could hold any number."""
SHIFTS_MAX = 16
"""Layouts of an image that its page tables may lead to; hostile memory could lead to any number."""
MISSING = 16 * PAGE_SIZE
"""Bytes at the end of RAM of which a page must be in the direct map."""
TABLES_BEFORE, TABLES_AFTER = kallsyms.BEFORE + (8 << 20), 8 << 20
"""Bytes before and after the digits of a token table that hold all of a kernel's symbol tables."""


class Ram:
    """A file of guest RAM, by guest physical address.

    :param path: the file
    :ivar layouts: where its parts may belong, the likeliest first; a dump says it itself
    :ivar encrypted: bits of a page-table entry that do not belong to the address (the C-bit under AMD SEV)
    :ivar masks: what that may be, the likeliest first
    :raises LibvmiError: ``VM_NOT_FOUND``: there is no such file, it is empty, or it is a dump that is cut off or of an
        unknown format
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            memory = dumps.opened(path)
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from None
        except ValueError as error:
            raise _unreadable(path, str(error)) from None
        self.format, self._hint, self.masks = memory.format, memory.hint, memory.encrypted
        self.encrypted = self.masks[0]
        self.data = memory.data
        self.map: mmap.mmap | Store | None = memory.store
        self.size = memory.size
        self.is_dump = bool(memory.segments)
        self.layouts = (memory.segments,) if memory.segments else tuple(layout.guesses(memory.size))
        self.arrange(self.layouts[0])

    def arrange(self, segments: tuple[Segment, ...]) -> None:
        """Take the file's parts to belong there. In the order of addresses."""
        self.segments = segments
        self._starts = [segment.start for segment in segments]
        self._by_offset = sorted((each for each in segments if each.offset >= 0), key=attrgetter("offset"))
        self._offsets = [segment.offset for segment in self._by_offset]

    def read(self, address: int, count: int) -> bytes:
        """``count`` bytes at a guest physical address.

        :raises FaultError: the guest has no RAM there
        :raises LinkError: the file was closed
        """
        if self.map is None:
            raise LinkError("the guest's memory was closed: make a new Libvmi")
        start, end, offset = self.segments[bisect_right(self._starts, address) - 1]
        if not start <= address < end:
            raise FaultError(address)
        if address + count > end:
            return self._read_across(address, count)
        if offset < 0:
            return bytes(count)
        try:
            return self.map[address - start + offset : address - start + offset + count]
        except DamagedError as error:
            good = max(error.offset - (address - start + offset), 0)
            raise FaultError(address + good, self.read(address, good) if good else b"") from None

    def segment(self, address: int) -> Segment:
        """The part that has this guest physical address. :raises FaultError: none"""
        segment = self.segments[bisect_right(self._starts, address) - 1]
        if not segment.start <= address < segment.end:
            raise FaultError(address)
        return segment

    def _read_across(self, address: int, count: int) -> bytes:
        """As ``read``, across segments: in a dump one may begin where another ends."""
        parts = []
        at, end = address, address + count
        for segment in islice(self.segments, bisect_right(self._starts, address) - 1, None):
            if at == end or not segment.start <= at < segment.end:
                break
            parts.append(self.read(at, min(end, segment.end) - at))
            at += len(parts[-1])
        data = b"".join(parts)
        if at == end:
            return data
        raise FaultError(at, data)

    def place(self, offset: int) -> int:
        """The guest physical address of a file offset. :raises FaultError: no memory is stored there"""
        segment = self._by_offset[bisect_right(self._offsets, offset) - 1]
        if 0 <= offset - segment.offset < segment.end - segment.start:
            return offset - segment.offset + segment.start
        raise FaultError(offset)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(guest physical address, offset, bytes) of the stored parts between two addresses that are no holes."""
        for number in range(max(bisect_right(self._starts, start) - 1, 0), len(self.segments)):
            segment = self.segments[number]
            if segment.start >= end:
                return
            if segment.offset < 0:
                continue
            moved = segment.start - segment.offset
            first, last = max(segment.start, start) - moved, min(segment.end, end) - moved
            for part in range(max(bisect_right(self.data, (first, 0)) - 1, 0), len(self.data)):
                low, high = self.data[part]
                if low >= last:
                    break
                if max(low, first) < min(high, last):
                    yield max(low, first) + moved, max(low, first), min(high, last) - max(low, first)

    @contextmanager
    def view(self, start: int, end: int) -> Iterator[memoryview]:
        """What is between two offsets, for the length of the block. Not copied if the file is mapped."""
        assert self.map is not None
        if isinstance(self.map, mmap.mmap):
            with memoryview(self.map) as memory, memory[start:end] as part:
                yield part
        else:
            yield memoryview(self.map.scan(start, end))

    def words(self, start: int, end: int, at: int) -> Iterator[tuple[int, list[int]]]:
        """The 64-bit word ``at`` bytes into each page between two addresses: (the first page, words of those after it).

        Holes are left out.
        """
        for address, offset, count in self.within(start, end):
            skipped = -address % PAGE_SIZE
            size = (count - skipped) // PAGE_SIZE * PAGE_SIZE
            for done in range(0, size, CHUNK):
                first = offset + skipped + done
                with self.view(first, first + min(CHUNK, size - done)) as part:
                    words = part.cast("Q")[at // 8 :: PAGE_SIZE // 8].tolist()
                yield address + skipped + done, words

    def blocks(self, pattern: bytes) -> Iterator[int]:
        """Offsets of the first ``pattern`` in each block of guest physical memory, outside the file's holes. The blocks
        near the kernel come first, if a dump says where it is, and then again.
        """
        assert self.map is not None
        near = self.within(self._hint - REGION, self._hint + REGION) if self._hint >= 0 else ()
        for start, end in chain(((at, at + count) for _, at, count in near), self.data):
            at = self.map.find(pattern, start, end)
            while at >= 0:
                skipped = 1
                with suppress(FaultError):
                    address = self.place(at)
                    skipped = min(BLOCK - address % BLOCK, self.segment(address).end - address)
                    yield at
                at = self.map.find(pattern, at + skipped, end)

    def find(self, pattern: bytes, image: Image) -> Iterator[int]:
        """File offsets of ``pattern`` in an image, outside the file's holes."""
        assert self.map is not None
        for _, start, count in self.within(*image):
            at = self.map.find(pattern, start, start + count)
            while at >= 0:
                yield at
                at = self.map.find(pattern, at + 1, start + count)

    def searched(self) -> None:
        """Let go of what only a search needs."""
        if self.map is not None and not isinstance(self.map, mmap.mmap):
            self.map.forget()

    def close(self) -> None:
        """Let go of the file."""
        memory, self.map = self.map, None
        if memory is not None:
            memory.close()


def _unreadable(path: str | os.PathLike[str], why: str) -> LibvmiError:
    return LibvmiError(f"VM_NOT_FOUND: guest memory {os.fspath(path)} cannot be read: {why}")


class Kernel:
    """A running kernel, found in RAM. Implements ``vmishim.kernel.profile.Profile``.

    :param ram: the guest's RAM, whose layout is found as well
    :param symbols: path of a ``System.map``, or a copy of the guest's ``/proc/kallsyms``; default: the kernel's own
        tables
    :raises LibvmiError: ``OS``: no 64-bit Linux kernel was found, or ``symbols`` do not fit it
    """

    def __init__(self, ram: Ram, symbols: str | os.PathLike[str] | None = None) -> None:
        self._ram = ram
        self._members: dict[tuple[str, str], Member] = {}
        tables, given = _Tables(ram), None if symbols is None else [_map(symbols)]
        image = None
        self.release, self._found = "", False
        for self._mask in ram.masks:
            ram.encrypted = self._mask
            for image in _images(ram):
                for self._symbols in given or tables.of(image):
                    if any(self._locate(banner) for banner in ram.find(BANNER, image) if _is_banner(ram, banner)):
                        return
            if image is not None:
                break
        if image is None:
            raise LibvmiError(
                f"OS: no Linux kernel found in the guest's memory, which is read as {ram.format.name}: has it booted, "
                "and is the file all of its memory?"
            )
        if self._found:
            raise LibvmiError(
                f"OS: the guest's kernel was found, but not where the rest of this raw image of {ram.size} bytes "
                "belongs: is it all of the guest's memory? A dump says it itself (QEMU: dump-guest-memory -z OUT)"
            )
        what = "kallsyms tables" if symbols is None else os.fspath(symbols)
        raise LibvmiError(
            f"OS: {what} do not match the kernel in the guest's memory; set symbols to a copy of its /proc/kallsyms"
        )

    def _locate(self, banner: int) -> bool:
        """Whether the banner is the kernel's, by this symbol table and layout; if so, find where everything is."""
        names = self._symbols.addresses
        try:
            # The image is one piece. Its variable phys_base says how far it was moved physically; the rest is how far
            # it was moved virtually, which is 0 if the symbols come from the running kernel.
            moved_both = self._ram.place(banner) - (names["linux_banner"] - KERNEL_MAP)
            where = names["phys_base"] - KERNEL_MAP + moved_both
            base: int = unpack_from("<q", self._ram.read(where, 8))[0]
            self._moved = moved_both - base
            if base % IMAGE_ALIGN or self._moved % IMAGE_ALIGN or not 0 <= self._moved < GIB:
                return False
            root = names.get("init_top_pgt") or names["init_level4_pgt"]
            self.root = root - KERNEL_MAP + moved_both
            # AMD SEV sets the C-bit in every private page-table entry, Intel TDX the shared bit in every shared one.
            self._ram.encrypted = self._mask
            for name in ("sme_me_mask", "cc_mask"):
                if name in names:
                    bits = self._ram.read(names[name] - KERNEL_MAP + moved_both, 8)
                    self._ram.encrypted |= int.from_bytes(bits, "little") & dumps.HIDDEN
        except (FaultError, KeyError):
            return False
        physical = self._ram.place(banner)
        for self.levels in (4, 5):
            if self._maps(names["linux_banner"] + self._moved, physical):
                self._found = True
                if self._arrange(banner, physical):
                    self._describe(banner)
                    return True
        return False

    def _maps(self, address: int, physical: int) -> bool:
        try:
            return self._walk(address).physical == physical
        except FaultError:
            return False

    def _walk(self, address: int) -> Translation:
        """:raises FaultError: not mapped"""
        return pagetable.walk(self._ram.read, self.root, address, self.levels, self._ram.encrypted)

    def _read_virtual(self, address: int, count: int) -> bytes:
        """:raises FaultError: not mapped, or not in the image"""
        parts = []
        while count > 0:
            place = self._walk(address)
            here = min(count, place.size - address % place.size)
            parts.append(self._ram.read(place.physical, here))
            address, count = address + here, count - here
        return b"".join(parts)

    def _arrange(self, banner: int, physical: int) -> bool:
        """Take the parts of a raw image to belong where the kernel has its RAM. False: no layout does.

        :param banner: offset of the kernel's version text
        :param physical: where that is, which is known by the kernel's page tables
        """
        ram = self._ram
        if ram.is_dump:
            return True
        located = ram.segments
        root = self._symbols.addresses.get("iomem_resource")
        for guess in dict.fromkeys([located, *self._splits(), *ram.layouts]):
            ram.arrange(guess)
            if ram.place(banner) != physical:
                continue
            if root is None:
                if self._maps_end():
                    return True
                continue
            said = layout.ranges(self._read_virtual, root + self._moved)
            for fit in layout.fitting(said, ram.size) if said else ():
                ram.arrange(fit)
                if ram.place(banner) == physical and said and self._has(said, root):
                    if ram.size < said[-1].end < layout.HIGH:
                        log.warning(
                            "the image ends before the guest's memory, at %#x: the rest is unreadable", ram.size
                        )
                    return True
        ram.arrange(located)
        return False

    def _splits(self) -> Iterator[tuple[Segment, ...]]:
        """Layouts by the ends of RAM that the kernel has in its image."""
        try:
            low, end = (int.from_bytes(self.read(name, 8), "little") * PAGE_SIZE for name in ("max_low_pfn", "max_pfn"))
        except (FaultError, KeyError):
            return
        yield from layout.split_at(self._ram.size, low, end)

    def _has(self, said: tuple[Range, ...], root: int) -> bool:
        """Whether the same tree of resources is read, and the direct map has the end of RAM in each part."""
        if layout.ranges(self._read_virtual, root + self._moved) != said:
            return False
        try:
            start = self._find_page_offset()
        except FaultError:
            return False
        for part in self._ram.segments:
            end = max((min(each.end, part.end) for each in said if each.start < part.end), default=0)
            # A page may be missing from the direct map: the kernel takes some out of it.
            if not any(self._maps(start + page, page) for page in range(end - PAGE_SIZE, end - MISSING, -PAGE_SIZE)):
                return False
        return True

    def _maps_end(self) -> bool:
        """Whether the direct map reaches the end of RAM, which it does not in a wrong layout."""
        if len(self._ram.layouts) == 1:
            return True
        end = self._ram.segments[-1].end - PAGE_SIZE
        return self._maps(self._find_page_offset() + end, end)

    def _find_page_offset(self) -> int:
        default = 0xFFFF_8880_0000_0000 if self.levels == 4 else 0xFF11_0000_0000_0000
        variable = self._symbols.addresses.get("page_offset_base")
        if variable is None:  # without CONFIG_DYNAMIC_MEMORY_LAYOUT
            return default
        return int.from_bytes(self._read_virtual(variable + self._moved, 8), "little")

    def _describe(self, banner: int) -> None:
        release = self._ram.read(self._ram.place(banner), 256).split()[2].decode("ascii", "replace")
        self.release = printable(release, RELEASE_MAX)
        self.hostname = self.boot_id = ""
        self.page_offset = self._find_page_offset()
        self.kaslr_offset = self.symbol("_text") - TEXT
        self.memory_size = self._find_end()
        self.vcpus = self._count_cpus()

    def _find_end(self) -> int:
        """The end of the highest RAM. A dump may hold firmware too, just below 4 GiB."""
        if self._ram.is_dump and "max_pfn" in self._symbols.addresses:
            last = int.from_bytes(self.read("max_pfn", 8), "little") * PAGE_SIZE - 1
            end = last + 1
            for segment in self._ram.segments:
                if segment.start <= end - 1 < segment.end or segment.start == end:
                    end = segment.end
            return end
        return self._ram.segments[-1].end

    def _count_cpus(self) -> int:
        try:
            return int(unpack_from("<I", self.read("__num_online_cpus", 4))[0])
        except KeyError:
            return 0

    def read(self, symbol: str, count: int) -> bytes:
        """Bytes of the kernel image at a symbol. :raises KeyError: no such symbol."""
        place = self._walk(self.symbol(symbol))
        return self._ram.read(place.physical, count)  # the image is one piece of physical memory

    def symbol(self, name: str) -> int:
        """See ``Profile.symbol``."""
        try:
            return self._symbols.addresses[name] + self._moved
        except KeyError:
            raise KeyError(f"Linux {self.release} has no symbol {name!r}") from None

    def symbols(self) -> dict[str, int]:
        """All symbols of the kernel image, KASLR applied."""
        return {name: (address + self._moved) % ADDRESSES for name, address in self._symbols.addresses.items()}

    def symbol_at(self, address: int) -> str:
        """See ``Profile.symbol_at``."""
        return self._symbols.names[address - self._moved]

    @cached_property
    def btf(self) -> Btf:
        """The kernel's types. :raises KeyError: built without ``CONFIG_DEBUG_INFO_BTF``."""
        try:
            size = btf.length(self.read("__start_BTF", 64))
            return Btf(self.read("__start_BTF", size))
        except ValueError as error:
            raise KeyError(f"the BTF of Linux {self.release} cannot be read: {error}") from None

    def member(self, struct: str, member: str) -> Member:
        """See ``Profile.member``."""
        key = (struct, member)
        if key not in self._members:
            self._members[key] = self.btf.member(struct, member)
        return self._members[key]

    def size(self, struct: str) -> int:
        """See ``Profile.size``."""
        return self.btf.size(struct)

    def forget(self) -> None:
        """See ``Profile.forget``: nothing to do, because the whole symbol table was read at the start."""


def _is_banner(ram: Ram, at: int) -> bool:
    """Whether this is a kernel's version text (``Linux version 6.1.0 (...``), not a format or a message about one."""
    with suppress(FaultError):
        version = ram.read(ram.place(at) + len(BANNER), 64)
        return version[:1].isdigit() and b" (" in version
    return False


def _images(ram: Ram) -> Iterator[Image]:
    """The kernel images near a version text, in each layout of the RAM, which is then arranged so."""
    finders = {each: (Images(ram), set[Image]()) for each in ram.layouts}
    shifted = _Shifted(ram)
    for at in ram.blocks(BANNER):
        for guess in chain(tuple(finders), shifted.near(at)):
            images, seen = finders.setdefault(guess, (Images(ram), set()))
            ram.arrange(guess)
            for image in images.at(ram.place(at)):
                if image not in seen:
                    seen.add(image)
                    yield image
                    ram.arrange(guess)


class _Shifted:
    """Layouts of a raw image in which a kernel above the hole is where its page tables say, wherever the hole is. A
    kernel below it is found in any layout.
    """

    def __init__(self, ram: Ram) -> None:
        self._ram = ram
        self._searched: set[int] = set()
        self._found: dict[tuple[Segment, ...], None] = {}

    def near(self, offset: int) -> Iterator[tuple[Segment, ...]]:
        """Those that page tables near an offset of the image lead to, and those found before."""
        if not self._ram.is_dump:
            for number in range(max(offset // REGION - 1, 0), offset // REGION + 2):
                if number not in self._searched and len(self._found) < SHIFTS_MAX:
                    self._searched.add(number)
                    self._search(number * REGION, (number + 1) * REGION)
        yield from tuple(self._found)

    def _search(self, start: int, end: int) -> None:
        for low, high in self._ram.data:
            first, last = max(low & -PAGE_SIZE, start), min(high & -PAGE_SIZE, end)
            for chunk in range(first, last, CHUNK):
                with self._ram.view(chunk, min(chunk + CHUNK, last)) as part:
                    ends = part.cast("Q")[PAGE_SIZE // 8 - 1 :: PAGE_SIZE // 8].tolist()
                    for at in (number * PAGE_SIZE for number, word in enumerate(ends) if word & PRESENT):
                        self._add(chunk + at, layout.claimed(bytes(part[at : at + PAGE_SIZE])))

    def _add(self, offset: int, address: int | None) -> None:
        below = layout.HIGH + offset - (address or 0)
        if address is not None and 0 < below <= offset and len(self._found) < SHIFTS_MAX:
            self._found[layout.split(self._ram.size, below)] = None


class _Tables:
    """The symbol tables in kernel images, decoded as they are asked for. The last one is kept, for another layout."""

    def __init__(self, ram: Ram) -> None:
        self._ram = ram
        self._unfit: set[int] = set()
        self._tried = 0
        self._last: tuple[int, kallsyms.Symbols] | None = None

    def of(self, image: Image) -> Iterator[kallsyms.Symbols]:
        """Every symbol table in an image that can be decoded.

        :raises LibvmiError: ``OS``: too much of it looks like symbol tables
        """
        for at in self._ram.find(kallsyms.DIGITS, image):
            if at not in self._unfit:
                yield from self._decode(at, image)

    def _decode(self, at: int, image: Image) -> Iterator[kallsyms.Symbols]:
        # The part of the image that is in one piece in the file, from a page on: a dump may start anywhere in a file.
        address = self._ram.place(at)
        segment = self._ram.segment(address)
        low = max(image.start, segment.start, address - TABLES_BEFORE)
        start = low + -low % PAGE_SIZE - address + at
        end = min(image.end, segment.end, address + TABLES_AFTER) - address + at
        if at < start:
            return
        if self._last is None or self._last[0] != at:
            if len(self._unfit) >= DIGITS_MAX or self._tried >= TABLES_MAX:
                raise LibvmiError(
                    f"OS: gave up: {len(self._unfit)} places in the guest's kernel look like symbol tables, but cannot "
                    "be decoded; set symbols to a copy of its /proc/kallsyms"
                )
            try:
                with self._ram.view(start, end) as part:
                    self._last = at, kallsyms.decode(part, at - start)
            except kallsyms.NotTokensError:
                self._unfit.add(at)
                return
            except ValueError:
                self._unfit.add(at)
                self._tried += 1
                return
            self._tried += 1
        yield self._last[1]


def _map(path: str | os.PathLike[str]) -> kallsyms.Symbols:
    try:
        return kallsyms.of_map(files.read_trusted(path))
    except (OSError, ValueError) as error:
        raise LibvmiError(f"OS: symbols {os.fspath(path)} cannot be read: {error}") from None


class RamFile:
    """A guest, by the file of its RAM. Implements ``vmishim.guests.target.Target``, and is its own reader.

    :param name: the domain's name
    :param path: the file
    :param symbols: path of a ``System.map``, or a copy of the guest's ``/proc/kallsyms``; default: found in memory
    :raises LibvmiError: ``VM_NOT_FOUND``: no such file; ``OS``: no kernel found in it
    """

    def __init__(self, name: str, path: str | os.PathLike[str], symbols: str | os.PathLike[str] | None = None) -> None:
        self.name = name
        self._ram = Ram(path)
        try:
            self.profile = Kernel(self._ram, symbols)
        except BaseException:
            self._ram.close()
            raise
        self._ram.searched()
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self._held = False
        self._pages: dict[tuple[int, int], int] = {}

    @property
    def agent(self) -> None:
        """None: a RAM file is read without an agent."""
        return None

    @property
    def format(self) -> Format:
        """What the file is."""
        return self._ram.format

    @property
    def is_flat(self) -> bool:
        """Whether guest physical addresses are offsets of the file."""
        return not self._ram.is_dump and all(start == offset for start, _, offset in self._ram.segments)

    @property
    def reader(self) -> RamFile:
        """Reads itself."""
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See ``MemoryReader.read``."""
        if space == PHYSICAL:
            return self._ram.read(address, count)
        within = address % PAGE_SIZE
        if within + count <= PAGE_SIZE:
            return self._ram.read(self._translate(address - within, space) + within, count)
        return self._read_pages(address, count, space)

    def _read_pages(self, address: int, count: int, space: int) -> bytes:
        parts = []
        at, end = address, address + count
        while at < end:
            piece = min(PAGE_SIZE - at % PAGE_SIZE, end - at)
            try:
                parts.append(self.read(at, piece, space))
            except FaultError as fault:
                raise FaultError(fault.address, b"".join(parts) + fault.data) from None
            at += piece
        return b"".join(parts)

    def _translate(self, page: int, space: int) -> int:
        """Physical address of a virtual page."""
        if self._held:
            known = self._pages.get((space, page))
            if known is not None:
                return known
        profile = self.profile
        if page != pagetable.canonical(page, profile.levels):
            raise FaultError(page)
        root = profile.root if space == KERNEL else space
        physical = pagetable.walk(self._ram.read, root, page, profile.levels, self._ram.encrypted).physical
        if self._held:
            self._pages[space, page] = physical
        return physical

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """See ``Target.lookup``."""
        try:
            found = pagetable.walk(self._ram.read, dtb, address, self.profile.levels, self._ram.encrypted)
        except FaultError:
            return 0, 0, []
        return found.physical, found.size, [entry.value for entry in found.entries]

    def hold(self) -> None:
        """Keep translations until ``release``. The guest runs on; to stop it, stop its CPUs in QEMU."""
        self._held = True

    def release(self) -> None:
        """See ``Target.release``."""
        self._held = False
        self.flush()

    def flush(self) -> None:
        """See ``Target.flush``."""
        self._pages.clear()

    def close(self) -> None:
        """See ``Target.close``."""
        self._ram.close()
