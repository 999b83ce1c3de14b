"""Symbols for Volatility, made of a description: a type of each kind, and symbols that know how far they were moved."""

from __future__ import annotations

import base64
import json

import pytest

from tests.unit.test_types import every_kind
from vmishim.errors import LibvmiError
from vmishim.guests.description import Description
from vmishim.volatility import isf
from vmishim.volatility.guest import name_of

TEXT = 0xFFFF_FFFF_8100_0000
MOVED = 0x2200_0000
INFO = (
    f"OSRELEASE=6.1.0-test\nSYMBOL(kallsyms_num_syms)={TEXT + MOVED + 0x300:x}\nSYMBOL(mem_section)=ffff888000000000\n"
)


def described(btf: bytes = b"") -> Description:
    symbols = [
        (0x1000, "runqueues"),
        (TEXT + MOVED, "_text"),
        (TEXT + MOVED + 0x100, "modules"),
        (TEXT + MOVED + 0x110, "linux_banner"),
        (TEXT + MOVED + 0x200, "unknown_variable"),
        (TEXT + MOVED + 0x300, "modules"),
    ]
    banner = b"Linux version 6.1.0-test"
    return Description("6.1.0-test", "00", banner, btf or every_kind(), symbols, INFO.encode(), True, MOVED, False)


def test_addresses_are_as_linked_and_variables_have_their_types() -> None:
    symbols = isf.make(described())["symbols"]
    assert symbols["modules"] == {"address": TEXT + 0x100, "type": {"kind": "struct", "name": "list_head"}}
    assert symbols["unknown_variable"] == {"address": TEXT + 0x200}
    # Of each CPU's own memory: a place, not an address; BTF itself has the type.
    assert symbols["runqueues"] == {"address": 0x1000, "type": {"kind": "struct", "name": "list_head"}}
    assert base64.b64decode(symbols["linux_banner"]["constant_data"]) == b"Linux version 6.1.0-test\0"


def test_what_only_vmcoreinfo_says_is_taken_if_it_is_an_address_of_the_image() -> None:
    symbols = isf.make(described())["symbols"]
    assert symbols["kallsyms_num_syms"] == {"address": TEXT + 0x300, "type": {"kind": "base", "name": "unsigned int"}}
    assert "mem_section" not in symbols


def test_each_kind_of_type_is_described() -> None:
    made = isf.make(described())
    head = {"kind": "pointer", "subtype": {"kind": "struct", "name": "list_head"}}
    fields = {"next": {"offset": 0, "type": head}, "prev": {"offset": 8, "type": head}}
    assert made["user_types"]["list_head"] == {"kind": "struct", "size": 16, "fields": fields}
    word = {"kind": "base", "name": "long unsigned int"}
    assert made["user_types"]["bits"]["fields"] == {
        "low": {"offset": 0, "type": {"kind": "bitfield", "bit_position": 0, "bit_length": 3, "type": word}},
        "high": {"offset": 0, "type": {"kind": "bitfield", "bit_position": 3, "bit_length": 61, "type": word}},
    }
    assert made["enums"]["colour"] == {"size": 4, "base": "int", "constants": {"RED": -1, "GREEN": 7}}
    assert made["enums"]["wide"]["constants"]["BIG"] == 1 | 2 << 32
    assert made["base_types"]["_Bool"] == {"kind": "bool", "size": 1, "signed": False, "endian": "little"}
    assert made["base_types"]["int"]["signed"]
    assert made["user_types"]["core_t"]["fields"]["timekeeper"]["offset"] == 8  # by its typedef, as dwarf2json has it
    json.dumps(made)


def test_types_that_contradict_themselves_are_an_error_of_ours() -> None:
    with pytest.raises(LibvmiError, match=r"BTF of Linux 6\.1\.0-test cannot be read"):
        isf.make(described(every_kind()[:200]))


@pytest.mark.parametrize("location", ["vmishim://web-1", "vmishim:web-1", "vmishim://web-1/"])
def test_a_location_names_a_domain(location: str) -> None:
    assert name_of(location) == "web-1"


def test_names_with_unusual_characters() -> None:
    assert name_of("vmishim://web%201") == "web 1"
