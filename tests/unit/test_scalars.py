"""The 40 calls that read or write one number: each against a table of widths and places, over memory that is known.

Every byte of every space is another one, so that a call that reads the wrong width, place, space or byte order gets
another number.
"""

from __future__ import annotations

import inspect
import json
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import pytest

from vmishim.errors import FAILURE, LibvmiError, UnknownNameError
from vmishim.kernel.profile import Member
from vmishim.libvmi import AccessContext, Libvmi
from vmishim.libvmi.constants import TranslateMechanism
from vmishim.memory.reader import KERNEL, PHYSICAL

METHODS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "compat" / "surface.json").read_text())["libvmi"][
    "Libvmi"
]["class"]["methods"]
WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "addr": 8}
"""Bytes, by the first part of what follows ``read_`` or ``write_``."""
PLACES: dict[str, dict[str, type]] = {
    "": {"ctx": AccessContext},
    "_ksym": {"symbol": str},
    "_va": {"vaddr": int, "pid": int},
    "_pa": {"paddr": int},
}
"""Parameters that say where, by the end of the name."""
SIZES = {f"{width}{place}": size for place in PLACES for width, size in WIDTHS.items()}
READS = [(f"read_{name}", size) for name, size in SIZES.items()]
WRITES = [(f"write_{name}", size) for name, size in SIZES.items()]

ADDRESSES = [0xFFFF_8880_0000_1000 + 24 * number for number in range(8)]
"""The top bit of a number is set at some of them, and clear at others."""
PID, TABLES = 7, 0x7000


class Kernel:
    """A kernel with one symbol."""

    release = "6.1.0"
    hostname = boot_id = ""
    page_offset = kaslr_offset = memory_size = 0
    vcpus = 1
    levels = 4
    address = ADDRESSES[0]

    def symbol(self, name: str) -> int:
        return {"here": self.address}[name]

    def symbol_at(self, address: int) -> str:
        raise KeyError(address)

    def member(self, struct: str, member: str) -> Member:
        raise KeyError(member)

    def size(self, struct: str) -> int:
        raise KeyError(struct)

    def forget(self) -> None: ...


class Guest:
    """Memory that goes by address and space, and what was asked of it."""

    name = "web-1"
    agent = None

    def __init__(self) -> None:
        self.profile = Kernel()
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.asked: list[tuple[int, int, int]] = []

    @property
    def reader(self) -> Guest:
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        self.asked.append((address, count, space))
        return memory(space, address, count)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        return 0, 0, []

    def hold(self) -> None: ...
    def release(self) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def memory(space: int, address: int, count: int) -> bytes:
    return b"".join(sha256(f"{space} {at}".encode()).digest()[:1] for at in range(address, address + count))


def number(space: int, address: int, size: int) -> int:
    return int.from_bytes(memory(space, address, size), "little")


def where(name: str, guest: Guest, address: int) -> list[tuple[tuple[Any, ...], int, int]]:
    """Arguments of a call, and the address and space that they mean."""
    guest.profile.address = address
    low = address % (1 << 40)  # there is no physical memory so high up
    kinds = TranslateMechanism
    match name.split("_")[2:]:
        case ["va"]:
            return [((address, 0), address, KERNEL), ((address, PID), address, TABLES)]
        case ["pa"]:
            return [((low,), low, PHYSICAL)]
        case ["ksym"]:
            return [(("here",), address, KERNEL)]
        case _:
            return [
                ((AccessContext(kinds.NONE, addr=low),), low, PHYSICAL),
                ((AccessContext(kinds.KERNEL_SYMBOL, ksym="here"),), address, KERNEL),
                ((AccessContext(kinds.PROCESS_DTB, addr=address, dtb=TABLES + 5),), address, TABLES),
                ((AccessContext(kinds.PROCESS_PID, addr=address, pid=0),), address, KERNEL),
                ((AccessContext(kinds.PROCESS_PID, addr=address, pid=PID),), address, TABLES),
            ]


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def vmi(guest: Guest) -> Libvmi:
    made = Libvmi.over(guest)
    made.pidcache_add(PID, TABLES)
    return made


def test_the_table_has_all_of_them() -> None:
    widths = tuple(WIDTHS)
    genuine = {name for name in METHODS if name.startswith(("read_", "write_")) and name.split("_")[1] in widths}
    assert {name for name, _ in READS + WRITES} == genuine
    assert len(genuine) == 40


@pytest.mark.parametrize(("name", "size"), READS + WRITES)
def test_signature(name: str, size: int) -> None:
    call = getattr(Libvmi, name)
    verb, _, *place = name.split("_")
    parameters: dict[str, Any] = dict(PLACES["".join(f"_{part}" for part in place)])
    parameters |= {"value": int} if verb == "write" else {}
    assert [[key] for key in parameters] == METHODS[name]["parameters"]
    assert list(inspect.signature(call).parameters) == ["self", *parameters]
    assert get_type_hints(call) == parameters | {"return": NoReturn if verb == "write" else int}
    # Written out: found by grep, in a file, under its own name.
    assert f"    def {name}(self, " in inspect.getsource(call)
    text = inspect.getdoc(call) or ""
    assert text.endswith(f"\n\nSource: ``vmi_{name}``.")
    assert "byte" in text.lower() if size == 1 else f"{size}" in text.split("\n")[0], text


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(("name", "size"), READS)
def test_a_read_asks_for_just_its_bytes(vmi: Libvmi, guest: Guest, name: str, size: int, address: int) -> None:
    for args, at, space in where(name, guest, address):
        guest.asked.clear()
        assert getattr(vmi, name)(*args) == number(space, at, size), args
        assert guest.asked == [(at, size, space)], args


@pytest.mark.parametrize(("name", "size"), [case for case in READS if case[0].endswith(("_va", "_ksym"))])
def test_a_read_of_known_kernel_memory_asks_nobody(vmi: Libvmi, guest: Guest, name: str, size: int) -> None:
    address = ADDRESSES[1]
    known = bytes(range(0xF1, 0xFA))
    guest.words[address] = int.from_bytes(known[:8], "little")
    guest.cells[address] = known
    for args, at, space in where(name, guest, address):
        guest.asked.clear()
        expected = int.from_bytes(known[:size], "little") if space == KERNEL else number(space, at, size)
        assert getattr(vmi, name)(*args) == expected
        assert guest.asked == ([] if space == KERNEL else [(at, size, space)])


@pytest.mark.parametrize(("name", "size"), READS)
def test_a_read_takes_nothing_from_too_short_a_cell(vmi: Libvmi, guest: Guest, name: str, size: int) -> None:
    address = ADDRESSES[2]
    guest.cells[address] = bytes(size - 1)
    for args, at, space in where(name, guest, address):
        assert getattr(vmi, name)(*args) == number(space, at, size)


@pytest.mark.parametrize(("name", "size"), [case for case in READS if not case[0].endswith(("_va", "_ksym"))])
def test_known_kernel_memory_is_not_physical_memory(vmi: Libvmi, guest: Guest, name: str, size: int) -> None:
    for args, at, space in where(name, guest, ADDRESSES[3]):
        guest.words[at], guest.cells[at] = 0, bytes(8)
        assert getattr(vmi, name)(*args) == number(space, at, size), args


@pytest.mark.parametrize(("name", "size"), WRITES)
def test_a_write_is_refused(vmi: Libvmi, guest: Guest, name: str, size: int) -> None:
    for args, _, _ in where(name, guest, ADDRESSES[0]):
        for value in (0, (1 << 8 * size) - 1, None):  # the genuine bindings take None for 0
            with pytest.raises(LibvmiError) as caught:
                getattr(vmi, name)(*args, value)
            assert (type(caught.value), str(caught.value)) == (LibvmiError, FAILURE)
        for value in (1 << 8 * size, -1):
            with pytest.raises(OverflowError):
                getattr(vmi, name)(*args, value)
        with pytest.raises(TypeError):
            getattr(vmi, name)(*args, "0")
    assert guest.asked == []


@pytest.mark.parametrize(("name", "size"), WRITES)
def test_a_write_checks_where(vmi: Libvmi, name: str, size: int) -> None:
    symbol = AccessContext(TranslateMechanism.KERNEL_SYMBOL, ksym="nowhere")
    wrong: dict[str, list[tuple[tuple[Any, ...], type[Exception]]]] = {
        "": [((symbol,), UnknownNameError), ((object(),), AttributeError)],
        "_ksym": [(("nowhere",), UnknownNameError), ((5,), AttributeError)],
        "_va": [((-1, 0), OverflowError), ((1 << 64, 0), OverflowError), ((0, 1 << 31), OverflowError)],
        "_pa": [((-1,), OverflowError), ((1 << 64,), OverflowError)],
    }
    for args, error in wrong["".join(f"_{part}" for part in name.split("_")[2:])]:
        with pytest.raises(error):
            getattr(vmi, name)(*args, 0)
