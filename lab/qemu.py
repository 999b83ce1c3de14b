"""The two JSON protocols of a QEMU VM: its monitor and its guest agent."""

import base64
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final

_DELIMITER: Final = b"\xff"


class ProtocolError(Exception):
    """QEMU or the guest agent refused a command, or hung up."""


class _JsonSocket:
    """Requests and replies, one JSON object per line, on a unix socket."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._buffer = b""
        self._allow_until(deadline)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._socket.close()

    def send(self, message: dict[str, Any], deadline: float, prefix: bytes = b"") -> None:
        """Send one object; TimeoutError after the deadline (monotonic)."""
        self._allow_until(deadline)
        self._socket.sendall(prefix + json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next object; TimeoutError after the deadline."""
        while b"\n" not in self._buffer:
            self._allow_until(deadline)
            data = self._socket.recv(1 << 20)
            if not data:
                raise ProtocolError("QEMU or the guest agent closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        # Bytes before the delimiter belong to an abandoned exchange.
        message = json.loads(line.rpartition(_DELIMITER)[2])
        assert isinstance(message, dict)
        return message

    def _allow_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer before the deadline")
        self._socket.settimeout(left)


class Monitor:
    """QEMU's monitor (QMP): docs/interop/qmp-spec in QEMU's source."""

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._socket = _JsonSocket(path, deadline)
        self._socket.receive(deadline)
        self.execute("qmp_capabilities", timeout=timeout)

    def execute(self, command: str, arguments: dict[str, object] | None = None, timeout: float = 10.0) -> Any:
        """Run a command and return what it returns.

        Raises ProtocolError if QEMU refuses it, TimeoutError after `timeout`
        seconds.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._socket.send({"execute": command, "arguments": arguments or {}}, deadline)
            while True:
                reply = self._socket.receive(deadline)
                if "event" not in reply:
                    return _value(reply, command)

    def close(self) -> None:
        """Hang up; the VM goes on."""
        self._socket.close()


class GuestAgent:
    """qemu-guest-agent in the guest, over its virtio-serial port.

    Its protocol has no addresses: a reply that comes after its request was
    given up would be taken for the next one. So each exchange that failed is
    followed by a synchronisation.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: _JsonSocket | None = None
        self._synchronisations = 0

    def synchronise(self, timeout: float) -> None:
        """Wait for the agent to answer; TimeoutError if it does not.

        Raises OSError or ProtocolError if QEMU is gone.
        """
        with self._lock:
            self._synchronise(time.monotonic() + timeout)

    def execute(self, command: str, timeout: float = 10.0, **arguments: object) -> Any:
        """Run a command of the agent and return what it returns.

        Raises ProtocolError if the agent refuses it, TimeoutError after
        `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._socket is None:
                self._synchronise(deadline)
            assert self._socket is not None
            try:
                self._socket.send({"execute": command, "arguments": arguments}, deadline)
                reply = self._socket.receive(deadline)
            except BaseException:
                self._hang_up()
                raise
            return _value(reply, command)

    def read(self, path: str, timeout: float = 60.0) -> bytes:
        """Return the content of a file in the guest."""
        deadline = time.monotonic() + timeout

        def execute(command: str, **arguments: object) -> Any:
            return self.execute(command, max(deadline - time.monotonic(), 0.0), **arguments)

        handle = execute("guest-file-open", path=path, mode="r")
        content = b""
        while True:
            part = execute("guest-file-read", handle=handle, count=4 << 20)
            content += base64.b64decode(part["buf-b64"])
            if part["eof"]:
                break
        execute("guest-file-close", handle=handle)
        return content

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        with self._lock:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _synchronise(self, deadline: float) -> None:
        self._hang_up()
        self._synchronisations += 1
        number = self._synchronisations
        connection = _JsonSocket(self._path, deadline)
        try:
            request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            connection.send(request, deadline, _DELIMITER)
            while True:
                try:
                    reply = connection.receive(deadline)
                except ValueError:
                    continue  # the rest of a reply in an abandoned exchange
                if reply.get("return") == number:
                    break
        except BaseException:
            connection.close()
            raise
        self._socket = connection


def _value(reply: dict[str, Any], command: str) -> Any:
    if "error" in reply:
        words = re.sub(r"\s+", " ", str(reply["error"].get("desc", reply["error"])))
        raise ProtocolError(f"{command}: {words}")
    return reply["return"]
