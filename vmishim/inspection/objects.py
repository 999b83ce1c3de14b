"""The guest kernel's lists as Python objects, read through `Libvmi`: what ``vmishim ps``, ``lsmod`` and ``ss`` show.

The lists are the guest kernel's own: a rootkit can unlink entries from them. Each reader begins at the list's head, as
LibVMI's examples do, and reads member by member; the read-ahead below turns that into one request instead of
thousands. Names and numbers are those of the kernel.

A list is consistent only inside ``with pause(vmi)`` (see `vmishim.inspection.lists.whole`): outside, a list that
changes meanwhile may show both states.

Each reader takes a `Damage`. Given one, it notes there what cannot be read, marks the entry, and goes on; without, it
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from ipaddress import IPv4Address, IPv6Address
from typing import Any, ParamSpec, TypeVar

from vmishim.errors import LibvmiError, UnknownNameError
from vmishim.inspection.lists import STRICT, UNREADABLE, Damage, chains, ring
from vmishim.inspection.open_files import OpenFiles
from vmishim.libvmi import Libvmi
from vmishim.libvmi.limits import TASK_LIMIT

Entry = TypeVar("Entry")
Arguments = ParamSpec("Arguments")

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
ENDED = ("zombie", "dead")
"""States of a thread that has exited."""
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
LISTENING_NULLS = 1 << 29
"""Number that ends the first chain of the listeners' table (include/net/inet_hashtables.h)."""


@dataclass(frozen=True)
class Task:
    """A process, from the ``task_struct`` of its leading thread; or one of its threads.

    The leading thread may have exited while others run on: it is a zombie then, and its memory, files and namespaces
    are gone, not those of the process.
    """

    pid: int
    """Number of the thread, in the guest's first pid namespace."""
    tgid: int
    """Number of the process."""
    ppid: int | None
    """Number of the parent process (``real_parent``); None if it cannot be read."""
    uid: int | None
    """Real user id, in the guest's first user namespace; None if it cannot be read."""
    comm: str
    """Its name in the kernel, up to 15 bytes; bytes that are not UTF-8 are escaped."""
    state: str
    """A word of ``STATES``, or "running"."""
    address: int
    """Address of its ``task_struct``."""
    unreadable: str = ""
    """What of it cannot be read, and why; empty if all can."""


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
    unreadable: str = ""
    """As in `Task`."""


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
    uid: int | None
    """Its owner's user id, in the guest's first user namespace; 0 in TIME_WAIT; None if it cannot be read."""
    inode: int | None
    """The number in ``/proc/PID/fd``; 0 if no process has it open (any more, or yet); None if it cannot be read."""
    namespace: int | None
    """Number of its network namespace, as in ``/proc/PID/ns/net``; None if it cannot be read."""
    pid: int | None
    """Number of the first process in the task list that has it open; 0 if none has; None if some open files could not
    be searched and it may be among them."""
    comm: str
    """The name of that process."""
    address: int
    """Address of its ``struct sock``, ``inet_timewait_sock`` or ``request_sock``."""
    unreadable: str = ""
    """As in `Task`."""


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
def tasks(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[Task]:
    """The processes in the guest's task list, the idle task (pid 0) first.

    :param damage: where to note what cannot be read
    :raises LibvmiError: without ``damage``, something cannot be read
    :raises LinkError: the guest could not be reached
    """
    processes = _Tasks(vmi, damage)
    for address in processes.leaders():
        task = processes.task(address)
        if task is not None:
            yield task


@_one_error
def threads(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[Task]:
    """All threads of the processes in the guest's task list, each process's leading thread first.

    :param damage: where to note what cannot be read
    :raises LibvmiError: without ``damage``, something cannot be read
    :raises LinkError: the guest could not be reached
    """
    processes = _Tasks(vmi, damage)
    for leader in processes.leaders():
        for address in (leader, *processes.others(leader)):
            task = processes.task(address)
            if task is not None:
                yield task


class _Tasks:
    """Reads the processes and threads of one guest, with offsets that are looked up once."""

    def __init__(self, vmi: Libvmi, damage: Damage) -> None:
        self.vmi, self.damage = vmi, damage
        names = ("tasks", "pid", "tgid", "comm", "real_parent", "cred", "exit_state", "signal", "thread_node", "files")
        self.at = {name: vmi.get_kernel_struct_offset("task_struct", name) for name in names}
        self.state = _state_offset(vmi)
        self.uid = vmi.get_kernel_struct_offset("cred", "uid")
        self.group = vmi.get_kernel_struct_offset("signal_struct", "thread_head")

    def leaders(self) -> Iterator[int]:
        """The ``task_struct`` of each process's leading thread."""
        link = self.at["tasks"]
        first = self.vmi.translate_ksym2v("init_task")
        yield first
        yield from ring(self.vmi, first + link, link, TASK_LIMIT, self.damage, "the list of processes")

    def others(self, leader: int) -> Iterator[int]:
        """The other threads of a process."""
        try:
            head = self.vmi.read_addr_va(leader + self.at["signal"], 0) + self.group
            for thread in ring(
                self.vmi, head, self.at["thread_node"], TASK_LIMIT, self.damage, f"the threads of {self.whose(leader)}"
            ):
                if thread != leader:
                    yield thread
        except UNREADABLE as error:
            self.damage.add(f"the threads of {self.whose(leader)}", error)

    def whose(self, task: int) -> str:
        """A process, for marks."""
        try:
            return f"{self.vmi.read_32_va(task + self.at['tgid'], 0)} {self.comm(task)}"
        except UNREADABLE:
            return f"the process at {task:#x}"

    def comm(self, task: int) -> str:
        return _text(self.vmi.read_va(task + self.at["comm"], 0, COMM_SIZE)[0])

    def credentials(self, task: int) -> int:
        """Address of a thread's ``struct cred``."""
        return self.vmi.read_addr_va(task + self.at["cred"], 0)

    def task(self, task: int) -> Task | None:
        """A process or thread; None if nothing of it can be read."""
        vmi, at = self.vmi, self.at
        ppid = uid = None
        unreadable = ""
        try:
            pid, tgid = vmi.read_32_va(task + at["pid"], 0), vmi.read_32_va(task + at["tgid"], 0)
            comm = self.comm(task)
            state = _word(vmi.read_32_va(task + self.state, 0) | vmi.read_32_va(task + at["exit_state"], 0))
        except UNREADABLE as error:
            self.damage.add(f"the process at {task:#x}", error)
            return None
        try:
            ppid = vmi.read_32_va(vmi.read_addr_va(task + at["real_parent"], 0) + at["tgid"], 0)
        except UNREADABLE as error:
            unreadable = self.damage.add(f"real_parent of {pid} {comm}", error)
        try:
            uid = vmi.read_32_va(self.credentials(task) + self.uid, 0)
        except UNREADABLE as error:
            unreadable = "; ".join(filter(None, (unreadable, self.damage.add(f"cred of {pid} {comm}", error))))
        return Task(pid, tgid, ppid, uid, comm, state, task, unreadable)


@_one_error
def modules(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[Module]:
    """The modules in the guest's module list, the last loaded first; none if its kernel does not support modules.

    :param damage: where to note what cannot be read
    :raises LibvmiError: the list's address is unknown; or without ``damage``, something cannot be read
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
    for module in ring(vmi, head, link, MODULES_MAX, damage, "the list of modules"):
        try:
            number = vmi.read_32_va(module + state, 0)
            found = Module(
                name=_text(vmi.read_va(module + name, 0, longest)[0]),
                size=sum(vmi.read_32_va(module + size, 0) for size in sizes),
                state=MODULE_STATES[number] if number < len(MODULE_STATES) else f"state {number}",
                base=vmi.read_addr_va(module + base, 0),
                address=module,
            )
        except UNREADABLE as error:
            damage.add(f"the module at {module:#x}", error)
            continue
        yield found


@_one_error
def sockets(vmi: Libvmi, damage: Damage = STRICT, owners: bool = True) -> Iterator[Socket]:
    """The guest's TCP sockets: connections first, then listeners.

    :param damage: where to note what cannot be read
    :param owners: find the processes that have them open, which reads the open files of all threads
    :raises LibvmiError: the tables' address is unknown (no TCP?); or without ``damage``, something cannot be read
    :raises LinkError: the guest could not be reached
    """
    found = list(_Sockets(vmi, damage).all())
    inodes = {inode for _, inode in found if inode}
    before = damage.count
    known = _openers(vmi, inodes, damage) if owners and inodes else {}
    unknown = None if damage.count > before else 0
    for socket, inode in found:
        pid, comm = known.get(inode, (unknown if inode else 0, ""))
        yield Socket(**socket, pid=pid, comm=comm)


class _Sockets:
    """Reads the sockets of one guest, with offsets that are looked up once."""

    def __init__(self, vmi: Libvmi, damage: Damage) -> None:
        self.vmi, self.damage = vmi, damage
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
        for table in (self._connections(main), *map(self._connections, self._tables(main)), self._listeners(main)):
            for sock in table:
                # A socket that moves to another chain while tables are read would appear twice.
                if sock not in seen:
                    seen.add(sock)
                    one = self._one(sock)
                    if one is not None:
                        yield one

    def _connections(self, table: int) -> Iterator[int]:
        at = self.vmi.get_kernel_struct_offset
        try:
            first = self.vmi.read_addr_va(table + at("inet_hashinfo", "ehash"), 0) + at("inet_ehash_bucket", "chain")
            count = self.vmi.read_32_va(table + at("inet_hashinfo", "ehash_mask"), 0) + 1
        except UNREADABLE as error:
            self.damage.add(f"the connections of the table at {table:#x}", error)
            return
        yield from self._chains("connections", first, count, self.vmi.vmi.profile.size("inet_ehash_bucket"), 0)

    def _listeners(self, table: int) -> Iterator[int]:
        """In ``lhash2`` since 5.19 (cae3873c5b3a "net: inet: Retire port only listening_hash")."""
        at, stride = self.vmi.get_kernel_struct_offset, self.vmi.vmi.profile.size("inet_listen_hashbucket")
        head = at("inet_listen_hashbucket", "nulls_head")
        try:
            old = self.vmi.vmi.profile.member("inet_hashinfo", "listening_hash")
        except KeyError:
            first = self.vmi.read_addr_va(table + at("inet_hashinfo", "lhash2"), 0)
            count = self.vmi.read_32_va(table + at("inet_hashinfo", "lhash2_mask"), 0) + 1
            return self._chains("listeners", first + head, count, stride, LISTENING_NULLS)
        count = old.size // max(stride, 1)
        return self._chains("listeners", table + old.offset + head, count, stride, LISTENING_NULLS)

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
        link = self.vmi.get_kernel_struct_offset("net", "list")
        for net in ring(self.vmi, heads, link, NAMESPACES_MAX, self.damage, "the list of network namespaces"):
            table = self.vmi.read_addr_va(net + own, 0)
            if table not in (0, main):
                found.append(table)
        yield from dict.fromkeys(found)

    def _chains(self, what: str, first: int, count: int, stride: int, nulls: int) -> Iterator[int]:
        if not stride or count > BUCKETS_MAX:
            raise LibvmiError(f"the socket table at {first:#x} is not valid: {count} chains of {stride} bytes")
        table, link = f"the table of {what} at {first:#x}", self.common["nulls_node"]
        return chains(self.vmi, first, count, stride, link, nulls, SOCKETS_MAX, self.damage, table)

    def _one(self, sock: int) -> tuple[dict[str, Any], int] | None:
        vmi, common = self.vmi, self.common
        try:
            number = vmi.read_8_va(sock + common["state"], 0)
            six = vmi.read_16_va(sock + common["family"], 0) == _AF_INET6
            if six:
                names = ("v6_rcv_saddr", "v6_daddr")
                local, remote = (_ipv6(vmi.read_va(sock + common[name], 0, 16)[0]) for name in names)
            else:
                local, remote = (
                    str(IPv4Address(vmi.read_32_va(sock + common[name], 0).to_bytes(4, "little")))
                    for name in ("rcv_saddr", "daddr")
                )
            port = vmi.read_16_va(sock + common["dport"], 0)
            local_port = vmi.read_16_va(sock + common["num"], 0)
            kind = number
            if kind == _TIME_WAIT:
                number = vmi.read_8_va(sock + self.substate, 0)
        except UNREADABLE as error:
            self.damage.add(f"the socket at {sock:#x}", error)
            return None
        namespace: int | None = None
        uid: int | None = None
        opened: int | None = None
        inode, lost = 0, []
        where = f"{local}:{local_port} - {remote}:{(port & 0xFF) << 8 | port >> 8}"
        try:
            namespace = vmi.read_32_va(vmi.read_addr_va(sock + common["net"], 0) + self.namespace, 0)
        except UNREADABLE as error:
            lost.append(self.damage.add(f"skc_net of {where}", error))
        try:
            uid = self._owner(sock, kind)
        except UNREADABLE as error:
            lost.append(self.damage.add(f"the user of {where}", error))
        try:
            if kind not in (_TIME_WAIT, _NEW_SYN_RECV) and (socket := vmi.read_addr_va(sock + self.socket, 0)):
                inode = socket + self.inode
            opened = vmi.read_64_va(inode + self.number, 0) if inode else 0
        except UNREADABLE as error:
            lost.append(self.damage.add(f"sk_socket of {where}", error))
        members = {
            "version": 6 if six else 4,
            "local": local,
            "local_port": local_port,
            "remote": remote,
            "remote_port": (port & 0xFF) << 8 | port >> 8,
            "state": TCP_STATES[number] if 0 < number < len(TCP_STATES) else f"state {number}",
            "uid": uid,
            "inode": opened,
            "namespace": namespace,
            "address": sock,
            "unreadable": "; ".join(lost),
        }
        return members, inode

    def _owner(self, sock: int, kind: int) -> int:
        if kind == _TIME_WAIT:
            return 0
        if kind == _NEW_SYN_RECV:
            sock = self.vmi.read_addr_va(sock + self.common["listener"], 0)
        return self.vmi.read_32_va(sock + self.uid, 0)


def _openers(vmi: Libvmi, inodes: set[int], damage: Damage) -> dict[int, tuple[int, str]]:
    """The owners of inodes: from address to (pid, name) of the first process that has the inode open."""
    processes, files = _Tasks(vmi, damage), OpenFiles(vmi, damage)
    found: dict[int, tuple[int, str]] = {}
    searched = {0}
    for leader in processes.leaders():
        whose = ""
        for thread in (leader, *processes.others(leader)):
            try:
                table = vmi.read_addr_va(thread + processes.at["files"], 0)
                if table in searched:
                    continue
                searched.add(table)
                whose = whose or processes.whose(leader)
                for inode in files.inodes(table, whose):
                    if inode in inodes and inode not in found:
                        pid = vmi.read_32_va(leader + processes.at["tgid"], 0)
                        found[inode] = pid, processes.comm(leader)
            except UNREADABLE as error:
                damage.add(f"open files of {processes.whose(leader)}", error)
        if len(found) == len(inodes):
            break
    return found


@_one_error
def without_file(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[Task]:
    """Processes whose executable was deleted, or never was in a file system (only in memory).

    :param damage: where to note what cannot be read
    :raises LibvmiError: as for `tasks`
    :raises LinkError: the guest could not be reached
    """
    names = ("task_struct mm", "mm_struct exe_file", "file f_path.dentry", "dentry d_hash.pprev")
    mm, executable, entry, hashed = (vmi.get_kernel_struct_offset(*name.split()) for name in names)
    processes = _Tasks(vmi, damage)
    for task in tasks(vmi, damage):
        try:
            memory = vmi.read_addr_va(task.address + mm, 0)
            if not memory and task.state in ENDED:
                # The leading thread has exited; the others still run the program.
                rest = (vmi.read_addr_va(thread + mm, 0) for thread in processes.others(task.address))
                memory = next(filter(None, rest), 0)
            file = vmi.read_addr_va(memory + executable, 0) if memory else 0
            if file and not vmi.read_addr_va(vmi.read_addr_va(file + entry, 0) + hashed, 0):
                yield task
        except UNREADABLE as error:
            damage.add(f"the executable of {task.pid} {task.comm}", error)


@_one_error
def other_users(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[Task]:
    """Threads that do not share their leading thread's credentials (``struct cred``), as all do until one of them makes
    the system call for itself alone.

    :param damage: where to note what cannot be read
    :raises LibvmiError: as for `tasks`
    :raises LinkError: the guest could not be reached
    """
    processes = _Tasks(vmi, damage)
    for leader in processes.leaders():
        try:
            shared = processes.credentials(leader)
            for thread in processes.others(leader):
                if processes.credentials(thread) != shared and (task := processes.task(thread)) is not None:
                    yield task
        except UNREADABLE as error:
            damage.add(f"the credentials of {processes.whose(leader)}", error)


@_one_error
def unlisted_modules(vmi: Libvmi, damage: Damage = STRICT) -> Iterator[tuple[str, int]]:
    """Modules in ``/sys/module`` that are not in the module list: the name and the address of ``struct module``.

    A module that is being loaded or removed is among them for a moment. Gives nothing if the kernel was built without
    KALLSYMS_ALL, since the address of the module objects is then unknown.

    :param damage: where to note what cannot be read
    :raises LibvmiError: without ``damage``, something cannot be read
    :raises LinkError: the guest could not be reached
    """
    where = _symbol(vmi, "module_kset")
    if where is None:
        return
    listed = {module.address for module in modules(vmi, damage)}
    entry, name = (vmi.get_kernel_struct_offset("kobject", member) for member in ("entry", "name"))
    inside, module = (vmi.get_kernel_struct_offset("module_kobject", member) for member in ("kobj", "mod"))
    try:
        head = vmi.read_addr_va(where, 0) + vmi.get_kernel_struct_offset("kset", "list")
        for each in ring(vmi, head, entry, MODULES_MAX, damage, "the modules' objects"):
            try:
                # Built-in modules have an object, but no struct module.
                found = vmi.read_addr_va(each - inside + module, 0)
                if found and found not in listed:
                    vmi.read_8_va(found, 0)  # or this is no module
                    yield _string(vmi, vmi.read_addr_va(each + name, 0)), found
            except UNREADABLE as error:
                damage.add(f"the module's object at {each:#x}", error)
    except UNREADABLE as error:
        damage.add("the modules' objects", error)


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
