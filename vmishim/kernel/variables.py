"""Types of the kernel's global variables: one table, because BTF has the types but, beside per-CPU variables, not which
variable is of which.

Most entries are true for every kernel that has the symbol. Where kernels differ, an entry lists what they may be, the
newest first, and the first that is possible here counts: its types exist in this kernel's BTF, and it is as large as
the space up to the next symbol allows. So no entry compares versions.

Source: the definitions in the kernel's sources. The tests compare each size with the symbol table's own spacing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmishim.kernel.types import Kind, Types

ALIGNMENT = 64
"""Bytes to which the linker aligns variables at most, except for pages."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """A pointer that has no number in BTF."""

    to: Declared


@dataclass(frozen=True, slots=True)
class Array:
    """An array that has no number in BTF."""

    of: Declared
    count: int


Declared = int | Pointer | Array
"""The type of a variable: the number of a type in BTF, or made of one."""

TABLE: dict[str, tuple[str, ...]] = {
    # Tasks, and what a task belongs to.
    "init_task": ("struct task_struct",),
    "init_mm": ("struct mm_struct",),
    "init_files": ("struct files_struct",),
    "init_fs": ("struct fs_struct",),
    "userspace_init_fs": ("struct fs_struct *",),
    "init_cred": ("struct cred",),
    "init_pid_ns": ("struct pid_namespace",),
    "init_uts_ns": ("struct uts_namespace",),
    "init_ipc_ns": ("struct ipc_namespace",),
    "init_time_ns": ("struct time_namespace",),
    "init_user_ns": ("struct user_namespace",),
    "init_net": ("struct net",),
    "net_namespace_list": ("struct list_head",),
    "uidhash_table": ("struct hlist_head []",),
    "root_task_group": ("struct task_group",),
    "cgrp_dfl_root": ("struct cgroup_root",),
    "task_state_array": ("char * []",),
    "cap_last_cap": ("int",),
    "ipc_mni_shift": ("int",),
    "tasklist_lock": ("rwlock_t",),
    # Modules, symbols, tracing, eBPF.
    "modules": ("struct list_head",),
    "module_kset": ("struct kset *",),
    "module_ktype": ("struct kobj_type",),
    "mod_tree": ("struct mod_tree_root",),
    "module_addr_min": ("unsigned long",),
    "module_addr_max": ("unsigned long",),
    "taint_flags": ("struct taint_flag []",),
    "tainted_mask": ("unsigned long",),
    "kallsyms_num_syms": ("unsigned int",),
    "ftrace_ops_list": ("struct ftrace_ops *",),
    "ftrace_list_end": ("struct ftrace_ops",),
    "ftrace_mod_maps": ("struct list_head",),
    "ftrace_ops_trampoline_list": ("struct list_head",),
    "kprobe_table": ("struct hlist_head []",),
    "bpf_kallsyms": ("struct list_head",),
    "prog_idr": ("struct idr",),
    "map_idr": ("struct idr",),
    "link_idr": ("struct idr",),
    "btf_idr": ("struct idr",),
    "pmus": ("struct list_head",),
    # What a rootkit changes.
    "idt_table": ("gate_desc [256]",),
    "tty_drivers": ("struct list_head",),
    "keyboard_notifier_list": ("struct atomic_notifier_head",),
    "raw_seq_ops": ("struct seq_operations",),
    "raw6_seq_ops": ("struct seq_operations",),
    "udp_seq_ops": ("struct seq_operations",),
    "udp6_seq_ops": ("struct seq_operations",),
    "tcp4_seq_ops": ("struct seq_operations",),
    "tcp6_seq_ops": ("struct seq_operations",),
    "arp_seq_ops": ("struct seq_operations",),
    "unix_seq_ops": ("struct seq_operations",),
    "packet_seq_ops": ("struct seq_operations",),
    "tcp4_seq_afinfo": ("struct tcp_seq_afinfo",),
    "tcp6_seq_afinfo": ("struct tcp_seq_afinfo",),
    "udp4_seq_afinfo": ("struct udp_seq_afinfo",),
    "udp6_seq_afinfo": ("struct udp_seq_afinfo",),
    "udplite4_seq_afinfo": ("struct udp_seq_afinfo",),
    "udplite6_seq_afinfo": ("struct udp_seq_afinfo",),
    # Until 4.13 (2b7cda9c35d3) the hooks were the kernel's, not a network namespace's.
    "nf_hooks": ("struct list_head [13][8]",),
    # Sockets, neighbours, files.
    "socket_file_ops": ("struct file_operations",),
    "ns_file_operations": ("struct file_operations",),
    "sockfs_dentry_operations": ("struct dentry_operations",),
    "arp_tbl": ("struct neigh_table",),
    "tcp_hashinfo": ("struct inet_hashinfo",),
    "super_blocks": ("struct list_head",),
    "sysfs_root_kn": ("struct kernfs_node *",),
    # Memory.
    "_totalram_pages": ("atomic_long_t",),
    "max_pfn": ("unsigned long",),
    "min_low_pfn": ("unsigned long",),
    "max_low_pfn": ("unsigned long",),
    "vmemmap_base": ("unsigned long",),
    "page_offset_base": ("unsigned long",),
    "vmalloc_base": ("unsigned long",),
    "phys_base": ("unsigned long",),
    "memblock": ("struct memblock",),
    "mem_section": ("struct mem_section * *",),
    "__highest_present_section_nr": ("unsigned long",),
    "sections_per_block": ("int",),
    "memory_subsys": ("struct bus_type",),
    "contig_page_data": ("struct pglist_data",),
    "node_data": ("struct pglist_data * []",),
    "node_states": ("nodemask_t [NR_NODE_STATES]",),
    "nr_node_ids": ("unsigned int",),
    "slab_caches": ("struct list_head",),
    "slab_kset": ("struct kset *",),
    "task_struct_cachep": ("struct kmem_cache *",),
    # Since 6.3 (cd0fc64e76844758b78f25c1c69049abe17ad2ef) pools; they were allocated at run time at times.
    "stack_pools": ("void * []",),
    "stack_slabs": ("void * []",),
    # Since 6.9 (d093602919ad) there are nodes instead of one list and tree.
    "vmap_nodes": ("struct vmap_node *",),
    "nr_vmap_nodes": ("int",),
    "vmap_zone_size": ("unsigned int",),
    "vmap_area_list": ("struct list_head",),
    "vmap_area_root": ("struct rb_root",),
    "vm_committed_as": ("struct percpu_counter",),
    "vm_zone_stat": ("atomic_long_t [NR_VM_ZONE_STAT_ITEMS]",),
    "vm_node_stat": ("atomic_long_t [NR_VM_NODE_STAT_ITEMS]",),
    "vm_numa_event": ("atomic_long_t [NR_VM_NUMA_EVENT_ITEMS]", "atomic_long_t [NR_VM_NUMA_STAT_ITEMS]"),
    "sysctl_overcommit_kbytes": ("unsigned long",),
    "sysctl_overcommit_ratio": ("int",),
    "hstates": ("struct hstate []",),
    "hugetlb_max_hstate": ("int",),
    "swap_info": ("struct swap_info_struct * []",),
    "nr_swapfiles": ("unsigned int",),
    "nr_swap_pages": ("atomic_long_t",),
    "total_swap_pages": ("long int",),
    "swapper_spaces": ("struct address_space * []",),
    "nr_swapper_spaces": ("unsigned int []",),
    "ioport_resource": ("struct resource",),
    "iomem_resource": ("struct resource",),
    "gfpflag_names": ("struct trace_print_flags []",),
    # CPUs, interrupts, time.
    "__cpu_online_mask": ("struct cpumask",),
    "__cpu_possible_mask": ("struct cpumask",),
    "__cpu_present_mask": ("struct cpumask",),
    "cpu_bit_bitmap": ("unsigned long [65][]",),
    "nr_cpu_ids": ("unsigned int",),
    "panic_cpu": ("atomic_t",),
    "crashing_cpu": ("int",),
    "__per_cpu_offset": ("unsigned long []",),
    # irq_desc_tree until 6.5 (721255b9826b).
    "sparse_irqs": ("struct maple_tree",),
    "irq_desc_tree": ("struct xarray",),
    # total_nr_irqs since 6.13 (5a9ffbc8a9e7).
    "total_nr_irqs": ("unsigned int",),
    "nr_irqs": ("int",),
    "poll_spurious_irq_timer": ("struct timer_list",),
    "softirq_vec": ("struct softirq_action [NR_SOFTIRQS]",),
    "avenrun": ("unsigned long [3]",),
    "jiffies": ("unsigned long",),
    "jiffies_64": ("u64",),
    # A structure of its own until 6.13 (a5f9e4e4ef02); since 6.17 (22c62b9a84b8) one of timekeeper_data.
    "timekeeper_data": ("struct tk_data []",),
    "tk_core": ("struct tk_data", "{seq timekeeper}", "{seq timekeeper shadow_timekeeper}"),
    # Devices.
    "block_class": ("struct class",),
    "blockdev_superblock": ("struct super_block *",),
    "bus_kset": ("struct kset *",),
    "bus_ktype": ("struct kobj_type",),
    "cdev_map": ("struct kobj_map *",),
    "chrdevs": ("struct char_device_struct * [255]",),
    "major_names": ("struct blk_major_name * [255]",),
    "class_kset": ("struct kset *",),
    "class_ktype": ("struct kobj_type",),
    "device_ktype": ("struct kobj_type",),
    "driver_ktype": ("struct kobj_type",),
    "pci_bus_type": ("struct bus_type",),
    "pci_root_buses": ("struct list_head",),
    "registered_fb": ("struct fb_info * []",),
    "num_registered_fb": ("int",),
    # The log, and what the kernel says of itself.
    "prb": ("struct printk_ringbuffer *",),
    "log_buf": ("char *",),
    "log_buf_len": ("u32",),
    **dict.fromkeys(("_text", "_stext", "_etext", "_end"), ("char []",)),
    "linux_banner": ("char []",),
    "saved_command_line": ("char *",),
    "kernel_config_data": ("char []",),
    "vermagic": ("char []",),
    "__start___ksymtab": ("struct kernel_symbol []",),
    "__stop___ksymtab": ("struct kernel_symbol []",),
    "__start___kcrctab": ("u32 []",),
    "__start___tracepoints_ptrs": ("int []",),
    "__stop___tracepoints_ptrs": ("int []",),
}
"""The types that each variable may have: ``[]`` has as many elements as there is space for, and a name in brackets is
that of an enumeration's value. ``{a b}`` is the structure without a name that has these members."""

_FORM = re.compile(r"(?P<base>\{[\w ]+\}|[\w ]+?)\s*(?P<stars>(?:\*\s*)*)(?P<arrays>(?:\[\w*\])*)")
_KEYWORDS = {"struct": Kind.STRUCT, "union": Kind.UNION, "enum": Kind.ENUM}
_INTEGERS = {"unsigned long": "long unsigned int", "long": "long int"}
"""C's names of integers that BTF spells as compilers do."""


def declared(types: Types, name: str, space: int) -> Declared | None:
    """The type of a global variable in this kernel.

    :param name: its symbol
    :param space: bytes up to the next symbol, which bound the variable's size; 0 if unknown
    :returns: None if the table does not have it, or nothing in the table is possible in this kernel
    """
    for text in TABLE.get(name, ()):
        found = parse(types, text, space)
        if found is not None and (not space or size(types, found) <= space):
            return found
    return None


def parse(types: Types, text: str, space: int = 0) -> Declared | None:
    """The type that C spells as ``text`` (without a variable's name, ``struct page *[4]``).

    :param space: bytes that ``[]`` may fill
    :returns: None if this kernel does not have it
    :raises ValueError: ``text`` is not a type
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(f"not a type: {text!r}")
    base = _base(types, form["base"].strip())
    if base is None:
        return None
    found: Declared = base
    for _ in range(form["stars"].count("*")):
        found = Pointer(found)
    counts = re.findall(r"\[(\w*)\]", form["arrays"])
    # The innermost array is written last. One without a number takes the space that the others leave.
    known = [_count(types, count) for count in counts]
    if any(count is None for count, given in zip(known, counts, strict=True) if given):
        return None
    element = size(types, found)
    for count in known:
        element *= count or 1
    for count in reversed(known):
        found = Array(found, space // element if count is None and element else count or 0)
    return found


def size(types: Types, of: Declared) -> int:
    """``sizeof`` a variable of this type, in bytes. :raises KeyError: BTF does not have the type"""
    match of:
        case Pointer():
            return 8
        case Array():
            return of.count * size(types, of.of)
        case _:
            return types.size_of(of)


def _base(types: Types, text: str) -> int | None:
    if text == "void":
        return 0
    if text.startswith("{"):
        return types.anonymous.get(tuple(text[1:-1].split()))
    keyword, _, rest = text.partition(" ")
    if rest and keyword in _KEYWORDS:
        return types.named.get((_KEYWORDS[keyword], rest))
    return types.named.get((Kind.TYPEDEF, text)) or types.named.get((Kind.INT, _INTEGERS.get(text, text)))


def _count(types: Types, text: str) -> int | None:
    if not text:
        return None
    if text.isdigit():
        return int(text)
    found = types.enumerators.get(text)
    return None if found is None else found[1]
