"""What a guest's kernel says of itself: all of its types, symbols and VMCOREINFO, read from its memory.

drgn, Volatility and a dump need all of it, a few MiB. So it is kept on disk, by the identity of the kernel's build, and
checked before it is used again: it must be whole, of this kernel, and agree with the guest's memory where that is
sampled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vmishim import files
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests.target import Target, direct
from vmishim.kernel import btf, kallsyms, variables, vmcoreinfo
from vmishim.kernel.types import Types
from vmishim.kernel.variables import Declared
from vmishim.memory.reader import ADDRESSES

log = logging.getLogger(__name__)

IMAGE = 0xFFFF_FFFF_8000_0000
"""Lowest address of the kernel's image; symbols below it are no addresses but places in each CPU's own memory."""
IMAGE_END = 0xFFFF_FFFF_C000_0000
BANNER_MAX = 512
"""Bytes of ``linux_banner`` that are read; the longest seen has 200."""
SEARCHED = 96 << 20
"""Bytes behind the kernel's text in which its tables are searched, if no symbol says where they are."""
KERNELS_MAX = 16
"""Kernels kept on disk; the one that was used longest ago is removed."""
SAMPLES, SAMPLE = 8, 64
"""Places of the BTF that are compared with the guest's memory, and bytes of each."""
_MAGIC = b"vmishim kernel 1\n"
_HEAD = struct.Struct("<32s32sQQQQ")  # hash of all that follows, identity, bytes: BTF, symbols, names; base
_STEP = 1 << 20
_BTF = struct.pack("<HBBI", btf.MAGIC, 1, 0, 24)
"""How BTF begins."""


@dataclass(frozen=True, eq=False)
class Description:
    """A guest's kernel.

    :ivar release: ``uname -r``
    :ivar identity: of the kernel's build, in hexadecimal: the same for each guest and each boot of it
    :ivar banner: what is in memory at ``linux_banner``, without its NUL
    :ivar btf: its BTF
    :ivar symbols: (address, name) of each symbol of the kernel itself, KASLR applied, in the order of addresses; those
        below ``IMAGE`` are places in each CPU's own memory
    :ivar vmcoreinfo: its VMCOREINFO, or what it would be
    :ivar has_vmcoreinfo: whether the kernel has one itself
    :ivar moved: how far KASLR moved its image, in bytes
    :ivar was_kept: whether it was kept on disk
    """

    release: str
    identity: str
    banner: bytes
    btf: bytes
    symbols: list[tuple[int, str]]
    vmcoreinfo: bytes
    has_vmcoreinfo: bool
    moved: int
    was_kept: bool

    @cached_property
    def types(self) -> Types:
        """Its types. :raises LibvmiError: the guest's BTF contradicts itself"""
        try:
            return Types(self.btf)
        except ValueError as error:
            raise LibvmiError(f"OS: the BTF of Linux {self.release} cannot be read: {error}") from None

    @cached_property
    def addresses(self) -> dict[str, int]:
        """Addresses by name; the first, if a name occurs twice."""
        return {name: address for address, name in reversed(self.symbols)}

    @cached_property
    def has_variables(self) -> bool:
        """Whether the kernel's symbols include its variables (``CONFIG_KALLSYMS_ALL``)."""
        return "init_task" in self.addresses

    @cached_property
    def _starts(self) -> list[int]:
        return sorted({address for address, _ in self.symbols})

    def space(self, name: str) -> int:
        """Bytes from a symbol to the next one, which bound the size of a variable; 0 for the last.

        :raises KeyError: no such symbol
        """
        address = self.addresses[name]
        after = bisect_right(self._starts, address)
        return self._starts[after] - address if after < len(self._starts) else 0

    def declared(self, name: str) -> Declared | None:
        """The type of a variable: a per-CPU one's as BTF says, a global one's by `vmishim.kernel.variables`; None if
        neither knows it, or the kernel has no such symbol."""
        own = self.types.variables.get(name)
        if own is not None:
            return own.type
        return variables.declared(self.types, name, self.space(name)) if name in self.addresses else None


def folder() -> Path:
    """Where kernels are kept: ``vmishim/kernels`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(home) if home.startswith("/") else Path("~/.cache").expanduser()) / "vmishim" / "kernels"


def describe(target: Target, kept: Path | None = None) -> Description:
    """The kernel of a guest: from disk if it was seen before, else read from the guest and kept.

    :param kept: the folder on disk (default: `folder`)
    :raises LibvmiError: ``OS``: the guest's kernel has no BTF or no symbol table, or they cannot be read
    :raises LinkError: the guest could not be asked
    """
    where = kept or folder()
    profile = target.profile
    given, banner = _given(target)
    said = vmcoreinfo.parse(given)
    identity = hashlib.sha256(repr((profile.release, said.get("BUILD-ID"), banner)).encode()).digest()
    found = _load(where / f"{identity.hex()[:32]}.kernel", identity, target) if banner or "BUILD-ID" in said else None
    was_kept = found is not None
    if found is None:
        found = _read(target, said)
        if banner or "BUILD-ID" in said:
            _keep(where, identity, found)
    blob, symbols = found
    made = given or _made(target, blob, symbols)
    moved = profile.kaslr_offset
    return Description(profile.release, identity.hex(), banner, blob, symbols, made, bool(given), moved, was_kept)


def _before_fault(read: Callable[[int, int], bytes], address: int, count: int) -> bytes:
    try:
        return read(address, count)
    except FaultError as fault:
        return fault.data


def own_vmcoreinfo(target: Target) -> bytes:
    """The kernel's own VMCOREINFO; empty if it has none, or does not say where.

    :raises LinkError: the guest could not be asked
    """
    return _given(target)[0]


def _given(target: Target) -> tuple[bytes, bytes]:
    """The kernel's own VMCOREINFO, and its banner; empty if it has none, or does not say where."""
    symbols: dict[str, int] = {}
    for name in ("vmcoreinfo_data", "linux_banner"):
        with suppress(KeyError):
            symbols[name] = target.profile.symbol(name)
    came = dict(direct(target).scatter(list(symbols.values()), BANNER_MAX)) if symbols else {}
    banner = came.get(symbols.get("linux_banner", 0), b"").split(b"\0")[0]
    place = int.from_bytes(came.get(symbols.get("vmcoreinfo_data", 0), b"")[:8], "little")
    with suppress(FaultError):
        data = target.reader.read(place, vmcoreinfo.SIZE_MAX).split(b"\0")[0] if place else b""
        if data.startswith(b"OSRELEASE="):
            return data, banner
    return b"", banner


def _made(target: Target, blob: bytes, symbols: list[tuple[int, str]]) -> bytes:
    profile, read = target.profile, target.reader.read
    addresses = {name: address for address, name in reversed(symbols)}
    values = {"phys_base": 0, "sme_me_mask": 0, "mem_section": 0}
    for name in values:
        with suppress(KeyError, FaultError):
            values[name] = int.from_bytes(read(addresses[name], 8), "little", signed=name == "phys_base")
    return vmcoreinfo.make(
        profile.release,
        addresses,
        Types(blob),
        moved=profile.kaslr_offset,
        phys_base=values["phys_base"],
        levels=profile.levels,
        sme_mask=values["sme_me_mask"],
        mem_section=values["mem_section"],
    )


def _read(target: Target, said: dict[str, str]) -> tuple[bytes, list[tuple[int, str]]]:
    """The BTF and symbols in the guest's memory. :raises LibvmiError: there are none, or they contradict themselves"""
    profile, read = target.profile, target.reader.read
    try:
        places = _places(said)
        try:
            start = profile.symbol("__start_BTF")
        except KeyError:
            start = 0
        if not start or not places:
            return _searched(target)
        blob = read(start, btf.length(read(start, 64)))
        memory, digits = _tables(read, places)
        pairs = kallsyms.pairs(memory, digits)
        Types(blob)
    except FaultError as fault:
        what = f"memory at {fault.address:#x} is unreadable"
    except ValueError as error:
        what = str(error)
    else:
        return blob, sorted(pairs)
    raise LibvmiError(f"OS: the types and symbols of Linux {profile.release} cannot be read from its memory: {what}")


def _places(said: dict[str, str]) -> dict[str, int]:
    """Where the symbol tables are, as VMCOREINFO says since 6.0 (5fd8fea935a1); empty if it does not."""
    names = ("names", "num_syms", "token_table", "token_index", "offsets", "relative_base")
    places = {}
    for name in names:
        text = said.get(f"SYMBOL(kallsyms_{name})", "")
        try:
            places[name] = int(text, 16)
        except ValueError:
            return {}
    low, high = min(places.values()), max(places.values())
    return places if low >= IMAGE and high < IMAGE_END and high - low < kallsyms.BEFORE else {}


def _tables(read: Callable[[int, int], bytes], places: dict[str, int]) -> tuple[bytes, int]:
    """The memory that holds all symbol tables, and where in it the digits of the token table are."""
    start = (min(places.values()) & -8) - 64  # the decoder wants something before the first table
    end = max(places["token_index"] + 2 * kallsyms.TOKENS, places["relative_base"] + 8)
    memory = read(start, end - start)
    digits = memory.find(kallsyms.DIGITS, places["token_table"] - start)
    if digits < 0:
        raise ValueError("there is no token table where VMCOREINFO says it is")
    return memory, digits


def _searched(target: Target) -> tuple[bytes, list[tuple[int, str]]]:
    """BTF and symbols, searched behind the kernel's text: a kernel whose symbols leave out its variables does not say
    where they are. :raises ValueError: they are not there"""
    try:
        start = -(-target.profile.symbol("_etext") // (2 << 20)) * (2 << 20)  # read-only data starts on a large page
    except KeyError:
        raise ValueError("it says neither where its symbol table is, nor where its text ends") from None
    memory = bytearray()
    while len(memory) < SEARCHED:
        part = _before_fault(target.reader.read, (start + len(memory)) % ADDRESSES, _STEP)
        memory += part
        if len(part) < _STEP:
            break
    return _blob_in(memory), sorted(_pairs_in(memory))


def _blob_in(memory: bytearray) -> bytes:
    at = memory.find(_BTF)
    while at >= 0:
        with suppress(ValueError):
            blob = bytes(memory[at : at + btf.length(bytes(memory[at : at + 64]))])
            if "task_struct" in Types(blob):
                return blob
        at = memory.find(_BTF, at + 1)
    raise ValueError("there is no BTF: was the kernel built with CONFIG_DEBUG_INFO_BTF?")


def _pairs_in(memory: bytearray) -> list[tuple[int, str]]:
    at, tried = memory.find(kallsyms.DIGITS), 0
    while at >= 0 and tried < kallsyms.CANDIDATES:
        try:
            return kallsyms.pairs(memoryview(memory), at)
        except kallsyms.NotTokensError:
            pass
        except ValueError:
            tried += 1
        at = memory.find(kallsyms.DIGITS, at + 1)
    raise ValueError("there is no symbol table: was the kernel built with CONFIG_KALLSYMS?")


# On disk.


def _load(path: Path, identity: bytes, target: Target) -> tuple[bytes, list[tuple[int, str]]] | None:
    """What is kept of this kernel; None if nothing is, or it is damaged, of another kernel, or not as the guest has it.

    :raises LinkError: the guest could not be asked
    """
    try:
        data = files.read_trusted(path)
        found = _unpacked(data, identity, target.profile.symbol("_text"))
        _compare(found, target)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        log.warning("%s is not used, and the guest's memory is read again: %s", path, reason)
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _packed(identity: bytes, blob: bytes, symbols: list[tuple[int, str]], base: int) -> bytes:
    addresses = array("Q", (address for address, _ in symbols)).tobytes()
    names = "\n".join(name for _, name in symbols).encode()
    body = zlib.compress(blob + addresses + names, 1)
    fields = (identity, len(blob), len(addresses), len(names), base)
    digest = hashlib.sha256(_HEAD.pack(bytes(32), *fields) + body).digest()
    return _MAGIC + _HEAD.pack(digest, *fields) + body


def _unpacked(data: bytes, identity: bytes, base: int) -> tuple[bytes, list[tuple[int, str]]]:
    """:raises ValueError: damaged, or of another kernel"""
    start = len(_MAGIC) + _HEAD.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise ValueError("it is not a kernel of this version of vmishim")
    digest, whose, *sizes, was = _HEAD.unpack_from(data, len(_MAGIC))
    body = data[start:]
    if hashlib.sha256(_HEAD.pack(bytes(32), whose, *sizes, was) + body).digest() != digest:
        raise ValueError("it was changed or cut off")
    if whose != identity:
        raise ValueError("it is of another kernel")
    whole = sum(sizes)
    if whole > btf.SIZE_MAX + kallsyms.TEXT_MAX + 8 * kallsyms.SYMBOLS_MAX:
        raise ValueError(f"it has {whole} bytes, more than a kernel can have")
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(body, whole + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked: {error}") from None
    if len(content) != whole or sizes[1] % 8:
        raise ValueError("its sizes contradict each other")
    blob, names = content[: sizes[0]], content[sizes[0] + sizes[1] :].decode().split("\n")
    addresses = array("Q")
    addresses.frombytes(content[sizes[0] : sizes[0] + sizes[1]])
    if len(names) != len(addresses):
        raise ValueError("its sizes contradict each other")
    moved = base - was  # the image is elsewhere in each boot
    placed = [(address + moved if address >= IMAGE else address) % ADDRESSES for address in addresses]
    return blob, list(zip(placed, names, strict=True))


def _compare(found: tuple[bytes, list[tuple[int, str]]], target: Target) -> None:
    """:raises ValueError: the guest's memory is not what was kept"""
    blob, symbols = found
    addresses = {name: address for address, name in reversed(symbols)}
    for name in ("_text", "init_task", "modules", "linux_banner", "init_mm", "tcp_hashinfo"):
        with suppress(KeyError):
            if target.profile.symbol(name) != addresses.get(name):
                raise ValueError(f"the guest has the symbol {name} elsewhere")
    start = addresses.get("__start_BTF")
    if start is None:
        return
    stop = addresses.get("__stop_BTF", start + len(blob))
    if stop - start != len(blob):
        raise ValueError("the guest's BTF has another size")
    chance = random.SystemRandom()
    places = [0, *(chance.randrange(max(len(blob) - SAMPLE, 1)) for _ in range(SAMPLES))]
    came = dict(direct(target).scatter([start + at for at in places], SAMPLE))
    for at in places:
        if (found_there := came.get(start + at)) is None or found_there[: len(blob) - at] != blob[at : at + SAMPLE]:
            raise ValueError(f"the guest's BTF differs at byte {at}")


def _keep(where: Path, identity: bytes, found: tuple[bytes, list[tuple[int, str]]]) -> None:
    blob, symbols = found
    base = next((address for address, name in symbols if name == "_text"), None)
    if base is None:
        return
    path = where / f"{identity.hex()[:32]}.kernel"
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(path, _packed(identity, blob, symbols, base), 0o600)
        kept = sorted(where.glob("*.kernel"), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in kept[KERNELS_MAX:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be written, so the guest's memory is read each time: %s", path, error.strerror)
