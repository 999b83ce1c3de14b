"""``vmishim watch``: in a terminal, outside one, and over the restart of an agent."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.until import until

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


class Output:
    """The lines of a watch that is not on a terminal."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.process = process
        self._pipe = process.stdout.fileno()
        self._data = b""

    def until(self, *words: str) -> str:
        """The first line from here on that has all the words."""
        deadline = time.monotonic() + PATIENCE
        seen = []
        while True:
            while b"\n" in self._data:
                line, _, self._data = self._data.partition(b"\n")
                seen.append(line.decode())
                if all(word in seen[-1] for word in words):
                    return seen[-1]
            left = max(deadline - time.monotonic(), 0)
            ready = select.select([self._pipe], [], [], left)[0]
            data = os.read(self._pipe, 1 << 16) if ready else b""
            assert data, f"no line with {words}; there were {seen[-20:]}"
            self._data += data


@contextmanager
def watching(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Output]:
    """A watch in a process of its own."""
    command = [sys.executable, "-m", "vmishim.cli", "watch", "--interval", "0.2", *arguments]
    more = {"PYTHONPATH": str(ROOT)} | (environment or {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ | more)
    try:
        yield Output(process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def planting(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine, ended whatever happens."""
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, so that nothing is left of it."""
    process.kill()
    process.wait()


def test_events_are_lines_and_findings_are_named(tmp_path: Path) -> None:
    program = Path(shutil.copy("/bin/sleep", tmp_path / "miner"))
    with watching("--local") as seen:
        seen.until("watching this machine, Linux ", " processes, ")
        with planting("sleep", "infinity") as plain:
            new = seen.until(f" + process {plain.pid} sleep, uid 0, parent {os.getpid()}")
            assert "<-" not in new
            end(plain)
            seen.until(f" - process {plain.pid} ")
        with planting(str(program), "infinity") as hidden:
            seen.until(f" + process {hidden.pid} miner")
            program.unlink()
            seen.until(f" ! process {hidden.pid} miner", "<- its executable was deleted, or never was in a file system")
            end(hidden)
            seen.until(f" - process {hidden.pid} ")
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
            new = seen.until(f" + socket {place} listen")
            assert new.endswith(f"({os.getpid()})  <- listens on a port that had no listener before")
            with socket.create_connection(server.getsockname()) as client:
                near = f"127.0.0.1:{client.getsockname()[1]}"
                seen.until(f" + socket {near} - {place}, ")
        seen.until(f" - socket {place} listen")
        seen.process.send_signal(signal.SIGINT)
        assert seen.process.wait(PATIENCE) == 0


def test_it_outlives_its_own_agent() -> None:
    with watching("--local") as seen:
        seen.until("watching this machine")
        (agent,) = _children(seen.process.pid)
        os.kill(agent, signal.SIGKILL)
        seen.until(" ! agent does not answer: ")
        seen.until(" ! agent answers again")
        with planting("sleep", "infinity") as planted:
            seen.until(f" + process {planted.pid} sleep")


def _children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


class Terminal:
    """A terminal by tmux, 110 by 30, with a server of its own."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(folder / "tmux")]
        self.run("new-session", "-d", "-x", "110", "-y", "30", "sh")

    def run(self, *arguments: str) -> str:
        # readline, which pytest loads, adds COLUMNS and LINES to the environment, behind Python's back here, and before
        # Python started in a worker of pytest-xdist.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment
        )
        return done.stdout

    def type(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def until(self, condition: Callable[[str], object]) -> str:
        """What is on the screen, once it is so."""

        def shown() -> str:
            screen = self.run("capture-pane", "-p")
            return screen if condition(screen) else ""

        return until(shown, deadline_s=PATIENCE, what="the screen to show it")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A terminal."""
    made = Terminal(tmp_path)
    yield made
    made.run("kill-server")


@pytest.mark.parametrize("key", ["q", "C-c"])
def test_in_a_terminal(terminal: Terminal, key: str) -> None:
    command = f"PYTHONPATH={ROOT} {sys.executable} -m vmishim.cli watch --local --interval 0.3; echo ended $((40 + $?))"
    terminal.type("clear; " + command, "Enter")
    screen = terminal.until(lambda screen: "q quits" in screen and " processes, " in screen)
    assert screen.splitlines()[0].startswith("this machine, Linux ")
    assert screen.splitlines()[3].split() == ["TIME", "WHAT", "FINDING"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]} listen"
        row = next(row for row in terminal.until(lambda screen: place in screen).splitlines() if place in row)
        assert row.split()[1:3] == ["+", "socket"]
        assert "listens on a port" in row
    terminal.type(key)
    screen = terminal.until(lambda screen: "ended 40" in screen)
    assert "q quits" not in screen  # the terminal is as it was
    assert f"socket {place}" in screen  # but for what was found
    assert "listens on a port that had no listener before" in screen
    terminal.type("echo typ''ed", "Enter")
    terminal.until(lambda screen: "typed" in screen)
