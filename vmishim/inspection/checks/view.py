"""What several checks need of a guest, read once a look: its tasks, open files, modules and code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vmishim.inspection import objects
from vmishim.inspection.lists import ring
from vmishim.inspection.objects import MODULES_MAX, Task
from vmishim.inspection.structures import Structures
from vmishim.libvmi.limits import TASK_LIMIT

FILES_MAX = 4096
"""Open files of one table that are read."""
ALL_FILES_MAX = 1 << 18
"""Open files that are read in one look."""
NAMESPACES_MAX = 1 << 16
"""Network namespaces that are read."""
OUT_OF_TREE = 1 << 12 | 1 << 13
"""``TAINT_OOT_MODULE`` and ``TAINT_UNSIGNED_MODULE`` (include/linux/panic.h)."""
MODULE_NAME_MAX = 56
_BITS = 64


@dataclass(frozen=True)
class LoadedModule:
    """A module of the list of modules: where its code is, and whether it is of the kernel's own tree."""

    address: int
    name: str
    text: int
    text_size: int
    taints: int


class View(Structures):
    """One look at a guest."""

    # Processes.

    @cached_property
    def tasks(self) -> list[Task]:
        """The processes in the list of tasks, the idle task first."""
        return list(objects.tasks(self.vmi, self.damage))

    def threads(self, leader: int) -> list[int]:
        """The ``task_struct`` of each thread of a process, the leader's first."""
        if leader not in self._threads:
            found = [leader]
            with self.marking(f"the threads of the process at {leader:#x}"):
                head = self.field(leader, "task_struct signal") + self.at("signal_struct thread_head")
                link = self.at("task_struct thread_node")
                what = f"the threads of the process at {leader:#x}"
                found += [
                    thread for thread in ring(self.vmi, head, link, TASK_LIMIT, self.damage, what) if thread != leader
                ]
            self._threads[leader] = found
        return self._threads[leader]

    @cached_property
    def _threads(self) -> dict[int, list[int]]:
        return {}

    def memory(self, task: Task) -> int:
        """The ``mm_struct`` of a process, 0 for a kernel thread; that of another thread once the leader has exited."""
        mm = self.field(task.address, "task_struct mm")
        if mm or task.state not in objects.ENDED:
            return mm
        rest = (self.field(thread, "task_struct mm") for thread in self.threads(task.address)[1:])
        return next(filter(None, rest), 0)

    @cached_property
    def memories(self) -> dict[int, int]:
        """The ``mm_struct`` of each process, by its ``task_struct``; without those that cannot be read."""
        found = {}
        for task in self.tasks:
            with self.marking(f"mm of {named(task)}"):
                found[task.address] = self.memory(task)
        return found

    def executable(self, task: Task) -> int:
        """The ``struct file`` of the program that a process runs; 0 for a kernel thread."""
        mm = self.memories.get(task.address, 0)
        return self.field(mm, "mm_struct exe_file") if mm else 0

    # Open files.

    @cached_property
    def files(self) -> list[tuple[Task, int]]:
        """(process, ``struct file``) of all open files, each table once."""
        found: list[tuple[Task, int]] = []
        searched = {0}
        for task in self.tasks:
            if not self.memories.get(task.address):
                continue
            for thread in self.threads(task.address):
                with self.marking(f"open files of {named(task)}"):
                    files = self.field(thread, "task_struct files")
                    if files not in searched:
                        searched.add(files)
                        for file in self._open(files, named(task)):
                            if len(found) >= ALL_FILES_MAX:
                                self.damage.add(f"open files: there are more than the {ALL_FILES_MAX:,} that are read")
                                return found
                            found.append((task, file))
        return found

    def _open(self, files: int, whose: str) -> Iterator[int]:
        table = self.field(files, "files_struct fdt")
        count = self.value(table, "fdtable max_fds")
        slots, used = self.field(table, "fdtable fd"), self.field(table, "fdtable open_fds")
        left = FILES_MAX
        for start in range(0, min(count, FILES_MAX * _BITS), _BITS):
            bits = self.pointer(used + start // 8)
            while bits:
                number = start + (bits & -bits).bit_length() - 1
                bits &= bits - 1
                if not left:
                    self.damage.add(f"open files of {whose}: there are more than the {FILES_MAX:,} that are read")
                    return
                left -= 1
                if file := self.pointer(slots + 8 * number):  # else reserved for a file that is being opened
                    yield file
        if count > FILES_MAX * _BITS:
            self.damage.add(f"open files of {whose}: searched up to descriptor {FILES_MAX * _BITS:,} of {count:,}")

    # Modules and code.

    @cached_property
    def modules(self) -> list[LoadedModule]:
        """The modules in the list of modules."""
        head = self.symbol("modules")
        if self.has("module mem"):
            # An array, code first, since 6.4 (ac3b43283923 "module: replace module_layout with module_memory").
            text = self.at("module mem") + self.at("module_memory base")
            size = self.at("module mem") + self.at("module_memory size")
        else:
            text = self.at("module core_layout") + self.at("module_layout base")
            size = self.at("module core_layout") + self.at("module_layout text_size")
        found = []
        what = "the list of modules"
        for module in ring(self.vmi, head, self.at("module list"), MODULES_MAX, self.damage, what):
            with self.marking(f"the module at {module:#x}"):
                name = self.text(module + self.at("module name"), MODULE_NAME_MAX)
                taints = self.pointer(module + self.at("module taints"))
                found.append(
                    LoadedModule(module, name, self.pointer(module + text), self.number(module + size), taints)
                )
        return found

    @cached_property
    def _kernel_text(self) -> range:
        return range(self.symbol("_stext"), self.symbol("_etext"))

    def is_text(self, address: int) -> bool:
        """Whether an address is in the code of the kernel itself, not of a module."""
        return address in self._kernel_text

    def module_at(self, address: int) -> LoadedModule | None:
        """The listed module whose code an address is in."""
        return next((each for each in self.modules if each.text <= address < each.text + each.text_size), None)

    def where(self, address: int) -> str:
        """An address of code, for sentences."""
        module = self.module_at(address)
        return f"{address:#x} in the module {module.name}" if module else f"{address:#x}, in no module that is listed"

    @property
    def looked(self) -> tuple[int, int, int]:
        """Numbers of processes, open files and modules that were read so far."""
        read = self.__dict__
        return len(read.get("tasks", ())), len(read.get("files", ())), len(read.get("modules", ()))

    # Networks.

    @cached_property
    def networks(self) -> list[int]:
        """The network namespaces (``struct net``)."""
        head, link = self.symbol("net_namespace_list"), self.at("net list")
        what = "the list of network namespaces"
        return list(ring(self.vmi, head, link, NAMESPACES_MAX, self.damage, what))


def named(task: Task) -> str:
    """A process, for sentences."""
    return f"{task.pid} {task.comm}"
