"""What a backend is to the API class: a guest that can be read, named and held still."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vmishim.kernel.profile import Profile
from vmishim.memory.reader import MemoryReader


class Target(Protocol):
    """One guest, by whatever backend it is read: its agent, or the RAM file of an ordinary VM."""

    name: str
    """The domain's name, as ``Libvmi.get_name`` gives it."""

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
    first, and asks ``reader`` for everything else. Empty for a backend that reads ahead of nobody. The object never
    changes."""
    cells: dict[int, bytes]
    """The same for what is not eight bytes long: the hit path of all other reads."""

    def hold(self) -> None:
        """Everything read until ``release`` is as of one hold (LibVMI's ``vmi_pause_vm``). Nested: the caller
        counts."""
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


@runtime_checkable
class Walking(Protocol):
    """A target that walks page tables by itself. Of others, the API class reads the tables and walks them."""

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate ``address`` by the page tables at ``dtb``.

        :returns: (physical address, page size, values of the entries from the root down); size 0: it is not mapped
        :raises LinkError: the guest could not be asked
        """
        ...
