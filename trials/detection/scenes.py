"""Attacks of every kind that ``vmishim scan`` looks for, and honest things that look like them, in a lab VM."""

from __future__ import annotations

import json
from collections.abc import Iterable

from lab.rootkit import Rootkit
from lab.vm import LabVM
from vmishim.inspection.findings import Finding
from vmishim.memory.reader import MemoryReader

Found = set[tuple[str, str, int | None]]
"""Findings by id, subject and pid."""

TRACING = "/sys/kernel/tracing"
USTAT, SYSFS, OVERFLOW = 136, 139, 4
"""Two system calls and an exception that nothing makes: a program that did would lead into the rootkit."""
SHOW = 3 * 8
"""Offset of ``show`` in ``struct seq_operations`` (include/linux/seq_file.h)."""
CGROUP_DEVICE = 15
"""Type of the eBPF programs that container runtimes load (include/uapi/linux/bpf.h)."""
CODE_SEARCHED = 1 << 14
"""Bytes of a table that are searched for a function."""

FILELESS = """
import os
file = os.memfd_create("fileless")
os.write(file, open("/usr/bin/sleep", "rb").read())
os.execv(f"/proc/self/fd/{file}", ["sleep", "infinity"])
"""
SETUID_CHILD = """
import os, time
os.setuid(1000)
if os.fork() == 0:
    os.execlp("sleep", "sleep", "infinity")
os.wait()
"""
RAW = """
import socket, time
kept = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300), socket.socket(2, socket.SOCK_RAW, 6)]
print("there", flush=True)
time.sleep(10**6)
"""
POSING = """
import ctypes, time
ctypes.CDLL(None).prctl(15, b"kworker/7:7", 0, 0, 0)  # PR_SET_NAME
open("/run/posing", "w").write("there")
time.sleep(10**6)
"""
MAP = """
import ctypes, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
made = libc.syscall(321, 0, struct.pack("<4I", 2, 4, 8, 1) + bytes(112), 128)  # BPF_MAP_CREATE
info = ctypes.create_string_buffer(80)
libc.syscall(321, 15, struct.pack("<IIQ", made, 80, ctypes.addressof(info)) + bytes(112), 128)
open("/run/planted-map", "w").write(str(struct.unpack_from("<4xI", info.raw)[0]))
time.sleep(10**6)
"""
PROGRAMS = """
import ctypes, json, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    return libc.syscall(321, command, buffer, 128), buffer.raw
found, number = [], 0
while not (answer := bpf(11, struct.pack("<I", number)))[0]:  # BPF_PROG_GET_NEXT_ID
    number = struct.unpack_from("<4xI", answer[1])[0]
    program, _ = bpf(13, struct.pack("<I", number))  # BPF_PROG_GET_FD_BY_ID
    if program >= 0:
        info = ctypes.create_string_buffer(80)
        bpf(15, struct.pack("<IIQ", program, 80, ctypes.addressof(info)))  # BPF_OBJ_GET_INFO_BY_FD
        found.append([number, *struct.unpack_from("<I", info.raw), info.raw[64:80].split(b"\\0")[0].decode()])
        os.close(program)
print(json.dumps(found))
"""
HONEST = """
import ctypes, os, socket, threading, time
kept = [socket.socket(10, socket.SOCK_RAW, 58)]
open("/proc/sys/net/ipv4/ping_group_range", "w").write("0 2147483647")
kept.append(socket.socket(2, socket.SOCK_DGRAM, 1))
threading.Thread(target=time.sleep, args=(10**6,)).start()
open("/run/honest", "w").write("there")
ctypes.CDLL(None).syscall(60, 0)  # the main thread exits, the other runs on
"""
BENIGN = f"""
# A daemon whose file was replaced by an update, as dpkg does it.
cp /usr/bin/sleep /usr/local/bin/daemon
systemd-run --quiet --collect --unit=daemon /usr/local/bin/daemon infinity
cp /usr/bin/sleep /usr/local/bin/daemon.new
mv /usr/local/bin/daemon.new /usr/local/bin/daemon
# A set-uid program that a user started.
install -m 4755 /usr/bin/sleep /usr/local/bin/set-uid
systemd-run --quiet --collect --unit=user -p User=1000 /usr/local/bin/set-uid infinity
systemd-run --quiet --collect --unit=honest python3 -IS -c '{HONEST}'
# Probes of tracefs, two at one place; a function tracer; an event.
printf 'p:seen/one vfs_read\\np:seen/two vfs_read\\n' >>{TRACING}/kprobe_events
echo 1 >{TRACING}/events/seen/enable
echo 1 >{TRACING}/events/sched/sched_process_fork/enable
mkdir {TRACING}/instances/seen
echo vfs_rmdir >{TRACING}/instances/seen/set_ftrace_filter
echo function >{TRACING}/instances/seen/current_tracer
# Packet filters of a module of the kernel's own tree; a port of a bridge.
ip link add seen0 type dummy
ip link add filtered link seen0 type ipvlan mode l3s
ip link add bridge0 type bridge
ip link add port0 type dummy
ip link set port0 master bridge0
echo '|/lib/systemd/systemd-coredump %P %u' >/proc/sys/kernel/core_pattern
echo 512 >/proc/sys/kernel/tainted  # TAINT_WARN
"""


def found(findings: Iterable[Finding]) -> dict[str, Found]:
    """Findings by check."""
    by_check: dict[str, Found] = {}
    for finding in findings:
        by_check.setdefault(finding.check, set()).add((finding.id, finding.subject, finding.pid))
    return by_check


def service(vm: LabVM, name: str, *command: str) -> int:
    """Run a program outside the container; its pid."""
    vm.run("systemd-run", "--quiet", "--collect", f"--unit={name}", *command)
    return int(vm.run("systemctl", "show", "-P", "MainPID", name).stdout)


def _python(vm: LabVM, name: str, program: str) -> int:
    return service(vm, name, "python3", "-IS", "-c", program)


# ---- honest things ---------------------------------------------------------------------------------------------------


def plant_benign(vm: LabVM) -> None:
    """What looks like an attack, and is none."""
    vm.spawn("sleep", "infinity", comm="kworkers")
    vm.run("sh", "-ec", BENIGN)
    vm.wait_until(lambda: not vm.run("test", "-s", "/run/honest", check=False).returncode, "/run/honest")


# ---- attacks ---------------------------------------------------------------------------------------------------------


class Attacks:
    """Attacks of every kind, all at a time.

    :param vm: a lab VM
    :param memory: reads its kernel's memory
    :ivar expected: what must be found, by check, and nothing else
    """

    def __init__(self, vm: LabVM, memory: MemoryReader) -> None:
        self.vm, self._memory = vm, memory
        self.expected: dict[str, Found] = {}
        unlinked, unhashed, both, raised, thief, robbed, masked = sorted(vm.spawn("sleep", "infinity", count=7))
        posing = _python(vm, "posing", POSING)
        fileless, parent = _python(vm, "fileless", FILELESS), _python(vm, "parent", SETUID_CHILD)
        vm.wait_until(lambda: b"memfd" in vm.run("readlink", f"/proc/{fileless}/exe").stdout, "the memfd")
        children = ("pgrep", "-P", str(parent), "-x", "sleep")
        vm.wait_until(lambda: vm.run(*children, check=False).stdout, "the child")
        child = int(vm.run(*children).stdout)
        vm.run("cp", "/usr/bin/sleep", "/usr/local/bin/gone")
        gone = service(vm, "gone", "/usr/local/bin/gone", "infinity")
        vm.wait_until(lambda: b"gone" in vm.run("readlink", f"/proc/{gone}/exe").stdout, "the deleted program")
        vm.run("rm", "/usr/local/bin/gone")
        raw = _python(vm, "raw", RAW)
        vm.wait_until(lambda: vm.run("ls", "-l", f"/proc/{raw}/fd").stdout.count(b"socket:[") >= 2, "the sockets")
        _python(vm, "map", MAP)
        both_written = ("sh", "-c", "test -s /run/planted-map && test -s /run/posing")
        vm.wait_until(lambda: not vm.run(*both_written, check=False).returncode, "what the planted programs write")
        map_number = int(vm.read("/run/planted-map"))
        programs = json.loads(vm.run("python3", "-c", PROGRAMS).stdout)
        program, name = next((number, name) for number, kind, name in programs if kind == CGROUP_DEVICE)
        vm.run("ip", "link", "set", "lo", "promisc", "on")
        vm.run("sh", "-c", "echo '|/tmp/crash' >/proc/sys/kernel/core_pattern")
        vm.run("sh", "-c", "echo /tmp/modprobe >/proc/sys/kernel/modprobe")

        self.rootkit = rootkit = Rootkit(vm)
        at, hook = rootkit.symbols, rootkit.symbols["hooked"]
        for pid in (unlinked, both):
            rootkit.do("unlink-task", pid)
        for pid in (unhashed, both):
            rootkit.do("unhash-pid", pid)
        rootkit.do("share-cred", raised, 0)
        rootkit.do("share-cred", thief, robbed)
        rootkit.do("zero-uid", child)
        rootkit.do("disguise", masked)
        rootkit.do("hide-bpf", at["prog_idr"], program)
        rootkit.do("hide-bpf", at["map_idr"], map_number)
        rootkit.do("hide-port", 4444, at["tcp4_seq_ops"] + SHOW)
        rootkit.do("patch", at["sys_call_table"] + 8 * USTAT, hook)
        rootkit.do("patch", at["sys_call_table"] + 8 * SYSFS, at["__x64_sys_getpid"])
        self._lead_gate(at["idt_table"] + 16 * OVERFLOW, hook)
        settime = self._place_of(at["capability_hooks"], at["cap_settime"])
        rootkit.do("patch", settime, hook)
        rootkit.do("notify-keys")
        rootkit.do("hook-packets")
        rootkit.do("trace-function", at["vfs_fsync_range"])
        rootkit.do("probe-function")
        rootkit.do("probe-forks")
        # Behind an ENDBR, where the kernel has one.
        listed = vm.run("grep", "vfs_fsync_range", "/sys/kernel/debug/kprobes/list").stdout
        hooked = f"_stext+{int(listed.split()[0], 16) - at['_stext']:#x}"
        self.expected = {
            "processes": {
                ("hidden-process", "sleep", unlinked),
                ("hidden-process", "sleep", unhashed),
                ("hidden-process", "sleep", both),
            },
            "credentials": {
                ("kernel-credentials", "sleep", raised),
                ("shared-credentials", "sleep", thief),
                ("shared-credentials", "sleep", robbed),
                ("raised-credentials", "sleep", child),
            },
            "executables": {
                ("memory-only-executable", self._comm(fileless), fileless),
                ("deleted-executable", "gone", gone),
            },
            "kernel-threads": {
                ("kernel-thread-with-memory", "sleep", masked),
                ("poses-as-kernel-thread", "kworker/7:7", posing),
            },
            "taint": {("foreign-module", "rootkit", None)},
            "syscalls": {
                ("syscall-hook", f"sys_call_table[{USTAT}]", None),
                ("syscall-twice", f"sys_call_table[{SYSFS}]", None),
            },
            "interrupts": {("interrupt-hook", f"idt_table[{OVERFLOW}]", None)},
            "operations": {("operation-hook", "tcp4_seq_ops.show: rootkit", None)},
            "notifiers": {("notifier", "keyboard_notifier_list: rootkit", None)},
            "netfilter": {("packet-hook", "hooks_ipv4[0]: rootkit", None)},
            "security-hooks": {("security-hook", f"_stext+{settime - at['_stext']:#x}: rootkit", None)},
            "tracers": {("tracer-hook", "ftrace: rootkit", None)},
            "tracepoints": {("tracepoint-hook", "sched_process_fork: rootkit", None)},
            "probes": {("probe-hook", f"{hooked}: rootkit", None)},
            "bpf": {
                ("hidden-bpf-program", name or "program", None),
                ("hidden-bpf-map", "map", None),
            },
            "raw-sockets": {
                ("packet-socket", "python3", raw),
                ("raw-socket", "python3", raw),
            },
            "promiscuous": {("promiscuous-device", "lo", None)},
            "kernel-programs": {
                ("kernel-program", "core_pattern=|/tmp/crash", None),
                ("kernel-program", "modprobe_path=/tmp/modprobe", None),
            },
        }

    def hide_module(self) -> None:
        """Take the module out of its lists: its code is of no listed module then."""
        self.rootkit.do("hide-module")
        self.expected = {
            check: {
                (kind, subject.removesuffix(": rootkit") if check != "taint" else "none is listed now", pid)
                for kind, subject, pid in findings
            }
            for check, findings in self.expected.items()
        }
        self.expected["modules"] = {("hidden-module", "rootkit", None)}

    def undo(self) -> None:
        """Undo all of it but the kernel's taint."""
        self.rootkit.unload()
        self.vm.run("systemctl", "stop", "fileless", "parent", "gone", "raw", "map", "posing")
        self.vm.run("ip", "link", "set", "lo", "promisc", "off")
        self.vm.run(
            "sh", "-c", "echo core >/proc/sys/kernel/core_pattern; echo /sbin/modprobe >/proc/sys/kernel/modprobe"
        )

    def _comm(self, pid: int) -> str:
        return self.vm.read(f"/proc/{pid}/comm").decode().strip()

    def _word(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 8), "little")

    def _lead_gate(self, gate: int, target: int) -> None:
        """Make an entry of the interrupt table lead elsewhere (Intel SDM volume 3, 6.14.1)."""
        low = self._word(gate) & 0x0000_FFFF_FFFF_0000
        self.rootkit.do("patch", gate, low | target & 0xFFFF | (target & 0xFFFF_0000) << 32)
        self.rootkit.do("patch", gate + 8, target >> 32)

    def _place_of(self, table: int, function: int) -> int:
        """Where a table has a function."""
        data = self._memory.read(table, CODE_SEARCHED)
        return next(
            table + at for at in range(0, CODE_SEARCHED, 8) if int.from_bytes(data[at : at + 8], "little") == function
        )
