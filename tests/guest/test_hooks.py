"""What detectors of rootkits look through besides lists of objects: probes, function tracers, loaded eBPF programs.

None of them is a list that is known from the start. The guest says itself what is there, by its own files and calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab.vm import LabVM
from tests.guest.ids import Ids
from tests.guest.test_readahead import learned, same
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import AccessContext, TranslateMechanism
from vmishim.wire.plan import Plan, Step, Take

TRACING = "/sys/kernel/tracing"
BUCKETS = 64
"""Heads of ``kprobe_table`` (KPROBE_TABLE_SIZE, kernel/kprobes.c)."""
GONE, DISABLED, FTRACE = 1, 2, 8
"""Flags of a probe (include/linux/kprobes.h)."""

PROGRAMS = """
import ctypes, json, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    return libc.syscall(321, command, buffer, 128), buffer.raw
found, number = [], 0
while True:
    status, answer = bpf(11, struct.pack("<I", number))  # BPF_PROG_GET_NEXT_ID
    if status:
        break
    number = struct.unpack_from("<4xI", answer)[0]
    program, _ = bpf(13, struct.pack("<I", number))  # BPF_PROG_GET_FD_BY_ID
    if program < 0:
        continue
    info = ctypes.create_string_buffer(80)
    bpf(15, struct.pack("<IIQ", program, 80, ctypes.addressof(info)))  # BPF_OBJ_GET_INFO_BY_FD
    kind, number = struct.unpack_from("<II", info.raw)
    found.append([number, kind, info.raw[64:80].split(b"\\0")[0].decode()])
    os.close(program)
print(json.dumps(found))
"""


def named(ids: Ids, address: int) -> str:
    return ids.vmi.translate_v2ksym(AccessContext(TranslateMechanism.PROCESS_PID, pid=0), address)


# ---- probes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def probes(lab: LabVM) -> Iterator[None]:
    """Two probes at one place, one of them active, and one on a function's return."""
    events = f"{TRACING}/kprobe_events"
    definitions = "p:planted/one vfs_read\np:planted/two vfs_read\nr:planted/three vfs_fsync\n"
    lab.run("sh", "-c", f"cat >>{events}", input=definitions.encode())
    lab.run("sh", "-c", f"echo 1 >{TRACING}/events/planted/one/enable")
    yield
    lab.run("sh", "-c", f"echo 0 >{TRACING}/events/planted/enable; : >{events}")


def shown_probes(lab: LabVM) -> list[tuple[int, int]]:
    """(address, flags) of each, by debugfs."""
    found = []
    for line in lab.run("cat", "/sys/kernel/debug/kprobes/list").stdout.decode().splitlines():
        flags = {"[GONE]": GONE, "[DISABLED]": DISABLED, "[FTRACE]": FTRACE}
        found.append((int(line.split()[0], 16), sum(flag for text, flag in flags.items() if text in line)))
    return sorted(found)


def read_probes(ids: Ids) -> list[tuple[int, int]]:
    """The same by memory: a place with several probes has one in the table that leads to them."""
    hlist, inside = ids.at("kprobe hlist"), ids.at("kprobe list")
    several = ids.vmi.translate_ksym2v("aggr_pre_handler")
    table = ids.vmi.translate_ksym2v("kprobe_table")

    def flags(probe: int) -> int:
        return ids.vmi.read_32_va(probe + ids.at("kprobe flags"), 0)

    found = []
    for bucket in range(table, table + 8 * BUCKETS, 8):
        link = ids.pointer(bucket)
        while link:
            probe = link - hlist
            shared = ids.pointer(probe + ids.at("kprobe pre_handler")) == several
            each = [link - inside for link in ids.ring(probe + inside)] if shared else [probe]
            address = ids.pointer(probe + ids.at("kprobe addr"))
            found += [(address, flags(one) & (GONE | DISABLED) | flags(probe) & FTRACE) for one in each]
            link = ids.pointer(link)
    return sorted(found)


def test_probes_are_those_that_debugfs_shows(lab: LabVM, guest: AgentGuest, ids: Ids, probes: None) -> None:
    listed = same(lambda: read_probes(ids), lambda: shown_probes(lab))
    assert sorted(flags & DISABLED for _, flags in listed) == [0, DISABLED, DISABLED]
    learned(guest, lambda: read_probes(ids), 24)


def test_probes_in_one_plan(lab: LabVM, guest: AgentGuest, ids: Ids, probes: None) -> None:
    """Who speaks to the agent himself gets the whole table by one request."""
    places = (Take(0, ids.at("kprobe addr"), 8),)
    table = ids.vmi.translate_ksym2v("kprobe_table")
    plan = Plan(table, Step.CHAIN, places, heads=BUCKETS, link=ids.at("kprobe hlist"))
    (chunk,) = guest.remote.walk(plan)
    assert {row[4] for row in plan.records(chunk.bulk)} == {address for address, _ in shown_probes(lab)}


# ---- function tracers ------------------------------------------------------------------------------------------------


def read_tracers(ids: Ids) -> list[tuple[str, list[str]]]:
    """(what is called, from which functions) of each ``ftrace_ops``."""
    vmi = ids.vmi
    end = vmi.translate_ksym2v("ftrace_list_end")
    ops = ids.pointer(vmi.translate_ksym2v("ftrace_ops_list"))
    found = []
    while ops != end:
        table = ids.pointer(ids.pointer(ops + ids.at("ftrace_ops func_hash")) + ids.at("ftrace_ops_hash filter_hash"))
        buckets = ids.pointer(table + ids.at("ftrace_hash buckets"))
        functions = []
        for number in range(1 << vmi.read_64_va(table + ids.at("ftrace_hash size_bits"), 0)):
            link = ids.pointer(buckets + 8 * number)
            while link:
                at = ids.pointer(link - ids.at("ftrace_func_entry hlist") + ids.at("ftrace_func_entry ip"))
                functions.append(named(ids, at & -16))  # behind an ENDBR, where there is one
                link = ids.pointer(link)
        found.append((named(ids, ids.pointer(ops + ids.at("ftrace_ops func"))), sorted(functions)))
        ops = ids.pointer(ops + ids.at("ftrace_ops next"))
    return sorted(found)


def test_function_tracers_are_those_that_were_begun(lab: LabVM, guest: AgentGuest, ids: Ids, probes: None) -> None:
    def shown() -> set[str]:
        listed = lab.run("cat", f"{TRACING}/enabled_functions").stdout.decode().splitlines()
        return {line.split()[0] for line in listed if not line.startswith(("\t", " "))}

    assert shown() == {"vfs_read"}
    before = read_tracers(ids)
    assert before == [("kprobe_ftrace_handler", ["vfs_read"])]
    traced = {"one": ["vfs_fsync", "vfs_getattr"], "two": ["vfs_rmdir"]}
    for name, functions in traced.items():
        folder = f"{TRACING}/instances/{name}"
        lab.run("sh", "-c", f"mkdir {folder} && cat >{folder}/set_ftrace_filter", input=" ".join(functions).encode())
        lab.run("sh", "-c", f"echo function >{folder}/current_tracer")
    try:
        listed = read_tracers(ids)
        assert listed == sorted([*before, *(("function_trace_call", functions) for functions in traced.values())])
        assert {function for _, functions in listed for function in functions} == shown()
        learned(guest, lambda: read_tracers(ids), 40)
    finally:
        for name in traced:
            folder = f"{TRACING}/instances/{name}"
            lab.run("sh", "-c", f"echo nop >{folder}/current_tracer; rmdir {folder}")
    assert read_tracers(ids) == before


# ---- eBPF programs ---------------------------------------------------------------------------------------------------


def read_programs(ids: Ids) -> list[list[int | str]]:
    """(number, type, name) of each, by the tree of ``prog_idr`` (lib/xarray.c)."""
    vmi = ids.vmi
    slots, aux = ids.at("xa_node slots"), ids.at("bpf_prog aux")
    found: list[list[int | str]] = []

    def descend(entry: int) -> None:
        if entry & 3 == 2:  # an inner node (include/linux/xarray.h, xa_is_internal)
            data, _ = vmi.read_va(entry - 2 + slots, 0, 64 * 8)
            for at in range(0, len(data), 8):
                descend(int.from_bytes(data[at : at + 8], "little"))
        elif entry:
            more = ids.pointer(entry + aux)
            number = vmi.read_32_va(more + ids.at("bpf_prog_aux id"), 0)
            kind = vmi.read_32_va(entry + ids.at("bpf_prog type"), 0)
            found.append([number, kind, vmi.read_str_va(more + ids.at("bpf_prog_aux name"), 0)])

    descend(ids.pointer(vmi.translate_ksym2v("prog_idr") + ids.at("idr idr_rt.xa_head")))
    return sorted(found)


def test_programs_are_those_that_bpf_tells(lab: LabVM, guest: AgentGuest, ids: Ids) -> None:
    """Ours among them: an agent that hides its own programs could hide others'."""

    def shown() -> list[list[int | str]]:
        return sorted(json.loads(lab.run("python3", "-c", PROGRAMS).stdout))

    listed = same(lambda: read_programs(ids), shown)
    assert {"read", "walk", "lookup"} <= {name for _, _, name in listed}
    learned(guest, lambda: read_programs(ids), 40)
