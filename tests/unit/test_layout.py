"""Where the parts of a raw image belong: what a guest's kernel says about it."""

from __future__ import annotations

from pathlib import Path
from struct import pack

import pytest

from trials.fuzz import ram
from trials.fuzz.bombs import btf_blob, btf_struct
from vmishim.errors import FaultError, LibvmiError
from vmishim.guests import layout
from vmishim.guests.dumps import Segment
from vmishim.guests.layout import GIB, HIGH, Range, split
from vmishim.guests.ramfile import RamFile

MIB = 1 << 20
BTF = btf_blob(btf_struct(1, []), b"\0a\0")
FIRMWARE = 131072 + 12288
"""What SeaBIOS keeps at the end of the memory below the hole."""

# The ends of the kernel's RAM, each with the bytes of the image, and those below the hole.
MACHINES = {
    "QEMU q35, 1 GiB": ((GIB - FIRMWARE,), GIB, GIB),
    "QEMU q35, 4 GiB": ((2 * GIB - FIRMWARE, 6 * GIB), 4 * GIB, 2 * GIB),
    "QEMU pc, 8 GiB": ((3 * GIB - FIRMWARE, 9 * GIB), 8 * GIB, 3 * GIB),
    "QEMU q35, max-ram-below-4g=512M": ((GIB // 2 - FIRMWARE, HIGH + GIB // 2), GIB, GIB // 2),
    "QEMU microvm, 3.25 GiB": ((3 * GIB, HIGH + GIB // 4), 13 * GIB // 4, 3 * GIB),
    "VMware, 3.25 GiB": ((3 * GIB - 12 * MIB, HIGH + GIB // 4), 13 * GIB // 4, 3 * GIB),
    "Firecracker, 3.5 GiB": ((0xD000_0000, HIGH + 0x1000_0000), 0xE000_0000, 0xD000_0000),
    "Xen, 4 GiB": ((0xEFFF_F000, HIGH + 0x1000_0000), HIGH, 0xF000_0000),
    "OVMF, 4 GiB": ((2 * GIB - 24 * MIB, 6 * GIB), 4 * GIB, 2 * GIB),
    "a firmware that keeps the end of both parts": ((2 * GIB - 24 * MIB, 6 * GIB - 16 * MIB), 4 * GIB, 2 * GIB),
}


def kernels(*ends: int) -> tuple[Range, ...]:
    """RAM that ends there, as a kernel has it: without the first page and the video memory."""
    low = [Range(0x1000, 0x9_FC00), Range(0x10_0000, min(ends))]
    return (*low, *(Range(HIGH, end) for end in ends if end > HIGH))


@pytest.mark.parametrize("name", MACHINES)
def test_the_layout_of_a_machine_is_that_of_its_kernel(name: str) -> None:
    ends, size, low = MACHINES[name]
    expected = split(size, low) if low < size else (Segment(0, size, 0),)
    assert next(layout.fitting(kernels(*ends), size)) == expected


@pytest.mark.parametrize("name", MACHINES)
def test_memory_plugged_in_later_is_not_in_the_image(name: str) -> None:
    ends, size, low = MACHINES[name]
    plugged = Range(max(HIGH, *ends), max(HIGH, *ends) + GIB)
    expected = split(size, low) if low < size else (Segment(0, size, 0),)
    assert expected in list(layout.fitting((*kernels(*ends), plugged), size))[:3]


def test_ram_above_4_gib_may_have_holes() -> None:
    """AMD's machines have one below 1 TiB."""
    high = Range(HIGH, 0xFD_0000_0000), Range(1 << 40, (1 << 40) + GIB)
    ram = (Range(0, 2 * GIB - FIRMWARE), *high)
    size = 2 * GIB + sum(end - start for start, end in high)
    (_, first, second), *_ = layout.fitting(ram, size)
    assert (first.start, first.end, first.offset) == (HIGH, 0xFD_0000_0000, 2 * GIB)
    assert (second.start, second.end) == high[1]


def test_an_image_with_its_hole_is_its_addresses() -> None:
    """``pmemsave``, LiME's ``format=padded``."""
    ram = kernels(2 * GIB - FIRMWARE, 5 * GIB)
    assert (Segment(0, 5 * GIB, 0),) in layout.fitting(ram, 5 * GIB)


def test_a_kernel_without_its_memory_has_no_layout() -> None:
    assert list(layout.fitting(kernels(2 * GIB - FIRMWARE, 6 * GIB), GIB)) == []


def tree(ranges: list[tuple[int, int]], links: int = 40) -> dict[int, bytes]:
    """A tree of resources by address, the root at 0x1000, the name at 0x2000."""
    nodes = [0x3000 + 0x100 * number for number in range(len(ranges))]
    memory = {0x1000: bytes(links + 16) + pack("<Q", nodes[0]) + bytes(16), 0x2000: b"System RAM\0"}
    for (start, end), node, sibling in zip(ranges, nodes, [*nodes[1:], 0], strict=True):
        front = pack("<QQQ", start, end, 0x2000).ljust(links, b"\0")
        memory[node] = (front + pack("<QQQ", 0x1000, sibling, 0)).ljust(64, b"\0")
    return memory


def read(memory: dict[int, bytes], address: int, count: int) -> bytes:
    for start, data in memory.items():
        if start <= address and address + count <= start + len(data):
            return data[address - start : address - start + count]
    raise FaultError(address)


@pytest.mark.parametrize("links", [40, 32])
def test_a_tree_of_resources_is_read(links: int) -> None:
    memory = tree([(0x1000, 0x9FFFF), (0x10_0000, 0x3FFF_FFFF), (HIGH, HIGH + GIB - 1)], links)
    found = layout.ranges(lambda address, count: read(memory, address, count), 0x1000)
    assert found == (Range(0x1000, 0xA_0000), Range(0x10_0000, 1 << 30), Range(HIGH, HIGH + GIB))


@pytest.mark.parametrize(
    "ranges",
    [
        [(0x2000, 0x3000), (0x1000, 0x1FFF)],  # not in order
        [(0x2000, 0x1000)],  # ends before it begins
        [(0x1000, 0x2000), (0x2000, 0x3000)],  # on top of each other
        [(number * 0x1000, number * 0x1000 + 0xFFF) for number in range(layout.RANGES_MAX + 1)],
    ],
)
def test_what_is_no_tree_of_resources_is_none(ranges: list[tuple[int, int]]) -> None:
    memory = tree(ranges)
    assert layout.ranges(lambda address, count: read(memory, address, count), 0x1000) is None


def test_a_tree_that_loops_is_none() -> None:
    memory = tree([(0x1000, 0x1FFF), (0x2000, 0x2FFF)])
    memory[0x3100] = memory[0x3100][:48] + pack("<QQ", 0x3000, 0)
    assert layout.ranges(lambda address, count: read(memory, address, count), 0x1000) is None


@pytest.mark.parametrize("low", [ram.SIZE - ram.BLOCK, ram.IMAGE], ids=["below the hole", "above the hole"])
def test_a_kernel_is_found_wherever_the_hole_is(tmp_path: Path, low: int) -> None:
    path = tmp_path / "ram"
    path.write_bytes(ram.guest(BTF, low=low))
    guest = RamFile("split", path)
    assert guest.profile.symbol("function_399") == 0xFFFF_FFFF_8100_3000 + 399
    assert guest.profile.memory_size == HIGH + ram.SIZE - low
    assert guest._ram.segments == split(ram.SIZE, low)
    guest.close()


def test_a_resource_may_cross_a_page(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(ram.guest(BTF, low=ram.IMAGE, tree_at=ram.SIZE - ram.BLOCK - 24))
    guest = RamFile("crossing", path)
    assert guest._ram.segments == split(ram.SIZE, ram.IMAGE)
    guest.close()


def test_a_kernel_whose_other_memory_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(ram.guest(BTF, low=ram.SIZE - ram.BLOCK)[: -ram.BLOCK])
    with pytest.raises(LibvmiError, match=r"^OS: the guest's kernel was found, but not where the rest .* belongs"):
        RamFile("cut", path)
