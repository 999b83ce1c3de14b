"""The guest kernel's lists as Python objects, read through `Libvmi`: what ``vmishim ps``, ``lsmod`` and ``ss`` show.

The lists are the guest kernel's own: a rootkit can unlink entries from them. Each reader begins at the list's head, as
LibVMI's examples do, and reads member by member; the read-ahead below turns that into one request instead of
thousands. Names and numbers are those of the kernel.

A list is consistent only inside ``with pause(vmi)`` (see `whole`): outside, a list that changes meanwhile may show both
states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from ipaddress import IPv4Address, IPv6Address
from typing import Any, ParamSpec, TypeVar

from vmishim.errors import LibvmiError, LinkError, UnknownNameError
from vmishim.libvmi import Libvmi, pause
from vmishim.libvmi.limits import TASK_LIMIT

Entry = TypeVar("Entry")
Arguments = ParamSpec("Arguments")

TRIES = 3
"""Tries to read a list before it counts as broken."""
COMM_SIZE = 16
"""Bytes of ``task_struct.comm`` (``TASK_COMM_LEN``)."""
MODULES_MAX = 1 << 16
"""Modules after which a list counts as a loop; Linux has about 6,000 that can be loaded."""
MODULE_NAME_MAX, MODULE_PARTS_MAX = 256, 64
"""Maximum bytes of a module's name, and maximum parts of its memory, whatever the guest says; Linux has 56 and 7."""

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
"""Bits of ``task_struct.__state`` and ``exit_state`` (include/linux/sched.h), the most specific first."""
MODULE_STATES = ("live", "coming", "going", "unformed")
"""``enum module_state`` (include/linux/module.h)."""
NAMESPACES_MAX = 1 << 20
"""Network namespaces after which their list counts as a loop."""
BUCKETS_MAX = 1 << 24
"""Chains above which a table is invalid; Linux makes 524,288 by default."""
SOCKETS_MAX = 1 << 24
"""Sockets of one table after which it counts as a loop."""
TCP_STATES = (
    "", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close", "close-wait",
    "last-ack", "listen", "closing", "syn-recv",
)  # fmt: skip
"""By number (include/net/tcp_states.h). The last is ``TCP_NEW_SYN_RECV``, a request for a connection, which
``/proc/net/tcp`` shows as syn-recv too."""
_TIME_WAIT, _NEW_SYN_RECV = 6, 12
_AF_INET6 = 10
FILES_MAX = 1 << 20
"""Maximum file descriptors of one process that are searched for sockets (``sysctl_nr_open``'s default)."""


@dataclass(frozen=True)
class Task:
    """A process, from the ``task_struct`` of its leading thread."""

    pid: int
    """Number of the thread, in the guest's first pid namespace."""
    tgid: int
    """Number of the process."""
    ppid: int
    """Number of the parent process (``real_parent``)."""
    uid: int
    """Real user id, in the guest's first user namespace."""
    comm: str
    """Its name in the kernel, up to 15 bytes; bytes that are not UTF-8 are escaped."""
    state: str
    """A word of ``STATES``, or "running"."""
    address: int
    """Address of its ``task_struct``."""


@dataclass(frozen=True)
class Module:
    """A loaded kernel module."""

    name: str
    size: int
    """Bytes of all its memory, as in ``/proc/modules``."""
    state: str
    """A word of ``MODULE_STATES``."""
    base: int
    """Address of its code."""
    address: int
    """Address of its ``struct module``."""


@dataclass(frozen=True)
class Socket:
    """A TCP socket of any network namespace: a connection, one in TIME_WAIT, a request for one, or a listener."""

    version: int
    """4 or 6, the file in which it is listed, ``/proc/net/tcp`` or ``tcp6``: an IPv6 socket may carry IPv4."""
    local: str
    local_port: int
    remote: str
    remote_port: int
    state: str
    """A word of ``TCP_STATES``."""
    uid: int
    """Its owner's user id, in the guest's first user namespace; 0 in TIME_WAIT."""
    inode: int
    """The number in ``/proc/PID/fd``; 0 if no process has it open (any more, or yet)."""
    namespace: int
    """Number of its network namespace, as in ``/proc/PID/ns/net``."""
    pid: int
    """Number of the first process in the task list that has it open; 0 if none has."""
    comm: str
    """The name of that process."""
    address: int
    """Address of its ``struct sock``, ``inet_timewait_sock`` or ``request_sock``."""


def _one_error(read: Callable[Arguments, Iterator[Entry]]) -> Callable[Arguments, Iterator[Entry]]:
    """Wraps a reader of a list, so that a guest that lies about itself causes a ``LibvmiError`` and nothing else.

    It may give values that sum to an address above 64 bits, or know one structure and not the next.
    """

    @wraps(read)
    def checked(*arguments: Arguments.args, **options: Arguments.kwargs) -> Iterator[Entry]:
        try:
            yield from read(*arguments, **options)
        except OverflowError:
            raise LibvmiError("a pointer in the list leads out of the address space") from None
        except KeyError as unknown:
            raise LibvmiError(unknown.args[0]) from None

    return checked


@_one_error
def tasks(vmi: Libvmi) -> Iterator[Task]:
    """The processes in the guest's task list, the idle task (pid 0) first.

    :raises LibvmiError: the list leads to unreadable memory, or never ends
    :raises LinkError: the guest could not be reached
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


@_one_error
def modules(vmi: Libvmi) -> Iterator[Module]:
    """The modules in the guest's module list, the last loaded first; none if its kernel does not support modules.

    :raises LibvmiError: the list's address is unknown, or the list cannot be read to its end
    :raises LinkError: the guest could not be reached
    """
    head = _symbol(vmi, "modules")
    if head is None:
        if _symbol(vmi, "find_module") is None:
            return  # built without CONFIG_MODULES
        raise LibvmiError("cannot find the list of modules: this kernel was built without CONFIG_KALLSYMS_ALL")
    link, name, state = (vmi.get_kernel_struct_offset("module", member) for member in ("list", "name", "state"))
    longest = min(vmi.vmi.profile.member("module", "name").size, MODULE_NAME_MAX)
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


@_one_error
def sockets(vmi: Libvmi, owners: bool = True) -> Iterator[Socket]:
    """The guest's TCP sockets: connections first, then listeners.

    :param owners: find the processes that have them open, which reads the open files of all processes
    :raises LibvmiError: the tables' address is unknown (no TCP?), or a table cannot be read to its end
    :raises LinkError: the guest could not be reached
    """
    found = list(_Sockets(vmi).all())
    inodes = {inode for _, inode in found if inode}
    known = _openers(vmi, inodes) if owners and inodes else {}
    for socket, inode in found:
        pid, comm = known.get(inode, (0, ""))
        yield Socket(**socket, pid=pid, comm=comm)


class _Sockets:
    """Reads the sockets of one guest, with offsets that are looked up once."""

    def __init__(self, vmi: Libvmi) -> None:
        self.vmi = vmi
        at = vmi.get_kernel_struct_offset
        names = ("family", "state", "num", "dport", "rcv_saddr", "daddr", "v6_rcv_saddr", "v6_daddr", "net", "listener")
        self.common = {name: at("sock", f"__sk_common.skc_{name}") for name in (*names, "nulls_node")}
        self.socket, self.uid = at("sock", "sk_socket"), at("sock", "sk_uid")
        self.inode = at("socket_alloc", "vfs_inode") - at("socket_alloc", "socket")
        self.number, self.substate = at("inode", "i_ino"), at("inet_timewait_sock", "tw_substate")
        self.namespace = at("net", "ns.inum")

    def all(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Each socket's members, and the address of its inode or 0."""
        main = self.vmi.translate_ksym2v("tcp_hashinfo")
        seen: set[int] = set()
        for chain in (self._connections(main), *map(self._connections, self._tables(main)), self._listeners(main)):
            for sock in chain:
                # A socket that moves to another chain while tables are read would appear twice.
                if sock not in seen:
                    seen.add(sock)
                    yield self._one(sock)

    def _connections(self, table: int) -> Iterator[int]:
        at = self.vmi.get_kernel_struct_offset
        first = self.vmi.read_addr_va(table + at("inet_hashinfo", "ehash"), 0) + at("inet_ehash_bucket", "chain")
        count = self.vmi.read_32_va(table + at("inet_hashinfo", "ehash_mask"), 0) + 1
        return self._chains(first, count, self.vmi.vmi.profile.size("inet_ehash_bucket"))

    def _listeners(self, table: int) -> Iterator[int]:
        """In ``lhash2`` since 5.19 (cae3873c5b3a "net: inet: Retire port only listening_hash")."""
        at, stride = self.vmi.get_kernel_struct_offset, self.vmi.vmi.profile.size("inet_listen_hashbucket")
        head = at("inet_listen_hashbucket", "nulls_head")
        try:
            old = self.vmi.vmi.profile.member("inet_hashinfo", "listening_hash")
        except KeyError:
            first = self.vmi.read_addr_va(table + at("inet_hashinfo", "lhash2"), 0)
            count = self.vmi.read_32_va(table + at("inet_hashinfo", "lhash2_mask"), 0) + 1
            return self._chains(first + head, count, stride)
        return self._chains(table + old.offset + head, old.size // max(stride, 1), stride)

    def _tables(self, main: int) -> Iterator[int]:
        """Connection tables of single namespaces, since 6.1 (d1e5e6408b30 "tcp: Introduce optional
        per-netns ehash")."""
        heads = _symbol(self.vmi, "net_namespace_list")
        try:
            own = self.vmi.vmi.profile.member("net", "ipv4.tcp_death_row.hashinfo").offset
        except KeyError:
            return
        if heads is None:
            return  # unknown without KALLSYMS_ALL
        found = []
        for net in _ring(self.vmi, heads, self.vmi.get_kernel_struct_offset("net", "list"), NAMESPACES_MAX):
            table = self.vmi.read_addr_va(net + own, 0)
            if table not in (0, main):
                found.append(table)
        yield from dict.fromkeys(found)

    def _chains(self, first: int, count: int, stride: int) -> Iterator[int]:
        if not stride or count > BUCKETS_MAX:
            raise LibvmiError(f"the socket table at {first:#x} is not valid: {count} chains of {stride} bytes")
        read, link = self.vmi.read_addr_va, self.common["nulls_node"]
        met = 0
        for head in range(first, first + count * stride, stride):
            node = read(head, 0)
            while not node & 1:  # a chain ends with an odd number
                met += 1
                if met > SOCKETS_MAX:
                    raise LibvmiError(f"the table at {first:#x} has more than {SOCKETS_MAX} sockets: it loops")
                yield node - link
                node = read(node, 0)

    def _one(self, sock: int) -> tuple[dict[str, Any], int]:
        vmi, common = self.vmi, self.common
        number = vmi.read_8_va(sock + common["state"], 0)
        six = vmi.read_16_va(sock + common["family"], 0) == _AF_INET6
        if six:
            local, remote = (_ipv6(vmi.read_va(sock + common[name], 0, 16)[0]) for name in ("v6_rcv_saddr", "v6_daddr"))
        else:
            local, remote = (
                str(IPv4Address(vmi.read_32_va(sock + common[name], 0).to_bytes(4, "little")))
                for name in ("rcv_saddr", "daddr")
            )
        port = vmi.read_16_va(sock + common["dport"], 0)
        net = vmi.read_addr_va(sock + common["net"], 0)
        uid = inode = 0
        if number == _TIME_WAIT:
            number = vmi.read_8_va(sock + self.substate, 0)
        elif number == _NEW_SYN_RECV:
            uid = vmi.read_32_va(vmi.read_addr_va(sock + common["listener"], 0) + self.uid, 0)
        else:
            uid = vmi.read_32_va(sock + self.uid, 0)
            opened = vmi.read_addr_va(sock + self.socket, 0)
            inode = opened + self.inode if opened else 0
        members = {
            "version": 6 if six else 4,
            "local": local,
            "local_port": vmi.read_16_va(sock + common["num"], 0),
            "remote": remote,
            "remote_port": (port & 0xFF) << 8 | port >> 8,
            "state": TCP_STATES[number] if 0 < number < len(TCP_STATES) else f"state {number}",
            "uid": uid,
            "inode": vmi.read_64_va(inode + self.number, 0) if inode else 0,
            "namespace": vmi.read_32_va(net + self.namespace, 0),
            "address": sock,
        }
        return members, inode


def _openers(vmi: Libvmi, inodes: set[int]) -> dict[int, tuple[int, str]]:
    """The owners of inodes: from address to (pid, name) of the first process that has the inode open."""
    at = vmi.get_kernel_struct_offset
    link, pid, comm, files = (at("task_struct", name) for name in ("tasks", "tgid", "comm", "files"))
    table, most, slots = at("files_struct", "fdt"), at("fdtable", "max_fds"), at("fdtable", "fd")
    inode = at("file", "f_inode")
    found: dict[int, tuple[int, str]] = {}
    for task in _ring(vmi, vmi.translate_ksym2v("init_task") + link, link, TASK_LIMIT):
        held = vmi.read_addr_va(task + files, 0)
        if not held:
            continue
        fdt = vmi.read_addr_va(held + table, 0)
        count = min(vmi.read_32_va(fdt + most, 0), FILES_MAX)
        first = vmi.read_addr_va(fdt + slots, 0)
        for slot in range(first, first + 8 * count, 8):
            file = vmi.read_addr_va(slot, 0)
            if file and (behind := vmi.read_addr_va(file + inode, 0)) in inodes and behind not in found:
                found[behind] = vmi.read_32_va(task + pid, 0), _text(vmi.read_va(task + comm, 0, COMM_SIZE)[0])
        if len(found) == len(inodes):
            break
    return found


@_one_error
def without_file(vmi: Libvmi) -> Iterator[Task]:
    """Processes whose executable was deleted, or never was in a file system (only in memory).

    :raises LibvmiError: as for `tasks`
    :raises LinkError: the guest could not be reached
    """
    names = ("task_struct mm", "mm_struct exe_file", "file f_path.dentry", "dentry d_hash.pprev")
    mm, executable, entry, hashed = (vmi.get_kernel_struct_offset(*name.split()) for name in names)
    for task in tasks(vmi):
        place = vmi.read_addr_va(task.address + mm, 0)
        file = vmi.read_addr_va(place + executable, 0) if place else 0
        if file and not vmi.read_addr_va(vmi.read_addr_va(file + entry, 0) + hashed, 0):
            yield task


@_one_error
def unlisted_modules(vmi: Libvmi) -> Iterator[tuple[str, int]]:
    """Modules in ``/sys/module`` that are not in the module list: the name and the address of ``struct module``.

    A module that is being loaded or removed is among them for a moment. Gives nothing if the kernel was built without
    KALLSYMS_ALL, since the address of the module objects is then unknown.

    :raises LibvmiError: a list cannot be read to its end
    :raises LinkError: the guest could not be reached
    """
    where = _symbol(vmi, "module_kset")
    if where is None:
        return
    listed = {module.address for module in modules(vmi)}
    entry, name = (vmi.get_kernel_struct_offset("kobject", member) for member in ("entry", "name"))
    inside, module = (vmi.get_kernel_struct_offset("module_kobject", member) for member in ("kobj", "mod"))
    head = vmi.read_addr_va(where, 0) + vmi.get_kernel_struct_offset("kset", "list")
    for each in _ring(vmi, head, entry, MODULES_MAX):
        # Built-in modules have an object, but no struct module.
        found = vmi.read_addr_va(each - inside + module, 0)
        if found and found not in listed:
            yield _string(vmi, vmi.read_addr_va(each + name, 0)), found


def whole(vmi: Libvmi, read: Callable[[Libvmi], Iterable[Entry]], tries: int = TRIES) -> list[Entry]:
    """A list read within one hold; read again if it is not consistent.

    The first reading takes several requests, and a process that ends between two of them leaves dangling pointers. The
    next reading takes about one request, since the read-ahead has learned from the first.

    :param read: `tasks`, `modules`, `sockets` or another reader of a list
    :raises LibvmiError: it can't be read in any of ``tries`` tries
    :raises LinkError: the guest could not be reached
    """
    while True:
        tries -= 1
        with pause(vmi):
            try:
                return list(read(vmi))
            except LibvmiError as error:
                if tries <= 0 or isinstance(error, LinkError):
                    raise


def _ring(vmi: Libvmi, head: int, link: int, most: int, whole: bool = False) -> Iterator[int]:
    """Addresses of the structures on a ``list_head`` ring; ``whole``: the head is itself inside a structure."""
    node = vmi.read_addr_va(head, 0)
    if whole:
        yield head - link
    for _ in range(most):
        if node == head:
            return
        yield (node - link) % (1 << 64)
        node = vmi.read_addr_va(node, 0)
    raise LibvmiError(f"the list at {head:#x} has more than {most} entries: it loops, or was changed while it was read")


# Differences between kernels, each with the commit that made it.


def _state_offset(vmi: Libvmi) -> int:
    """Offset of a task's state: an ``unsigned int`` since 5.14 (2f064a59a11f "sched: Change task_struct::state"), the
    low half of a ``long`` before."""
    try:
        return vmi.get_kernel_struct_offset("task_struct", "__state")
    except UnknownNameError:
        return vmi.get_kernel_struct_offset("task_struct", "state")


def _module_memory(vmi: Libvmi) -> tuple[int, list[int]]:
    """Offsets of a module's code address and of the sizes of its parts.

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
    parts = min(memory.size // max(stride, 1), MODULE_PARTS_MAX)
    return base, [size + part * stride for part in range(parts)]


# Text.


def _symbol(vmi: Libvmi, name: str) -> int | None:
    try:
        return vmi.translate_ksym2v(name)
    except UnknownNameError:
        return None


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _string(vmi: Libvmi, address: int) -> str:
    """A string of any length that ends with a NUL."""
    try:
        return vmi.read_str_va(address, 0)
    except UnicodeDecodeError as error:
        return _text(error.object)


def _ipv6(data: bytes) -> str:
    address = IPv6Address(data)
    return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)


def _word(state: int) -> str:
    for bits, word in STATES:
        if state & bits == bits:
            return word
    return "running" if not state else f"state {state:#x}"
