"""What a guest is to everything above this package, however it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from vmishim.kernel.profile import Profile
from vmishim.memory.reader import Extent, MemoryReader, OneByOne, ScatterReader
from vmishim.wire.messages import Chunk
from vmishim.wire.plan import Plan

if TYPE_CHECKING:
    from vmishim.link import Link  # which imports zmq, and a RAM file is read without


class Agent(Protocol):
    """The agent of a guest: what can be asked of it beyond memory, and what asking has cost."""

    @property
    def link(self) -> Link:
        """The connection to it, which counts requests, bytes and handshakes."""
        ...

    @property
    def version(self) -> str:
        """Its version of vmishim."""
        ...

    @property
    def sealed(self) -> bool:
        """Whether the guest's kernel encrypts what it reads, so that the agent cannot see it (docs/security.md)."""
        ...

    def learned(self, extents: Iterable[Extent]) -> None:
        """Take kernel memory that an injected program read into the read-ahead."""
        ...

    @property
    def direct(self) -> ScatterReader:
        """Reads memory of the guest itself: nothing is read ahead, and nothing is kept."""
        ...

    def walk(self, plan: Plan, heads: Sequence[int] = ()) -> list[Chunk]:
        """Walk, all of it, past the read-ahead.

        :param heads: addresses of heads, for a plan that lists them
        :raises LinkError: the guest could not be asked, or its records do not fit the plan
        """
        ...

    def behind(self, start: int, count: int, offset: int, most: int) -> tuple[list[int], str] | None:
        """The words at ``offset`` behind the pointers of an array, in one walk in the guest; null pointers are skipped.

        :param start: address of the first pointer
        :param count: how many
        :param most: words after which the walk ends
        :returns: the words that can be read, and why these are not all, empty if they are; None if this guest is read
            without reading ahead, to be compared with
        :raises LinkError: the guest could not be asked
        """
        ...


class Target(Protocol):
    """One guest: by its agent, or by the RAM file of an ordinary VM."""

    name: str
    """The domain's name, as ``Libvmi.get_name`` gives it."""

    @property
    def agent(self) -> Agent | None:
        """The guest's agent; None if it is read without one."""
        ...

    @property
    def reader(self) -> MemoryReader:
        """Reads memory, for several threads at a time; may answer kernel addresses from read-ahead snapshots."""
        ...

    @property
    def profile(self) -> Profile:
        """The guest kernel's symbols and layouts."""
        ...

    words: dict[int, int]
    """Kernel memory known right now, eight bytes by exact start address: the hit path of pointer reads looks here
    first, and asks ``reader`` for everything else. Empty for a target that does not read ahead. The object never
    changes."""
    cells: dict[int, bytes]
    """The same for what is not eight bytes long: the hit path of all other reads."""

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate ``address``, a canonical one, by the page tables at physical address ``dtb``.

        :returns: (physical address, page size in bytes, values of the entries from the root down); size 0: not mapped
        :raises LinkError: the guest could not be asked
        """
        ...

    def hold(self) -> None:
        """Everything read until ``release`` is as of one hold (LibVMI's ``vmi_pause_vm``). The caller counts nested
        holds.

        :raises LinkError: the guest could not be asked, or its agent does not stop it; then nothing is held
        """
        ...

    def release(self) -> None:
        """End the hold (LibVMI's ``vmi_resume_vm``)."""
        ...

    def flush(self) -> None:
        """Forget every cached byte: the next read asks the guest."""
        ...

    def close(self) -> None:
        """Let go of the guest. Further reads raise ``LinkError``."""
        ...


def direct(target: Target) -> ScatterReader:
    """Reads memory of the guest itself: nothing is read ahead, and nothing is kept."""
    return target.agent.direct if target.agent else OneByOne(target.reader)
