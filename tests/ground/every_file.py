"""Opens a file of every kind that this kernel allows, makes FOLDER/open, and keeps the files until it is ended.

Run by an interpreter alone: ``python every_file.py FOLDER``. What a kernel or its rules refuse is left out.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial

BPF, PERF_EVENT_OPEN, USERFAULTFD, FANOTIFY_INIT, IO_URING_SETUP, MEMFD_SECRET = 321, 298, 323, 300, 425, 447
EVENTFD, TIMERFD, SIGNALFD, INOTIFY, MQ_OPEN, LANDLOCK, OPEN_TREE, PIDFD_OPEN = 290, 283, 289, 294, 240, 444, 428, 434
"""System calls of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl)."""
MAP_CREATE, PROG_LOAD, BTF_LOAD = 0, 5, 18
UDMABUF_CREATE, SET_NAME, SEAL_SHRINK, ADD_SEALS = 0x40187542, 0x40086201, 2, 1033

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    descriptor = int(libc.syscall(number, *arguments))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return descriptor


def bpf(command: int, *words: int, form: str) -> int:
    attributes = ctypes.create_string_buffer(struct.pack(form, *words), 128)
    return call(BPF, command, attributes, 128)


def dma_buf() -> int:
    memory = os.memfd_create("behind", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, mmap.PAGESIZE)
    fcntl.fcntl(memory, ADD_SEALS, SEAL_SHRINK)
    with open("/dev/udmabuf", "rb") as device:
        made = int(fcntl.ioctl(device, UDMABUF_CREATE, bytearray(struct.pack("=IIQQ", memory, 0, 0, mmap.PAGESIZE))))
    fcntl.ioctl(made, SET_NAME, bytearray(b"frame\n1\0"))
    return made


def every(folder: str) -> Iterator[Callable[[], object]]:
    """Functions that each open one."""
    at = os.path.join(folder, "")
    for space in sorted(os.listdir("/proc/self/ns")):
        yield partial(os.open, f"/proc/self/ns/{space}", os.O_RDONLY)
    yield lambda: call(PIDFD_OPEN, os.getpid(), 0)
    yield lambda: os.memfd_create("plain")
    yield lambda: os.memfd_create("x\nFINDING: 1 y\x1b[2J" + "z" * 200)
    yield lambda: os.memfd_create("huge", os.MFD_HUGETLB)
    yield lambda: call(MEMFD_SECRET, 0)
    yield lambda: call(EVENTFD, 0, 0)
    yield select.epoll
    yield lambda: call(TIMERFD, 1, 0)
    yield lambda: call(SIGNALFD, -1, ctypes.byref(ctypes.c_uint64(1)), 8, 0)
    yield lambda: call(INOTIFY, 0)
    yield lambda: call(FANOTIFY_INIT, 0, 0)
    yield lambda: call(USERFAULTFD, 0)
    yield lambda: call(IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
    yield lambda: call(LANDLOCK, ctypes.byref(ctypes.c_uint64(1)), 8, 0)
    yield lambda: call(PERF_EVENT_OPEN, ctypes.create_string_buffer(struct.pack("=II", 1, 112), 112), 0, -1, -1, 0)
    yield lambda: bpf(MAP_CREATE, 2, 4, 8, 1, form="=4I")
    # A program that returns 0, of the type socket filter.
    code, terms = ctypes.create_string_buffer(struct.pack("=QQ", 0xB7, 0x95), 16), ctypes.create_string_buffer(b"GPL")
    yield lambda: bpf(PROG_LOAD, 1, 2, ctypes.addressof(code), ctypes.addressof(terms), form="=IIQQ")
    # An integer in BTF (Documentation/bpf/btf.rst).
    raw = struct.pack("=HBBIIIIIIIII", 0xEB9F, 1, 0, 24, 0, 16, 16, 5, 1, 1 << 24, 4, 32) + b"\0int\0"
    types = ctypes.create_string_buffer(raw, len(raw))
    yield lambda: bpf(BTF_LOAD, ctypes.addressof(types), 0, len(raw), form="=QQI")
    yield lambda: call(MQ_OPEN, b"every_file", os.O_CREAT | os.O_RDWR, 0o600, None)
    yield lambda: call(OPEN_TREE, -100, b"/tmp", 1)
    yield os.pipe
    yield socket.socketpair
    for family, kind in ((socket.AF_INET, 1), (socket.AF_INET6, 2), (socket.AF_NETLINK, 3), (socket.AF_PACKET, 3)):
        yield partial(socket.socket, family, kind)
    yield dma_buf
    yield lambda: os.openpty()
    yield lambda: os.open("/dev/null", os.O_RDONLY)
    yield lambda: os.open("/", os.O_RDONLY)
    yield lambda: os.open("/proc/self/status", os.O_RDONLY)
    yield lambda: os.open("/sys/kernel", os.O_RDONLY)
    yield lambda: os.open(folder, os.O_RDONLY)
    yield lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR)
    yield lambda: os.open(f"{at}unlinked", os.O_CREAT | os.O_RDWR)
    yield lambda: os.unlink(f"{at}unlinked")
    yield lambda: os.mkfifo(f"{at}fifo")
    yield lambda: os.open(f"{at}fifo", os.O_RDWR)
    yield lambda: os.open(at.encode() + b"\xff\n\x1b\\ name", os.O_CREAT | os.O_RDWR)
    # Short names lie in their dentry, long ones beside it; a few of many cross a page where slabs have more than one.
    for number in range(100):
        yield partial(os.open, f"{at}{number:031}", os.O_CREAT | os.O_RDWR)
        yield partial(os.open, f"{at}{number:0180}", os.O_CREAT | os.O_RDWR)


def main() -> None:
    """Open them all."""
    kept = []
    for function in every(sys.argv[1]):
        with contextlib.suppress(OSError):
            kept.append(function())
    open(os.path.join(sys.argv[1], "open"), "w").close()
    signal.pause()


if __name__ == "__main__":
    main()
