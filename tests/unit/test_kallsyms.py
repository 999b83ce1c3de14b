"""Symbol tables as the kernel's build makes them, in each order they have had."""

from __future__ import annotations

from array import array
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.kernel import _Kallsyms
from vmishim.kernel.kallsyms import DIGITS, decode, of_map

BASE = 0xFFFF_FFFF_A100_0000
TEXTS = ["init_", "task", "_bpf", "linux", "T", "d"]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def image(count: int, order: str, per_cpu: bool, long_name: bool = False) -> tuple[bytes, list[tuple[int, str]]]:
    """The tables, and what they say. Orders: "6.1" as released, "6.2" with numbers in front of the tokens, "6.6"."""
    # Digits and letters are tokens of their own; those in between are pieces of names.
    tokens = [
        chr(code) if chr(code).isalnum() or code == ord("_") else TEXTS[code % 6] + "x" * (code % 3)
        for code in range(256)
    ]
    names, addresses, encoded = [], [], b""
    markers = []
    for number in range(count):
        if number % 256 == 0:
            markers.append(len(encoded))
        text = f"T{number}_{'q' * (300 if long_name and number == 3 else number % 7)}"
        spelled = text.encode()
        names.append(text[1:])
        length = len(spelled)
        encoded += (bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])) + spelled
        addresses.append(0x1000 * number if per_cpu and number < 5 else BASE + 0x10 * number)
    if per_cpu:
        offsets = [address if address < 1 << 32 else BASE - 1 - address for address in addresses]
    else:
        offsets = [address - BASE for address in addresses]
    token_table, index = b"", []
    for token in tokens:
        index.append(len(token_table))
        token_table += token.encode() + b"\0"
    places = _padded(pack(f"<{count}i", *offsets)) + pack("<Q", BASE)
    head = _padded(pack("<I", count)) + _padded(encoded) + _padded(pack(f"<{len(markers)}I", *markers))
    sequence = _padded(bytes(byte for number in range(count) for byte in number.to_bytes(3, "big")))
    tail = _padded(token_table) + _padded(pack("<256H", *index))
    data = {
        "6.1": places + head + tail,
        "6.2": places + head + sequence + tail,
        "6.6": head + tail + places + sequence,
    }[order]
    return b"\x90" * 4096 + data + b"\xcc" * 8192, list(zip(addresses, names, strict=True))


@pytest.mark.parametrize("order", ["6.1", "6.2", "6.6"])
@pytest.mark.parametrize("per_cpu", [True, False])
@given(st.integers(300, 2000))
@settings(max_examples=10, deadline=None)
def test_tables_are_decoded(order: str, per_cpu: bool, count: int) -> None:
    memory, truth = image(count, order, per_cpu)
    symbols = decode(memory, memory.find(DIGITS))
    assert symbols.addresses == {name: address for address, name in truth}
    assert symbols.names == dict(truth)


def test_a_name_longer_than_127_bytes() -> None:
    memory, truth = image(600, "6.2", per_cpu=True, long_name=True)
    assert decode(memory, memory.find(DIGITS)).addresses[truth[3][1]] == truth[3][0]


@given(st.binary(max_size=64))
def test_digits_alone_are_no_table(around: bytes) -> None:
    memory = around + DIGITS + bytes(9000) + around
    with pytest.raises(ValueError, match="digits"):
        decode(memory, memory.find(DIGITS))


@pytest.mark.parametrize("order", ["6.1", "6.2", "6.6"])
def test_a_cut_image_is_refused(order: str) -> None:
    memory, _ = image(600, order, per_cpu=True)
    at = memory.find(DIGITS)
    for start in (at - 200, 4096 + 64):
        with pytest.raises(ValueError, match=r"names|tokens|digits|offsets"):
            decode(memory[start:], at - start)


def test_a_module_that_came_back_as_another_build_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may give it the memory that it had, and so the same address."""
    own = "ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81000040 T start\n"
    symbols, modules = tmp_path / "kallsyms", tmp_path / "modules"

    def load(size: int, at: str) -> None:
        symbols.write_text(f"{own}{at} t run\t[some]\n")
        modules.write_text(f"some {size} 0 - Live 0xffffffffc0000000\n")

    load(16384, "ffffffffc0000010")
    monkeypatch.setattr("guest_agent.kernel.Path", lambda path: tmp_path / path.rpartition("/")[2])
    table = _Kallsyms()
    assert table.address(b"run") == 0xFFFFFFFFC0000010
    load(20480, "ffffffffc0000020")
    assert table.address(b"run") == 0xFFFFFFFFC0000020
    assert [table.name(0xFFFFFFFFC0000000 + at) for at in (0x10, 0x20)] == [None, "run"]
    assert [table.name(0xFFFFFFFF81000000 + at) for at in (0, 1, 0x40)] == ["_text", None, "start"]


def test_a_long_row_of_numbers_does_not_hang() -> None:
    """All the memory before the tokens could be markers that never began."""
    memory, _ = image(600, "6.1", per_cpu=True)
    index = memory.find(DIGITS)
    table = memory.rfind(b"\0\0", 0, index) + 1 & -8
    numbers = array("I", range(1, 1 << 18))
    with pytest.raises(ValueError, match="names"):
        decode(numbers.tobytes() + bytes(4) + memory[table:], 4 * (1 << 18) + index - table)


MAP = "ffffffffc0000000 t linux_banner\t[rootkit]\nffffffff82100000 D linux_banner\nffffffff82100000 D second\n"


def test_a_modules_symbol_in_a_map_never_hides_the_kernels_own() -> None:
    found = of_map(MAP.encode())
    assert found.addresses == {"linux_banner": 0xFFFF_FFFF_8210_0000, "second": 0xFFFF_FFFF_8210_0000}
    assert found.names == {0xFFFF_FFFF_8210_0000: "linux_banner", 0xFFFF_FFFF_C000_0000: "linux_banner"}


@pytest.mark.parametrize("text", [b"", b"words\n", b"0 T a\n0 T b\n1000000 A c\n", b"-1 T a\n", b"1_0 T a\n"])
def test_what_is_no_map_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"no symbols|are zero|no address"):
        of_map(text)
