"""A stopped guest's dumps, as QEMU writes them, are the same guest as its RAM file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.vm import LabVM
from vmishim.guests.ramfile import RamFile
from vmishim.inspection import objects
from vmishim.libvmi import Libvmi

FORMATS = ("raw", "elf", "kdump-zlib")


@dataclass(frozen=True)
class Still:
    """The lab VM with processes planted, its CPUs stopped."""

    vm: LabVM
    pid: int
    """One of them."""
    mapped: tuple[int, ...]
    """Where its program and libraries are mapped."""


@pytest.fixture
def still(lab: LabVM) -> Iterator[Still]:
    """The VM, for as long as a test runs."""
    planted = lab.spawn("sleep", "infinity", count=7)
    pid = min(planted)
    maps = [line.split() for line in lab.read(f"/proc/{pid}/maps").decode().splitlines()]
    mapped = tuple(int(words[0].split("-")[0], 16) for words in maps if words[-1].startswith("/"))
    lab.pause()
    yield Still(lab, pid, mapped)
    lab.resume()
    lab.kill(planted)


@pytest.fixture(params=FORMATS)
def dump(request: pytest.FixtureRequest, still: Still, tmp_path: Path) -> Iterator[Path]:
    """The guest's memory in a file, which goes at once: it takes a gigabyte."""
    file, vm = tmp_path / "dump", still.vm
    if request.param == "raw":
        shutil.copy(vm.ram, file)
    else:
        arguments = {"protocol": f"file:{file}", "paging": False, "detach": True, "format": request.param}
        vm.monitor("dump-guest-memory", arguments)
        vm.wait_until(lambda: vm.monitor("query-dump")["status"] != "active", "the dump", timeout=120)
        assert vm.monitor("query-dump")["status"] == "completed"
    yield file
    file.unlink()


def test_a_dump_is_the_same_guest(still: Still, dump: Path) -> None:
    with Libvmi.over(RamFile("live", still.vm.ram)) as live, Libvmi.over(RamFile("dump", dump)) as dumped:
        tasks = list(objects.tasks(live))
        assert still.pid in [task.pid for task in tasks]
        assert list(objects.tasks(dumped)) == tasks
        assert list(objects.modules(dumped)) == list(objects.modules(live))
        assert dumped.get_memsize() == live.get_memsize()
        assert still.mapped
        for address in still.mapped:
            assert dumped.read_va(address, still.pid, 4096) == live.read_va(address, still.pid, 4096)
