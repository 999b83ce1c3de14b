"""The guest kernel's lists as Python objects, read through `Libvmi`: what ``vmishim ps`` and ``vmishim lsmod`` show.

The list is the guest's own, so it holds what the guest's kernel has linked there: one reading of the truth, not the
truth. A reader of a list begins where LibVMI's examples begin, at its head, and reads member by member; that this costs
one request and not thousands is the business of the reader below. Names and numbers come as the kernel has them.

Consistent as a whole inside ``with pause(vmi)`` only: outside, a list that changes meanwhile may show both its states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmishim.errors import LibvmiError, LinkError
from vmishim.libvmi import TASK_LIMIT, Libvmi

COMM_SIZE = 16
"""Bytes of ``task_struct.comm`` (``TASK_COMM_LEN``)."""
MODULES_MAX = 1 << 16
"""Modules after which a list is taken for a loop; Linux has about 6,000 to load."""

STATES = (
    (0x20, "zombie"),
    (0x10, "dead"),
    (0x80, "dead"),
    (0x8000, "frozen"),
    (0x402, "idle"),
    (0x40, "parked"),
    (0x8, "traced"),
    (0x4, "stopped"),
    (0x2, "blocked"),
    (0x1, "sleeping"),
)
"""Bits of ``task_struct.__state`` and ``exit_state`` (include/linux/sched.h), the telling ones first."""
MODULE_STATES = ("live", "coming", "going", "unformed")
"""``enum module_state`` (include/linux/module.h)."""


@dataclass(frozen=True)
class Task:
    """A process, as its leading thread's ``task_struct`` has it."""

    pid: int
    """Number of the thread, in the guest's first pid namespace."""
    tgid: int
    """Number of the process."""
    ppid: int
    """Number of the parent process (``real_parent``)."""
    uid: int
    """Real user id, in the guest's first user namespace."""
    comm: str
    """The kernel's name for it, up to 15 bytes; what is not UTF-8 is escaped."""
    state: str
    """A word of ``STATES``, or "running"."""
    address: int
    """Address of its ``task_struct``."""


@dataclass(frozen=True)
class Module:
    """A loaded kernel module."""

    name: str
    size: int
    """Bytes of all its memory, as ``/proc/modules`` counts them."""
    state: str
    """A word of ``MODULE_STATES``."""
    base: int
    """Where its code is."""
    address: int
    """Address of its ``struct module``."""


def tasks(vmi: Libvmi) -> Iterator[Task]:
    """The processes of the guest's task list, the idle task (pid 0) first.

    :raises LibvmiError: the list leads into memory that cannot be read, or never ends
    :raises LinkError: the guest could not be asked
    """
    fields = ("tasks", "pid", "tgid", "comm", "real_parent", "cred", "exit_state")
    link, pid, tgid, comm, parent, cred, ended = (vmi.get_kernel_struct_offset("task_struct", name) for name in fields)
    state = _state_offset(vmi)
    uid = vmi.get_kernel_struct_offset("cred", "uid")
    for task in _ring(vmi, vmi.translate_ksym2v("init_task") + link, link, TASK_LIMIT, whole=True):
        number = vmi.read_32_va(task + tgid, 0)
        yield Task(
            pid=vmi.read_32_va(task + pid, 0),
            tgid=number,
            ppid=vmi.read_32_va(vmi.read_addr_va(task + parent, 0) + tgid, 0),
            uid=vmi.read_32_va(vmi.read_addr_va(task + cred, 0) + uid, 0),
            comm=_text(vmi.read_va(task + comm, 0, COMM_SIZE)[0]),
            state=_word(vmi.read_32_va(task + state, 0) | vmi.read_32_va(task + ended, 0)),
            address=task,
        )


def modules(vmi: Libvmi) -> Iterator[Module]:
    """The modules of the guest's module list, the last loaded first; none if its kernel has no modules at all.

    :raises LibvmiError: the kernel does not say where the list is, or it cannot be read to its end
    :raises LinkError: the guest could not be asked
    """
    head = _symbol(vmi, "modules")
    if head is None:
        if _symbol(vmi, "find_module") is None:
            return  # built without CONFIG_MODULES
        raise LibvmiError("this kernel has modules but does not say where their list is: built without KALLSYMS_ALL")
    link, name, state = (vmi.get_kernel_struct_offset("module", member) for member in ("list", "name", "state"))
    longest = vmi.vmi.profile.member("module", "name").size
    base, sizes = _module_memory(vmi)
    for module in _ring(vmi, head, link, MODULES_MAX):
        number = vmi.read_32_va(module + state, 0)
        yield Module(
            name=_text(vmi.read_va(module + name, 0, longest)[0]),
            size=sum(vmi.read_32_va(module + size, 0) for size in sizes),
            state=MODULE_STATES[number] if number < len(MODULE_STATES) else f"state {number}",
            base=vmi.read_addr_va(module + base, 0),
            address=module,
        )


def _ring(vmi: Libvmi, head: int, link: int, most: int, whole: bool = False) -> Iterator[int]:
    """Addresses of the structures on a ``list_head`` ring; ``whole``: the head is itself in one."""
    node = vmi.read_addr_va(head, 0)
    if whole:
        yield head - link
    for _ in range(most):
        if node == head:
            return
        yield (node - link) % (1 << 64)
        node = vmi.read_addr_va(node, 0)
    raise LibvmiError(f"the list at {head:#x} has more than {most} entries: it loops, or was changed while it was read")


# What differs between kernels, each with the commit that made it.


def _state_offset(vmi: Libvmi) -> int:
    """Where a task's state is: an ``unsigned int`` since 5.14 (2f064a59a11f "sched: Change task_struct::state"), the
    low half of a ``long`` before."""
    try:
        return vmi.get_kernel_struct_offset("task_struct", "__state")
    except LinkError:
        raise
    except LibvmiError:
        return vmi.get_kernel_struct_offset("task_struct", "state")


def _module_memory(vmi: Libvmi) -> tuple[int, list[int]]:
    """Where a module's code address and the sizes of its parts are.

    An array ``mem[]``, code first, since 6.4 (ac3b43283923 "module: replace module_layout with module_memory");
    ``core_layout`` and ``init_layout`` before.
    """
    profile = vmi.vmi.profile
    try:
        memory, stride = profile.member("module", "mem"), profile.size("module_memory")
    except KeyError:
        layouts = ("core_layout", "init_layout")
        sizes = [vmi.get_kernel_struct_offset("module", f"{layout}.size") for layout in layouts]
        return vmi.get_kernel_struct_offset("module", "core_layout.base"), sizes
    size = memory.offset + profile.member("module_memory", "size").offset
    base = memory.offset + profile.member("module_memory", "base").offset
    return base, [size + part for part in range(0, memory.size, stride)]


# Words.


def _symbol(vmi: Libvmi, name: str) -> int | None:
    try:
        return vmi.translate_ksym2v(name)
    except LinkError:
        raise
    except LibvmiError:
        return None


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _word(state: int) -> str:
    for bits, word in STATES:
        if state & bits == bits:
            return word
    return "running" if not state else f"state {state:#x}"
