"""Where records go: a file or standard output, journald, syslog. What can't be written now is kept, within a bound, and
written in order as soon as it can be."""

from __future__ import annotations

import errno
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vmishim.inspection.findings import Severity
from vmishim.watching.records import NOTICE, SEVERITIES, Record, line, plain

PENDING_MAX = 64 << 20
"""Bytes of records that are kept while they can't be written; then the oldest are given up, and counted."""
JOURNAL, SYSLOG = "/run/systemd/journal/socket", "/dev/log"
"""Sockets of journald's native protocol (systemd, JOURNAL_NATIVE_PROTOCOL) and of syslog (RFC 3164)."""
_AUTHPRIV = 10
"""The facility of syslog for security messages (RFC 5424, section 6.2.1)."""
_LATER = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)

Say = Callable[[str], object]


class Outlet(ABC):
    """Where records go.

    :param name: for messages
    :param say: tells people, once, that writing fails or works again
    :ivar lost: records that were given up
    """

    def __init__(self, name: str, say: Say) -> None:
        self.name = name
        self.lost = 0
        self._say = say
        self._pending: deque[bytes] = deque()
        self._size = self._done = 0  # `_done`: bytes of the first that are written
        self._failing = False
        self._given_up = 0

    @property
    def pending(self) -> int:
        """Records that wait."""
        return len(self._pending)

    def write(self, record: Record) -> None:
        """Write a record, or keep it."""
        data = self._encode(record)
        self._pending.append(data)
        self._size += len(data)
        # The first may be written in part: it stays.
        while self._size > PENDING_MAX and len(self._pending) > 1:
            first = self._pending.popleft()
            if self._done:
                self._pending[0], first = first, self._pending[0]
            self._size -= len(first)
            self.lost += 1
        if not self._failing:
            self.retry()

    def retry(self) -> None:
        """Write what is kept."""
        try:
            while self._pending:
                first = self._pending[0]
                self._done += self._send(memoryview(first)[self._done :])
                if self._done >= len(first):
                    self._pending.popleft()
                    self._size -= len(first)
                    self._done = 0
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self._ends_with_reader:
                raise
            if not self._failing:
                self._failing, self._given_up = True, self.lost
                if error.errno not in _LATER:
                    self._say(f"{self.name}: {error.strerror}; records are kept, and written as soon as they can be")
            return
        if self._failing:
            self._failing = False
            lost = self.lost - self._given_up
            self._say(f"{self.name}: written again; " + (f"{lost:,} records were lost" if lost else "nothing was lost"))

    _ends_with_reader = False

    def reopen(self) -> None:
        """Begin again: the file was rotated, or the service restarted."""
        self.retry()

    @abstractmethod
    def _encode(self, record: Record) -> bytes: ...

    @abstractmethod
    def _send(self, data: memoryview) -> int:
        """Write, and return how many bytes were. :raises OSError: none could be"""

    def close(self) -> None:
        """Write what can be written, and let go."""
        self.retry()
        if self._pending:
            self._say(f"{self.name}: {len(self._pending):,} records could not be written, and are lost")


class File(Outlet):
    """Lines of JSON at the end of a file. Rotation is the system's: after it renamed the file, `reopen`.

    :raises OSError: it can't be opened
    """

    def __init__(self, path: Path, say: Say) -> None:
        super().__init__(str(path), say)
        self._path = path
        self._file = self._opened()

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _encode(self, record: Record) -> bytes:
        return line(record)

    def _send(self, data: memoryview) -> int:
        return os.write(self._file, data)

    def reopen(self) -> None:
        """Open the name again. A line that could be written only in part is written whole in the new file."""
        self.retry()
        try:
            opened = self._opened()
        except OSError as error:
            self._say(f"{self.name}: {error.strerror}; still writing to the file opened before")
            return
        os.close(self._file)
        self._file, self._done = opened, 0
        self.retry()

    def close(self) -> None:
        """See `Outlet.close`."""
        super().close()
        os.close(self._file)


class Stream(Outlet):
    """Lines of JSON on standard output. Its end is the watch's end: `retry` raises BrokenPipeError."""

    _ends_with_reader = True

    def __init__(self, say: Say) -> None:
        super().__init__("standard output", say)

    def _encode(self, record: Record) -> bytes:
        return line(record)

    def _send(self, data: memoryview) -> int:
        return os.write(1, data)


class Datagrams(Outlet):
    """One datagram a record to a socket of this machine, connected again when the service behind it restarts.

    :param path: of the socket
    """

    def __init__(self, name: str, path: str, say: Say) -> None:
        super().__init__(name, say)
        self._path = path
        self._socket: socket.socket | None = None

    def _send(self, data: memoryview) -> int:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            try:
                made.connect(self._path)
            except OSError:
                made.close()
                raise
            self._socket = made
        try:
            return self._socket.send(data)
        except OSError as error:
            if error.errno not in _LATER:
                self._socket.close()
                self._socket = None
            raise

    def close(self) -> None:
        """See `Outlet.close`."""
        super().close()
        if self._socket is not None:
            self._socket.close()


class Journal(Datagrams):
    """journald, by its native protocol: ``journalctl -t vmishim VMISHIM_RULE=module-hidden``."""

    def __init__(self, say: Say, path: str = JOURNAL) -> None:
        super().__init__("journald", path, say)

    def _encode(self, record: Record) -> bytes:
        fields = {
            "MESSAGE": _told(record),
            "PRIORITY": str(priority(record)),
            "SYSLOG_IDENTIFIER": "vmishim",
            "VMISHIM_GUEST": record.get("host", {}).get("name", ""),
            "VMISHIM_ACTION": record["event"]["action"],
            "VMISHIM_RULE": record.get("rule", {}).get("id", ""),
            "VMISHIM_RECORD": line(record).decode().rstrip("\n"),
        }
        return b"".join(_field(name, value) for name, value in fields.items() if value)


class Syslog(Datagrams):
    """The system's log daemon, by ``/dev/log``."""

    def __init__(self, say: Say, path: str = SYSLOG) -> None:
        super().__init__("syslog", path, say)

    def _encode(self, record: Record) -> bytes:
        value = _AUTHPRIV * 8 + priority(record)
        return f"<{value}>vmishim[{os.getpid()}]: ".encode() + line(record).rstrip(b"\n")


def _field(name: str, value: str) -> bytes:
    """A field of journald's protocol: a value with a line break carries its length."""
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _told(record: Record) -> str:
    guest = record.get("host", {}).get("name", "")
    return plain(f"{guest}: {record['message']}" if guest else record["message"])


def priority(record: Record) -> int:
    """syslog(3)'s number for a record's severity."""
    severity = record["event"]["severity"]
    found = {Severity.HIGH: 2, Severity.MEDIUM: 3, Severity.LOW: 4}
    steps = [*((SEVERITIES[each], number) for each, number in found.items()), (NOTICE, 5)]
    return next((number for least, number in steps if severity >= least), 6)
