"""Acquire a guest's memory: find out where it is, read it, and put it into a file, in the order of addresses.

An agent answers one request at a time, and a request waits for its reply. So several connections ask in turn: while one
request is answered, others are on their way, and what came before is hashed and written.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from queue import SimpleQueue

from vmishim.acquire import selection
from vmishim.acquire.journal import Plan
from vmishim.acquire.output import Output
from vmishim.acquire.pieces import Got, chunks, read, total
from vmishim.acquire.shapes import SHAPES, Image
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.guests import description, layout
from vmishim.guests.layout import Range
from vmishim.guests.ramfile import KERNEL_MAP
from vmishim.guests.target import Target
from vmishim.kernel import btf, vmcoreinfo
from vmishim.kernel.btf import Btf
from vmishim.kernel.profile import Profile
from vmishim.memory.reader import MemoryReader, ScatterReader

RAM_MAX = 1 << 46
"""Bytes of the largest guest, 64 TiB: more than a kernel with four levels of page tables can have."""
IMAGE_MAX = 1 << 30
"""Bytes of the largest kernel image (``KERNEL_IMAGE_SIZE``)."""
AHEAD = 2
"""Requests that wait for each connection."""
_NO_TYPES = struct.pack("<HBB5I", btf.MAGIC, 1, 0, 24, 0, 0, 0, 1) + b"\0"
"""BTF without any type."""
_VMEMMAP = {4: 0xFFFF_EA00_0000_0000, 5: 0xFFD4_0000_0000_0000}
"""Where the array of ``struct page`` is without ``CONFIG_DYNAMIC_MEMORY_LAYOUT``, by levels of page tables."""


class AcquisitionError(LibvmiError):
    """The guest's memory cannot be acquired. The text says why, and what to do."""


def plan(target: Target, name: str, format: str, kernel_only: bool) -> Plan:
    """What a dump of a guest is of.

    :raises AcquisitionError: it cannot be found out where the guest's memory is
    :raises LinkError: the guest could not be asked
    """
    profile, reader = target.profile, target.reader
    try:
        root = profile.symbol("iomem_resource")
        text, end, base = (profile.symbol(symbol) for symbol in ("_text", "_end", "phys_base"))
    except KeyError as error:
        raise AcquisitionError(
            f"where the guest's memory is cannot be found out: {error.args[0]}. Its kernel must be built with "
            "KALLSYMS_ALL, as those of Debian, Ubuntu, Fedora and RHEL are"
        ) from None
    if not profile.page_offset:
        raise AcquisitionError("where the guest's memory is cannot be found out: its direct map is not known")
    found = layout.ranges(reader.read, root)
    if not found:
        raise AcquisitionError("the guest's kernel does not say where its RAM is: its iomem_resource cannot be read")
    ram = [Range(*each) for each in found]
    if total(ram) > RAM_MAX:
        raise AcquisitionError(f"the guest's kernel says that it has {total(ram)} bytes of RAM, more than {RAM_MAX}")
    try:
        moved = _word(reader, base)
    except FaultError:
        raise AcquisitionError("where the guest's kernel is cannot be found out: phys_base cannot be read") from None
    if not 0 < end - text <= IMAGE_MAX:
        raise AcquisitionError(f"the guest's kernel says that its image is from {text:#x} to {end:#x}")
    image = Image(text, (text - KERNEL_MAP + moved) % (1 << 64), end - text)
    info = description.own_vmcoreinfo(target)
    return Plan(
        name,
        format,
        kernel_only,
        ram,
        _of_kernel(ram, profile, reader, info) if kernel_only else ram,
        facts(target),
        image,
        (info or _vmcoreinfo(target)).decode(),
        "the guest's memory" if info else "made up: the kernel has none",
    )


def _of_kernel(ram: list[Range], profile: Profile, reader: MemoryReader, info: bytes) -> list[Range]:
    pages = selection.layout(info)
    if pages is None:
        raise AcquisitionError(
            "which memory is the kernel's cannot be found out, because the kernel has no VMCOREINFO that says how to "
            "read its struct page: leave out --kernel-only"
        )
    array = _VMEMMAP[profile.levels]
    with suppress(KeyError, FaultError):
        array = _word(reader, profile.symbol("vmemmap_base"))

    def readable(address: int, count: int) -> bytes:
        try:
            return reader.read(address, count)
        except FaultError as fault:
            return fault.data

    return selection.kernel(ram, pages, array, readable)


def _vmcoreinfo(target: Target) -> bytes:
    """What a kernel without VMCOREINFO would say. :raises LinkError: the guest could not be asked"""
    try:
        return description.describe(target).vmcoreinfo
    except LinkError:
        raise
    except LibvmiError:  # it has no BTF either
        profile = target.profile
        symbols = {}
        for name in vmcoreinfo.SYMBOLS:
            with suppress(KeyError):
                symbols[name] = profile.symbol(name)
        base = _word(target.reader, profile.symbol("phys_base"))
        return vmcoreinfo.make(
            profile.release,
            symbols,
            Btf(_NO_TYPES),
            moved=profile.kaslr_offset,
            phys_base=base - (base >> 63 << 64),
            levels=profile.levels,
        )


def _word(reader: MemoryReader, address: int) -> int:
    """The 64-bit word at a kernel virtual address. :raises FaultError: it cannot be read"""
    return int.from_bytes(reader.read(address, 8), "little")


def facts(target: Target) -> dict[str, object]:
    """What a dump says of its guest. :raises LinkError: the guest could not be asked"""
    profile = target.profile
    boot_id = profile.boot_id
    if not boot_id:
        # What /proc/sys/kernel/random/boot_id shows; zeros until something asks for it.
        with suppress(KeyError, FaultError):
            boot_id = target.reader.read(profile.symbol("sysctl_bootid"), 16).hex()
    known: dict[str, object] = {
        "release": profile.release,
        "hostname": profile.hostname,
        "boot_id": boot_id,
        "page_offset": profile.page_offset,
        "kaslr_offset": profile.kaslr_offset,
        "levels": profile.levels,
        "vcpus": profile.vcpus,
    }
    if target.agent:
        link = target.agent.link
        known |= {"agent": link.endpoint, "agent_key": link.remote.text, "agent_version": target.agent.version}
        known["kernel_encryption"] = target.agent.sealed
    return known


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Pace:
    """Bounds how fast the guest is read.

    :param rate: bytes a second; 0: no bound
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._next = clock()

    def wait(self, count: int) -> float:
        """Seconds to wait before ``count`` bytes may be asked for. What was not used in time is lost."""
        if not self._rate:
            return 0.0
        at = max(self._next, self._clock())
        wait = at - self._clock()
        self._next = at + count / self._rate
        return wait


def acquire(
    readers: Sequence[ScatterReader], output: Output, frozen: bool, pace: Pace, progress: Callable[[int], None]
) -> None:
    """Read all of the plan that the record does not have yet.

    What was read is in the file, whatever ends this.

    :param readers: one for each connection to the guest
    :param frozen: the first of them holds the guest's container frozen
    :param progress: told of bytes that were read, or found unreadable
    :raises LinkError: the guest could not be asked, or the freeze ended
    :raises OSError: the file cannot be written
    """
    shape = SHAPES[output.plan.format]
    output.begin({"begun": now(), "frozen": frozen})
    guest = output.plan.guest
    page_offset = guest["page_offset"] if "agent" in guest else None
    for got in _all(readers, chunks(output.plan.ranges, output.record.done), page_offset, pace):
        # In the order of addresses, as the journal must be.
        parts: list[tuple[int, bytes | Range]] = [*got.found, *((hole.start, hole) for hole in got.unreadable)]
        for address, part in sorted(parts, key=lambda each: each[0]):
            if isinstance(part, Range):
                output.add_unreadable(part)
            else:
                before = output.record.pieces[-1] if output.record.pieces else None
                output.add(address, part, shape.place(before, address))
        progress(got.wanted.end - got.wanted.start)
    if frozen:
        # Its connection is refused if the freeze ended at any time before this.
        first = output.plan.ranges[0].start
        read(readers[0], Range(first, first + 1), page_offset)
    output.end(now())


def _all(
    readers: Sequence[ScatterReader], wanted: Iterator[Range], page_offset: int | None, pace: Pace
) -> Iterator[Got]:
    """The answers in the order of the questions."""
    free: SimpleQueue[ScatterReader] = SimpleQueue()
    for reader in readers:
        free.put(reader)

    def ask(part: Range) -> Got:
        reader = free.get()
        try:
            return read(reader, part, page_offset)
        finally:
            free.put(reader)

    pool = ThreadPoolExecutor(len(readers))
    waiting: deque[Future[Got]] = deque()
    try:
        for part in wanted:
            time.sleep(pace.wait(part.end - part.start))
            waiting.append(pool.submit(ask, part))
            if len(waiting) >= AHEAD * len(readers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
