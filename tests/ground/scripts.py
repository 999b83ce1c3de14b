"""Scripts over LibVMI's Python API as others write them: one read at a time, following the kernel's own pointers.

Each listing is a plain function of what memory holds. None knows what answers its reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.guest.ids import Ids
from vmishim.errors import LibvmiError

NR_OPEN = 1 << 20
"""Maximum file descriptors of one process that a script looks at."""
HRTIMER_BASES = 8
"""Clock bases of a CPU (HRTIMER_MAX_CLOCK_BASES, include/linux/hrtimer_defs.h)."""
XA_SLOTS = 64
"""Slots of a node of an XArray (XA_CHUNK_SIZE, include/linux/xarray.h)."""
MNT_CURSOR = 0x10000000
"""Flag of an entry in a list of mounts that is none (include/linux/mount.h)."""
PIDTYPE_PID = 0
PIN, UNSIGNED = 4096, 1 << 64


class Scripts(Ids):
    """Listings by scalar reads of ``vmi``; what a listing needs of the guest's layout it asks once."""

    def has(self, name: str) -> bool:
        """Whether this kernel has a member, such as ``"task_struct thread_group"``."""
        try:
            self.at(name)
        except Exception:
            return False
        return True

    @property
    def init_task(self) -> int:
        return self.vmi.translate_ksym2v("init_task")

    def text(self, address: int) -> str:
        return self.vmi.read_str_va(address, 0)

    def u32(self, address: int) -> int:
        return self.vmi.read_32_va(address, 0)

    # ---- paths ---------------------------------------------------------------------------------------------------

    def executable_paths(self) -> dict[int, str]:
        """pid -> path of the executable, up to the root of the namespace that it was started in."""
        return dict(self.each(lambda task: self.path(file) if (file := self.executable(task)) else None))

    def executable_dentries(self) -> dict[int, str]:
        """The same within its file system only: parent by parent, to the dentry that is its own parent."""
        return dict(self.each(lambda task: self.within(file) if (file := self.executable(task)) else None))

    def each(self, read: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """pid and what ``read`` says of each task, but for tasks that end meanwhile."""
        for task in self.tasks():
            try:
                found = read(task)
                if found is not None:
                    yield self.pid(task), found
            except LibvmiError:
                continue

    def executable(self, task: int) -> int:
        mm = self.pointer(task + self.at("task_struct mm"))
        return self.pointer(mm + self.at("mm_struct exe_file")) if mm else 0

    def within(self, file: int) -> str:
        names, dentry = list[str](), self.pointer(file + self.at("file f_path.dentry"))
        while (parent := self.pointer(dentry + self.at("dentry d_parent"))) != dentry:
            names.append(self.dentry_name(dentry))
            dentry = parent
        return "/" + "/".join(reversed(names))

    def path(self, file: int) -> str:
        names = list[str]()
        dentry = self.pointer(file + self.at("file f_path.dentry"))
        mount = self.pointer(file + self.at("file f_path.mnt")) - self.at("mount mnt")
        while True:
            if dentry == self.pointer(mount + self.at("mount mnt.mnt_root")):
                parent = self.pointer(mount + self.at("mount mnt_parent"))
                if parent == mount:
                    return "/" + "/".join(reversed(names))
                dentry, mount = self.pointer(mount + self.at("mount mnt_mountpoint")), parent
                continue
            parent = self.pointer(dentry + self.at("dentry d_parent"))
            if parent == dentry:
                return "/" + "/".join(reversed(names))
            names.append(self.dentry_name(dentry))
            dentry = parent

    def dentry_name(self, dentry: int) -> str:
        return self.text(self.pointer(dentry + self.at("dentry d_name.name")))

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def backward(self, head: int) -> Iterator[int]:
        """Links of a ring, the last one first."""
        link = self.pointer(head + 8)
        while link != head:
            yield link
            link = self.pointer(link + 8)

    def processes_backward(self) -> dict[int, str]:
        """pid -> comm, the youngest first."""
        link = self.at("task_struct tasks")
        return {self.pid(at - link): self.comm(at - link) for at in self.backward(self.init_task + link)}

    def family(self) -> dict[int, int]:
        """pid -> pid of its parent, from ``init_task`` down through the children of each."""
        children, sibling = self.at("task_struct children"), self.at("task_struct sibling")
        found, todo = {}, [self.init_task]
        while todo:
            task = todo.pop()
            for thread in self.threads_of(task):  # a thread has the children that it started
                for link in self.ring(thread + children):
                    found[self.pid(link - sibling)] = self.pid(task)
                    todo.append(link - sibling)
        return found

    def threads_of(self, task: int) -> Iterator[int]:
        """Each thread of a process."""
        if self.has("task_struct thread_group"):  # until 6.7 (8e1f385104ac)
            link = self.at("task_struct thread_group")
            yield task
            yield from (at - link for at in self.ring(task + link))
        else:
            link = self.at("task_struct thread_node")
            head = self.pointer(task + self.at("task_struct signal")) + self.at("signal_struct thread_head")
            yield from (at - link for at in self.ring(head))

    def thread_groups(self) -> dict[int, int]:
        """tid -> pid, by the ring that links a process's threads; in ``signal_struct`` or, before 6.7, in each."""
        return {self.pid(thread): self.pid(task) for task in self.tasks() for thread in self.threads_of(task)}

    def all_pids(self) -> dict[int, str]:
        """tid -> comm of what has a number in the first pid namespace, by its IDR, an XArray."""
        namespace = self.pointer(
            self.pointer(self.init_task + self.at("task_struct thread_pid"))
            + self.at("pid numbers")
            + self.at("upid ns")
        )
        link = self.at("task_struct pid_links")
        found = {}
        for pid in self.xarray(self.pointer(namespace + self.at("pid_namespace idr.idr_rt.xa_head"))):
            try:
                first = self.pointer(pid + self.at("pid tasks") + 8 * PIDTYPE_PID)
                if first:
                    found[self.pid(first - link)] = self.comm(first - link)
            except LibvmiError:
                continue  # it ends
        return found

    def xarray(self, entry: int) -> Iterator[int]:
        """What an XArray holds, from an entry down."""
        if entry & 3 != 2 or entry < PIN:  # no node
            if entry:
                yield entry
            return
        slots = (entry & ~3) + self.at("xa_node slots")
        for slot in range(XA_SLOTS):
            yield from self.xarray(self.pointer(slots + 8 * slot))

    # ---- memory --------------------------------------------------------------------------------------------------

    def all_mappings(self) -> dict[int, set[tuple[int, int, int]]]:
        """pid -> (start, end, inode or 0) of each mapping, by the maple tree."""
        return dict(self.each(self.mapped))

    def mapped(self, task: int) -> set[tuple[int, int, int]] | None:
        start, end = self.at("vm_area_struct vm_start"), self.at("vm_area_struct vm_end")
        mm = self.pointer(task + self.at("task_struct mm"))
        if not mm:
            return None
        root = self.pointer(mm + self.at("mm_struct mm_mt") + self.at("maple_tree ma_root"))
        areas = self.maple(root) if root & 2 else [root] if root else []
        return {(self.pointer(area + start), self.pointer(area + end), self.inode(area)) for area in areas}

    def inode(self, vma: int) -> int:
        file = self.pointer(vma + self.at("vm_area_struct vm_file"))
        return self.pointer(self.pointer(file + self.at("file f_inode")) + self.at("inode i_ino")) if file else 0

    # ---- files, mounts and file systems ----------------------------------------------------------------------------

    def all_files(self) -> dict[tuple[int, int], int]:
        """(pid, file descriptor) -> inode."""
        return {(pid, number): inode for pid, opened in self.each(self.opened) for number, inode in opened.items()}

    def opened(self, task: int) -> dict[int, int] | None:
        files = self.pointer(task + self.at("task_struct files"))
        if not files:
            return None
        table = self.pointer(files + self.at("files_struct fdt"))
        slots = self.pointer(table + self.at("fdtable fd"))
        found = {}
        for number in range(min(self.u32(table + self.at("fdtable max_fds")), NR_OPEN)):
            file = self.pointer(slots + 8 * number)
            if file:
                inode = self.pointer(file + self.at("file f_inode"))
                found[number] = self.pointer(inode + self.at("inode i_ino"))
        return found

    def mounts(self) -> dict[int, tuple[str, str]]:
        """Number of each mount of ``init_task``'s namespace -> its device and file system's type."""
        namespace = self.pointer(
            self.pointer(self.first_process + self.at("task_struct nsproxy")) + self.at("nsproxy mnt_ns")
        )
        if self.has("mnt_namespace list"):
            link = self.at("mount mnt_list")
            flags = self.at("mount mnt.mnt_flags")
            mounts = [at - link for at in self.ring(namespace + self.at("mnt_namespace list"))]
            # A reader of mountinfo, as systemd is, keeps its place in the list by an entry that is no mount.
            mounts = [mount for mount in mounts if not self.u32(mount + flags) & MNT_CURSOR]
        else:  # since 6.8 (2eea9ce4310d)
            link = self.at("mount mnt_node")
            mounts = [at - link for at in self.tree(self.pointer(namespace + self.at("mnt_namespace mounts")))]
        return {self.u32(mount + self.at("mount mnt_id")): self.mounted(mount) for mount in mounts}

    def mount_tree(self) -> dict[int, int]:
        """Number of each mount -> that of the mount it is on, from the root of process 1 down."""
        root = self.pointer(self.first_process + self.at("task_struct fs")) + self.at("fs_struct root.mnt")
        children, child, number = self.at("mount mnt_mounts"), self.at("mount mnt_child"), self.at("mount mnt_id")
        found, todo = {}, [self.pointer(root) - self.at("mount mnt")]
        while todo:
            mount = todo.pop()
            for link in self.ring(mount + children):
                found[self.u32(link - child + number)] = self.u32(mount + number)
                todo.append(link - child)
        return found

    @property
    def first_process(self) -> int:
        """Process 1."""
        return self.pointer(self.init_task + self.at("task_struct tasks")) - self.at("task_struct tasks")

    def mounted(self, mount: int) -> tuple[str, str]:
        kind = self.pointer(self.pointer(mount + self.at("mount mnt.mnt_sb")) + self.at("super_block s_type"))
        return self.text(self.pointer(mount + self.at("mount mnt_devname"))), self.text(
            self.pointer(kind + self.at("file_system_type name"))
        )

    def tree(self, node: int) -> Iterator[int]:
        """Nodes of an rb-tree, in order."""
        if node:
            yield from self.tree(self.pointer(node + self.at("rb_node rb_left")))
            yield node
            yield from self.tree(self.pointer(node + self.at("rb_node rb_right")))

    def super_blocks(self) -> list[tuple[int, str]]:
        """(device, type) of each mounted file system, sorted, by the ring that leads through process 1's root."""
        root = self.pointer(self.first_process + self.at("task_struct fs")) + self.at("fs_struct root.dentry")
        first = self.pointer(self.pointer(root) + self.at("dentry d_sb"))
        link = self.at("super_block s_list")
        head = self.symbol("super_blocks")
        found = []
        for at in self.ring(head) if head else [first + link, *self.ring(first + link)]:
            device = self.u32(at - link + self.at("super_block s_dev"))
            kind = self.pointer(at - link + self.at("super_block s_type"))
            if kind > UNSIGNED - (1 << 47) and device:  # the head has no type
                found.append((device, self.text(self.pointer(kind + self.at("file_system_type name")))))
        return sorted(found)

    def symbol(self, name: str) -> int:
        """Where a symbol is; 0 where this kernel does not say."""
        try:
            return self.vmi.translate_ksym2v(name)
        except Exception:
            return 0

    def file_systems(self) -> list[str]:
        """Names of the file systems that are known, along the chain from that of process 1's root."""
        root = self.pointer(self.first_process + self.at("task_struct fs")) + self.at("fs_struct root.dentry")
        kind = self.symbol("file_systems")
        kind = (
            self.pointer(kind)
            if kind
            else self.pointer(self.pointer(self.pointer(root) + self.at("dentry d_sb")) + self.at("super_block s_type"))
        )
        found = []
        while kind:
            found.append(self.text(self.pointer(kind + self.at("file_system_type name"))))
            kind = self.pointer(kind + self.at("file_system_type next"))
        return found

    def binary_formats(self) -> set[int]:
        """Addresses of the functions that load a program, by the ring that a program's own format is in."""
        mm = self.pointer(self.first_process + self.at("task_struct mm"))
        link, load = self.at("linux_binfmt lh"), self.at("linux_binfmt load_binary")
        first = self.pointer(mm + self.at("mm_struct binfmt")) + link
        return {self.pointer(at - link + load) for at in [first, *self.ring(first)]} - {0}  # the head is no format

    # ---- devices, objects and timers -------------------------------------------------------------------------------

    def namespaces(self) -> Iterator[int]:
        """Each ``struct net``, the first process's first."""
        link = self.at("net list")
        first = self.pointer(
            self.pointer(self.first_process + self.at("task_struct nsproxy")) + self.at("nsproxy net_ns")
        )
        head = self.symbol("net_namespace_list")
        for at in self.ring(head) if head else [first + link]:
            yield at - link

    def net_devices(self) -> dict[str, int]:
        """Name of each network device -> its number."""
        link = self.at("net_device dev_list")
        return {
            self.text(at - link + self.at("net_device name")): self.u32(at - link + self.at("net_device ifindex"))
            for net in self.namespaces()
            for at in self.ring(net + self.at("net dev_base_head"))
        }

    def kobjects(self) -> list[str]:
        """Names of the kobjects of the kset that network devices are in, that of all devices; sorted."""
        net = next(iter(self.namespaces()))
        device = self.pointer(net + self.at("net dev_base_head")) - self.at("net_device dev_list")
        kset = self.pointer(device + self.at("net_device dev.kobj.kset"))
        link = self.at("kobject entry")
        return sorted(
            self.text(self.pointer(at - link + self.at("kobject name")))
            for at in self.ring(kset + self.at("kset list"))
        )

    def timers(self) -> list[int]:
        """When each high-resolution timer expires, nanoseconds of its clock; sorted. By the trees of each CPU, which
        change all the time: what is not there any more is left out."""
        bases = set()
        for task in self.tasks():
            signal = self.pointer(task + self.at("task_struct signal"))
            clock = self.pointer(signal + self.at("signal_struct real_timer.base"))
            if clock:
                bases.add(self.pointer(clock + self.at("hrtimer_clock_base cpu_base")))
        first, stride = self.at("hrtimer_cpu_base clock_base"), self.vmi.vmi.profile.size("hrtimer_clock_base")
        clocks = (base + first + number * stride for base in bases for number in range(HRTIMER_BASES))
        return sorted(
            expires for clock in clocks for expires in self.expiries(clock + self.at("hrtimer_clock_base active"))
        )

    def expiries(self, pointer: int) -> Iterator[int]:
        """When the timers of the tree that ``pointer`` leads to expire. It may be torn while it is read."""
        todo, seen = [pointer], set[int]()
        while todo:
            try:
                node = self.pointer(todo.pop())
                if node and node not in seen:
                    seen.add(node)
                    todo += [node + self.at("rb_node rb_left"), node + self.at("rb_node rb_right")]
                    yield self.pointer(node + self.at("timerqueue_node expires"))
            except (LibvmiError, OverflowError):  # a pointer of memory that is something else by now
                continue

    def posix_timers(self) -> dict[int, set[int]]:
        """pid -> numbers of its timers (timer_create)."""
        found = {}
        for task in self.tasks():
            at = self.pointer(task + self.at("task_struct signal")) + self.at("signal_struct posix_timers")
            if self.has("k_itimer list.pprev"):  # newer kernels have an hlist
                link, timers = self.pointer(at), set[int]()
                while link:
                    timers.add(self.u32(link - self.at("k_itimer list") + self.at("k_itimer it_id")))
                    link = self.pointer(link)
            else:
                timers = {
                    self.u32(link - self.at("k_itimer list") + self.at("k_itimer it_id")) for link in self.ring(at)
                }
            if timers:
                found[self.pid(task)] = timers
        return found
