"""The checks of ``vmishim scan``: each compares what two parts of a guest's kernel say, and gives findings.

`CHECKS` is the whole list: ``vmishim scan --list``, the documentation and the tests go by it. What a check needs of the
kernel is probed before it runs, by symbols and members of structures, never by version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmishim.inspection.checks import bpf, code, hooks, modules, network, processes, settings
from vmishim.inspection.checks.view import View
from vmishim.inspection.findings import Finding
from vmishim.inspection.structures import Structures


def _members(text: str) -> tuple[str, ...]:
    """``"cred uid euid, dentry d_name.name"`` as "struct member" names; alternatives are written ``a|b``."""
    found = []
    for part in text.split(","):
        struct, *names = part.split()
        found += ["|".join(f"{struct} {each}" for each in name.split("|")) for name in names] or [struct]
    return tuple(found)


@dataclass(frozen=True)
class Check:
    """A check.

    :ivar name: as ``--only`` and ``--skip`` take it
    :ivar run: gives the findings of one look
    :ivar symbols: what the kernel must have; ``a|b``: one of them
    :ivar members: the same: ``"struct member"``, or ``"struct"``
    :ivar optional: symbols that are looked at where the kernel has them
    :ivar fields: the same for members
    :ivar planted: how the tests plant what it must find
    :ivar benign: what looks like it and must not be found
    """

    name: str
    run: Callable[[View], Iterator[Finding]]
    symbols: tuple[str, ...]
    members: tuple[str, ...]
    planted: str
    benign: str
    optional: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """What it looks for, in one line."""
        return (self.run.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").rstrip(".")

    def missing(self, kernel: Structures) -> str:
        """What the kernel lacks of what this needs; empty if it has all."""
        for name in self.symbols:
            if not any(kernel.has_symbol(each) for each in name.split("|")):
                return f"the kernel has no symbol {name.replace('|', ' or ')}"
        for name in self.members:
            if not any(kernel.has(each) for each in name.split("|")):
                words = " or ".join(each.replace(" ", ".") for each in name.split("|"))
                return f"the kernel has no {words}, or no BTF to find it in"
        return ""


_TASKS = _members(
    "task_struct tasks pid tgid comm real_parent cred exit_state signal thread_node files mm flags group_leader,"
    "task_struct __state|state, cred uid euid, signal_struct thread_head"
)
_FILES = _members("files_struct fdt, fdtable max_fds fd open_fds, file f_op private_data")
_MODULES = (
    *_members("module list name taints, module mem|core_layout"),
    "module_memory base|module_layout base",
    "module_memory size|module_layout text_size",
)
_TEXT = ("_stext", "_etext", "modules")

CHECKS: tuple[Check, ...] = (
    Check(
        "processes",
        processes.hidden_processes,
        ("init_task", "init_pid_ns"),
        (
            *_TASKS,
            *_members("task_struct children sibling pid_links, pid tasks, pid_namespace idr, idr idr_rt"),
            *_members("xarray xa_head, xa_node shift slots"),
        ),
        "processes taken out of the list of tasks, of the table of pids, and of both",
        "a process whose main thread has exited",
    ),
    Check(
        "credentials",
        processes.credentials,
        ("init_task", "init_cred"),
        (
            *_TASKS,
            *_members("signal_struct pids, pid tasks, task_struct pid_links, mm_struct exe_file, file f_inode"),
            *_members("inode i_mode i_uid"),
        ),
        "a process with init_cred, two with the same cred, one whose uid became 0",
        "a set-uid program that a user started; threads that share credentials",
    ),
    Check(
        "executables",
        processes.executables,
        ("init_task",),
        (
            *_TASKS,
            *_members("mm_struct exe_file, file f_path.dentry, dentry d_hash d_name.name d_name.len d_parent d_inode"),
            *_members("dentry d_children|d_subdirs d_sib|d_child"),
        ),
        "a program that runs from a memfd, and one whose file was deleted",
        "a daemon whose file was replaced by an update",
    ),
    Check(
        "kernel-threads",
        processes.kernel_threads,
        ("init_task",),
        _TASKS,
        "a process called kworker/7:7, and one that is marked as a kernel thread",
        "a process called kworkers, and all kernel threads",
    ),
    Check(
        "modules",
        modules.hidden_modules,
        ("modules", "module_kset", "mod_tree"),
        (
            *_MODULES,
            *_members("kset list, kobject entry, module_kobject kobj mod, mod_tree_root root, latch_tree_root tree"),
            *_members("mod_tree_node mod node, latch_tree_node node, rb_node rb_left rb_right"),
        ),
        "a module taken out of the list of modules",
        "loaded modules, and built-in ones, which /sys/module shows too",
    ),
    Check(
        "taint",
        modules.taint,
        ("tainted_mask", "modules"),
        _MODULES,
        "an unsigned module from outside the kernel's tree",
        "a kernel that is tainted by a warning",
    ),
    Check(
        "syscalls",
        code.syscall_table,
        (*_TEXT, "sys_call_table"),
        _MODULES,
        "a system call that leads into a module, and one that leads where another one leads",
        "system calls that the kernel does not implement, which all lead to one function",
        ("__x64_sys_ni_syscall", "sys_ni_syscall"),
    ),
    Check(
        "interrupts",
        code.interrupts,
        (*_TEXT, "idt_table"),
        _MODULES,
        "a gate that leads into a module",
        "exceptions that keep the handlers of the kernel's start",
        ("early_idt_handler_array",),
    ),
    Check(
        "operations",
        hooks.operations,
        (*_TEXT, "proc_root", "proc_root_operations"),
        (*_MODULES, "proc_dir_entry proc_dir_ops"),
        "tcp4_seq_ops.show that leads into a module",
        "all of the kernel's own",
        tuple(hooks.TABLES),
        (
            *hooks.FILE_OPERATIONS,
            *hooks.SEQ_OPERATIONS,
            *hooks.PROTO,
            *hooks.PROTO_OPS,
            *hooks.INODE_OPERATIONS,
        ),
    ),
    Check(
        "notifiers",
        hooks.notifiers,
        _TEXT,
        (*_MODULES, *_members("notifier_block notifier_call next, tty_ldisc_ops open")),
        "a module that registers a keyboard notifier",
        "notifiers of the kernel and of its own modules",
        (*hooks.NOTIFIERS, "tty_ldiscs"),
        (*hooks.NOTIFIERS.values(), *hooks.LINE_OPERATIONS),
    ),
    Check(
        "netfilter",
        hooks.netfilter,
        (*_TEXT, "net_namespace_list"),
        (
            *_MODULES,
            *_members("net list nf.hooks_ipv4, nf_hook_entries num_hook_entries hooks, nf_hook_entry hook"),
        ),
        "a module that hooks incoming packets",
        "the filter of ipvlan, a module of the kernel's own tree",
        (),
        ("net nf.hooks_ipv6", "nf_hook_entry"),
    ),
    Check(
        "security-hooks",
        hooks.security,
        (*_TEXT, "static_calls_table|security_hook_heads"),
        (
            *_MODULES,
            "lsm_static_calls_table|security_hook_heads",
            *_members("security_hook_list hook"),
        ),
        "the hook of settime of the capability module that leads into another module",
        "the security modules of the kernel, AppArmor and BPF among them",
        (),
        ("lsm_static_call", "lsm_static_call hl", "security_hook_list list"),
    ),
    Check(
        "tracers",
        hooks.tracers,
        (*_TEXT, "ftrace_ops_list", "ftrace_list_end"),
        (*_MODULES, *_members("ftrace_ops func next")),
        "a module that registers a function tracer",
        "the kernel's own function tracer, on functions of the file system",
        (),
        ("ftrace_ops saved_func",),
    ),
    Check(
        "tracepoints",
        hooks.tracepoints,
        (*_TEXT, "__start___tracepoints_ptrs", "__stop___tracepoints_ptrs"),
        (*_MODULES, *_members("tracepoint name funcs, tracepoint_func func")),
        "a module that is called at sched_process_fork",
        "the kernel's own events, switched on in tracefs",
        (),
        ("tracepoint_func",),
    ),
    Check(
        "probes",
        hooks.probes,
        (*_TEXT, "kprobe_table", "aggr_pre_handler"),
        (*_MODULES, *_members("kprobe hlist list addr pre_handler post_handler")),
        "a module that registers a probe",
        "probes of tracefs, one place with two of them",
    ),
    Check(
        "bpf",
        bpf.bpf_objects,
        ("init_task", "prog_idr", "map_idr", "link_idr", "bpf_kallsyms", "bpf_prog_fops", "bpf_map_fops"),
        (
            *_TASKS,
            *_FILES,
            *_members("bpf_prog aux, bpf_prog_aux id name prog ksym used_map_cnt used_maps, bpf_ksym lnode prog"),
            *_members("bpf_map id name, bpf_link id prog, idr idr_rt, xarray xa_head, xa_node shift slots"),
        ),
        "a container's program and a process's map taken out of the kernel's tables of numbers",
        "the programs of the agent, and those of a container runtime for its devices",
        ("bpf_link_fops", "bpf_link_fops_poll"),
    ),
    Check(
        "raw-sockets",
        network.raw_sockets,
        ("init_task", "socket_file_ops"),
        (*_TASKS, *_FILES, *_members("socket sk, sock __sk_common.skc_family sk_type sk_protocol")),
        "a packet socket and a raw socket",
        "a raw socket for ICMPv6, as network managers have, and a ping socket",
    ),
    Check(
        "promiscuous",
        network.promiscuous,
        ("net_namespace_list",),
        _members("net list dev_base_head, net_device dev_list promiscuity priv_flags name"),
        "a device that was made promiscuous",
        "all other devices, and a port of a bridge",
    ),
    Check(
        "kernel-programs",
        settings.kernel_programs,
        ("core_pattern", "modprobe_path"),
        (),
        "a core_pattern and a modprobe_path that lead to /tmp",
        "a core_pattern that names a file, and systemd-coredump",
        ("poweroff_cmd", "uevent_helper"),
    ),
)
"""All checks, in the order in which they run."""
