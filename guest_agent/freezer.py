"""Freeze the monitored system while an IDS looks at it: freezes its container's cgroup (``cgroup.freeze``, see
Documentation/admin-guide/cgroup-v2.rst), while the agent, outside the cgroup, keeps answering.

A separate process, the warden, holds the cgroup's files and tracks which sessions hold a freeze and until when. It
thaws when the last holder's time is up, or when the agent is gone for any reason, so neither a dead IDS nor a dead
agent leaves the system frozen. If agent and warden are killed together, the next agent thaws before anything else.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
from pathlib import Path
from time import monotonic

from guest_agent import sandbox
from vmishim.errors import LinkError

FREEZE_MAX = 60_000
"""The longest time without a request, in ms, that a session may ask its freeze to survive."""
_FREEZE_TIMEOUT = 1.0  # seconds; a task in uninterruptible sleep can't be frozen
_POLL_MS = 2  # ms; the kernel announces changes of cgroup.events at most every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV)
_ASK = struct.Struct("<B8sI")
_FREEZE, _RENEW, _THAW = range(3)
_DONE = "done"
_CALLS = (
    "poll read write pread64 pwrite64 clock_gettime exit_group "
    "brk munmap mremap madvise futex rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall"
)
_ROOT = Path("/sys/fs/cgroup")


class FreezeError(Exception):
    """The monitored system can't be frozen, or did not stay frozen; the text says why."""


class Freezer:
    """The agent's side of the warden. The constructor forks the warden: call it before there are threads or secrets.

    :param cgroup: folder of the monitored container's cgroup, which is thawed at once; None refuses every freeze
    :raises LinkError: there is no such cgroup, it can't be frozen, or the agent itself is in it
    """

    def __init__(self, cgroup: Path | None = None) -> None:
        self._holders: set[bytes] = set()
        self._socket: socket.socket | None = None
        if cgroup is None:
            return
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
        if (_ROOT / own.lstrip("/")).is_relative_to(cgroup.resolve()):
            raise LinkError(f"the agent is in {cgroup} itself: name the cgroup of the monitored container only")
        try:
            freeze = os.open(cgroup / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
            events = os.open(cgroup / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
            os.pwrite(freeze, b"0", 0)
        except OSError as error:
            raise LinkError(
                f"{error.filename or cgroup}: {error.strerror}: --freeze takes the folder of a cgroup (version 2) that "
                "outlives the agent, such as the slice of the monitored container"
            ) from error
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            try:
                _keep_only(theirs.fileno(), freeze, events)
                _Warden(theirs.fileno(), freeze, events).run()
            finally:
                os._exit(0)
        for descriptor in (freeze, events):
            os.close(descriptor)
        theirs.close()

    def freeze(self, session: bytes, milliseconds: int) -> None:
        """Freeze the monitored system for a session; returns once it is frozen. Called again, it sets a new time.

        :param milliseconds: the freeze ends when the session sends no request for this long
        :raises FreezeError: it can't be frozen; it then runs on, unless another session has it frozen
        """
        if self._socket is None:
            raise FreezeError("this agent may not freeze anything: start it with --freeze CGROUP")
        if not 0 < milliseconds <= FREEZE_MAX:
            raise FreezeError(f"a freeze lasts 1 to {FREEZE_MAX:,} ms without a request, not {milliseconds:,}")
        self._ask(_FREEZE, session, milliseconds)
        self._holders.add(session)

    def renew(self, session: bytes) -> None:
        """Restart the time of a session's freeze, if it holds one, because the session was answered.

        :raises FreezeError: its freeze ended before this call
        """
        if session in self._holders:
            self._ask(_RENEW, session)

    def thaw(self, session: bytes) -> None:
        """End a session's freeze, if it holds one; the system runs again unless another session holds one."""
        if session in self._holders:
            self._holders.remove(session)
            self._ask(_THAW, session)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable between requests only when the warden has ended."""
        return () if self._socket is None else (self._socket.fileno(),)

    @property
    def lost(self) -> bool:
        """Whether the warden has ended, so that nothing would thaw the system."""
        poll = select.poll()
        for descriptor in self.descriptors:
            poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Thaw the monitored system and end the warden."""
        if self._socket is not None:
            self._socket.close()

    def _ask(self, what: int, session: bytes, milliseconds: int = 0) -> None:
        assert self._socket is not None, "only an agent with a cgroup has freezes"
        try:
            self._socket.send(_ASK.pack(what, session, milliseconds))
            answer = self._socket.recv(4096)
        except OSError:
            answer = b""
        if answer != _DONE.encode():
            raise FreezeError(answer.decode() or "the process that thaws has ended: restart the agent")


class _Warden:
    """The warden's process: tracks each session's freeze, how long the session may be silent, and its deadline."""

    def __init__(self, agent: int, freeze: int, events: int) -> None:
        self._agent, self._freeze, self._events = agent, freeze, events
        self._holders: dict[bytes, tuple[float, float]] = {}

    def run(self) -> None:
        """Serve the agent until it is gone."""
        poll = select.poll()
        poll.register(self._agent, select.POLLIN)
        try:
            while True:
                left = max((until for _, until in self._holders.values()), default=0.0) - monotonic()
                if self._holders and left <= 0:
                    self._thaw()
                elif poll.poll(left * 1000 + 1 if self._holders else None):
                    request = os.read(self._agent, _ASK.size)
                    if not request:
                        return
                    os.write(self._agent, self._answer(*_ASK.unpack(request)).encode())
        finally:
            self._thaw()

    def _answer(self, what: int, session: bytes, milliseconds: int) -> str:
        try:
            self._serve(what, session, milliseconds)
        except FreezeError as error:
            return str(error)
        except OSError as error:
            self._holders.clear()
            return (
                f"the monitored container's cgroup is gone ({error.strerror}), as when the container is restarted: "
                "give --freeze a cgroup that outlives it, and restart the agent"
            )
        return _DONE

    def _serve(self, what: int, session: bytes, milliseconds: int) -> None:
        now = monotonic()
        if what == _FREEZE:
            self._freeze_all()
            seconds = milliseconds / 1000
            self._holders[session] = seconds, monotonic() + seconds
        elif what == _RENEW:
            # Read the file: another process may have thawed the cgroup. The read fails when the cgroup is gone.
            if os.pread(self._freeze, 1, 0) != b"1":
                self._holders.clear()
            if session not in self._holders:
                raise FreezeError(
                    "the pause is over: no request came for longer than it allows, or the container was thawed by "
                    "hand; call resume_vm, then pause_vm again, with a longer freeze in domains.toml if needed"
                )
            seconds, _ = self._holders[session]
            self._holders[session] = seconds, now + seconds
        else:
            self._holders.pop(session, None)
            if all(until <= now for _, until in self._holders.values()):
                self._thaw()

    def _freeze_all(self) -> None:
        os.pwrite(self._freeze, b"1", 0)
        deadline = monotonic() + _FREEZE_TIMEOUT
        poll = select.poll()
        poll.register(self._events, select.POLLPRI)
        while b"frozen 1" not in os.pread(self._events, 256, 0):
            if monotonic() > deadline:
                if not self._holders:
                    self._thaw()
                raise FreezeError(f"the monitored container did not freeze within {_FREEZE_TIMEOUT:g} s")
            poll.poll(_POLL_MS)

    def _thaw(self) -> None:
        self._holders.clear()
        with contextlib.suppress(OSError):  # a cgroup that is gone freezes nothing
            os.pwrite(self._freeze, b"0", 0)


def _keep_only(*descriptors: int) -> None:
    """Keep only these descriptors, standard error, and the rights to use them. Ignore signals meant for the agent: this
    process ends when the agent does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    low = 0
    for descriptor in (*sorted((2, *descriptors)), os.sysconf("SC_OPEN_MAX")):
        os.closerange(low, descriptor)
        low = descriptor + 1
    sandbox.drop_capabilities()
    sandbox.confine([*map(sandbox.Call, _CALLS.split()), sandbox.Call("mmap", 2, mmap.PROT_EXEC, 0)])
