# This file runs Volatility. It is also licensed under the Volatility Software License 1.0,
# https://www.volatilityfoundation.org/license/vsl-v1.0
"""The file that Volatility loads (compat/volatility): what cannot be read is Volatility's own error, never zeros, and a
lost guest is another."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vmishim.errors import FaultError, LinkError
from vmishim.memory.reader import PAGE_SIZE
from vmishim.volatility import guest as guests

exceptions = pytest.importorskip("volatility3.framework.exceptions", reason="pip install 'vmishim[vol]'")
FILE = Path(__file__).parents[2] / "compat" / "volatility" / "vmishim_guest.py"
AT = 0xFFFF_8880_0000_0000
"""Two pages, then one that is not there, then another."""
PAGES = [b"a" * PAGE_SIZE, b"b" * PAGE_SIZE, None, b"d" * PAGE_SIZE]
ROOT = 0x1000


class Guest:
    """Memory of ``PAGES``; ``lost`` says that the agent does not answer any more."""

    size, levels, root = len(PAGES) * PAGE_SIZE, 4, ROOT

    def __init__(self) -> None:
        self.lost: LinkError | None = None
        self.translated: tuple[int, int, int] | None = (0x7000, PAGE_SIZE, 0x7067)

    def __deepcopy__(self, memo: object) -> Guest:
        return self

    def read(self, address: int, count: int, root: int) -> bytes:
        return self.read_physical((address | 0xFFFF << 48) - AT, count)

    def read_physical(self, address: int, count: int) -> bytes:
        if self.lost:
            raise self.lost
        parts: list[bytes] = []
        for at in range(address, address + count):
            page = PAGES[at // PAGE_SIZE] if 0 <= at < self.size else None
            if page is None:
                raise FaultError(at, b"".join(parts))
            parts.append(page[at % PAGE_SIZE : at % PAGE_SIZE + 1])
        return b"".join(parts)

    def ranges(self) -> list[tuple[int, int]]:
        return [(0, self.size)]

    def translate(self, page: int, root: int) -> tuple[int, int, int]:
        if self.translated is None:
            raise FaultError(page)
        return self.translated


@pytest.fixture(scope="module")
def file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vmishim_guest", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    made = Guest()
    monkeypatch.setitem(guests._open, "web-1", made)
    return made


@pytest.fixture
def layers(file: ModuleType, guest: Guest) -> Any:
    """The kernel's layer, and the physical one below it, as the stacker puts them together."""
    from volatility3.framework import contexts
    from volatility3.framework.layers import physical

    context = contexts.Context()
    context.config["file.location"] = "vmishim://web-1"
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["physical.base_layer"] = "file"
    context.add_layer(file.VmishimPhysical(context, "physical", "physical"))
    context.config["kernel.memory_layer"], context.config["kernel.page_map_offset"] = "physical", ROOT
    context.add_layer(file.VmishimIntel32e(context, "kernel", "kernel"))
    return context.layers


def test_addresses_may_have_the_bits_that_are_not_translated_or_not(layers: Any) -> None:
    assert layers["kernel"].read(AT, 2) == layers["kernel"].read(AT & (1 << 48) - 1, 2) == b"aa"


@pytest.mark.parametrize("layer", ["kernel", "physical"])
def test_what_is_not_there_is_volatilitys_fault_with_our_sentence(layers: Any, layer: str) -> None:
    start = AT if layer == "kernel" else 0
    hole = start + 2 * PAGE_SIZE
    with pytest.raises(
        exceptions.InvalidAddressException, match=r"vmishim: .* is not mapped, or cannot be read"
    ) as fault:
        layers[layer].read(hole - 4, 8)
    assert fault.value.invalid_address == hole
    assert layers[layer].is_valid(hole - 4, 4)
    assert not layers[layer].is_valid(hole - 4, 5)


def test_only_a_plugin_that_asks_for_padding_gets_zeros(layers: Any) -> None:
    hole = AT + 2 * PAGE_SIZE
    assert layers["kernel"].read(hole - 2, PAGE_SIZE + 4, pad=True) == b"bb" + bytes(PAGE_SIZE) + b"dd"


def test_a_scan_passes_over_what_is_not_there_and_nothing_else(layers: Any) -> None:
    mapped = [(at, count) for at, count, *_ in layers["physical"].mapping(0, 4 * PAGE_SIZE, ignore_errors=True)]
    assert mapped == [(0, 2 * PAGE_SIZE), (3 * PAGE_SIZE, PAGE_SIZE)]
    with pytest.raises(exceptions.InvalidAddressException):
        list(layers["physical"].mapping(0, 4 * PAGE_SIZE))


def test_physical_addresses_are_those_of_the_page_tables(layers: Any, guest: Guest) -> None:
    assert layers["kernel"].translate(AT + 5) == (0x7005, "physical")
    guest.translated = None
    with pytest.raises(exceptions.InvalidAddressException):
        layers["kernel"].translate(AT)
    assert layers["kernel"].translate(AT, ignore_errors=True) == (None, None)


READS: list[Callable[[Any], Any]] = [
    lambda layers: layers["kernel"].read(AT, 8),
    lambda layers: layers["kernel"].read(AT, 8, pad=True),
    lambda layers: layers["kernel"].is_valid(AT),
    lambda layers: list(layers["physical"].mapping(0, 8, ignore_errors=True)),
    lambda layers: layers["file"].read(0, 8),
]


@pytest.mark.parametrize("read", READS)
def test_a_lost_guest_never_looks_like_unreadable_memory(layers: Any, guest: Guest, read: Callable[[Any], Any]) -> None:
    guest.lost = LinkError("no answer for 5 s")
    with pytest.raises(exceptions.LayerException, match="vmishim: no answer for 5 s") as lost:
        read(layers)
    assert not isinstance(lost.value, exceptions.InvalidAddressException)


ENDING = """
import importlib.util, sys
from types import SimpleNamespace
from vmishim.volatility import guest
spec = importlib.util.spec_from_file_location("vmishim_guest", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
guest._open["web-1"] = SimpleNamespace(lost={lost!r})
print("half of the rows")
"""


@pytest.mark.parametrize(("lost", "status"), [("no answer", 1), (None, 0)])
def test_a_run_that_lost_its_guest_fails_whatever_volatility_made_of_it(lost: str | None, status: int) -> None:
    command = [sys.executable, "-c", ENDING.format(lost=lost), str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "half of the rows\n")
    assert ("rows are missing: no answer" in done.stderr) == (lost is not None)
