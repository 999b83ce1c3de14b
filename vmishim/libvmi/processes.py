"""Processes: from a pid to its page tables, and back."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator

from vmishim.errors import FaultError, failure
from vmishim.libvmi import limits
from vmishim.libvmi.opened import NO_OS
from vmishim.libvmi.translation import PageTables
from vmishim.libvmi.values import signed_32, unsigned
from vmishim.memory.lifetimes import PID_STALE
from vmishim.memory.reader import ADDRESSES, KERNEL

_SWITCHED = 0x1FFF
"""Bits of CR3 that differ while a process runs: PCID, and which half of the pair that page-table isolation makes."""


class Processes(PageTables):
    """The calls that know processes by their pid."""

    __slots__ = ()

    def pid_to_dtb(self, pid: int) -> int:
        """Physical address of a process's page tables; of the kernel's for pid 0.

        Found by walking the guest's task list, and remembered for a second, or until a pause ends.

        :raises LibvmiError: ``VMI_FAILURE``: there is no such process

        Source: ``vmi_pid_to_dtb``.
        """
        pid = signed_32(pid)
        if pid == 0:
            return self._kernel_tables()
        known = self._dtbs.get(pid)
        if known is not None and (self._holds or time.monotonic() < known[1]):
            return known[0]
        mm, number = self._offset("task_struct", "mm"), self._offset("task_struct", "pid")
        for task in self._tasks():
            if self._kernel_32(_add(task, number)) == pid:
                # A kernel thread has no memory of its own and borrows one: active_mm, the next pointer.
                memory = self._kernel_64(_add(task, mm)) or self._kernel_64(_add(task, mm + 8))
                dtb = self._tables_of(memory) if memory else 0
                self._dtbs[pid] = dtb, time.monotonic() + PID_STALE
                return dtb
        raise failure(f"the guest has no process {pid}")

    def dtb_to_pid(self, dtb: int) -> int:
        """Pid of the first process that has its page tables at the physical address ``dtb``.

        The bits for PCID and page-table isolation are ignored.

        :raises LibvmiError: ``VMI_FAILURE``: no process has

        Source: ``vmi_dtb_to_pid``.
        """
        dtb = unsigned(dtb)
        if not dtb & ~_SWITCHED:
            return 0  # LibVMI takes the idle task's missing memory for page tables at 0
        mm, number = self._offset("task_struct", "mm"), self._offset("task_struct", "pid")
        for task in self._tasks():
            memory = self._kernel_64(_add(task, mm))
            if memory and self._tables_of(memory) in (dtb, dtb & ~_SWITCHED):
                return self._kernel_32(_add(task, number))
        raise failure(f"no process of the guest has its page tables at {dtb:#x}")

    def translate_uv2p(self, vaddr: int, pid: int) -> int:
        """Physical address of a virtual address of process ``pid``.

        :raises LibvmiError: ``VMI_FAILURE``: it is not mapped, or there is no such process

        Source: ``vmi_translate_uv2p``.
        """
        try:
            return self.pagetable_lookup(self.pid_to_dtb(pid), vaddr)
        except FaultError:
            # The process may have got new page tables (execve): look once more, as LibVMI does.
            if self._dtbs.pop(pid, None) is None:
                raise
        return self.pagetable_lookup(self.pid_to_dtb(pid), vaddr)

    def _space(self, pid: int) -> int:
        """The space that reads of a process's memory are in. :raises LibvmiError: there is no such process."""
        if not self._os:
            raise failure(NO_OS)
        if pid == 0:
            operator.index(pid)  # 0.0 is not a pid
            return KERNEL
        return self._root(self.pid_to_dtb(pid))

    def _tables_of(self, memory: int) -> int:
        """Physical address of the page tables of an ``mm_struct``."""
        return self._direct(self._kernel_64(_add(memory, self._offset("mm_struct", "pgd"))))

    def _tasks(self) -> Iterator[int]:
        """Address of every ``task_struct`` in the guest's list, ``init_task`` first."""
        if not self._os:
            raise failure(NO_OS)
        first = task = self._symbol("init_task")
        offset = self._offset("task_struct", "tasks")
        met: set[int] = set()
        while task not in met and len(met) < limits.TASK_LIMIT:  # a damaged list may loop without its head
            met.add(task)
            yield task
            task = _add(self._kernel_64(_add(task, offset)), -offset)
            if task == first:
                return
        raise failure(f"the list of tasks has more than {limits.TASK_LIMIT} entries: it loops")


def _add(address: int, offset: int) -> int:
    """An address and an offset as the kernel adds them, whatever the guest says they are."""
    return (address + offset) % ADDRESSES
