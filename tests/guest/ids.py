"""What an IDS does, written the way LibVMI's users write it: one read at a time, no knowledge of what answers it."""

from __future__ import annotations

from collections.abc import Iterator

from vmishim.errors import LibvmiError
from vmishim.libvmi import Libvmi

FEW_BUCKETS = "thash_entries=1024"
"""For kernels whose hash table of TCP connections is read word by word: 1,024 buckets, and not the 8,192 of a GiB."""


class Ids:
    """Listings by scalar reads of ``vmi``."""

    def __init__(self, vmi: Libvmi) -> None:
        self.vmi = vmi
        self._offsets: dict[str, int] = {}

    def at(self, name: str) -> int:
        """``"task_struct comm"`` -> its offset, asked for once."""
        if name not in self._offsets:
            self._offsets[name] = self.vmi.get_kernel_struct_offset(*name.split(" "))
        return self._offsets[name]

    def pointer(self, address: int) -> int:
        return self.vmi.read_addr_va(address, 0)

    def ring(self, head: int) -> Iterator[int]:
        """Links of a ``list_head`` ring, its head left out."""
        link = self.pointer(head)
        while link != head:
            yield link
            link = self.pointer(link)

    def tasks(self) -> Iterator[int]:
        """Every ``task_struct`` of the task list, ``init_task`` first."""
        tasks = self.at("task_struct tasks")
        head = self.vmi.translate_ksym2v("init_task") + tasks
        yield head - tasks
        for link in self.ring(head):
            yield link - tasks

    def pid(self, task: int) -> int:
        return self.vmi.read_32_va(task + self.at("task_struct pid"), 0)

    def comm(self, task: int) -> str:
        return self.vmi.read_str_va(task + self.at("task_struct comm"), 0)

    def processes(self) -> dict[int, str]:
        """pid -> comm, without the idle task."""
        return {pid: self.comm(task) for task in self.tasks() if (pid := self.pid(task))}

    def executables(self) -> dict[int, tuple[int, int, str]]:
        """pid -> (uid, parent's pid, last part of the executable's path)."""
        found = {}
        for task in self.tasks():
            uid = self.vmi.read_32_va(self.pointer(task + self.at("task_struct cred")) + self.at("cred uid"), 0)
            parent = self.pid(self.pointer(task + self.at("task_struct real_parent")))
            name = ""
            mm = self.pointer(task + self.at("task_struct mm"))
            if mm and (file := self.pointer(mm + self.at("mm_struct exe_file"))):
                name = self.name(file)
            found[self.pid(task)] = uid, parent, name
        return found

    def name(self, file: int) -> str:
        """Last part of a ``struct file``'s path."""
        dentry = self.pointer(file + self.at("file f_path.dentry"))
        return self.vmi.read_str_va(self.pointer(dentry + self.at("dentry d_name.name")), 0)

    def threads(self) -> dict[int, int]:
        """tid -> pid of its process."""
        found = {}
        for task in self.tasks():
            head = self.pointer(task + self.at("task_struct signal")) + self.at("signal_struct thread_head")
            for link in self.ring(head):
                thread = link - self.at("task_struct thread_node")
                found[self.pid(thread)] = self.pid(task)
        return found

    def files(self) -> dict[tuple[int, int], str]:
        """(pid, file descriptor) -> last part of the file's path."""
        found = {}
        for task in self.tasks():
            files = self.pointer(task + self.at("task_struct files"))
            if not files:
                continue
            table = self.pointer(files + self.at("files_struct fdt"))
            most = self.vmi.read_32_va(table + self.at("fdtable max_fds"), 0)
            slots = self.pointer(table + self.at("fdtable fd"))
            for number in range(most):
                file = self.pointer(slots + 8 * number)
                if file:
                    found[self.pid(task), number] = self.name(file)
        return found

    def modules(self) -> set[str]:
        """Names of the loaded modules."""
        head = self.vmi.translate_ksym2v("modules")
        link, name = self.at("module list"), self.at("module name")
        return {self.vmi.read_str_va(at - link + name, 0) for at in self.ring(head)}

    def sockets(self) -> list[tuple[int, int, int]]:
        """(local port, remote port, state) of every TCP socket, listeners too, sorted."""
        found = []
        for pointer, mask, bucket, head in (
            ("ehash", "ehash_mask", "inet_ehash_bucket", "chain"),
            ("lhash2", "lhash2_mask", "inet_listen_hashbucket", "nulls_head"),
        ):
            info = self.vmi.translate_ksym2v("tcp_hashinfo")
            table = self.pointer(info + self.at(f"inet_hashinfo {pointer}"))
            count = self.vmi.read_32_va(info + self.at(f"inet_hashinfo {mask}"), 0) + 1
            # inet_listen_hashbucket is a lock and a head; its size is a power of two.
            stride = 8 if bucket == "inet_ehash_bucket" else 16
            first = table + self.at(f"{bucket} {head}")
            for at in range(first, first + count * stride, stride):
                link = self.pointer(at)
                while not link & 1:
                    found.append(self.socket(link - self.at("sock __sk_common.skc_nulls_node")))
                    link = self.pointer(link)
        return sorted(found)

    def socket(self, sock: int) -> tuple[int, int, int]:
        local = self.vmi.read_16_va(sock + self.at("sock __sk_common.skc_num"), 0)
        remote = self.vmi.read_16_va(sock + self.at("sock __sk_common.skc_dport"), 0)
        state = self.vmi.read_8_va(sock + self.at("sock __sk_common.skc_state"), 0)
        return local, (remote & 0xFF) << 8 | remote >> 8, state

    def mappings(self, pid: int) -> set[tuple[int, int]]:
        """(start, end) of a process's memory mappings, by its maple tree (Documentation/core-api/maple_tree.rst)."""
        task = next(task for task in self.tasks() if self.pid(task) == pid)
        mm = self.pointer(task + self.at("task_struct mm"))
        root = self.pointer(mm + self.at("mm_struct mm_mt") + self.at("maple_tree ma_root"))
        return {
            (
                self.pointer(vma + self.at("vm_area_struct vm_start")),
                self.pointer(vma + self.at("vm_area_struct vm_end")),
            )
            for vma in self.maple(root)
        }

    def maple(self, entry: int) -> Iterator[int]:
        """Entries of the maple tree below an encoded node."""
        node, kind = entry & ~255, entry >> 3 & 15
        leaf, (slots, pivots, first) = kind < 2, ((10, 9, 80) if kind == 3 else (16, 15, 128))
        for slot in range(slots):
            # A pivot of 0 ends the node; the last slot has none.
            if slot < pivots and slot and not self.pointer(node + 8 + 8 * (slot - 1)):
                return
            value = self.pointer(node + first + 8 * slot)
            if value and value >= 1 << 63:
                yield from [value] if leaf else self.maple(value)

    def unreadable(self, address: int) -> bool:
        """Whether LibVMI's error says that ``address`` can't be read."""
        try:
            self.vmi.read_8_va(address, 0)
        except LibvmiError as error:
            return str(error) == "VMI_FAILURE"
        return False
