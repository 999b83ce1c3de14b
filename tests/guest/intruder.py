"""What a container's root may try against the agent. Runs in the guest, in the container and outside of it alike:
``intruder.py TARGETS``, a JSON object of names and values; prints a JSON object of each try's outcome: "done", or the
name of the error.
"""

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
NR_BPF, NR_FINIT_MODULE = 321, 313
PTRACE_SEIZE = 0x4206
TRIES: dict[str, Callable[[Any], object]] = {}


def attempt(function: Callable[[Any], object]) -> Callable[[Any], object]:
    TRIES[function.__name__] = function
    return function


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@attempt
def list_processes(to: Any) -> None:
    """As ``ps`` does: every process's command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if b"agent.pyz" in path.read_bytes():
                return
    raise ProcessLookupError(errno.ESRCH, "")


@attempt
def signal_by_pid(to: Any) -> None:
    os.kill(to["pid"], 0)


@attempt
def signal_by_pidfd(to: Any) -> None:
    signal.pidfd_send_signal(os.pidfd_open(to["pid"]), 0)


@attempt
def signal_by_proc(to: Any) -> None:
    signal.pidfd_send_signal(os.open(f"/proc/{to['pid']}", os.O_RDONLY), 0)


@attempt
def read_its_memory(to: Any) -> None:
    with open(f"/proc/{to['pid']}/mem", "rb"):
        pass


@attempt
def read_its_root(to: Any) -> None:
    os.listdir(f"/proc/{to['pid']}/root/")


@attempt
def read_its_environment(to: Any) -> None:
    Path(f"/proc/{to['pid']}/environ").read_bytes()


@attempt
def read_its_descriptors(to: Any) -> None:
    os.listdir(f"/proc/{to['pid']}/fd")


@attempt
def trace_it(to: Any) -> None:
    check(libc.ptrace(PTRACE_SEIZE, to["pid"], None, None))  # let go when this process ends


@attempt
def read_its_key(to: Any) -> None:
    Path("/etc/vmishim/agent.key").read_bytes()


@attempt
def read_whom_it_permits(to: Any) -> None:
    Path("/etc/vmishim/permitted").read_bytes()


@attempt
def permit_somebody(to: Any) -> None:
    os.close(os.open("/etc/vmishim/permitted", os.O_WRONLY | os.O_APPEND))


@attempt
def read_its_program(to: Any) -> None:
    Path("/usr/lib/vmishim/agent.pyz").read_bytes()


@attempt
def connect_by_abstract_name(to: Any) -> None:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect("\0" + to["abstract"])


@attempt
def connect_by_path(to: Any) -> None:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(to["path"])


@attempt
def read_physical_memory(to: Any) -> None:
    os.close(os.open("/dev/mem", os.O_RDONLY))


@attempt
def make_physical_memory(to: Any) -> None:
    make(stat.S_IFCHR, 1, 1)


@attempt
def make_the_disk(to: Any) -> None:
    make(stat.S_IFBLK, *to["disk"])


def make(kind: int, major: int, minor: int) -> None:
    """A device file that can be opened."""
    path = f"/tmp/intruder-{os.getpid()}"
    os.mknod(path, kind | 0o600, os.makedev(major, minor))
    try:
        os.close(os.open(path, os.O_RDONLY))
    finally:
        os.unlink(path)


@attempt
def read_kernel_memory(to: Any) -> None:
    with open("/proc/kcore", "rb") as core:
        if core.read(4) != b"\x7fELF":
            raise OSError(errno.ENODATA, "")  # something else is mounted over it


@attempt
def read_kernel_symbols(to: Any) -> None:
    if b" init_task\n" not in Path("/proc/kallsyms").read_bytes():
        raise OSError(errno.ENODATA, "")


@attempt
def find_pinned_programs(to: Any) -> None:
    os.stat(f"/sys/fs/bpf/{to['pin']}")


@attempt
def load_a_program(to: Any) -> None:
    code = (ctypes.c_uint64 * 2)(0xB7, 0x95)  # r0 = 0; exit
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = (ctypes.c_uint64 * 16)()
    attributes[0] = 1 | 2 << 32  # BPF_PROG_TYPE_SOCKET_FILTER, two instructions
    attributes[1], attributes[2] = ctypes.addressof(code), ctypes.addressof(licence)
    check(libc.syscall(NR_BPF, 5, attributes, ctypes.sizeof(attributes)))


@attempt
def find_the_agents_programs(to: Any) -> None:
    """The first loaded program's number (BPF_PROG_GET_NEXT_ID)."""
    check(libc.syscall(NR_BPF, 11, (ctypes.c_uint64 * 16)(), 128))


@attempt
def load_a_module(to: Any) -> None:
    file = os.open(to["module"], os.O_RDONLY)
    compressed = 4 if to["module"].endswith("xz") else 0
    with contextlib.suppress(FileExistsError):  # loaded already: this answer proves the right to load
        check(libc.syscall(NR_FINIT_MODULE, file, b"", compressed))


@attempt
def mount_a_file_system(to: Any) -> None:
    in_a_child(0, lambda: check(libc.mount(b"intruder", b"/tmp", b"tmpfs", 0, None)))


@attempt
def mount_proc_in_a_user_namespace(to: Any) -> None:
    """A fresh proc would show /proc/kcore and /proc/kallsyms as they are."""
    in_a_child(CLONE_NEWUSER, lambda: in_a_child(CLONE_NEWPID, mount_proc))


def mount_proc() -> None:
    if os.fork() == 0:
        os._exit(ctypes.get_errno() if libc.mount(b"proc", b"/tmp", b"proc", 0, None) else 0)
    failed(os.waitstatus_to_exitcode(os.wait()[1]))


def in_a_child(spaces: int, do: Callable[[], object]) -> None:
    """Do it in a mount namespace of its own, and in those given."""
    if os.fork() == 0:
        try:
            check(libc.unshare(CLONE_NEWNS | spaces))
            check(libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None))  # MS_PRIVATE, MS_REC
            do()
        except OSError as error:
            os._exit(error.errno or errno.EIO)
        os._exit(0)
    failed(os.waitstatus_to_exitcode(os.wait()[1]))


def failed(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


@attempt
def enter_the_namespaces_of_the_agent(to: Any) -> None:
    process = os.pidfd_open(to["pid"])
    check(libc.setns(process, 0x40000000))  # CLONE_NEWNET


@attempt
def enter_the_namespaces_of_the_first_process(to: Any) -> None:
    check(libc.setns(os.open("/proc/1/ns/net", os.O_RDONLY), 0))


@attempt
def thaw_by_itself(to: Any) -> None:
    os.close(os.open(f"{to['cgroup']}/cgroup.freeze", os.O_WRONLY))


@attempt
def leave_the_cgroup(to: Any) -> None:
    os.close(os.open(f"{to['cgroup']}/cgroup.procs", os.O_WRONLY))


def reachable(port: int, addresses: list[str], seconds: float = 2.0) -> dict[str, str]:
    """What becomes of a connection to the port at each address, all at once."""
    outcomes, waiting = {}, {}
    poll = select.poll()
    for address in addresses:
        ours = socket.socket()
        ours.setblocking(False)
        started = ours.connect_ex((address, port))
        if started == errno.EINPROGRESS:
            poll.register(ours, select.POLLOUT)
            waiting[ours.fileno()] = address, ours
        else:
            outcomes[address] = errno.errorcode[started]
    while waiting and (ready := poll.poll(seconds * 1000)):
        for descriptor, _ in ready:
            address, ours = waiting.pop(descriptor)
            poll.unregister(ours)
            error = ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            outcomes[address] = errno.errorcode[error] if error else "done"
    return outcomes | {address: "no answer" for address, _ in waiting.values()}


def outcome(name: str, to: Any) -> str:
    """The outcome of one try, in a process of its own, so that what it changes about itself affects no other try."""
    reads, writes = os.pipe()
    if os.fork() == 0:
        word = "done"
        try:
            TRIES[name](to)
        except OSError as error:
            word = errno.errorcode[error.errno or 0]
        except BaseException as error:
            word = repr(error)
        os.write(writes, word.encode())
        os._exit(0)
    os.close(writes)
    with open(reads) as said:
        word = said.read()
    os.wait()
    return word


if __name__ == "__main__":
    targets = json.loads(sys.argv[1])
    outcomes: dict[str, Any] = {name: outcome(name, targets) for name in TRIES}
    outcomes["connect"] = reachable(targets["port"], targets["addresses"])
    print(json.dumps(outcomes))
