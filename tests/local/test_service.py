"""The agent as a service: what it tells systemd, and what it waits for."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import until
from vmishim import isolated
from vmishim.guests.agent import connect
from vmishim.guests.domains import Domain
from vmishim.wire.keys import generate, load_private, save_private


class Service:
    """A running agent, and the states that it has told systemd (sd_notify(3))."""

    def __init__(self, folder: Path) -> None:
        # The agent becomes another user, which must reach the list of permitted keys.
        folder.chmod(0o711)
        self.key, self.permitted = folder / "agent.key", folder / "permitted"
        self.endpoint = f"ipc://{folder}/socket"
        self._states: list[str] = []
        self._systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._systemd.bind(str(folder / "notify"))
        self._systemd.setblocking(False)
        files = ["--key", str(self.key), "--permitted", str(self.permitted)]
        self._log = (folder / "log").open("w+")
        self._child = subprocess.Popen(
            isolated.module("guest_agent", "serve", "--listen", self.endpoint, *files),
            stderr=self._log, env=isolated.environment() | {"NOTIFY_SOCKET": str(folder / "notify")},
        )  # fmt: skip

    def told(self, state: str) -> bool:
        """Whether the agent has told this state. :raises AssertionError: it has ended"""
        assert self._child.poll() is None, self.log()
        try:
            while True:
                self._states.append(self._systemd.recv(4096).decode())
        except BlockingIOError:
            return state in self._states

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(10)
        self._systemd.close()
        self._log.close()


@pytest.fixture
def service() -> Iterator[Service]:
    # Not pytest's own folder, which only we may enter.
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        running = Service(Path(folder))
        yield running
        running.close()


def test_an_agent_without_a_key_waits_for_one(service: Service) -> None:
    until(
        lambda: service.told(f"READY=1\nSTATUS=waiting for {service.key} and {service.permitted}"),
        what="the status that names both files",
    )
    ours = generate()
    service.permitted.write_text(f"{ours.public.text}\n")
    until(lambda: service.told(f"READY=1\nSTATUS=waiting for {service.key}"), what="the status that names the key")
    save_private(service.key, generate())
    until(lambda: service.told("READY=1"), what="an agent that listens")
    assert service.told("STATUS=")  # it waits for nothing any more
    assert [line for line in service.log().splitlines() if line.startswith("waiting")] == [
        f"waiting for {service.key} and {service.permitted} (docs/deploy.md)",
        f"waiting for {service.key} (docs/deploy.md)",
    ]
    entry = Domain("local", agent=service.endpoint, agent_key=load_private(service.key).public.text, timeout=30.0)
    guest = connect(entry, "batch", ours)
    assert guest.profile.symbol("init_task")
    guest.close()
