"""Which of drgn's Linux helpers and crash-style commands work on a guest, and what each costs: docs/drgn-table.md.

    python -m bench.drgn [--kernel 6.12] [--sealed] [--delay 10]

Boots a lab VM, opens it by its agent, and runs each with nothing known of its memory. A helper that walks something is
followed for at most a thousand items.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import IO, Any

import drgn
import drgn.commands._crash
import drgn.helpers.linux
from drgn import NULL, Object, Program, cast, sizeof
from drgn.commands import run_command
from drgn.commands._crash.common import CRASH_COMMAND_NAMESPACE

from bench.delay import delayed
from lab.agent import KEYS, InstalledAgent, install
from lab.kernels import default_kernel, kernels
from lab.vm import LabVM
from vmishim.drgn.guest import Guest
from vmishim.guests.agent import AgentGuest

linux: Any = drgn.helpers.linux  # whose names its modules add
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "drgn-table.md"
ITEMS_MAX = 1000
"""Items for which an iterator is followed."""
SECONDS_MAX = 60
"""Seconds after which a helper or command is stopped."""

WORKS, DWARF, FAILS, NOTHING = "works", "needs DWARF", "fails", "nothing to try it on"

REASONS = (
    # (text of the error, what it means)
    ("cannot read object with void type", (DWARF, "the type of a variable is in debugging information only")),
    ("could not find debugging", (DWARF, "needs the kernel's debugging information")),
    ("debugging information", (DWARF, "needs the kernel's debugging information")),
)


class World:
    """What helpers are called with: objects of the guest, found when they are asked for."""

    def __init__(self, prog: Program, pid: int) -> None:
        self.prog = prog
        self._pid = pid

    def __getattr__(self, name: str) -> Any:
        # Only names that are not found otherwise: variables of the kernel.
        return self.prog[name].address_of_()

    @cached_property
    def task(self) -> Object:
        return linux.find_task(self.prog, self._pid)

    @cached_property
    def mm(self) -> Object:
        return self.task.mm.read_()

    @cached_property
    def vma(self) -> Object:
        return next(iter(linux.for_each_vma(self.mm)))

    @cached_property
    def ns(self) -> Object:
        return self.task.nsproxy.mnt_ns.read_()

    @cached_property
    def net(self) -> Object:
        return self.task.nsproxy.net_ns.read_()

    @cached_property
    def dev(self) -> Object:
        return linux.netdev_get_by_name(self.net, "lo")

    @cached_property
    def addr(self) -> int:
        """In the direct map: a task."""
        return int(self.task.value_())

    @cached_property
    def user_addr(self) -> int:
        return int(self.vma.vm_start.value_())

    @cached_property
    def page(self) -> Object:
        return linux.virt_to_page(self.prog, self.addr)

    @cached_property
    def pfn(self) -> int:
        return int(linux.virt_to_pfn(self.prog, self.addr))

    @cached_property
    def phys(self) -> int:
        return int(linux.virt_to_phys(self.prog, self.addr))

    @cached_property
    def file(self) -> Object:
        return next(file for _, file in linux.for_each_file(linux.find_task(self.prog, 1)))

    @cached_property
    def dentry(self) -> Object:
        return self.task.fs.pwd.dentry.read_()

    @cached_property
    def inode(self) -> Object:
        return linux.path_lookup(self.prog, "/usr/bin/dash").dentry.d_inode.read_()

    @cached_property
    def mapping(self) -> Object:
        return self.inode.i_mapping.read_()

    @cached_property
    def mnt(self) -> Object:
        return next(iter(linux.for_each_mount(self.prog)))

    @cached_property
    def disk(self) -> Object:
        return next(iter(linux.for_each_disk(self.prog)))

    @cached_property
    def bdev(self) -> Object:
        return next(iter(linux.for_each_partition(self.prog)))

    @cached_property
    def queue(self) -> Object:
        return self.disk.queue.read_()

    @cached_property
    def rq(self) -> Object:
        return self.queue.tag_set.tags[0].static_rqs[0].read_()

    @cached_property
    def cgrp(self) -> Object:
        return self.task.cgroups.dfl_cgrp.read_()

    @cached_property
    def css(self) -> Object:
        return self.prog["cgrp_dfl_root"].cgrp.self.address_of_()

    @cached_property
    def cpumask(self) -> Object:
        return linux.cpu_online_mask(self.prog)

    @cached_property
    def bitmap(self) -> Object:
        return linux.cpu_online_mask(self.prog).bits

    @cached_property
    def kn(self) -> Object:
        return linux.kernfs_walk(self.prog["sysfs_root_kn"], "kernel/mm")

    @cached_property
    def kthread(self) -> Object:
        return linux.find_task(self.prog, 2)

    @cached_property
    def module(self) -> Object:
        return linux.find_module(self.prog, "virtio_net")

    @cached_property
    def slab(self) -> Object:
        return linux.find_slab_cache(self.prog, "pid")

    @cached_property
    def zone(self) -> Object:
        return linux.NODE_DATA(self.prog, 0).node_zones[0].address_of_()

    @cached_property
    def section(self) -> Object:
        return linux.nr_to_section(self.prog, 0)

    @cached_property
    def socket(self) -> Object:
        """The listening socket of the agent."""
        for task in linux.for_each_task(self.prog):
            for _, file in linux.for_each_file(task):
                if file.f_op == self.prog["socket_file_ops"].address_of_():
                    sock = cast("struct socket *", file.private_data)
                    if sock.type == 1 and sock.sk.member_("__sk_common").skc_family == 2:
                        return sock
        raise LookupError("no TCP socket")

    @cached_property
    def desc(self) -> Object:
        return next(desc for _, desc in linux.for_each_irq_desc(self.prog) if desc.action)

    @cached_property
    def rq_of_cpu(self) -> Object:
        return linux.cpu_rq(self.prog, 0)

    @cached_property
    def pci(self) -> Object:
        return next(iter(linux.for_each_pci_dev(self.prog)))

    @cached_property
    def pci_bus(self) -> Object:
        return next(iter(linux.for_each_pci_root_bus(self.prog)))

    @cached_property
    def tree(self) -> Object:
        """A red-black tree: timers of the first CPU."""
        bases = linux.per_cpu(self.prog["hrtimer_bases"], 0)
        return bases.clock_base[0].active.rb_root.rb_root.address_of_()

    @cached_property
    def rb_node(self) -> Object:
        return linux.rb_first(self.tree)

    @cached_property
    def bpf_prog(self) -> Object:
        return next(iter(linux.bpf_prog_for_each(self.prog)))

    @cached_property
    def bpf_map(self) -> Object:
        return next(iter(linux.bpf_map_for_each(self.prog)))

    @cached_property
    def wq(self) -> Object:
        return self.task.signal.wait_chldexit.address_of_()

    @cached_property
    def completion(self) -> Object:
        """What a kernel thread is parked by."""
        threads = (task for task in linux.for_each_task(self.prog) if task.pid > 2 and linux.task_is_kthread(task))
        return linux.to_kthread(next(threads)).parked.address_of_()

    @cached_property
    def swait(self) -> Object:
        return self.completion.wait.address_of_()

    @cached_property
    def sigaction(self) -> Object:
        return self.task.sighand.action[0].sa.address_of_()

    @cached_property
    def radix(self) -> Object:
        return self.prog["init_pid_ns"].idr.idr_rt.address_of_()

    @cached_property
    def plist(self) -> Object:
        return cast("struct plist_head *", self.prog["swap_active_head"].address_of_())

    @cached_property
    def subsys(self) -> Object:
        return self.prog["pci_bus_type"].address_of_()

    @cached_property
    def class_(self) -> Object:
        return self.prog["block_class"].address_of_()

    @cached_property
    def llist(self) -> Object:
        return linux.per_cpu(self.prog["call_single_queue"], 0).address_of_()

    @cached_property
    def nulls(self) -> Object:
        """The first chain of TCP's table that has a socket, else the first."""
        return self.prog["tcp_hashinfo"].lhash2[0].nulls_head.address_of_()

    @cached_property
    def sock(self) -> Object:
        return self.socket.sk.read_()

    @cached_property
    def skb(self) -> Object:
        raise LookupError("no packet waits in the guest")


Arguments = Callable[[World], tuple[Any, ...]]
_LIST: Arguments = lambda w: (w.modules,)  # noqa: E731 # one table
_LIST_OF: Arguments = lambda w: (w.modules, "struct module", "list")  # noqa: E731
_FIRST: Arguments = lambda w: ("struct module", w.modules, "list")  # noqa: E731

BY_PARAMETER: dict[str, Arguments] = {
    "": lambda w: (),
    "prog": lambda w: (w.prog,),
    "task": lambda w: (w.task,),
    "mm": lambda w: (w.mm,),
    "vma": lambda w: (w.vma,),
    "page": lambda w: (w.page,),
    "prog, addr": lambda w: (w.prog, w.addr),
    "prog, pfn": lambda w: (w.prog, w.pfn),
    "prog, nr": lambda w: (w.prog, 0),
    "prog, cpu": lambda w: (w.prog, 0),
    "prog, item": lambda w: (w.prog, 0),
    "mm, addr": lambda w: (w.mm, w.user_addr),
    "prog, path": lambda w: (w.prog, "kernel/mm"),
    "disk": lambda w: (w.disk,),
    "part": lambda w: (w.bdev,),
    "bdev": lambda w: (w.bdev,),
    "rq": lambda w: (w.rq,),
    "cgrp": lambda w: (w.cgrp,),
    "css": lambda w: (w.css,),
    "mask": lambda w: (w.cpumask,),
    "bitmap, size": lambda w: (w.bitmap, 64),
    "inode": lambda w: (w.inode,),
    "mapping": lambda w: (w.mapping,),
    "dentry": lambda w: (w.dentry,),
    "mnt": lambda w: (w.mnt,),
    "ns, src, dst, fstype": lambda w: (w.prog,),
    "kn": lambda w: (w.kn,),
    "module": lambda w: (w.module,),
    "mod": lambda w: (w.module,),
    "slab_cache": lambda w: (w.slab,),
    "zone": lambda w: (w.zone,),
    "section": lambda w: (w.section,),
    "section, nr": lambda w: (w.section, 0),
    "sock": lambda w: (w.socket,),
    "net": lambda w: (w.net,),
    "desc": lambda w: (w.desc,),
    "desc, cpu": lambda w: (w.desc, 0),
    "bus": lambda w: (w.pci_bus,),
    "bpf_prog": lambda w: (w.bpf_prog,),
    "sigaction": lambda w: (w.sigaction,),
    "prog, value": lambda w: (w.prog, 0x3),
    "sk": lambda w: (w.sock,),
    "node": lambda w: (w.rb_node,),
    "root": lambda w: (w.tree,),
    "ns": lambda w: (w.prog,),
    "wq": lambda w: (w.wq,),
    "head": _LIST,
    "head, type, member": _LIST_OF,
    "type, head, member": _FIRST,
}
BY_NAME: dict[str, Arguments] = {
    "MAJOR": lambda w: (0xFE00000,),
    "MINOR": lambda w: (0xFE00000,),
    "MKDEV": lambda w: (8, 1),
    "NODE_DATA": lambda w: (w.prog, 0),
    "PHYS_PFN": lambda w: (w.prog, 0x100000),
    "RB_EMPTY_NODE": lambda w: (w.rb_node,),
    "SOCKET_I": lambda w: (w.socket.file.f_inode,),
    "SOCK_INODE": lambda w: (w.socket,),
    "access_process_vm": lambda w: (w.task, w.user_addr, 64),
    "access_remote_vm": lambda w: (w.mm, w.user_addr, 64),
    "address_to_module": lambda w: (w.prog, w.module.init.value_() or w.module.value_()),
    "blk_mq_rq_from_pdu": lambda w: (linux.blk_mq_rq_to_pdu(w.rq),),
    "bpf_map_by_id": lambda w: (w.prog, w.bpf_map.id.value_()),
    "bpf_prog_by_id": lambda w: (w.prog, w.bpf_prog.aux.id.value_()),
    "bus_for_each_dev": lambda w: (w.subsys,),
    "bus_to_subsys": lambda w: (w.subsys,),
    "cfs_rq_for_each_entity": lambda w: (w.rq_of_cpu.cfs.address_of_(),),
    "cgroup_bpf_prog_for_each": lambda w: (w.cgrp, w.prog["CGROUP_INET_INGRESS"]),
    "cgroup_bpf_prog_for_each_effective": lambda w: (w.cgrp, w.prog["CGROUP_INET_INGRESS"]),
    "cgroup_get_from_path": lambda w: (w.prog, "/"),
    "class_for_each_device": lambda w: (w.class_,),
    "class_to_subsys": lambda w: (w.class_,),
    "completion_done": lambda w: (w.completion,),
    "completion_for_each_task": lambda w: (w.completion,),
    "cpumask_of": lambda w: (w.prog, 0),
    "css_next_child": lambda w: (NULL(w.prog, "struct cgroup_subsys_state *"), w.css),
    "css_next_descendant_pre": lambda w: (NULL(w.prog, "struct cgroup_subsys_state *"), w.css),
    "d_path": lambda w: (w.file.f_path,),
    "decode_file_type": lambda w: (w.inode.i_mode,),
    "decode_memory_block_state": lambda w: (next(iter(linux.for_each_memory_block(w.prog))),),
    "decode_memory_block_state_value": lambda w: (w.prog, 1),
    "decode_page_flags_value": lambda w: (w.prog, w.page.flags),
    "decode_sigset": lambda w: (w.task.blocked,),
    "decode_sysv_shm_flags": lambda w: (next(iter(linux.for_each_sysv_shm(w.prog))),),
    "decode_sysv_shm_mode_flags": lambda w: (w.prog, 0o1000),
    "dev_name": lambda w: (w.pci.dev.address_of_(),),
    "fget": lambda w: (linux.find_task(w.prog, 1), 0),
    "find_pid": lambda w: (w.prog, 1),
    "find_task": lambda w: (w.prog, 1),
    "find_module": lambda w: (w.prog, "virtio_net"),
    "find_slab_cache": lambda w: (w.prog, "pid"),
    "find_user": lambda w: (w.prog, 0),
    "find_sysv_msg_queue": lambda w: (w.prog, 0),
    "find_sysv_sem_array": lambda w: (w.prog, 0),
    "find_sysv_shm": lambda w: (w.prog, 0),
    "find_vmap_area": lambda w: (w.prog, w.task.stack),
    "vmalloc_to_page": lambda w: (w.prog, w.task.stack),
    "vmalloc_to_pfn": lambda w: (w.prog, w.task.stack),
    "for_each_netdev": lambda w: (w.net,),
    "for_each_node_mask": lambda w: (w.prog["node_states"][w.prog["N_ONLINE"]],),
    "for_each_node_state": lambda w: (w.prog, w.prog["N_ONLINE"]),
    "for_each_resource": lambda w: (w.iomem_resource,),
    "for_each_task": lambda w: (w.prog,),
    "gate_desc_func": lambda w: (w.prog["idt_table"][14],),
    "get_net_ns_by_fd": lambda w: _empty("no process has a network namespace open"),
    "get_net_ns_by_inode": lambda w: _empty("no process has a network namespace open"),
    "hlist_empty": lambda w: (w.prog["uidhash_table"][0].address_of_(),),
    "hlist_for_each": lambda w: (w.prog["uidhash_table"][0].address_of_(),),
    "hlist_for_each_entry": lambda w: ("struct user_struct", w.prog["uidhash_table"][0].address_of_(), "uidhash_node"),
    "hlist_nulls_empty": lambda w: (w.nulls,),
    "hlist_nulls_for_each_entry": lambda w: ("struct sock", w.nulls, "__sk_common.skc_nulls_node"),
    "sk_nulls_for_each": lambda w: (w.nulls,),
    "is_a_nulls": lambda w: (w.nulls.first,),
    "hrtimer_clock_base_for_each": lambda w: (linux.per_cpu(w.prog["hrtimer_bases"], 0).clock_base[0].address_of_(),),
    "huge_page_size": lambda w: (next(iter(linux.for_each_hstate(w.prog))),),
    "idle_task": lambda w: (w.prog, 0),
    "idr_find": lambda w: (w.prog["init_pid_ns"].idr.address_of_(), 1),
    "idr_for_each": lambda w: (w.prog["init_pid_ns"].idr.address_of_(),),
    "idr_for_each_entry": lambda w: (w.prog["init_pid_ns"].idr.address_of_(), "struct pid"),
    "in_direct_map": lambda w: (w.prog, w.addr),
    "inode_paths": lambda w: (w.inode,),
    "irq_to_desc": lambda w: (w.prog, 1),
    "kernel_stack_trace": lambda w: (w.prog, w.task),
    "kernfs_children": lambda w: (w.kn,),
    "kernfs_walk": lambda w: (w.prog["sysfs_root_kn"], "kernel/mm"),
    "kobject_path": lambda w: (w.pci.dev.kobj.address_of_(),),
    "kthread_data": lambda w: (w.kthread,),
    "to_kthread": lambda w: (w.kthread,),
    "ktime_to_ns": lambda w: (w.task.start_time,),
    "kuid_val": lambda w: (w.task.cred.uid,),
    "list_next_entry": lambda w: (w.module, "list"),
    "list_prev_entry": lambda w: (w.module, "list"),
    "llist_empty": lambda w: (w.llist,),
    "llist_first_entry": lambda w: (w.llist, "struct __call_single_data", "node.llist"),
    "llist_first_entry_or_null": lambda w: (w.llist, "struct __call_single_data", "node.llist"),
    "llist_for_each": lambda w: (w.llist.first,),
    "llist_for_each_entry": lambda w: ("struct __call_single_data", w.llist.first, "node.llist"),
    "llist_is_singular": lambda w: (w.llist,),
    "llist_next_entry": lambda w: _empty("no lock-free list has an entry"),
    "mt_for_each": lambda w: (w.mm.mm_mt.address_of_(),),
    "mtree_load": lambda w: (w.mm.mm_mt.address_of_(), w.user_addr),
    "mutex_owner": lambda w: (w.task.signal.cred_guard_mutex.address_of_(),),
    "neigh_table_for_each_neighbor": lambda w: (w.prog["arp_tbl"].nht.read_(),),
    "netdev_get_by_index": lambda w: (w.net, 1),
    "netdev_get_by_name": lambda w: (w.net, "lo"),
    "netdev_for_each_tx_queue": lambda w: (w.dev,),
    "netdev_ipv4_addrs": lambda w: (w.dev,),
    "netdev_ipv6_addrs": lambda w: (w.dev,),
    "netdev_name": lambda w: (w.dev,),
    "netdev_priv": lambda w: (w.dev,),
    "node_state": lambda w: (0, w.prog["N_ONLINE"]),
    "op_is_write": lambda w: (Object(w.prog, "unsigned int", 1),),
    "path_lookup": lambda w: (w.prog, "/usr/bin/dash"),
    "pci_bus_name": lambda w: (w.pci_bus,),
    "pci_is_bridge": lambda w: (w.pci,),
    "pci_name": lambda w: (w.pci,),
    "pci_pcie_type": lambda w: (w.pci,),
    "per_cpu": lambda w: (w.prog["runqueues"], 0),
    "per_cpu_ptr": lambda w: (w.prog["runqueues"].address_of_(), 0),
    "percpu_counter_sum": lambda w: (w.prog["vm_committed_as"].address_of_(),),
    "percpu_counter_sum_positive": lambda w: (w.prog["vm_committed_as"].address_of_(),),
    "phys_to_page": lambda w: (w.prog, w.phys),
    "phys_to_virt": lambda w: (w.prog, w.phys),
    "pid_task": lambda w: (linux.find_pid(w.prog, 1), w.prog["PIDTYPE_PID"]),
    "plist_first_entry": lambda w: (w.plist, "struct swap_info_struct", "list"),
    "plist_for_each": lambda w: (w.plist,),
    "plist_for_each_entry": lambda w: ("struct swap_info_struct", w.plist, "list"),
    "plist_head_empty": lambda w: (w.plist,),
    "plist_last_entry": lambda w: (w.plist, "struct swap_info_struct", "list"),
    "plist_node_empty": lambda w: (w.task.pushable_tasks.address_of_(),),
    "print_files": lambda w: (w.task,),
    "qdisc_lookup": lambda w: (w.dev, 0x8001),
    "radix_tree_for_each": lambda w: (w.radix,),
    "radix_tree_lookup": lambda w: (w.radix, 1),
    "rb_find": lambda w: (
        *("struct hrtimer", w.tree, "node.node", 0),
        lambda key, timer: -1 if timer.node.expires.value_() > 1 << 62 else 0,
    ),
    "rbtree_inorder_for_each_entry": lambda w: ("struct hrtimer", w.tree, "node.node"),
    "rbtree_preorder_for_each_entry": lambda w: ("struct hrtimer", w.tree, "node.node"),
    "validate_rbtree": lambda w: ("struct hrtimer", w.tree, "node.node", _by_expiry, True),
    "validate_rbtree_inorder_for_each_entry": lambda w: ("struct hrtimer", w.tree, "node.node", _by_expiry, True),
    "request_queue_busy_iter": lambda w: (w.queue,),
    "rq_for_each_fair_task": lambda w: (w.rq_of_cpu,),
    "rq_for_each_rt_task": lambda w: (w.rq_of_cpu,),
    "rwsem_locked": lambda w: (w.mm.mmap_lock.address_of_(),),
    "rwsem_owner": lambda w: (w.mm.mmap_lock.address_of_(),),
    "sbitmap_for_each_set": lambda w: (w.queue.tag_set.tags[0].bitmap_tags.sb.address_of_(),),
    "sched_entity_is_task": lambda w: (w.task.se.address_of_(),),
    "sched_entity_to_task": lambda w: (w.task.se.address_of_(),),
    "section_nr_to_pfn": lambda w: (w.prog, 0),
    "pfn_to_section": lambda w: (w.prog, w.pfn),
    "sigpending_for_each": lambda w: (w.task.pending.address_of_(),),
    "sigset_to_hex": lambda w: (w.task.blocked,),
    "skb_shinfo": lambda w: (w.skb,),
    "slab_cache_for_each_allocated_object": lambda w: (w.slab, "struct pid"),
    "sock_cgroup_ptr": lambda w: (w.sock.sk_cgrp_data.address_of_(),),
    "stack_depot_fetch": lambda w: _empty("the stack depot is empty"),
    "super_block_for_each_mount": lambda w: (w.inode.i_sb,),
    "swait_active": lambda w: (w.swait,),
    "swait_for_each_task": lambda w: (w.swait,),
    "swap_file_path": lambda w: (next(iter(linux.for_each_swap_info(w.prog))),),
    "swap_is_file": lambda w: (next(iter(linux.for_each_swap_info(w.prog))),),
    "swap_usage_in_pages": lambda w: (next(iter(linux.for_each_swap_info(w.prog))),),
    "sysfs_lookup": lambda w: (w.prog, "/sys/kernel/mm"),
    "task_group_name": lambda w: (w.prog["root_task_group"].address_of_(),),
    "task_group_sched_entity": lambda w: (w.task.sched_task_group, 0),
    "task_rss": lambda w: (w.prog, w.task),
    "test_bit": lambda w: (0, w.bitmap),
    "timer_base_for_each": lambda w: (linux.per_cpu(w.prog["timer_bases"], 0)[0].address_of_(),),
    "vma_find": lambda w: (w.mm, w.user_addr),
    "wmark_pages": lambda w: (w.zone, 0),
    "zone_page_state": lambda w: (w.zone, 0),
    "xa_for_each": lambda w: (w.prog["init_pid_ns"].idr.idr_rt.address_of_(),),
    "xa_is_value": lambda w: (Object(w.prog, "void *", 5),),
    "xa_is_zero": lambda w: (Object(w.prog, "void *", 5),),
    "xa_load": lambda w: (w.prog["init_pid_ns"].idr.idr_rt.address_of_(), 1),
    "xa_to_value": lambda w: (Object(w.prog, "void *", 5),),
    "waitqueue_for_each_entry": lambda w: (w.wq,),
    "global_vm_event_state": lambda w: (w.prog, w.prog["PGFAULT"]),
}
"""Arguments that a parameter's name alone does not say."""

COMMANDS = {
    "ascii": "ascii 61626364",
    "bpf": "bpf",
    "bt": "bt 1",
    "btop": "btop 1000",
    "dev": "dev",
    "drgn": "drgn print(prog['jiffies'])",
    "eval": "eval 1 + 1",
    "exit": "exit",
    "files": "files 1",
    "foreach": "foreach task",
    "help": "help ps",
    "ipcs": "ipcs",
    "irq": "irq",
    "kmem": "kmem -i",
    "list": "list -H modules -o module.list",
    "log": "log",
    "mod": "mod",
    "mount": "mount",
    "net": "net",
    "p": "p jiffies",
    "ps": "ps",
    "ptob": "ptob 1",
    "ptov": "ptov 100000",
    "q": "q",
    "rd": "rd linux_banner 8",
    "runq": "runq",
    "search": "search -s {task:x} -l 100000 deadbeef",
    "set": "set 1",
    "sig": "sig 1",
    "struct": "struct list_head modules",
    "swap": "swap",
    "sym": "sym do_exit",
    "sys": "sys",
    "task": "task 1",
    "timer": "timer",
    "tree": "tree -t xarray -s pid.level init_pid_ns",
    "union": "union bpf_attr",
    "vm": "vm 1",
    "vtop": "vtop {linux_banner:x}",
    "waitq": "waitq signal_struct.wait_chldexit {signal:x}",
    "whatis": "whatis task_struct",
    "*": "*list_head modules",
    "kmem -s": "kmem -s",
}
"""How each command is tried."""


_UNWINDING = {"verdict": DWARF, "shown": "two frames are right: the tables for more are in debugging information only"}
PARTLY: dict[str, Any] = {"bt": _UNWINDING, "kernel_stack_trace": _UNWINDING}
"""What ends without an error, but is wrong."""


def _by_expiry(one: Object, other: Object) -> int:
    first, second = one.node.expires.value_(), other.node.expires.value_()
    return int((first > second) - (first < second))


def _empty(why: str) -> tuple[Any, ...]:
    raise LookupError(why)


@dataclass(frozen=True)
class Row:
    """What one helper or command gave."""

    of: str
    name: str
    verdict: str
    shown: str
    requests: int
    seconds: float


def helpers() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(module, name, function) of each public helper."""
    for found in pkgutil.iter_modules(drgn.helpers.linux.__path__):
        module = importlib.import_module(f"drgn.helpers.linux.{found.name}")
        for name in sorted(getattr(module, "__all__", ())):
            function = getattr(module, name)
            if callable(function) and not inspect.isclass(function):
                yield found.name, name, function


def arguments_of(name: str, function: Callable[..., Any]) -> Arguments | None:
    """How to call a helper; None if nothing says so."""
    if name in BY_NAME:
        return BY_NAME[name]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C: the documentation's first line has them
        text = (function.__doc__ or "").partition("(")[2].partition(")")[0]
        return BY_PARAMETER.get(", ".join(part.partition(":")[0].strip() for part in text.split(",")))
    required = [each.name for each in parameters if each.default is each.empty]
    return BY_PARAMETER.get(", ".join(required)) or BY_PARAMETER.get(", ".join(each.name for each in parameters))


class _TimeoutError(BaseException):
    pass


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _TimeoutError


def tried(guest: Guest, of: str, name: str, call: Callable[[], Any], ready: Callable[[], Any] | None = None) -> Row:
    """Call something with nothing known of the guest's memory."""
    assert isinstance(guest.target, AgentGuest)
    try:
        if ready is not None:
            ready()
    except (LookupError, StopIteration, drgn.FaultError, AttributeError, TypeError, ValueError) as error:
        return Row(of, name, NOTHING, _said(error), 0, 0.0)
    guest.refresh()
    guest.cache._pages.clear()
    before, begun = guest.target.link.requests, time.perf_counter()
    verdict, shown = WORKS, ""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS_MAX)
    try:
        shown = _shown(call())
    except _TimeoutError:
        verdict, shown = FAILS, f"not done after {SECONDS_MAX} s"
    except Exception as error:
        verdict, shown = _verdict(error)
    finally:
        signal.alarm(0)
    return Row(of, name, verdict, shown, guest.target.link.requests - before, time.perf_counter() - begun)


def _verdict(error: Exception) -> tuple[str, str]:
    text = _said(error)
    for part, meaning in REASONS:
        if part in text:
            return meaning
    return FAILS, text


def _said(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "the guest has none"
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def _shown(value: Any) -> str:
    if inspect.isgenerator(value) or (hasattr(value, "__next__") and not isinstance(value, Object)):
        count = sum(1 for _ in itertools.islice(value, ITEMS_MAX + 1))
        return f"more than {ITEMS_MAX} items" if count > ITEMS_MAX else f"{count} items"
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} items"
    if isinstance(value, Object):
        value = value.read_() if value.address_ is not None and sizeof(value) <= 8 else value
        return f"`{value.type_.type_name()}`"
    if isinstance(value, str | bytes):
        return f"{len(value)} characters"
    if value is None:
        return "prints"
    return f"`{type(value).__name__}`"


def helper_rows(guest: Guest, pid: int) -> Iterator[Row]:
    """A row for each helper."""
    for of, name, function in helpers():
        world = World(guest.prog, pid)
        arguments = arguments_of(name, function)
        if arguments is None:
            yield Row(of, name, NOTHING, "not tried", 0, 0.0)
            continue
        given: list[Any] = []

        def ready(arguments: Arguments = arguments, world: World = world, given: list[Any] = given) -> None:
            given[:] = arguments(world)

        def call(function: Callable[..., Any] = function, given: list[Any] = given) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                found = function(*given)
                return itertools.islice(found, ITEMS_MAX + 1) if inspect.isgenerator(found) else found

        row = tried(guest, of, name, call, ready)
        if row.shown.startswith("ValidationError"):  # the guest changed the tree or list under it
            row = tried(guest, of, name, call, ready)
        yield replace(row, **PARTLY.get(name, {}))


def command_rows(guest: Guest) -> Iterator[Row]:
    """A row for each crash-style command."""
    names = {*CRASH_COMMAND_NAMESPACE._commands, *COMMANDS}
    with tempfile.TemporaryFile() as output:
        yield from _command_rows(guest, names, output)


def _command_rows(guest: Guest, names: set[str], output: IO[bytes]) -> Iterator[Row]:
    run_command(guest.prog, "crash set 1 >/dev/null", globals={})
    places = {name: guest.prog[name].address_ for name in ("init_task", "linux_banner")}
    init = linux.find_task(guest.prog, 1)
    places |= {"task": init.value_(), "signal": init.signal.value_()}
    for name in sorted(names):
        text = COMMANDS.get(name, name).format_map(places)

        def call(text: str = text) -> str:
            output.seek(0)
            output.truncate()
            sys.stdout.flush()
            saved = os.dup(1)
            os.dup2(output.fileno(), 1)
            try:
                run_command(guest.prog, f"crash {text}", globals=drgn.cli.default_globals(guest.prog))
                sys.stdout.flush()
            finally:
                os.dup2(saved, 1)
                os.close(saved)
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
            missing = [line for line in lines if "couldn't get" in line or "void type" in line]
            if missing:
                raise ValueError(missing[0])
            return "\n".join(lines)

        row = tried(guest, "crash", text, call)
        yield replace(row, name=COMMANDS.get(name, name), **PARTLY.get(name, {}))


def document(rows: list[Row], commands: list[Row], release: str, how: str) -> str:
    """The page."""
    lines = [
        "# drgn on a guest: every helper and command",
        "",
        f"drgn {drgn.__version__}, Linux {release}, {how}; written by `python -m bench.drgn`. Each was run once,",
        "with nothing known of the guest's memory; what walks something was followed for at most",
        f"{ITEMS_MAX:,} items. Seconds are those of a software-emulated VM on a shared machine: compare requests.",
        "*Nothing to try it on* means that the VM has no such object.",
        "",
        *_summary(rows, commands),
        "",
        "## Helpers",
        "",
        *_table(rows, "module"),
        "",
        "## Crash-style commands",
        "",
        *_table(commands, ""),
        "",
    ]
    return "\n".join(lines)


def _summary(rows: list[Row], commands: list[Row]) -> list[str]:
    lines = ["| | works | needs DWARF | fails | nothing to try it on | all |", "|---|---|---|---|---|---|"]
    for what, of in (("helpers", rows), ("commands", commands)):
        counts = [sum(row.verdict == verdict for row in of) for verdict in (WORKS, DWARF, FAILS, NOTHING)]
        lines.append(f"| {what} | {' | '.join(map(str, counts))} | {len(of)} |")
    return lines


def _table(rows: list[Row], first: str) -> list[str]:
    head = ["| module | helper |", "|---|---|"] if first else ["| command |", "|---|"]
    lines = [head[0] + " verdict | gave | requests | seconds |", head[1] + "---|---|--:|--:|"]
    for row in rows:
        name = f"| {row.of} | `{row.name}` |" if first else f"| `{row.name}` |"
        shown = row.shown.replace("|", "\\|").replace("<", "&lt;")
        cost = f"{row.requests} | {row.seconds:.2f}" if row.verdict != NOTHING else " | "
        lines.append(f"{name} {row.verdict} | {shown} | {cost} |")
    return lines


FIGURES: dict[str, Callable[[Program], int]] = {
    "tasks": lambda prog: sum(1 for task in linux.for_each_task(prog) if task.comm.string_()),
    "modules": lambda prog: sum(1 for module in linux.for_each_module(prog) if module.name.string_()),
    "slab caches": lambda prog: sum(1 for cache in linux.for_each_slab_cache(prog) if cache.name.string_()),
    "open files": lambda prog: sum(1 for task in linux.for_each_task(prog) for _ in linux.for_each_file(task)),
    "mounts": lambda prog: sum(1 for mount in linux.for_each_mount(prog) if linux.mount_dst(mount)),
    "virtual memory areas": lambda prog: sum(
        1 for task in linux.for_each_task(prog) if task.mm for _ in linux.for_each_vma(task.mm)
    ),
    "the log": lambda prog: len(linux.get_dmesg(prog)),
}
"""What docs/drgn.md has figures of: each counts what it found."""


def figures(guest: Guest) -> Iterator[str]:
    """A line for each: found, then requests and seconds, with nothing known, and again with all memory too old."""
    assert isinstance(guest.target, AgentGuest)
    link = guest.target.link
    for name, count in FIGURES.items():
        guest.refresh()
        guest.cache._pages.clear()
        cells = []
        for _ in range(2):
            guest.refresh()
            before, begun = link.requests, time.perf_counter()
            found = count(guest.prog)
            cells.append(f"{link.requests - before} / {time.perf_counter() - begun:.2f}")
        yield f"| {name} ({found:,}) | {' | '.join(cells)} |"


@contextlib.contextmanager
def opened(options: argparse.Namespace, vm: LabVM) -> Iterator[Guest]:
    """The VM in drgn, as the options say."""
    installed = install(vm, *(["--kernel-key", f"{KEYS}/kernel.key"] if options.sealed else []))
    with ExitStack() as stack:
        endpoint = installed.endpoint
        if options.delay:
            endpoint = stack.enter_context(delayed(int(endpoint.rsplit(":", 1)[1]), options.delay / 1000))
        there = InstalledAgent(endpoint, installed.private, installed.public, installed.kernel)
        target = stack.enter_context(
            contextlib.closing(there.connect(kernel_key=there.kernel if options.sealed else None))
        )
        yield Guest(target)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description="Try all of drgn's Linux helpers and crash-style commands on a lab VM."
    )
    parser.add_argument("--kernel", default=default_kernel(), choices=list(kernels()))
    parser.add_argument("--sealed", action="store_true", help="the guest's kernel encrypts what is read")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="a network path with this round trip")
    parser.add_argument("--only", default="", metavar="TEXT", help="helpers and commands with this in their name")
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    parser.add_argument("--figures", action="store_true", help="print those of docs/drgn.md, and write no page")
    options = parser.parse_args()
    how = ", ".join(
        [
            "by its agent",
            *(["whose kernel encrypts"] if options.sealed else []),
            *([f"over a path of {options.delay:g} ms"] if options.delay else []),
        ]
    )
    with LabVM.boot(options.kernel) as vm, opened(options, vm) as guest:
        (pid,) = vm.spawn("sleep", "infinity", count=1)
        drgn.set_default_prog(guest.prog)
        if options.figures:
            vm.spawn("sleep", "infinity", count=45)
            print(f"Linux {guest.kernel.release}, {how}", *figures(guest), sep="\n")
            return
        rows = [row for row in _told(helper_rows(guest, pid)) if options.only in row.name]
        commands = [row for row in _told(command_rows(guest)) if options.only in row.name]
        options.output.write_text(document(rows, commands, guest.kernel.release, how))


def _told(rows: Iterator[Row]) -> Iterator[Row]:
    width = shutil.get_terminal_size().columns
    for row in rows:
        print(f"{row.of:10} {row.name:40} {row.verdict:20} {row.requests:5} {row.seconds:7.2f}  {row.shown}"[:width])
        yield row


if __name__ == "__main__":
    main()
