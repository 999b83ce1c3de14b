"""A Linux guest read by plain LibVMI calls: its tasks, files, sockets and modules, each found in several ways where the
kernel has several. Intrusion detection looks for what one way shows and another does not."""

import contextlib
import struct
from collections import namedtuple

from libvmi import AccessContext, LibvmiError, TranslateMechanism

LIMIT = 1 << 20
"""Entries of a list that are read: the guest may be hostile."""
KERNEL = 0xFF00000000000000
"""No pointer of the kernel to its own memory is lower (Documentation/arch/x86/x86_64/mm.rst)."""
CHUNK = 4096
"""Bytes of a table that are read at a time."""
SLOTS, FILES = 1 << 24, 1 << 16
"""File descriptors of a process up to which open files are searched, and how many are read."""
ENDS = (1 << 29) - 1
"""Bits of the number at a chain's end that are the chain's (include/net/inet_hashtables.h)."""
BROKEN, MARKS = 64, 100
"""Broken chains after which a table is given up, and sentences about damage that are kept."""

PID, TGID, PGID, SID = range(4)
"""What a struct pid can stand for: a thread, a process, its group, its session (include/linux/pid_types.h)."""
AF_INET, AF_INET6, IPPROTO_TCP = 2, 10, 6
TCP_STATES = (
    "",
    "ESTABLISHED",
    "SYN-SENT",
    "SYN-RECV",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "TIME-WAIT",
    "CLOSE",
    "CLOSE-WAIT",
    "LAST-ACK",
    "LISTEN",
    "CLOSING",
    "NEW-SYN-RECV",
)
S_IFMT, S_IFSOCK, S_IFIFO, S_ISUID = 0o170000, 0o140000, 0o010000, 0o4000

Process = namedtuple("Process", "task pid comm uid euid cred parent mm")
"""A process, from its task_struct; ``parent`` is its real parent's task_struct, ``mm`` is 0 for a kernel thread. What
cannot be read is None."""
Socket = namedtuple("Socket", "address state local remote")


class Damaged(LibvmiError):
    """Something in the guest's memory is not as the kernel makes it."""


class Linux:
    """A guest.

    :param vmi: a Libvmi
    :param layout: offsets by "struct member"
    :ivar damage: what could not be read, in sentences; each once
    """

    def __init__(self, vmi, layout):
        self.vmi = vmi
        self.layout = layout
        self.symbols = {}
        self.damage = {}

    # Damage.

    def mark(self, sentence):
        """Note what could not be read."""
        if len(self.damage) < MARKS:
            self.damage[sentence] = None

    @contextlib.contextmanager
    def marking(self, what):
        """A block that ends where memory cannot be read, which is noted; the program goes on after it."""
        try:
            yield
        except (LibvmiError, OverflowError) as error:
            # Another error, such as a lost connection, ends the program.
            if not (isinstance(error, (Damaged, OverflowError)) or str(error) == "VMI_FAILURE"):
                raise
            self.mark(f"{what}: {reason(error)}")

    # Symbols.

    def symbol(self, name):
        """Address of a kernel symbol, or None."""
        if name not in self.symbols:
            try:
                self.symbols[name] = self.vmi.translate_ksym2v(name)
            except LibvmiError as error:
                if str(error) != "VMI_FAILURE":
                    raise
                self.symbols[name] = None
        return self.symbols[name]

    def needed(self, name):
        """Address of a kernel symbol that the program cannot do without."""
        address = self.symbol(name)
        if address is None:
            raise LibvmiError(f"the kernel has no symbol {name!r}")
        return address

    def symbol_at(self, address):
        """Name of the symbol that begins at an address, or None."""
        try:
            return self.vmi.translate_v2ksym(AccessContext(TranslateMechanism.PROCESS_PID, pid=0), address)
        except LibvmiError as error:
            if str(error) != "VMI_FAILURE":
                raise
            return None

    # Words.

    def pointer(self, address):
        return self.vmi.read_addr_va(address, 0)

    def number(self, address):
        return self.vmi.read_32_va(address, 0)

    def field(self, address, member):
        """The pointer that is a member: field(task, "task_struct mm")."""
        return self.vmi.read_addr_va(address + self.layout[member], 0)

    def text(self, address, most):
        """A string of at most ``most`` bytes; bytes that are not UTF-8 are escaped."""
        data = self.vmi.read_va(address, 0, most)[0]
        return data.split(b"\0", 1)[0].decode(errors="backslashreplace")

    def string(self, address, most=256):
        """A string that ends with a NUL, as `text`; read page by page, as the page after its end may not be mapped."""
        data = b""
        while b"\0" not in data:
            if len(data) == most:
                return data.decode(errors="backslashreplace") + "..."
            at = address + len(data)
            data += self.vmi.read_va(at, 0, min(most - len(data), CHUNK - at % CHUNK))[0]
        return data.split(b"\0", 1)[0].decode(errors="backslashreplace")

    def words(self, address, count):
        """``count`` pointers, from ``address`` on."""
        found = []
        end = address + 8 * count
        while address < end:
            size = min(CHUNK - address % CHUNK, end - address)
            data, got = self.vmi.read_va(address, 0, size)
            if got != size:
                raise Damaged(f"the table at {address:#x} cannot be read")
            found += struct.unpack(f"<{size // 8}Q", data)
            address += size
        return found

    # Lists and trees.

    def ring(self, head, what):
        """Links of a list_head, without the head itself. Where it is broken, it is read backward too."""
        met = set()
        why = yield from self._one_way(head, 0, met)
        if why:
            self.mark(f"{what}: {why}")
            why = yield from self._one_way(head, 8, met)
            if why:
                self.mark(f"{what}, backward: {why}; entries may be missing")

    def _one_way(self, head, ahead, met):
        """Links by the pointers at ``ahead``. Returns why it ended, unless it closed or came to what was met before."""
        joins = frozenset(met)
        before = link = head
        try:
            link, last = self.pointer(head + ahead), self.pointer(head + 8 - ahead)
            while link != head and link not in joins:
                back, following = self.pointer(link + 8 - ahead), self.pointer(link + ahead)
                if link in met:
                    return f"it loops: {before:#x} leads back to {link:#x}"
                if back != before:
                    return f"{before:#x} leads to {link:#x}, which leads back to {back:#x}"
                if len(met) == LIMIT:
                    return f"it has more than {LIMIT} entries"
                met.add(link)
                yield link
                before, link = link, following
        except (LibvmiError, OverflowError) as error:
            if isinstance(error, LibvmiError) and str(error) != "VMI_FAILURE":
                raise
            return f"{before:#x} leads to {link:#x}: {reason(error)}"
        return "" if link != head or before == last else f"it ends with {before:#x}, but should with {last:#x}"

    def rb_tree(self, node, what):
        """Nodes of a red-black tree, starting with its root."""
        pending, met = [node] if node else [], set()
        while pending:
            node = pending.pop()
            if node in met or len(met) == LIMIT:
                self.mark(f"{what}: it loops at {node:#x}")
                continue
            met.add(node)
            with self.marking(f"{what}, {node:#x}"):
                below = (self.field(node, "rb_node rb_left"), self.field(node, "rb_node rb_right"))
                yield node
                pending += [child for child in below if child]

    def xarray(self, array, what):
        """(index, entry) of an xarray that holds pointers (Documentation/core-api/xarray.rst)."""
        entry = self.field(array, "xarray xa_head")
        shift, slots = self.layout["xa_node shift"], self.layout["xa_node slots"]
        pending, met = [(0, entry, 64)] if entry else [], set()
        while pending:
            index, entry, above = pending.pop()
            if entry & 3 != 2:
                yield index, entry
            elif entry > CHUNK:
                # A node, its address plus 2; smaller ones are marks, such as that of an entry being made.
                node = entry - 2
                with self.marking(f"{what}, {node:#x}"):
                    step = self.vmi.read_8_va(node + shift, 0)
                    if node in met or step >= above or len(met) == LIMIT:
                        raise Damaged("it is no node of this array")
                    met.add(node)
                    below = self.words(node + slots, 64)
                    pending += [(index + (at << step), child, step) for at, child in enumerate(below) if child]

    # Tasks.

    def tasks(self):
        """Processes in the list of tasks, the idle task first: the task_struct of each one's main thread."""
        link = self.layout["task_struct tasks"]
        head = self.needed("init_task") + link
        yield head - link
        for at in self.ring(head, "the list of tasks"):
            yield at - link

    def threads(self, task):
        """Threads of a process, the main thread first, which may have exited while others run on."""
        yield task
        with self.marking(f"the threads of {self.whose(task)}"):
            head = self.field(task, "task_struct signal") + self.layout["signal_struct thread_head"]
            for at in self.ring(head, f"the threads of {self.whose(task)}"):
                thread = at - self.layout["task_struct thread_node"]
                if thread != task:
                    yield thread

    def whose(self, task):
        """A process, for sentences."""
        try:
            name = self.text(task + self.layout["task_struct comm"], 16)
            return f"{self.number(task + self.layout['task_struct tgid'])} {name}"
        except (LibvmiError, OverflowError):
            return f"the process at {task:#x}"

    def children(self, task):
        """Child processes of all threads of a process, including those it adopted."""
        for thread in self.threads(task):
            what = f"the children of {self.whose(task)}"
            for at in self.ring(thread + self.layout["task_struct children"], what):
                yield at - self.layout["task_struct sibling"]

    def descendants(self, task):
        """All processes below one, found through the lists of children."""
        pending, seen = [task], {task}
        while pending:
            for child in self.children(pending.pop()):
                if child not in seen:
                    seen.add(child)
                    pending.append(child)
                    yield child

    def pids(self):
        """(number, struct pid) of every entry in the kernel's table of pids."""
        space = self.needed("init_pid_ns")
        return self.xarray(space + self.layout["pid_namespace idr"] + self.layout["idr idr_rt"], "the table of pids")

    def task_of(self, pid, kind):
        """The first task that a struct pid stands for, 0 if none."""
        link = self.pointer(pid + self.layout["pid tasks"] + 8 * kind)
        # An hlist_node, two pointers, for each kind.
        return link - self.layout["task_struct pid_links"] - 16 * kind if link else 0

    def session_leader(self, task):
        """The leader of a process's session, 0 if it is gone."""
        pid = self.pointer(self.field(task, "task_struct signal") + self.layout["signal_struct pids"] + 8 * SID)
        return self.task_of(pid, TGID) if pid else 0

    def process(self, task):
        """A process; or a thread, with its own credentials."""
        pid, comm = (
            self.number(task + self.layout["task_struct tgid"]),
            self.text(task + self.layout["task_struct comm"], 16),
        )
        cred = uid = euid = parent = mm = None
        with self.marking(f"cred of {pid} {comm}"):
            cred = self.field(task, "task_struct cred")
            uid, euid = self.number(cred + self.layout["cred uid"]), self.number(cred + self.layout["cred euid"])
        with self.marking(f"real_parent of {pid} {comm}"):
            parent = self.field(self.field(task, "task_struct real_parent"), "task_struct group_leader")
        with self.marking(f"mm of {pid} {comm}"):
            mm = self.memory(task)
        return Process(task, pid, comm, uid, euid, cred, parent, mm)

    def users(self, task):
        """The process by its main thread, and by each thread that does not share that one's credentials."""
        process = self.process(task)
        yield process
        for thread in self.threads(task):
            with self.marking(f"cred of a thread of {process.pid} {process.comm}"):
                if self.field(thread, "task_struct cred") != self.field(task, "task_struct cred"):
                    yield self.process(thread)

    def memory(self, task):
        """The mm_struct of a process, 0 for a kernel thread. The main thread has none once it has exited."""
        mm = self.field(task, "task_struct mm")
        if mm or not self.number(task + self.layout["task_struct exit_state"]):
            return mm
        rest = (self.field(thread, "task_struct mm") for thread in self.threads(task))
        return next(filter(None, rest), 0)

    # Files.

    def files(self, task):
        """(thread, descriptor, struct file) of a process: of the table that its threads share, and of those that single
        threads have for themselves; nothing for a kernel thread."""
        if not self.memory(task):
            return
        searched = {0}
        for thread in self.threads(task):
            with self.marking(f"open files of {self.whose(task)}"):
                files = self.field(thread, "task_struct files")
                if files not in searched:
                    searched.add(files)
                    for number, file in self._open(self.field(files, "files_struct fdt"), self.whose(task)):
                        yield thread, number, file

    def _open(self, table, whose):
        """(descriptor, struct file) of what is open in a table: what is used of it is read, and no more."""
        count = self.number(table + self.layout["fdtable max_fds"])
        if count > SLOTS:
            self.mark(f"open files of {whose}: searched up to descriptor {SLOTS} of {count}")
        slots, used = self.field(table, "fdtable fd"), self.field(table, "fdtable open_fds")
        start, end, found = used, used + min(count, SLOTS) // 8, 0
        while used < end:
            size = min(CHUNK - used % CHUNK, end - used)
            bitmap = self.vmi.read_va(used, 0, size)[0]
            # Pieces of the bitmap, and of the table the part that each says is used.
            for at in range(0, size, 64):
                bits = int.from_bytes(bitmap[at : at + 64], "little")
                low, high = max((bits & -bits).bit_length() - 1, 0), bits.bit_length()
                for number, file in enumerate(self.words(slots + 8 * (8 * at + low), high - low), low):
                    if file and bits >> number & 1:
                        found += 1
                        if found > FILES:
                            self.mark(f"open files of {whose}: more than the {FILES} that are read")
                            return
                        yield 8 * (used - start + at) + number, file
            used, slots = used + size, slots + 64 * size

    def executable(self, task):
        """The struct file of the program that a process runs, 0 for a kernel thread."""
        mm = self.memory(task)
        return self.field(mm, "mm_struct exe_file") if mm else 0

    def inode(self, file):
        return self.field(file, "file f_inode")

    def mode(self, inode):
        return self.vmi.read_16_va(inode + self.layout["inode i_mode"], 0)

    def is_deleted(self, file):
        """Whether the file is in no folder any more."""
        return self.number(self.inode(file) + self.layout["inode i_nlink"]) == 0

    def path(self, file):
        """A file's name, as /proc/PID/fd shows it, without the mark for a deleted file."""
        dentry, mnt = self.field(file, "file f_path.dentry"), self.field(file, "file f_path.mnt")
        root = self.field(mnt, "vfsmount mnt_root")
        if root < KERNEL:
            raise Damaged(f"{mnt:#x} is no mount")
        if self._is_root(dentry) and root != dentry:
            return self._dname(self.inode(file), dentry)
        mount = mnt - self.layout["mount mnt"]
        names, met = [], set()
        while (dentry, mount) not in met:
            met.add((dentry, mount))
            root = self.field(mount + self.layout["mount mnt"], "vfsmount mnt_root")
            if root < KERNEL:
                raise Damaged(f"{mount:#x} is no mount")
            if dentry == root:
                above = self.field(mount, "mount mnt_parent")
                if above == mount:
                    return "/" + "/".join(reversed(names))
                dentry, mount = self.field(mount, "mount mnt_mountpoint"), above
                continue
            if self._is_root(dentry):
                return "/" + "/".join(reversed(names))  # in a folder that this mount does not show
            names.append(self.name(dentry))
            dentry = self.field(dentry, "dentry d_parent")
        raise Damaged(f"the path of the file at {file:#x} does not end")

    def _dname(self, inode, dentry):
        """The name of a file that is in no folder, as the kernel's d_dname functions make it."""
        kind = {S_IFSOCK: "socket", S_IFIFO: "pipe"}.get(self.mode(inode) & S_IFMT) or self.file_system(dentry)
        if kind == "anon_inodefs":  # eventfd, epoll, BPF maps, io_uring and the like
            return f"anon_inode:{self.name(dentry)}"
        if kind == "pidfs":  # since 6.9 (cb12fd8e0dab "pidfd: add pidfs"); the names of its files stayed
            return "anon_inode:[pidfd]"
        if kind == "nsfs":
            operations = self.field(self.field(inode, "inode i_private"), "ns_common ops")
            kind = self.string(self.field(operations, "proc_ns_operations name"))
        elif kind == "dmabuf":
            name = self.field(dentry, "dentry d_fsdata") + self.layout["dma_buf name"]
            return f"/{self.name(dentry)}:{self.string(self.pointer(name)) if self.pointer(name) else ''}"
        elif kind not in ("socket", "pipe"):
            return f"/{self.name(dentry)}"  # a memfd, shared memory
        return f"{kind}:[{self.field(inode, 'inode i_ino')}]"

    def file_system(self, dentry):
        kind = self.field(self.field(dentry, "dentry d_sb"), "super_block s_type")
        return self.string(self.field(kind, "file_system_type name"))

    def _is_root(self, dentry):
        return self.field(dentry, "dentry d_parent") == dentry

    def name(self, dentry):
        return self.string(self.field(dentry, "dentry d_name.name"))

    # Sockets.

    def socket_of(self, file):
        """The TCP socket (struct sock) that a file is, 0 if none."""
        if self.field(file, "file f_op") != self.needed("socket_file_ops"):
            return 0
        sock = self.field(self.field(file, "file private_data"), "socket sk")
        if not sock:
            return 0
        family = self.vmi.read_16_va(sock + self.layout["sock __sk_common.skc_family"], 0)
        protocol = self.vmi.read_16_va(sock + self.layout["sock sk_protocol"], 0)
        return sock if family in (AF_INET, AF_INET6) and protocol == IPPROTO_TCP else 0

    def hashed_sockets(self):
        """TCP sockets (struct sock) in the tables of connections and of listeners."""
        info = self.needed("tcp_hashinfo")
        link = self.layout["sock __sk_common.skc_nulls_node"]
        # inet_listen_hashbucket is a lock and a head.
        tables = (
            ("ehash", 1, self.layout["inet_ehash_bucket chain"] // 8),
            ("lhash2", 2, self.layout["inet_listen_hashbucket nulls_head"] // 8),
        )
        for name, words, head in tables:
            what, broken = f"the table {name} of TCP sockets", 0
            with self.marking(what):
                count = self.number(info + self.layout[f"inet_hashinfo {name}_mask"]) + 1
                if count > LIMIT:
                    raise Damaged(f"it has {count} chains")
                table = self.field(info, f"inet_hashinfo {name}")
                met = set()
                for number, node in enumerate(self.words(table, count * words)[head::words]):
                    before = table + 8 * (number * words + head)
                    with self.marking(f"{what}, chain {number}"):
                        broken += 1
                        # A chain ends with an odd number instead of a pointer.
                        while not node & 1:
                            back, following = self.pointer(node + 8), self.pointer(node)
                            if node in met or back != before:
                                raise Damaged(f"{before:#x} leads to {node:#x}, which leads back to {back:#x}")
                            if (
                                table <= node < table + 8 * count * words
                            ):  # the word after it may lead back all the same
                                raise Damaged(f"{before:#x} leads to {node:#x}, which is among the heads")
                            met.add(node)
                            yield node - link
                            before, node = node, following
                        if node >> 1 & ENDS != number:
                            raise Damaged(f"it ends like chain {node >> 1 & ENDS}")
                        broken -= 1
                    if broken == BROKEN:
                        raise Damaged(f"{broken} chains are broken, and the rest was not read")

    def socket(self, sock):
        common = "sock __sk_common.skc_"
        family = self.vmi.read_16_va(sock + self.layout[common + "family"], 0)
        state = self.vmi.read_8_va(sock + self.layout[common + "state"], 0)
        local = self.vmi.read_16_va(sock + self.layout[common + "num"], 0)
        remote = self.vmi.read_16_va(sock + self.layout[common + "dport"], 0)
        kinds, size = (("v6_rcv_saddr", "v6_daddr"), 16) if family == AF_INET6 else (("rcv_saddr", "daddr"), 4)
        here, there = (self.vmi.read_va(sock + self.layout[common + kind], 0, size)[0] for kind in kinds)
        return Socket(
            address=sock,
            state=TCP_STATES[state] if state < len(TCP_STATES) else str(state),
            local=_endpoint(here, local),
            remote=_endpoint(there, (remote & 0xFF) << 8 | remote >> 8),
        )

    # Modules.

    def listed_modules(self):
        """Modules (struct module) in the list of modules."""
        for at in self.ring(self.needed("modules"), "the list of modules"):
            yield at - self.layout["module list"]

    def kobject_modules(self):
        """Modules in the set of kobjects behind /sys/module, where built-in ones have no struct module."""
        what = "the set of kobjects"
        with self.marking(what):
            head = self.pointer(self.needed("module_kset")) + self.layout["kset list"]
            for at in self.ring(head, what):
                kobject = at - self.layout["kobject entry"]
                with self.marking(f"{what}, {kobject:#x}"):
                    module = self.field(kobject - self.layout["module_kobject kobj"], "module_kobject mod")
                    if module:
                        yield module

    def tree_modules(self):
        """Modules in the tree in which the kernel looks up the module of a code address."""
        root = self.needed("mod_tree") + self.layout["mod_tree_root root"] + self.layout["latch_tree_root tree"]
        link = self.layout["mod_tree_node node"] + self.layout["latch_tree_node node"]
        what = "the tree of code"
        for node in self.rb_tree(self.pointer(root), what):
            with self.marking(f"{what}, {node:#x}"):
                yield self.field(node - link, "mod_tree_node mod")

    def module_name(self, module):
        return self.text(module + self.layout["module name"], 56)

    # Code.

    def is_text(self, address):
        """Whether an address is in the code of the kernel itself, not of a module."""
        return self.needed("_stext") <= address < self.needed("_etext")


def reason(error):
    """What an error says; a note says more, where it has one."""
    return "; ".join(getattr(error, "__notes__", ())) or str(error)


def _endpoint(address, port):
    if len(address) == 4:
        return f"{'.'.join(map(str, address))}:{port}"
    if address[:12] == bytes(10) + b"\xff\xff":
        return f"[::ffff:{'.'.join(map(str, address[12:]))}]:{port}"
    groups = [f"{group:x}" for group in struct.unpack(">8H", address)]
    return f"[{':'.join(groups)}]:{port}" if any(address) else f"[::]:{port}"
