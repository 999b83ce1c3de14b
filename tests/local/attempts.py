"""Tries what an agent may not do, before and after it has confined itself: ``python3 -c SOURCE PACKAGE``.

PACKAGE is a folder or zip to import ``guest_agent`` from. Prints JSON: the errno of each attempt (0: it went through)
before and after, what requests were answered with, and how the processes ended that made one attempt of FATAL each,
which they should not survive; logs a traceback.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
# arch/x86/entry/syscalls/syscall_64.tbl
MPROTECT, IOCTL, PRCTL, PTRACE, INIT_MODULE, UNSHARE = 10, 16, 157, 101, 175, 272
PERF_EVENT_OPEN, PROCESS_VM_READV, BPF, EXECVEAT, PIDFD_OPEN = 298, 310, 321, 322, 434


def call(number: int, *arguments: object) -> int:
    """A system call. :raises OSError: as it failed"""
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def bpf(command: int, attribute: ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2)."""
    return call(BPF, ctypes.c_int(command), attribute, ctypes.c_uint(len(attribute)))


def words(*numbers: int) -> ctypes.Array[ctypes.c_char]:
    """An attribute of bpf(2) made of u32."""
    return ctypes.create_string_buffer(b"".join(number.to_bytes(4, "little") for number in numbers), 64)


def load_program() -> int:
    code = ctypes.create_string_buffer(bytes.fromhex("b700000000000000 9500000000000000"))  # return 0
    licence = ctypes.create_string_buffer(b"GPL")
    halves = [half for data in (code, licence) for half in divmod(ctypes.addressof(data), 1 << 32)[::-1]]
    return bpf(5, words(1, 2, *halves))


def look_up(descriptor: int) -> int:
    key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(1 << 21)
    halves = [half for data in (key, value) for half in divmod(ctypes.addressof(data), 1 << 32)[::-1]]
    return bpf(1, words(descriptor, 0, *halves))


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def start_thread() -> None:
    try:
        threading.Thread(target=int).start()
    except RuntimeError:  # all that Python says about it
        raise PermissionError(1, "clone") from None


def protect(mode: int) -> None:
    pages = mmap.mmap(-1, 4096)
    call(MPROTECT, ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages))), ctypes.c_size_t(4096), mode)


FATAL: dict[str, Callable[[], object]] = {
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "execveat": lambda: call(EXECVEAT, -100, b"/bin/true", None, None, 0),
    "ptrace": lambda: call(PTRACE, 0, 0, None, None),
    "process_vm_readv": lambda: call(PROCESS_VM_READV, os.getpid(), None, 0, None, 0, 0),
}


def attempts(descriptor: int) -> dict[str, Callable[[], object]]:
    """Each goes through, or fails in another way than EPERM, when root makes it.

    :param descriptor: of a map
    """
    here, there = socket.create_server(("127.0.0.1", 0)), socket.socket()
    datagrams, parent = socket.socket(type=socket.SOCK_DGRAM), os.getppid()
    return {
        "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "make a file": lambda: os.open("/dev/shm/attempt", os.O_WRONLY | os.O_CREAT),
        "remove a file": lambda: os.unlink("/dev/shm/attempt"),
        "list a folder": lambda: os.listdir("/"),
        "load a program": load_program,
        "make a map": lambda: bpf(0, words(2, 4, 8, 1)),
        "look into a map": lambda: look_up(descriptor),
        "find a map": lambda: bpf(14, words(0x7FFFFFFF)),
        "find a program": lambda: bpf(13, words(0x7FFFFFFF)),
        "load a module": lambda: call(INIT_MODULE, None, 0, b""),
        "count events": lambda: call(PERF_EVENT_OPEN, None, 0, -1, -1, 0),
        "fork": fork,
        "start a thread": start_thread,
        "make a socket": lambda: socket.socket().close(),
        "connect": lambda: there.connect(here.getsockname()),
        "send to a stranger": lambda: datagrams.sendto(b"", ("127.0.0.1", 9)),
        "signal another": lambda: os.kill(parent, 0),
        "hold another": lambda: call(PIDFD_OPEN, parent, 0),
        "map code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "turn data into code": lambda: protect(mmap.PROT_READ | mmap.PROT_EXEC),
        "become root": lambda: os.setuid(0),
        "change the root": lambda: os.chroot("/"),
        "leave namespaces": lambda: call(UNSHARE, 0),
        "ioctl": lambda: call(IOCTL, here.fileno(), 0x541B, ctypes.byref(ctypes.c_int())),
        "prctl": lambda: call(PRCTL, 3, 0, 0, 0, 0),
    }


def outcome(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


def end(attempt: Callable[[], object], confine: Callable[[], object]) -> int:
    """How a child process ends that confines itself and then makes an attempt: minus the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            confine()
            attempt()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(package: str) -> None:
    sys.path.insert(0, package)
    from guest_agent import sandbox
    from guest_agent.agent import Agent
    from guest_agent.kernel import Kernel
    from vmishim.wire import messages
    from vmishim.wire.plan import Plan, Step, Take

    def confine() -> None:
        sandbox.drop_capabilities()
        sandbox.confine(sandbox.serving())

    ends = {name: end(attempt, confine) for name, attempt in FATAL.items()}
    logging.basicConfig(format="%(message)s")
    kernel = Kernel()
    agent = Agent(kernel)
    tries = attempts(kernel._programs.map_descriptor("out"))
    task = kernel.symbol("init_task") or 0
    comm, size = kernel.member("task_struct comm") or [0, 0]
    requests: dict[str, bytes] = {
        type(request).__name__: messages.encode(request)
        for request in (
            messages.Hello("test", ["init_task"], ["task_struct comm"]),
            messages.Symbols(["init_task", "no_such_symbol"]),
            messages.Names([task, 1]),
            messages.Members(["task_struct comm", "no_such_struct"]),
            messages.Pointees(["task_struct 0"]),
            messages.Read(0, task + comm, size),
            messages.Lookup(0x1000, task),
            messages.Walk(Plan(task, Step.SELF, (Take(0, comm, size),))),
            messages.More(4711),
            messages.Inject("junk", b"\x7fELF"),
            messages.Injected(),
        )
    } | {"nonsense": b"\xff", "a read of nothing": messages.encode(messages.Read(0, 8, 8))}

    def answers() -> dict[str, str]:
        return {name: agent.answer(b"session", request).hex() for name, request in requests.items()}

    report: dict[str, object] = {"ends": ends, "before": {name: outcome(attempt) for name, attempt in tries.items()}}
    report["answers before"] = answers()
    sandbox.drop_capabilities()
    idle = threading.Thread(target=threading.Event().wait, daemon=True)
    idle.start()
    sandbox.confine(sandbox.serving())
    report["after"] = {name: outcome(attempt) for name, attempt in tries.items()}
    report["answers after"] = answers()
    try:
        raise ZeroDivisionError("as planned")
    except ZeroDivisionError:
        logging.exception("an error whose traceback is logged")
    print(json.dumps(report), flush=True)
    os._exit(0)  # the idle thread waits for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
