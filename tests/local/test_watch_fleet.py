"""``vmishim watch --domains`` on agents of this machine: events of all, and what goes wrong with one, or a thousand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.ground import dask
from tests.local.test_fleet import processes_with
from tests.local.test_watch import PATIENCE, ROOT, Terminal, planting, terminal
from tests.until import until
from vmishim.guests import local
from vmishim.guests.domains import Domain
from vmishim.wire.keys import generate, save_private

__all__ = ["terminal"]
LOOK = ["--lists", "processes", "--interval", "0.3"]


@pytest.fixture(scope="module")
def agents() -> Iterator[list[Domain]]:
    with ExitStack() as stack:
        yield [stack.enter_context(local.agent()) for _ in range(2)]


class Config:
    """``domains.toml``."""

    def __init__(self, folder: Path, agents: list[Domain]) -> None:
        self.path = folder / "domains.toml"
        self.agents = {f"web-{number}": entry(f"web-{number}", agent) for number, agent in enumerate(agents)}
        save_private(folder / "key", generate())
        self._key = str(folder / "key")
        self.write(*self.agents.values())

    def write(self, *entries: str) -> None:
        self.path.write_text("\n".join(entries))

    def nobody(self, name: str, endpoint: str) -> str:
        """An agent that is not there, or is not one."""
        return entry(name, Domain(name, agent=endpoint, agent_key=generate().public.text, key=self._key, timeout=2.0))


def entry(name: str, agent: Domain) -> str:
    timeout = max(agent.timeout, 2.0)
    keys = f'agent_key = "{agent.agent_key}"\nkey = "{agent.key}"\ntimeout = {timeout}\n'
    return f'[{name}]\nagent = "{agent.agent}"\n{keys}'


@pytest.fixture
def config(tmp_path: Path, agents: list[Domain]) -> Config:
    return Config(tmp_path, agents)


class Watching:
    """A watch, and the records that it writes into a file."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process, self.output = process, output

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """All whole records with this action, and of this guest."""
        lines = self.output.read_text().splitlines(keepends=True) if self.output.exists() else []
        made = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            each
            for each in made
            if each["event"]["action"] == wanted.get("action", each["event"]["action"])
            and each.get("host", {}).get("name") == wanted.get("guest", each.get("host", {}).get("name"))
        ]

    def until(self, count: int = 1, **wanted: Any) -> list[dict[str, Any]]:
        return until(
            lambda: found if len(found := self.records(**wanted)) >= count else [],
            deadline_s=PATIENCE,
            what=f"{count} records with {wanted}; there are {[each['message'] for each in self.records()][-5:]}",
        )

    def end(self, number: int = signal.SIGTERM) -> str:
        """End it. Returns what it said on standard error."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, said
        return said


@contextmanager
def watching(config: Config, output: Path, *more: str) -> Iterator[Watching]:
    command = [sys.executable, "-m", "vmishim.cli", "watch", "--domains", "*", "--output", str(output), *LOOK, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VMISHIM_CONFIG": str(config.path)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Watching(process, output)
    finally:
        process.kill()
        process.wait()


def test_events_of_all_guests_are_records_and_sigterm_loses_none(config: Config, tmp_path: Path) -> None:
    with watching(config, tmp_path / "watch.json") as seen:
        for name in config.agents:
            seen.until(action="guest-watched", guest=name)
        with planting("sleep", "infinity") as planted:

            def of(action: str) -> list[str]:
                found = seen.records(action=action)
                return sorted(each["host"]["name"] for each in found if each["process"]["pid"] == planted.pid)

            until(lambda: of("process-started") == list(config.agents), deadline_s=PATIENCE, what="it to start")
            planted.kill()
            planted.wait()
            until(lambda: of("process-ended") == list(config.agents), deadline_s=PATIENCE, what="it to end")
        assert not _children(seen.process.pid)  # so it leaves no zombie
        assert seen.end() == ""
    records = seen.records()
    assert [each["event"]["sequence"] for each in records] == [*range(1, len(records) + 1)]
    assert records[-1]["event"]["action"] == "watch-ended"


def _children(parent: int) -> str:
    return Path(f"/proc/{parent}/task/{parent}/children").read_text()


def test_sighup_reads_the_list_again_and_begins_a_new_file(config: Config, tmp_path: Path) -> None:
    first, second = config.agents.values()
    config.write(first)
    with watching(config, tmp_path / "watch.json") as seen:
        seen.until(action="guest-watched", guest="web-0")
        (tmp_path / "watch.json").rename(tmp_path / "watch.json.1")
        config.write(second)
        seen.process.send_signal(signal.SIGHUP)
        seen.until(action="guest-removed", guest="web-0")
        seen.until(action="guest-watched", guest="web-1")
        config.write(second, second)
        seen.process.send_signal(signal.SIGHUP)
        seen.until(action="domains-invalid")
        said = seen.end(signal.SIGINT)
    assert said.startswith("vmishim: the guests stay as they were: ")
    assert said.count("\n") == 1
    old = Watching(seen.process, tmp_path / "watch.json.1").records()
    numbers = [each["event"]["sequence"] for each in (*old, *seen.records())]
    assert numbers == [*range(1, len(numbers) + 1)]


def test_an_agent_that_stands_still_is_said_once_and_the_other_goes_on(config: Config, tmp_path: Path) -> None:
    (stopped,) = processes_with(config.agents["web-1"].split('agent = "')[1].split('"')[0])
    with watching(config, tmp_path / "watch.json") as seen:
        for name in config.agents:
            seen.until(action="guest-watched", guest=name)
        os.kill(stopped, signal.SIGSTOP)
        try:
            seen.until(action="agent-lost", guest="web-1")
            with planting("sleep", "infinity") as planted:
                until(lambda: planted.pid in started(seen, "web-0"), deadline_s=PATIENCE, what="an event of the other")
                assert len(seen.records(action="agent-lost")) == 1
                os.kill(stopped, signal.SIGCONT)
                seen.until(action="agent-back", guest="web-1")
                until(lambda: planted.pid in started(seen, "web-1"), deadline_s=PATIENCE, what="what it missed")
        finally:
            os.kill(stopped, signal.SIGCONT)
        seen.end()


def started(seen: Watching, guest: str) -> list[int]:
    return [each["process"]["pid"] for each in seen.records(action="process-started", guest=guest)]


@contextmanager
def answering(folder: Path, reply: Callable[[bytes], bytes]) -> Iterator[str]:
    """What answers each frame, and is no agent."""
    with zmq.Context() as context, context.socket(zmq.REP) as listener:
        endpoint = f"ipc://{folder}/garbage"
        listener.setsockopt(zmq.RCVTIMEO, 100)
        listener.setsockopt(zmq.LINGER, 0)
        listener.bind(endpoint)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    listener.send(reply(listener.recv()))
                except zmq.Again:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield endpoint
        finally:
            stop.set()
            thread.join()


def test_a_guest_that_answers_garbage_and_a_mute_one_are_said_once_each(config: Config, tmp_path: Path) -> None:
    with (
        answering(tmp_path, lambda frame: os.urandom(len(frame))) as garbage,
        socket.create_server(("127.0.0.1", 0)) as mute,
    ):
        mute_entry = config.nobody("mute", f"tcp://127.0.0.1:{mute.getsockname()[1]}")
        config.write(config.nobody("garbage", garbage), mute_entry, config.agents["web-0"])
        with watching(config, tmp_path / "watch.json") as seen:
            seen.until(action="guest-watched", guest="web-0")
            lost = {name: seen.until(action="agent-lost", guest=name)[0]["message"] for name in ("garbage", "mute")}
            assert "garbage is not the agent with key" in lost["garbage"]
            assert "does not answer: nothing answered at tcp://127.0.0.1" in lost["mute"]
            with planting("sleep", "infinity") as planted:
                until(lambda: planted.pid in started(seen, "web-0"), deadline_s=PATIENCE, what="an honest event")
            assert len(seen.records(action="agent-lost")) == 2
            seen.end()


def test_a_thousand_guests_that_are_not_there_delay_nobody(config: Config, tmp_path: Path) -> None:
    dead = [config.nobody(f"dead-{number}", f"ipc://{tmp_path}/nobody") for number in range(1000)]
    config.write(*dead, config.agents["web-0"])
    with watching(config, tmp_path / "watch.json") as seen:
        seen.until(1000, action="agent-lost")
        seen.until(action="guest-watched", guest="web-0")
        with planting("sleep", "infinity") as planted:
            until(lambda: planted.pid in started(seen, "web-0"), deadline_s=PATIENCE, what="the one that is there")
        assert seen.end() == ""
    assert len({each["host"]["name"] for each in seen.records(action="agent-lost")}) == 1000
    assert len(seen.records(action="agent-lost")) == 1000


def test_a_full_disk_is_said_once_and_every_record_is_there_once_it_has_room(config: Config, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        (disk / "filler").write_bytes(bytes(60 << 10))
        dead = [config.nobody(f"dead-{number}", f"ipc://{tmp_path}/nobody") for number in range(100)]
        config.write(*dead)
        with watching(config, disk / "watch.json") as seen:
            assert seen.process.stderr is not None
            said = seen.process.stderr.readline()
            text = "No space left on device; records are kept, and written as soon as they can be"
            assert said == f"vmishim: {disk}/watch.json: {text}\n"
            subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            assert seen.process.stderr.readline() == f"vmishim: {disk}/watch.json: written again; nothing was lost\n"
            seen.until(100, action="agent-lost")
            seen.end()
        numbers = [each["event"]["sequence"] for each in seen.records()]
        assert numbers == [*range(1, len(numbers) + 1)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_terminal_shows_guests_and_the_events_of_the_one_that_is_chosen(terminal: Terminal, config: Config) -> None:
    config.write(*config.agents.values(), config.nobody("gone", "ipc:///nowhere"))
    command = f"VMISHIM_CONFIG={config.path} PYTHONPATH={ROOT} {sys.executable} -m vmishim.cli watch --domains '*' "
    terminal.type("clear; " + command + " ".join(LOOK) + "; echo ended $((40 + $?))", "Enter")
    screen = terminal.until(lambda text: text.count(" ok ") == 2 and "no answer" in text)
    assert screen.splitlines()[0].startswith("3 guests, 1 not answering, ")
    assert screen.splitlines()[2].split()[:4] == ["GUEST", "STATE", "LAST", "LOOK"]
    terminal.type("Down")
    terminal.type("Enter")
    terminal.until(lambda text: "Esc goes back" in text)
    with planting("sleep", "infinity") as planted:
        screen = terminal.until(lambda text: f"{planted.pid} sleep, uid 0" in text)
        assert screen.splitlines()[2].startswith("web-1, Linux ")
    terminal.type("Escape")
    terminal.until(lambda text: "GUEST" in text)
    terminal.type("q")
    terminal.until(lambda text: "ended 40" in text)


def test_a_cluster_watches_and_a_worker_that_is_killed_loses_nothing_and_repeats_nothing(
    config: Config, tmp_path: Path
) -> None:
    with dask.cluster(workers=2, folder=tmp_path) as (client, scheduler):
        engine = ["--engine", scheduler.address.replace("tls://", "dask://"), "--engine-tls", *scheduler.tls]
        with watching(config, tmp_path / "watch.json", *engine) as seen:
            for name in config.agents:
                seen.until(action="guest-watched", guest=name)
            sessions = client.run(held_guests)
            worker = next(worker for worker, names in sessions.items() if names)
            assert sorted(name for names in sessions.values() for name in names) == list(config.agents)
            with planting("sleep", "infinity") as planted:
                os.kill(int(client.run(os.getpid, workers=[worker])[worker]), signal.SIGKILL)
                for name in config.agents:
                    until(
                        lambda name=name: planted.pid in started(seen, name),  # type: ignore[misc]
                        deadline_s=PATIENCE,
                        what="its start",
                    )
            for name in config.agents:
                seen.until(action="process-ended", guest=name)
                until(lambda name=name: planted.pid in ended(seen, name), deadline_s=PATIENCE, what="its end")  # type: ignore[misc]
            (child,) = map(int, _children(seen.process.pid).split())
            assert seen.end() == ""
            assert not Path(f"/proc/{child}").exists()
    for name in config.agents:
        assert started(seen, name).count(planted.pid) == 1
        assert ended(seen, name).count(planted.pid) == 1
        assert len(seen.records(action="guest-watched", guest=name)) == 1


def ended(seen: Watching, guest: str) -> list[int]:
    return [each["process"]["pid"] for each in seen.records(action="process-ended", guest=guest)]


def held_guests() -> list[str]:
    """What a worker runs: the guests whose sessions it holds."""
    from vmishim.watching import held

    return sorted(held._held)


def test_a_cluster_that_is_not_there_is_said_once_for_each_guest(config: Config, tmp_path: Path) -> None:
    with watching(config, tmp_path / "watch.json", "--engine", "dask+tcp://127.0.0.1:1") as seen:
        for name in config.agents:
            (lost,) = seen.until(action="agent-lost", guest=name)
            assert "no Dask scheduler answers at tcp://127.0.0.1:1" in lost["message"]
        seen.end()
