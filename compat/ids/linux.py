"""A Linux guest read by plain LibVMI calls: its tasks, files, sockets and modules, each found in several ways where the
kernel has several. Intrusion detection looks for what one way shows and another does not."""

import struct
from collections import namedtuple

from libvmi import AccessContext, LibvmiError, TranslateMechanism

LIMIT = 1 << 20
"""A list with more entries is treated as a loop: the guest may be hostile."""
CHUNK = 4096
"""Bytes of a table that are read at a time."""

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
"""A process, from its task_struct; ``parent`` is its real parent's task_struct, ``mm`` is 0 for a kernel thread."""
Socket = namedtuple("Socket", "address state local remote")


class Linux:
    """A guest.

    :param vmi: a Libvmi
    :param layout: offsets by "struct member"
    """

    def __init__(self, vmi, layout):
        self.vmi = vmi
        self.layout = layout
        self.symbols = {}

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
                raise LibvmiError(f"the table at {address:#x} cannot be read")
            found += struct.unpack(f"<{size // 8}Q", data)
            address += size
        return found

    # Lists and trees.

    def ring(self, head):
        """Links of a list_head, without the head itself."""
        link = self.pointer(head)
        for _ in range(LIMIT):
            if link == head:
                return
            yield link
            link = self.pointer(link)
        raise LibvmiError(f"the list at {head:#x} does not end")

    def rb_tree(self, node):
        """Nodes of a red-black tree, starting with its root."""
        pending = [node] if node else []
        for _ in range(LIMIT):
            if not pending:
                return
            node = pending.pop()
            yield node
            below = (self.field(node, "rb_node rb_left"), self.field(node, "rb_node rb_right"))
            pending += [child for child in below if child]
        raise LibvmiError(f"the tree at {node:#x} does not end")

    def xarray(self, array):
        """(index, entry) of an xarray that holds pointers (Documentation/core-api/xarray.rst)."""
        entry = self.field(array, "xarray xa_head")
        pending = [(0, entry)] if entry else []
        shift, slots = self.layout["xa_node shift"], self.layout["xa_node slots"]
        for _ in range(LIMIT):
            if not pending:
                return
            index, entry = pending.pop()
            if entry & 3 != 2:
                yield index, entry
            elif entry > CHUNK:
                # A node, its address plus 2; smaller ones are marks, such as that of an entry being made.
                node = entry - 2
                step = self.vmi.read_8_va(node + shift, 0)
                below = self.words(node + slots, 64)
                pending += [(index + (at << step), child) for at, child in enumerate(below) if child]
        raise LibvmiError(f"the xarray at {array:#x} does not end")

    # Tasks.

    def tasks(self):
        """Processes in the list of tasks, the idle task first."""
        link = self.layout["task_struct tasks"]
        head = self.needed("init_task") + link
        yield head - link
        for at in self.ring(head):
            yield at - link

    def threads(self, task):
        """Threads in a process's own list, including the leader."""
        head = self.field(task, "task_struct signal") + self.layout["signal_struct thread_head"]
        for at in self.ring(head):
            yield at - self.layout["task_struct thread_node"]

    def children(self, task):
        """Child processes of all threads of a process, including those it adopted."""
        for thread in self.threads(task):
            for at in self.ring(thread + self.layout["task_struct children"]):
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
        return self.xarray(space + self.layout["pid_namespace idr"] + self.layout["idr idr_rt"])

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
        cred = self.field(task, "task_struct cred")
        return Process(
            task=task,
            pid=self.number(task + self.layout["task_struct tgid"]),
            comm=self.text(task + self.layout["task_struct comm"], 16),
            uid=self.number(cred + self.layout["cred uid"]),
            euid=self.number(cred + self.layout["cred euid"]),
            cred=cred,
            parent=self.field(self.field(task, "task_struct real_parent"), "task_struct group_leader"),
            mm=self.field(task, "task_struct mm"),
        )

    # Files.

    def files(self, task):
        """(descriptor, struct file) of a task; nothing for a kernel thread."""
        files = self.field(task, "task_struct files") if self.field(task, "task_struct mm") else 0
        if not files:
            return
        table = self.field(files, "files_struct fdt")
        most = min(self.number(table + self.layout["fdtable max_fds"]), LIMIT)
        for number, file in enumerate(self.words(self.field(table, "fdtable fd"), most)):
            if file:
                yield number, file

    def executable(self, task):
        """The struct file of the program that a process runs, 0 for a kernel thread."""
        mm = self.field(task, "task_struct mm")
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
        if self._is_root(dentry) and self.field(mnt, "vfsmount mnt_root") != dentry:
            return self._dname(self.inode(file), dentry)
        mount = mnt - self.layout["mount mnt"]
        names = []
        for _ in range(CHUNK):
            if dentry == self.field(mount + self.layout["mount mnt"], "vfsmount mnt_root"):
                above = self.field(mount, "mount mnt_parent")
                if above == mount:
                    return "/" + "/".join(reversed(names))
                dentry, mount = self.field(mount, "mount mnt_mountpoint"), above
                continue
            if self._is_root(dentry):
                return "/" + "/".join(reversed(names))  # in a folder that this mount does not show
            names.append(self.name(dentry))
            dentry = self.field(dentry, "dentry d_parent")
        raise LibvmiError(f"the path of the file at {file:#x} does not end")

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
            count = self.number(info + self.layout[f"inet_hashinfo {name}_mask"]) + 1
            if count > LIMIT:
                raise LibvmiError(f"the table of TCP sockets has {count} buckets")
            for node in self.words(self.field(info, f"inet_hashinfo {name}"), count * words)[head::words]:
                # A chain ends with an odd number instead of a pointer.
                for _ in range(LIMIT):
                    if node & 1 or not node:
                        break
                    yield node - link
                    node = self.pointer(node)

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
        for at in self.ring(self.needed("modules")):
            yield at - self.layout["module list"]

    def kobject_modules(self):
        """Modules in the set of kobjects behind /sys/module, where built-in ones have no struct module."""
        head = self.pointer(self.needed("module_kset")) + self.layout["kset list"]
        for at in self.ring(head):
            kobject = at - self.layout["kobject entry"]
            module = self.field(kobject - self.layout["module_kobject kobj"], "module_kobject mod")
            if module:
                yield module

    def tree_modules(self):
        """Modules in the tree in which the kernel looks up the module of a code address."""
        root = self.needed("mod_tree") + self.layout["mod_tree_root root"] + self.layout["latch_tree_root tree"]
        link = self.layout["mod_tree_node node"] + self.layout["latch_tree_node node"]
        for node in self.rb_tree(self.pointer(root)):
            yield self.field(node - link, "mod_tree_node mod")

    def module_name(self, module):
        return self.text(module + self.layout["module name"], 56)

    # Code.

    def is_text(self, address):
        """Whether an address is in the code of the kernel itself, not of a module."""
        return self.needed("_stext") <= address < self.needed("_etext")


def _endpoint(address, port):
    if len(address) == 4:
        return f"{'.'.join(map(str, address))}:{port}"
    if address[:12] == bytes(10) + b"\xff\xff":
        return f"[::ffff:{'.'.join(map(str, address[12:]))}]:{port}"
    groups = [f"{group:x}" for group in struct.unpack(">8H", address)]
    return f"[{':'.join(groups)}]:{port}" if any(address) else f"[::]:{port}"
