"""Pointers to functions that rootkits replace or add: operations of files and protocols, notifiers, packet filters,
security modules, function tracers and probes.

Code of the kernel itself is expected everywhere. Where modules register functions too, a listed module of the kernel's
own tree is expected as well; one from outside the tree is a finding of its own; code of no listed module never is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vmishim.inspection.checks.view import OUT_OF_TREE, View
from vmishim.inspection.findings import Finding, Severity
from vmishim.inspection.lists import ring
from vmishim.inspection.structures import BrokenError
from vmishim.memory.reader import PAGE_SIZE

FILE_OPERATIONS = tuple(
    f"file_operations {name}"
    for name in (
        *("llseek", "read", "write", "read_iter", "write_iter", "iterate", "iterate_shared", "poll"),
        *("unlocked_ioctl", "compat_ioctl", "mmap", "open", "flush", "release", "fsync", "splice_read", "splice_write"),
    )
)
SEQ_OPERATIONS = tuple(f"seq_operations {name}" for name in ("start", "stop", "next", "show"))
PROTO = tuple(
    f"proto {name}"
    for name in (
        "close",
        "connect",
        "disconnect",
        "accept",
        "ioctl",
        "sendmsg",
        "recvmsg",
        "get_port",
        "hash",
        "unhash",
    )
)
PROTO_OPS = tuple(
    f"proto_ops {name}"
    for name in ("release", "bind", "connect", "accept", "poll", "ioctl", "listen", "sendmsg", "recvmsg", "mmap")
)
INODE_OPERATIONS = tuple(
    f"inode_operations {name}" for name in ("lookup", "permission", "getattr", "setattr", "unlink", "rename", "create")
)
TABLES = {
    **dict.fromkeys(
        (
            *("proc_root_operations", "proc_root_fops", "proc_tgid_base_operations", "proc_tid_base_operations"),
            *("proc_dir_operations", "socket_file_ops", "def_blk_fops", "def_chr_fops", "pipefifo_fops", "tty_fops"),
            *("ext4_dir_operations", "ext4_file_operations", "simple_dir_operations", "dcache_dir_operations"),
            *("kernfs_dir_fops", "kernfs_file_fops", "shmem_file_operations", "ramfs_file_operations"),
        ),
        FILE_OPERATIONS,
    ),
    **dict.fromkeys(
        (
            *("tcp4_seq_ops", "tcp6_seq_ops", "udp_seq_ops", "udp6_seq_ops", "raw_seq_ops", "raw6_seq_ops"),
            *("packet_seq_ops", "unix_seq_ops", "modules_op", "kallsyms_op", "ptype_seq_ops", "mounts_op"),
        ),
        SEQ_OPERATIONS,
    ),
    **dict.fromkeys(("tcp_prot", "tcpv6_prot", "udp_prot", "udpv6_prot", "raw_prot", "ping_prot"), PROTO),
    **dict.fromkeys(("inet_stream_ops", "inet_dgram_ops", "inet6_stream_ops", "packet_ops"), PROTO_OPS),
    **dict.fromkeys(
        ("proc_root_inode_operations", "proc_dir_inode_operations", "ext4_dir_inode_operations"), INODE_OPERATIONS
    ),
}
"""Tables of functions by symbol, with the members that are looked at. A kernel has those of what is built into it."""
NOTIFIERS = {
    "keyboard_notifier_list": "atomic_notifier_head head",
    "vt_notifier_list": "atomic_notifier_head head",
    "panic_notifier_list": "atomic_notifier_head head",
    "reboot_notifier_list": "blocking_notifier_head head",
    "module_notify_list": "blocking_notifier_head head",
    "netdev_chain": "raw_notifier_head head",
}
LINE_DISCIPLINES = 31
"""Line disciplines that a kernel can have (``NR_LDISCS``); ``tty_ldiscs`` is an array of pointers."""
LINE_OPERATIONS = tuple(
    f"tty_ldisc_ops {name}" for name in ("open", "close", "read", "write", "ioctl", "receive_buf", "receive_buf2")
)
PROTOCOLS = 5
"""Pointers in ``netns_nf.hooks_ipv4``, one for each place of a packet's path (``NF_INET_NUMHOOKS``)."""
HOOKS_MAX = 1024
"""Hooks of one place (``MAX_HOOK_COUNT``, net/netfilter/core.c)."""
TRACEPOINTS_MAX = 1 << 16
"""Tracepoints of a kernel; Linux 6.12 has about 2,000."""
PROBE_BUCKETS = 64
"""Heads of ``kprobe_table`` (``KPROBE_TABLE_SIZE``, kernel/kprobes.c)."""


@dataclass(frozen=True)
class Slot:
    """A pointer to a function.

    :ivar name: where it is, in words: ``tcp4_seq_ops.show``
    :ivar address: where it is
    :ivar code: where it leads
    """

    name: str
    address: int
    code: int


def judged(view: View, slot: Slot, kind: str, what: str, technique: str, modules: bool = True) -> Iterator[Finding]:
    """The finding of a pointer, if it is one.

    :param kind: the finding's id
    :param what: what it is, in words
    :param modules: whether modules register such functions too
    """
    if not slot.code or view.is_text(slot.code):
        return
    module = view.module_at(slot.code)
    if module is None or not modules:
        severity, why = Severity.HIGH, "" if module is None else ", where only the kernel's own code is expected"
    elif module.taints & OUT_OF_TREE:
        severity, why = Severity.MEDIUM, ", which is not of the kernel's own tree"
    else:
        return
    yield Finding(
        kind,
        severity,
        f"{slot.name}: {module.name}" if module else slot.name,
        f"{what} {slot.name} leads to {view.where(slot.code)}{why}",
        "where it leads with the kernel's text and the code of the listed modules",
        {"pointer": slot.address, "code": slot.code},
        "the code at that address; hidden modules",
        technique,
    )


def operations(view: View) -> Iterator[Finding]:
    """Functions of /proc, file systems and protocols."""
    for symbol, members in TABLES.items():
        if not view.has_symbol(symbol):
            continue
        table = view.symbol(symbol)
        with view.marking(symbol):
            for member in members:
                if view.has(member):
                    at = table + view.at(member)
                    slot = Slot(f"{symbol}.{member.split()[1]}", at, view.pointer(at))
                    yield from judged(view, slot, "operation-hook", "the operation", "T1014", modules=False)
    with view.marking("proc_root"):
        at = view.symbol("proc_root") + view.at("proc_dir_entry proc_dir_ops")
        table = view.pointer(at)
        if table != view.symbol("proc_root_operations"):
            yield Finding(
                "operation-hook",
                Severity.HIGH,
                "proc_root.proc_dir_ops",
                f"the operations of /proc are those at {table:#x}, not proc_root_operations",
                "proc_root.proc_dir_ops with proc_root_operations",
                {"pointer": at, "table": table},
                "the functions of that table; hidden modules",
                "T1014",
            )


def notifiers(view: View) -> Iterator[Finding]:
    """Functions that are called for each key, and at other events; and those of terminals."""
    for symbol, head in NOTIFIERS.items():
        if not view.has_symbol(symbol):
            continue
        technique = "T1056.001" if symbol in ("keyboard_notifier_list", "vt_notifier_list") else "T1014"
        with view.marking(symbol):
            first = view.pointer(view.symbol(symbol) + view.at(head))
            for block in view.chain(first, view.at("notifier_block next"), symbol):
                at = block + view.at("notifier_block notifier_call")
                slot = Slot(symbol, at, view.pointer(at))
                yield from judged(view, slot, "notifier", "a function in", technique)
    if view.has_symbol("tty_ldiscs"):
        for number, table in enumerate(view.words(view.symbol("tty_ldiscs"), LINE_DISCIPLINES)):
            if not table:
                continue
            with view.marking(f"tty_ldiscs[{number}]"):
                for member in LINE_OPERATIONS:
                    if view.has(member):
                        at = table + view.at(member)
                        slot = Slot(f"tty_ldiscs[{number}].{member.split()[1]}", at, view.pointer(at))
                        yield from judged(view, slot, "notifier", "the operation", "T1056.001")


def netfilter(view: View) -> Iterator[Finding]:
    """Functions that packets pass, of all network namespaces."""
    entry = view.size("nf_hook_entry")
    members = [name for name in ("hooks_ipv4", "hooks_ipv6") if view.has(f"net nf.{name}")]
    for net in view.networks:
        for member in members:
            with view.marking(f"the packet filters of the network at {net:#x}"):
                for place, hooks in enumerate(view.words(net + view.at(f"net nf.{member}"), PROTOCOLS)):
                    if not hooks:
                        continue
                    count = view.value(hooks, "nf_hook_entries num_hook_entries")
                    if count > HOOKS_MAX:
                        raise BrokenError(f"{member}[{place}] has {count} hooks")
                    start = hooks + view.at("nf_hook_entries hooks") + view.at("nf_hook_entry hook")
                    for number in range(count):
                        at = start + number * entry
                        slot = Slot(f"{member}[{place}]", at, view.pointer(at))
                        yield from judged(view, slot, "packet-hook", "a packet filter of", "T1205")


def security(view: View) -> Iterator[Finding]:
    """Hooks of security modules, which are all built into the kernel."""
    if view.has("lsm_static_calls_table"):
        # Since 6.12 (417c5643cd67 "lsm: replace indirect LSM hook calls with static calls").
        start, size = view.symbol("static_calls_table"), view.size("lsm_static_calls_table")
        each = view.size("lsm_static_call")
        places = range(start + view.at("lsm_static_call hl"), start + size, each)
        hooks = [hook for at in places if (hook := view.pointer(at))]
    else:
        start, size = view.symbol("security_hook_heads"), view.size("security_hook_heads")
        link = view.at("security_hook_list list")
        heads = [start + 8 * number for number, first in enumerate(view.words(start, size // 8)) if first]
        hooks = [node - link for head in heads for node in view.hlist(head, f"the security hooks at {head:#x}")]
    for hook in hooks:
        with view.marking(f"the security hook at {hook:#x}"):
            at = hook + view.at("security_hook_list hook")
            slot = Slot(f"_stext+{at - view.symbol('_stext'):#x}", at, view.pointer(at))
            yield from judged(view, slot, "security-hook", "the security hook at", "T1562.001", modules=False)


def tracers(view: View) -> Iterator[Finding]:
    """Functions that are called where others begin (ftrace)."""
    end = view.symbol("ftrace_list_end")
    first = view.pointer(view.symbol("ftrace_ops_list"))
    members = [name for name in ("func", "saved_func") if view.has(f"ftrace_ops {name}")]
    for ops in view.chain(first, view.at("ftrace_ops next"), "the list of function tracers"):
        if ops == end:
            break
        with view.marking(f"the function tracer at {ops:#x}"):
            found = set[int]()
            for member in members:
                at = ops + view.at(f"ftrace_ops {member}")
                code = view.pointer(at)
                if code not in found:
                    found.add(code)
                    yield from judged(view, Slot("ftrace", at, code), "tracer-hook", "a function tracer of", "T1014")


def tracepoints(view: View) -> Iterator[Finding]:
    """Functions that are called at the kernel's tracepoints."""
    start, stop = view.symbol("__start___tracepoints_ptrs"), view.symbol("__stop___tracepoints_ptrs")
    if not 0 <= stop - start <= 4 * TRACEPOINTS_MAX:
        raise BrokenError(f"there are {(stop - start) // 4} tracepoints")
    places = []
    for at in range(start, stop, PAGE_SIZE):
        # Each is as far from its own place as it says (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS).
        data = view.read(at, min(PAGE_SIZE, stop - at))
        places += [at + 4 * number + far for number, (far,) in enumerate(struct.iter_unpack("<i", data))]
    member, size = view.at("tracepoint funcs"), view.size("tracepoint_func")
    page, base = b"", -1
    for point in sorted(places):
        with view.marking(f"the tracepoint at {point:#x}"):
            at = point + member
            if base != at & -PAGE_SIZE and at % PAGE_SIZE <= PAGE_SIZE - 8:
                base = at & -PAGE_SIZE
                page = view.read(base, PAGE_SIZE)
            inside = at - base
            funcs = int.from_bytes(page[inside : inside + 8], "little") if inside <= PAGE_SIZE - 8 else view.pointer(at)
            if not funcs:
                continue
            for number in range(HOOKS_MAX):
                where = funcs + number * size + view.at("tracepoint_func func")
                code = view.pointer(where)
                if not code:
                    break
                name = view.string(view.field(point, "tracepoint name"))
                yield from judged(
                    view, Slot(name, where, code), "tracepoint-hook", "a function of the tracepoint", "T1014"
                )


def probes(view: View) -> Iterator[Finding]:
    """Handlers of kernel probes (kprobes)."""
    hlist, inside = view.at("kprobe hlist"), view.at("kprobe list")
    several = view.symbol("aggr_pre_handler")
    table = view.symbol("kprobe_table")
    for bucket in range(table, table + 8 * PROBE_BUCKETS, 8):
        for node in view.hlist(bucket, "the table of probes"):
            probe = node - hlist
            with view.marking(f"the probe at {probe:#x}"):
                place = view.field(probe, "kprobe addr")
                each = [probe]
                if view.field(probe, "kprobe pre_handler") == several:
                    each = list(ring(view.vmi, probe + inside, inside, HOOKS_MAX, view.damage, "probes of one place"))
                for one in each:
                    for member in ("kprobe pre_handler", "kprobe post_handler"):
                        at = one + view.at(member)
                        slot = Slot(f"_stext+{place - view.symbol('_stext'):#x}", at, view.pointer(at))
                        yield from judged(view, slot, "probe-hook", "the handler of the probe at", "T1014")
