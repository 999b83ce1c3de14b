"""Drop privileges once the agent holds all it needs: root's user, every capability, and all but a few system calls.

Open descriptors and loaded programs need no privilege to be used, so the confined process can answer requests and do
nothing else. It takes two steps, because capabilities belong to a thread and new threads inherit them:
`drop_capabilities` before the first thread starts, `confine` when all of them run.

libseccomp is called through ctypes (``libseccomp.so.2``, which systemd itself needs): no Python binding is maintained
both in Debian and on PyPI.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pwd
import termios
from collections.abc import Collection
from ctypes import POINTER, Structure, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

from vmishim.errors import LibvmiError

CAP_SETGID, CAP_SETUID = 6, 7
"""include/uapi/linux/capability.h"""
BPF_PROG_TEST_RUN, BPF_OBJ_GET_INFO_BY_FD = 10, 15
"""enum bpf_cmd"""


class SandboxError(LibvmiError):
    """The process could not be confined, so it must not serve. The text says what failed, and what to do."""


class Call(NamedTuple):
    """A system call that is allowed, if ``argument & mask == value`` (``argument`` is the argument's index)."""

    name: str
    argument: int = 0
    mask: int = 0
    value: int = 0


INT, _POINTER = (1 << 32) - 1, (1 << 64) - 1
"""Masks for the bits of an argument that the kernel uses."""


def process() -> list[Call]:
    """What every Python process needs: memory, threads, its own signals, the log."""
    names = (
        "brk munmap mremap madvise futex sched_yield sched_getaffinity rt_sigaction rt_sigprocmask rt_sigreturn "
        "sigaltstack restart_syscall getpid gettid exit exit_group write "
        "clock_gettime clock_nanosleep gettimeofday getrandom"
    )
    return [
        *map(Call, names.split()),
        # Memory is never made executable.
        Call("mmap", 2, mmap.PROT_EXEC, 0),
        Call("mprotect", 2, mmap.PROT_EXEC, 0),
        # mmap.mmap duplicates the descriptor it maps.
        Call("fcntl", 1, INT, fcntl.F_DUPFD_CLOEXEC),
        # abort(3) may signal this process only.
        Call("tgkill", 0, INT, os.getpid()),
    ]


def serving() -> list[Call]:
    """What the agent needs while it answers requests. It opens no file, executes nothing and connects to nothing."""
    names = (
        # libzmq's connections: it accepts them and makes none.
        "listen accept4 getsockname getpeername getsockopt setsockopt recvfrom shutdown "
        "epoll_ctl epoll_wait epoll_pwait poll ppoll "
        # Open descriptors: libzmq's mailboxes, the list of permitted keys.
        "read pread64 lseek close fstat "
        # Whether the path of that list still names the open file. Shows that a file exists, not its content.
        "stat newfstatat "
        # Descriptors of programs, from the process that loads them (`guest_agent.loader`).
        "recvmsg "
        # The hostname and release in the answer to a hello.
        "uname"
    )
    return [
        *map(Call, names.split()),
        # Run loaded programs, and ask whether they still are the ones. Nothing else of bpf(2): no program can be
        # loaded, no map looked up. The second tells kind, sizes, name and ids of what a descriptor leads to, and
        # shows a program's instructions to CAP_BPF only.
        Call("bpf", 0, INT, BPF_PROG_TEST_RUN),
        Call("bpf", 0, INT, BPF_OBJ_GET_INFO_BY_FD),
        # Without an address: only to the connected peer.
        Call("sendto", 4, _POINTER, 0),
        # How much of a reply a peer has left unread.
        Call("ioctl", 1, INT, termios.TIOCOUTQ),
        # Not F_SETOWN or F_SETSIG, which would make a descriptor signal other processes.
        Call("fcntl", 1, INT, fcntl.F_GETFL),
        Call("fcntl", 1, INT, fcntl.F_SETFL),
        *process(),
    ]


NEVER = ("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev")
"""System calls that neither our code nor our libraries make. A process that makes one has been taken over: the kernel
kills it at once, and systemd starts a new one. Any other call that is not allowed fails with EPERM: libraries make
calls that they can do without (glibc asks for the number of CPUs, or for the name of a link-local peer's interface),
and a peer must not be able to kill the agent by provoking one."""


def drop_capabilities(keep: Collection[int] = ()) -> None:
    """Drop the capabilities of this thread, and so of threads it will start, except those that `confine` needs.

    :param keep: numbers of more capabilities to keep
    :raises SandboxError: the kernel refused
    """
    kept = {*keep, *({CAP_SETGID, CAP_SETUID} if os.geteuid() == 0 else ())}
    held = sum(1 << number for number in kept) & _permitted()
    low, high = held & 0xFFFFFFFF, held >> 32
    # struct __user_cap_header_struct; two of __user_cap_data_struct: effective, permitted, inheritable.
    header = (c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (c_uint32 * 6)(low, low, 0, high, high, 0)):
        raise SandboxError(f"cannot give up capabilities: {os.strerror(ctypes.get_errno())}")


def confine(calls: Collection[Call], keep: Collection[int] = ()) -> None:
    """Become an unprivileged user, and allow all threads of this process only these system calls, permanently.

    Root becomes the user that systemd made for the service (``DynamicUser``), or ``nobody``; the kernel then drops its
    last capabilities. Neither can be regained: ``no_new_privs`` is set.

    :param keep: numbers of capabilities to keep; only for a process with one thread
    :raises SandboxError: the kernel or libseccomp refused; the process must then end
    """
    seccomp = _libseccomp()
    if os.geteuid() == 0:
        user, group = _unprivileged()
        if keep and _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0):
            raise SandboxError(f"cannot keep capabilities: {os.strerror(ctypes.get_errno())}")
        try:
            # glibc applies these to every thread.
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
        except OSError as error:
            raise SandboxError(
                f"root cannot become user {user} ({error.strerror}): give the agent CAP_SETUID and CAP_SETGID, as its "
                "unit does"
            ) from None
    if keep:
        drop_capabilities(keep)
    # So that neither a core file nor another process of this user exposes the private key.
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise SandboxError(f"cannot become undumpable: {os.strerror(ctypes.get_errno())}")
    filter_ = seccomp.seccomp_init(_ERRNO | errno.EPERM)
    if not filter_:
        raise SandboxError("libseccomp cannot create a filter")
    try:
        for call in calls:
            compare = _Compare(call.argument, _MASKED_EQUAL, call.mask, call.value)
            _add(seccomp, filter_, _ALLOW, call.name, compare if call.mask else None)
        for name in NEVER:
            _add(seccomp, filter_, _KILL_PROCESS, name)
        _check(seccomp.seccomp_attr_set(filter_, _ALL_THREADS, 1), "apply to all threads")
        # This sets no_new_privs, without which the kernel accepts filters from root only.
        _check(seccomp.seccomp_load(filter_), "be installed")
    finally:
        seccomp.seccomp_release(filter_)


def _unprivileged() -> tuple[int, int]:
    """User and group that root changes to."""
    folder = os.environ.get("RUNTIME_DIRECTORY")
    if folder:
        # A dynamic user is not in /etc/passwd, but it owns this folder.
        status = os.stat(folder)
        if status.st_uid:
            return status.st_uid, status.st_gid
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _permitted() -> int:
    """This thread's permitted capabilities, as a bit mask."""
    status = Path("/proc/thread-self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:")), 16)


# ---- libseccomp (include/seccomp.h) and libc -------------------------------------------------------------------------

_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_MASKED_EQUAL = 7  # enum scmp_compare
_ALL_THREADS = 4  # SCMP_FLTATR_CTL_TSYNC
_CAPABILITY_VERSION_3 = 0x20080522  # include/uapi/linux/capability.h
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8  # include/uapi/linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


class _Compare(Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = [("arg", c_uint), ("op", c_int), ("datum_a", c_uint64), ("datum_b", c_uint64)]


def _libseccomp() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise SandboxError(f"libseccomp is not installed ({error}): apt install libseccomp2") from None
    for name, result, arguments in (
        ("seccomp_init", c_void_p, [c_uint32]),
        ("seccomp_release", None, [c_void_p]),
        ("seccomp_syscall_resolve_name", c_int, [c_char_p]),
        ("seccomp_rule_add_array", c_int, [c_void_p, c_uint32, c_int, c_uint, POINTER(_Compare)]),
        ("seccomp_attr_set", c_int, [c_void_p, c_int, c_uint32]),
        ("seccomp_load", c_int, [c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _add(lib: ctypes.CDLL, filter_: int, action: int, name: str, compare: _Compare | None = None) -> None:
    number = lib.seccomp_syscall_resolve_name(name.encode())
    count, array = (0, None) if compare is None else (1, ctypes.byref(compare))
    _check(lib.seccomp_rule_add_array(filter_, action, number, count, array), f"add {name}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise SandboxError(f"a seccomp filter could not {what}: {os.strerror(-result)}")
