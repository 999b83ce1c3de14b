"""Small inputs that would cost a parser gigabytes or hours, each against a bound of its own.

``python -m trials.fuzz.bombs`` prints what each costs: bytes, memory and CPU time, with the bounds and without.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from struct import pack
from typing import Any

from trials.fuzz import ram
from trials.fuzz.budget import within_budget
from vmishim import attestation
from vmishim.attestation.errors import AttestationError
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.guests.image import Image
from vmishim.guests.ramfile import BANNER, TEXT, Ram, RamFile
from vmishim.kernel.btf import Btf
from vmishim.kernel.kallsyms import DIGITS
from vmishim.kernel.kallsyms import decode as decode_symbols
from vmishim.kernel.offsets import Offsets
from vmishim.libvmi import config
from vmishim.libvmi.profiles import JsonProfile
from vmishim.memory import elf, pagetable
from vmishim.wire import messages as wire
from vmishim.wire.plan import PlanError

ENDLESS = 1 << 62
_BUILTIN = object()
"""Stands for a name that its module does not define."""


class _Forgetful(set[Any]):
    """A set that has nothing."""

    def __contains__(self, item: object) -> bool:
        return False


@dataclass(frozen=True)
class Bomb:
    """An input, its parser, and the bounds that it is against."""

    target: str
    """Its name in `trials.fuzz.targets.TARGETS`."""
    parse: Callable[[bytes], object]
    make: Callable[[], bytes]
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """``"module:name"`` of each bound, and a value that takes it out."""

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """For the length of the block the parser has none of these bounds."""
        places = [(import_module(f"vmishim.{module}"), name) for module, name in (at.split(":") for at in self.bounds)]
        kept = [vars(module).get(name, _BUILTIN) for module, name in places]
        try:
            for (module, name), value in zip(places, self.bounds.values(), strict=True):
                setattr(module, name, value)
            yield
        finally:
            for (module, name), value in zip(places, kept, strict=True):
                if value is _BUILTIN:
                    delattr(module, name)
                else:
                    setattr(module, name, value)


# ---- symbols ---------------------------------------------------------------------------------------------------------


def _kallsyms(data: bytes) -> None:
    with suppress(ValueError):
        decode_symbols(data, data.find(DIGITS))


def _long_token() -> bytes:
    """A token of 7,000 characters, and names that have nothing else."""
    names = [(TEXT + number, b"T%d" % number + b"\0" * 300) for number in range(390)]
    return bytes(4096) + ram.kallsyms(names, long=b"x" * 7000) + bytes(4096)


def _long_names() -> bytes:
    """Names of up to 32,000 tokens, which are 400 characters each."""
    names = [(TEXT + number, b"T%d" % number + b"\0" * (32000 if 255 < number < 300 else 0)) for number in range(400)]
    return bytes(4096) + ram.kallsyms(names, long=b"x" * 400) + bytes(4096)


# ---- types -----------------------------------------------------------------------------------------------------------


def _btf(data: bytes) -> None:
    with suppress(ValueError, KeyError):
        blob = Btf(data)
        for name in blob.structs():
            with suppress(KeyError):
                blob.layout(name)
            with suppress(KeyError):
                blob.pointee(name, 1 << 20)


def btf_blob(types: bytes, strings: bytes) -> bytes:
    return pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def btf_struct(name: int, members: list[tuple[int, int, int]], size: int = 8) -> bytes:
    return pack("<III", name, 4 << 24 | len(members), size) + b"".join(pack("<III", *member) for member in members)


def _long_strings() -> bytes:
    """Structures whose names all end where the strings end, 512 KiB further on."""
    types = b"".join(btf_struct(1 + number, []) for number in range(4000))
    return btf_blob(types, bytes(1) + b"a" * (512 << 10) + bytes(1))


def _nested() -> bytes:
    """A structure of 40,000 members in one in one in one, 60 deep, none of which has a name for it."""
    names = b"\0" + b"".join(b"%05d\0" % number for number in range(40000))
    types = [pack("<III", 0, 2 << 24, 0), btf_struct(1, [(1 + 6 * number, 1, 0) for number in range(40000)])]
    types += [btf_struct(7 + 6 * number, [(0, number + 2, 0)]) for number in range(60)]
    return btf_blob(b"".join(types), names)


def _no_pointer() -> bytes:
    """A structure of 15,000 members, all another structure, at another offset each; no member of that is in reach."""
    outer = btf_struct(1, [(0, 2, 64 * place) for place in range(15000)], 1 << 30)
    inner = btf_struct(1, [(0, 3, 1 << 30)] * 15000, 1 << 30)
    return btf_blob(outer + inner + pack("<IIII", 0, 1 << 24, 8, 64), b"\0a\0")


def _arrays() -> bytes:
    """A structure of 20,000 members, each an array of arrays, 60 deep, with 60 typedefs in front of each."""
    chain = [pack("<IIII", 0, 1 << 24, 8, 64)]
    for _ in range(60):
        chain += [pack("<III", 0, 8 << 24, len(chain) + step) for step in range(60)]
        chain.append(pack("<IIIIII", 0, 3 << 24, 0, len(chain), 1, 1))
    return btf_blob(b"".join([*chain, btf_struct(1, [(0, len(chain), 0)] * 20000)]), b"\0a\0")


# ---- RAM files and dumps ---------------------------------------------------------------------------------------------


def _ramfile(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with suppress(LibvmiError):
            RamFile("bomb", file.name).close()


def _decoys() -> bytes:
    """A process that has filled its memory with version texts and with symbol tables without symbols."""
    table = ram.tokens()
    return ram.guest(btf_blob(btf_struct(1, []), b"\0a\0"), (ram.BANNER + bytes(6) + table) * 3000)


def _dump(data: bytes, size: int = 0) -> None:
    """Search a dump that is ``data``, and a hole after it up to ``size``."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        if size:
            os.ftruncate(file.fileno(), size)
        with suppress(LibvmiError), closing(Ram(file.name)) as memory:
            for _ in memory.blocks(BANNER):
                pass


def _every_other_page() -> bytes:
    """A compressed dump whose bitmap, of 1 MiB, has every other page."""
    half = 1 << 20
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, 2 * half // 4096, 0)
    blocks = [header, bytes(96) + pack("<Q", 8 * half)]
    return b"".join(block.ljust(4096, b"\0") for block in blocks) + b"\xff" * half + b"\x55" * half


def _one_page_for_all() -> bytes:
    """A compressed dump of 40,000 pages, all of which are the same 50 bytes."""
    page = zlib.compress(b"\1" * 4096)
    half, pages = 8192, 40000
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, 2 * half // 4096, 0)
    blocks = [header, bytes(96) + pack("<Q", pages), bytes(half), (b"\xff" * (pages // 8)).ljust(half, b"\0")]
    head = b"".join(block.ljust(-(-len(block) // 4096) * 4096, b"\0") for block in blocks)
    at = len(head) + 24 * pages
    return (
        head
        + (pack("<QIIQ", at, len(page), 1, 0) + pack("<QIIQ", at + len(page), len(page), 1, 0)) * (pages // 2)
        + page * 2
    )


def _growing(method: int) -> bytes:
    """A compressed dump whose 2,000 pages would be a MiB each."""
    import cramjam
    import lzallright

    data = b"\1" * (1 << 20)
    if method == 1:
        page = zlib.compress(data, 9)
    elif method == 2:
        page = bytes(lzallright.LZOCompressor().compress(data))
    elif method == 4:
        page = bytes(cramjam.snappy.compress_raw(data))
    else:
        page = bytes(cramjam.zstd.compress(data))
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, 2, 0)
    blocks = [header, bytes(96) + pack("<Q", 2000), bytes(4096), b"\xff" * 250]
    head = b"".join(block.ljust(4096, b"\0") for block in blocks)
    places = range(len(head) + 24 * 2000, 1 << 40, len(page))
    return head + b"".join(pack("<QIIQ", at, len(page), method, 0) for at in places[:2000]) + page * 2000


def _damaged_pages() -> bytes:
    """A compressed dump of 100,000 pages that are no zlib."""
    half, pages = 16384, 100_000
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, 2 * half // 4096, 0)
    blocks = [header, bytes(96) + pack("<Q", pages), bytes(half), (b"\xff" * (pages // 8)).ljust(half, b"\0")]
    head = b"".join(block.ljust(-(-len(block) // 4096) * 4096, b"\0") for block in blocks)
    at = len(head) + 24 * pages
    return head + b"".join(pack("<QIIQ", at + number, 1, 1, 0) for number in range(pages)) + b"\xff" * pages


def _small_blocks() -> bytes:
    """An AVML image of 100,000 blocks of one byte each."""
    block = b"\1\5\0\0" + bytes(5)
    return pack("<4sIQQ8x", b"AVML", 2, 0, 99_999) + block * 100_000 + pack("<Q", 900_000)


def _piled_records() -> bytes:
    """A flattened dump of 20,000 records that each cover all earlier ones except a byte."""
    records = b"".join(pack(">qq", 20_000 - number, 100) + bytes(100) for number in range(20_000))
    return _records_in_a_hole().ljust(4096, b"\0") + records + pack(">qq", -1, -1)


_sparse = partial(_dump, size=1 << 43)
_RECORDS = {"guests.packed:RECORD_MIN": 0, "guests.packed:RECORDS_MAX": ENDLESS}
"""Either bound ends them, the number of records only after seconds."""


def _programs_in_a_hole() -> bytes:
    """A core whose first section, in a hole, announces 100 million program headers, in a hole as well."""
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, 4096, 64, 0, 64, 56, 0xFFFF, 64, 1, 0
    )
    return header + bytes(44) + pack("<I", 100_000_000) + bytes(16)


def _records_in_a_hole() -> bytes:
    """A flattened dump whose records are all zeros: none has a byte, and none is the last."""
    return b"makedumpfile".ljust(16, b"\0") + pack(">qq", 1, 1)


def _bitmap_in_a_hole() -> bytes:
    """A compressed dump whose bitmap is a hole of a terabyte."""
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, (2 << 40) // 4096 - 1, 0)
    return header.ljust(4096 + 96, b"\0") + pack("<Q", 1 << 43)


# ---- what is mapped in a process -------------------------------------------------------------------------------------


_ROUND = 12288
"""Bytes of 512 symbols."""


def _elf(data: bytes) -> None:
    """After the image come its last 12 KiB again and again: a process may map a page in any number of places."""

    def read(address: int, count: int) -> bytes:
        over = max(address - len(data), 0) // _ROUND * _ROUND
        part = data[address - over : address - over + count]
        return (part + data[-_ROUND:] * ((count - len(part)) // _ROUND + 1))[:count]

    with suppress(FaultError):
        list(elf.exports(read, 0))


def _object(tags: list[tuple[int, int]], rest: bytes) -> bytes:
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    programs = pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 512, 512, 0) + pack("<IIQQQQQQ", 2, 4, 176, 176, 0, 80, 80, 0)
    dynamic = b"".join(pack("<QQ", *tag) for tag in [*tags, (0, 0)])
    return (header + programs + dynamic).ljust(512, b"\0") + rest


def _exported_ends() -> bytes:
    """A million symbols, in 12 KiB that are mapped again and again; the names are the last 4 KiB of all strings."""
    symbols = b"".join(pack("<IBBHQQ", number, 18, 0, 7, 8, 8) for number in range(_ROUND // 24))
    tables = pack("<IIII", 1, 1 << 20, 0, 0) + b"a" * 6000 + bytes(1)
    return _object([(4, 512), (5, 528), (6, 512 + len(tables)), (10, 6001)], tables + symbols)


def _endless_chain() -> bytes:
    """A hash table whose last chain has no end."""
    table = pack("<IIIIII", 1, 1, 0, 0, 1, 0) + bytes(_ROUND)
    return _object([(0x6FFF_FEF5, 512), (5, 528), (6, 4096), (10, 8)], table)


def _pages(data: bytes) -> None:
    with suppress(ValueError):
        for _ in islice(pagetable.pages(lambda address, count: data[address : address + count], 0), 1 << 20):
            pass


def _tables_without_end() -> bytes:
    """Four page tables, each of which is all the tables below the one before; the last one maps nothing."""
    return b"".join(pack("<512Q", *[4096 * number | 3] * 512) for number in (1, 2, 3)) + bytes(4096)


# ---- files -----------------------------------------------------------------------------------------------------------


def _config(data: bytes) -> None:
    with suppress(LibvmiError):
        config.parse(data.decode(), "bomb")


def _number_without_end() -> bytes:
    return b"domain { kpgd = " + b"7" * (1 << 20) + b"; }"


def _profile(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with suppress(LibvmiError, KeyError):
            JsonProfile(file.name).member("s0", "missing")


def _embedded_twice() -> bytes:
    """Structures that embed the next one twice, 40 deep, without a name."""
    inner = {f"s{level}": {"size": 8, "fields": {
        name: {"offset": 0, "anonymous": True, "type": {"kind": "struct", "name": f"s{level + 1}"}} for name in "ab"
    }} for level in range(40)}  # fmt: skip
    return json.dumps({"user_types": inner | {"s40": {"size": 8, "fields": {}}}}).encode()


def _brackets() -> bytes:
    return b"[" * (1 << 20)


def _offsets(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with suppress(LibvmiError):
            Offsets.read(Path(file.name))


# ---- the wire --------------------------------------------------------------------------------------------------------


def _message(data: bytes) -> None:
    with suppress(LinkError, PlanError):
        wire.decode(data)


def _lists() -> bytes:
    """An answer that is one list of empty lists, in a frame as long as the network layer allows."""
    text = b"[[" + b",".join([b"[]"] * (10 << 20)) + b"]]"
    return pack("<BI", 65, len(text)) + text


def _evidence(data: bytes) -> None:
    with suppress(AttestationError):
        attestation.verify(data)


def _same_certificate() -> bytes:
    """A table of certificates of which all entries name the same bytes."""
    folder = Path(__file__).parents[2] / "tests" / "unit" / "data" / "attestation"
    report, vcek = (folder.joinpath(f"milan-v2.{end}").read_bytes() for end in ("bin", "vcek.der"))
    size = 600 * 24
    entry = bytes.fromhex("63da758de6644564adc5f4b93be8accd") + pack("<II", size, len(vcek))
    return report + (entry * 599 + bytes(24)) + vcek


_NAMES = {"kernel.kallsyms:NAME_MAX": ENDLESS, "kernel.kallsyms:TEXT_MAX": ENDLESS}
_BTF_NAMES = {"kernel.btf:NAME_MAX": ENDLESS, "kernel.btf:_SHARED": ENDLESS}
_EVERYWHERE = {
    "guests.ramfile:_images": lambda memory: iter([Image(0, ram.SIZE)]),
    "guests.ramfile:DIGITS_MAX": ENDLESS,
    "guests.ramfile:TABLES_MAX": ENDLESS,
}
_NUMBERS = {"libvmi.config:TOKEN_MAX": ENDLESS, "libvmi.config:NUMBER_MAX": ENDLESS}

BOMBS = {
    "a token of 7,000 characters": Bomb("kallsyms", _kallsyms, _long_token, _NAMES),
    "names of 32,000 tokens": Bomb("kallsyms", _kallsyms, _long_names, _NAMES | {"kernel.kallsyms:_LONGEST": 1 << 20}),
    "BTF names of 512 KiB": Bomb("btf", _btf, _long_strings, _BTF_NAMES),
    "BTF structures 60 deep": Bomb("btf", _btf, _nested, {"kernel.btf:_LAYOUTS_MAX": ENDLESS}),
    "BTF without the pointer": Bomb("btf", _btf, _no_pointer, {"kernel.btf:_MEMBERS_MAX": ENDLESS}),
    "BTF arrays 60 deep": Bomb("btf", _btf, _arrays),
    "decoys in a process": Bomb("ramfile", _ramfile, _decoys, _EVERYWHERE),
    "a dump of every other page": Bomb("dumps", _dump, _every_other_page, {"guests.dumps:SEGMENTS_MAX": ENDLESS}),
    "a dump of one page": Bomb("dumps", _dump, _one_page_for_all),
    "pages of zlib that grow": Bomb("dumps", _dump, partial(_growing, 1)),
    "pages of LZO that grow": Bomb("dumps", _dump, partial(_growing, 2), {"guests.packed:DAMAGED_MAX": ENDLESS}),
    "pages of Snappy that grow": Bomb("dumps", _dump, partial(_growing, 4)),
    "pages of Zstandard that grow": Bomb("dumps", _dump, partial(_growing, 0x20)),
    "damaged pages": Bomb("dumps", _dump, _damaged_pages),
    "an AVML image of blocks of one byte": Bomb("dumps", _dump, _small_blocks),
    "records on top of each other": Bomb("dumps", _dump, _piled_records),
    "program headers in a hole": Bomb("dumps", _sparse, _programs_in_a_hole, {"guests.dumps:PROGRAMS_MAX": ENDLESS}),
    "records in a hole": Bomb("dumps", _sparse, _records_in_a_hole, _RECORDS),
    "a bitmap in a hole": Bomb("dumps", _sparse, _bitmap_in_a_hole, {"guests.dumps:BITMAP_MAX": ENDLESS}),
    "exports that share their names": Bomb("elf", _elf, _exported_ends, {"memory.elf:MOST_TEXT": ENDLESS}),
    "a hash chain without end": Bomb("elf", _elf, _endless_chain, {"memory.elf:MOST_SYMBOLS": ENDLESS}),
    "page tables without end": Bomb("pagetable", _pages, _tables_without_end, {"memory.pagetable:TABLES_MAX": ENDLESS}),
    "a number without end": Bomb("config", _config, _number_without_end, _NUMBERS),
    "members embedded twice": Bomb("profiles", _profile, _embedded_twice, {"libvmi.profiles:set": _Forgetful}),
    "brackets in a profile": Bomb("profiles", _profile, _brackets, {"libvmi.profiles:RecursionError": KeyError}),
    "brackets in offsets": Bomb("offsets", _offsets, _brackets, {"kernel.offsets:RecursionError": KeyError}),
    "a list of lists": Bomb("messages", _message, _lists, {"wire.messages:JSON_MAX": ENDLESS}),
    "one certificate 600 times": Bomb("attestation", _evidence, _same_certificate),
}
"""By what they are."""


def main() -> None:
    """Print what each bomb costs, each in a process of its own."""
    for name, bomb in BOMBS.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        data = bomb.make()
        print(f"{name}: {len(data):,} bytes", end="", flush=True)
        for unbounded in (False, True) if bomb.bounds else (False,):
            if pid := os.fork():
                os.waitpid(pid, 0)
                continue
            try:
                with bomb.unbounded() if unbounded else nullcontext():
                    spent = within_budget(partial(bomb.parse, data))
                    print(f"; {spent.mib:.0f} MiB, {spent.seconds:.2f} s", end="", flush=True)
            except BaseException as error:
                print(f"; {type(error).__name__} {str(error)[:60]}", end="", flush=True)
            finally:
                os._exit(0)
        print()


if __name__ == "__main__":
    main()
