"""A stopped guest's dumps, as QEMU, makedumpfile and programs in the guest write them, are the same guest as its RAM
file."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lab.vm import LabVM
from tests.ground import images
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests.ramfile import Ram, RamFile
from vmishim.inspection import objects
from vmishim.libvmi import Libvmi

PIECE = 1 << 16
PAGE = 4096
USER_PAGES = 8
"""Of a makedumpfile level: without the programs' own pages."""


@dataclass(frozen=True)
class Still:
    """The lab VM with processes planted, its CPUs stopped."""

    vm: LabVM
    pid: int
    """One of them."""
    mapped: tuple[int, ...]
    """Where its program and libraries are mapped."""
    ranges: tuple[tuple[int, int], ...]
    """The kernel's RAM, from ``/proc/iomem``."""
    vmcoreinfo: tuple[int, int]
    """(guest physical address, bytes) of what the kernel tells of itself, from ``/sys/kernel/vmcoreinfo``."""


@pytest.fixture
def still(lab: LabVM) -> Iterator[Still]:
    """The VM, for as long as a test runs."""
    planted = lab.spawn("sleep", "infinity", count=7)
    pid = min(planted)
    maps = [line.split() for line in lab.read(f"/proc/{pid}/maps").decode().splitlines()]
    mapped = tuple(int(words[0].split("-")[0], 16) for words in maps if words[-1].startswith("/"))
    iomem = lab.read("/proc/iomem").decode()
    ranges = [(int(start, 16), int(end, 16) + 1) for start, end in re.findall(r"(?m)^(\w+)-(\w+) : System RAM$", iomem)]
    start, size = (int(word, 16) for word in lab.read("/sys/kernel/vmcoreinfo").split())
    lab.pause()
    yield Still(lab, pid, mapped, tuple(ranges), (start, size))
    lab.resume()
    lab.kill(planted)


Write = Callable[[Still, Path], None]


def raw(still: Still, file: Path) -> None:
    """A copy of the RAM file."""
    shutil.copy(still.vm.ram, file)


def qemu(still: Still, file: Path, *, format: str, paging: bool = False) -> None:
    """What QEMU's monitor dumps."""
    arguments = {"protocol": f"file:{file}", "paging": paging, "detach": True, "format": format}
    still.vm.monitor("dump-guest-memory", arguments)
    still.vm.wait_until(lambda: still.vm.monitor("query-dump")["status"] != "active", "the dump", timeout=120)
    assert still.vm.monitor("query-dump")["status"] == "completed"


def makedumpfile(still: Still, file: Path, *options: str) -> None:
    """What makedumpfile makes of QEMU's core, with the kernel's own description of itself."""
    core, info = file.with_suffix(".core"), file.with_suffix(".info")
    try:
        qemu(still, core, format="elf")
        # It expects the program headers after the file's header, where QEMU has a section header since 7.1.
        with core.open("r+b") as elf:
            header = bytearray(elf.read(64))
            (programs,) = struct.unpack_from("<Q", header, 32)
            (count,) = struct.unpack_from("<H", header, 56)
            elf.seek(programs)
            table = elf.read(56 * count)
            struct.pack_into("<QQ", header, 32, 64, 0)
            struct.pack_into("<HHH", header, 58, 0, 0, 0)
            elf.seek(0)
            elf.write(header + table)
        at, size = still.vmcoreinfo
        with still.vm.ram.open("rb") as ram:
            ram.seek(at)
            info.write_bytes(ram.read(size)[24:].rstrip(b"\0"))
        done = _makedumpfile(options, info, core, file)
        if "31" in options and b"not supported" in done.stdout:
            # Slabs of a kernel that it does not know it takes for the pages of programs, and leaves them out.
            done = _makedumpfile((*options[: options.index("31")], str(31 - USER_PAGES)), info, core, file)
        assert done.returncode == 0, done
    finally:
        core.unlink(missing_ok=True)
        info.unlink(missing_ok=True)


def _makedumpfile(options: tuple[str, ...], info: Path, core: Path, file: Path) -> subprocess.CompletedProcess[bytes]:
    command = ["makedumpfile", "-f", *options, "-i", str(info), str(core)]
    if "-F" in options:
        with file.open("wb") as out:
            return subprocess.run(command, stdout=out, stderr=subprocess.PIPE)
    return subprocess.run([*command, str(file)], capture_output=True)


def image(still: Still, file: Path, *, write: Callable[[dict[int, bytes]], bytes]) -> None:
    """What LiME or AVML write in the guest, a piece of a range at a time."""
    with still.vm.ram.open("rb") as ram, file.open("wb") as out:
        for start, end in still.ranges:
            for at in range(start, end, 64 << 20):
                ram.seek(at)
                out.write(write({at: ram.read(min(64 << 20, end - at))}))


WHOLE: dict[str, Write] = {
    "raw": raw,
    "elf": partial(qemu, format="elf"),
    "kdump-zlib": partial(qemu, format="kdump-zlib"),
    "makedumpfile -c -d 1": lambda still, file: makedumpfile(still, file, "-c", "-d", "1"),
    "makedumpfile -l -d 1 -F": lambda still, file: makedumpfile(still, file, "-l", "-d", "1", "-F"),
    "makedumpfile -E -d 1": lambda still, file: makedumpfile(still, file, "-E", "-d", "1"),
    "LiME": partial(image, write=images.lime),
    "AVML": partial(image, write=images.avml),
}
LONG = {"makedumpfile -l -d 1 -F", "makedumpfile -E -d 1"}
"""Those of which each part is in a shorter test too: the compression, the flattened stream (tests/unit), the core."""
PARTS: dict[str, Write] = {
    "elf with paging": partial(qemu, format="elf", paging=True),
    "makedumpfile -l -d 31": lambda still, file: makedumpfile(still, file, "-l", "-d", "31"),
}


@pytest.fixture
def dump(request: pytest.FixtureRequest, still: Still, tmp_path: Path) -> Iterator[Path]:
    """The guest's memory in a file, which goes at once: it takes a gigabyte."""
    file = tmp_path / "dump"
    request.param(still, file)
    yield file
    file.unlink()


def pages(ram: Ram, start: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    """Pages from one address to another; None for one that cannot be read."""
    for at in range(start, end, PIECE):
        size = min(PIECE, end - at)
        try:
            data = ram.read(at, size)
            yield from ((at + done, data[done : done + PAGE]) for done in range(0, size, PAGE))
        except FaultError:
            for page in range(at, at + size, PAGE):
                try:
                    yield page, ram.read(page, PAGE)
                except FaultError:
                    yield page, None


def different(still: Still, file: Path) -> tuple[int, int]:
    """(pages of the kernel's RAM that differ in the dump, those that the dump cannot read)."""
    dumped = Ram(file)
    wrong = unreadable = 0
    with still.vm.ram.open("rb") as ram:
        for start, end in still.ranges:
            for page, data in pages(dumped, start & -PAGE, end & -PAGE):
                if data is None:
                    unreadable += 1
                elif data != os.pread(ram.fileno(), PAGE, page):
                    wrong += 1
    dumped.close()
    return wrong, unreadable


@pytest.mark.parametrize(
    "dump",
    [pytest.param(write, id=name, marks=[pytest.mark.long] if name in LONG else []) for name, write in WHOLE.items()],
    indirect=True,
)
def test_a_dump_is_the_same_guest(still: Still, dump: Path) -> None:
    with Libvmi.over(RamFile("live", still.vm.ram)) as live, Libvmi.over(RamFile("dump", dump)) as dumped:
        tasks = list(objects.tasks(live))
        assert still.pid in [task.pid for task in tasks]
        assert list(objects.tasks(dumped)) == tasks
        assert list(objects.modules(dumped)) == list(objects.modules(live))
        assert dumped.get_memsize() in (live.get_memsize(), still.ranges[-1][1])
        assert still.mapped
        for address in still.mapped:
            assert dumped.read_va(address, still.pid, 4096) == live.read_va(address, still.pid, 4096)
    assert different(still, dump) == (0, 0)


@pytest.mark.parametrize("dump", PARTS.values(), ids=PARTS, indirect=True)
def test_a_dump_without_some_pages_has_none_of_them(still: Still, dump: Path) -> None:
    with Libvmi.over(RamFile("live", still.vm.ram)) as live, Libvmi.over(RamFile("dump", dump)) as dumped:
        assert list(objects.tasks(dumped)) == list(objects.tasks(live))
        assert list(objects.modules(dumped)) == list(objects.modules(live))
    wrong, unreadable = different(still, dump)
    assert wrong == 0
    assert unreadable < (still.ranges[-1][1] // PAGE)


def test_a_migration_stream_is_named(still: Still, tmp_path: Path) -> None:
    file = tmp_path / "stream"
    still.vm.monitor("migrate", {"uri": f"exec:head -c 65536 > {file}"})
    still.vm.wait_until(lambda: file.exists() and file.stat().st_size == 65536, "the stream's beginning")
    still.vm.wait_until(lambda: still.vm.monitor("query-migrate")["status"] == "failed", "the stream's end")
    with pytest.raises(LibvmiError, match=r"its format is QEMU migration stream, .*dump-guest-memory -z OUT$"):
        RamFile("stream", file)
