"""A process is all of its threads: what belongs to any of them is found, whether or not the main thread still lives."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.until import until
from vmishim.guests import local
from vmishim.guests.agent import Strategy
from vmishim.inspection import objects, open_files
from vmishim.inspection.lists import whole
from vmishim.inspection.objects import Socket
from vmishim.libvmi import Libvmi

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "ground" / "thread_group.py"
FAR = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 1, 1_000_000)
"""A descriptor whose table is not read descriptor by descriptor."""
REQUESTS_MAX = 64
"""Requests of a look that was learned: one for each table, ring and array, 6 to 10; beside all that runs on this
machine while all tests run, 32 to 41 have been seen. One for each thread, or each descriptor, would be hundreds."""


@dataclass(frozen=True)
class Group:
    """The process.

    :ivar ports: where it listens, by which thread's files
    """

    pid: int
    ports: dict[str, int]

    @property
    def threads(self) -> dict[int, int]:
        """Its threads' real users, by ``/proc``."""
        found = {}
        for folder in Path(f"/proc/{self.pid}/task").iterdir():
            lines = (folder / "status").read_text().splitlines()
            found[int(folder.name)] = next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
        return found

    @property
    def inodes(self) -> set[int]:
        """The sockets that any of them has open, by ``/proc``."""
        links = [os.readlink(link) for link in Path(f"/proc/{self.pid}/task").glob("*/fd/*")]
        return {int(link.removeprefix("socket:[").rstrip("]")) for link in links if link.startswith("socket:[")}


@contextmanager
def planted(program: Path, *arguments: str) -> Iterator[Group]:
    """The process of ``thread_group.py``, without its main thread."""
    with subprocess.Popen(
        [program, PROGRAM, *arguments],
        env={"PYTHONHOME": sys.base_prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            ports = json.loads(process.stdout.readline())
            status = Path(f"/proc/{process.pid}/status")
            until(lambda: "State:\tZ" in status.read_text(), deadline_s=20, what="the main thread to exit")
            yield Group(process.pid, ports)
        finally:
            process.kill()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """The process, whose program was deleted since."""
    program = Path(shutil.copy(Path(sys.executable).resolve(), tmp_path / "program"))
    with planted(program) as made:
        program.unlink()
        yield made


def listeners(vmi: Libvmi, group: Group) -> dict[int, Socket]:
    """The sockets that listen on the group's ports; nothing of the group looks damaged."""
    found = whole(vmi, objects.sockets)
    # Of processes that end meanwhile, a word by word reading may see half.
    assert [each for each in found.damage if f" {group.pid} " in each] == []
    ports = group.ports.values()
    return {each.local_port: each for each in found.entries if each.state == "listen" and each.local_port in ports}


@pytest.mark.parametrize("strategy", ["batch", "page"])
def test_sockets_of_all_threads_have_their_owner(group: Group, strategy: Strategy) -> None:
    with local.guest(strategy) as guest:
        found = listeners(Libvmi.over(guest), group)
    assert {port: each.pid for port, each in found.items()} == dict.fromkeys(group.ports.values(), group.pid)
    assert {each.inode for each in found.values()} == group.inodes


def test_threads_and_their_users_are_those_of_proc(group: Group) -> None:
    with local.guest() as guest:
        found = whole(Libvmi.over(guest), objects.threads)
    assert {task.pid: task.uid for task in found.entries if task.tgid == group.pid} == group.threads
    assert sorted(group.threads.values()) == [0, 0, 1000]
    assert next(task.pid for task in found.entries if task.tgid == group.pid) == group.pid


def test_a_thread_with_credentials_of_its_own_is_named(group: Group) -> None:
    with local.guest() as guest:
        found = whole(Libvmi.over(guest), objects.other_users)
    own = [task for task in found.entries if task.tgid == group.pid]
    assert {task.pid: task.uid for task in own} == {tid: uid for tid, uid in group.threads.items() if uid}


def test_a_deleted_program_is_found_without_its_main_thread(group: Group) -> None:
    assert not Path(f"/proc/{group.pid}/exe").exists()
    with local.guest() as guest:
        found = whole(Libvmi.over(guest), objects.without_file)
    assert [task.state for task in found.entries if task.pid == group.pid] == ["zombie"]


def test_the_examples_find_files_and_programs_of_all_threads(group: Group) -> None:
    program = str(ROOT / "compat" / "ids" / "open_files.py")
    command = [str(Path(sys.executable).with_name("vmishim")), "run", "--local", program, "any", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    opened = {entry["path"] for entry in found["listing"] if entry["pid"] == group.pid}
    assert {path for path in opened if path.startswith("socket:")} == {f"socket:[{inode}]" for inode in group.inodes}
    assert group.pid in {finding["pid"] for finding in found["findings"]}


@pytest.mark.parametrize("strategy", ["batch", "page"])
def test_a_descriptor_of_a_large_number_is_found_in_a_few_requests(strategy: Strategy) -> None:
    assert FAR > open_files.NEAR
    with planted(Path(sys.executable), str(FAR)) as group, local.guest(strategy) as guest:
        vmi, costs = Libvmi.over(guest), list[int]()
        for _ in range(6):
            asked = guest.link.requests
            found = listeners(vmi, group)
            costs.append(guest.link.requests - asked)
        if strategy == "batch":
            assert min(costs[2:]) <= REQUESTS_MAX, costs
        assert found[group.ports["own"]].pid == group.pid


@pytest.mark.parametrize("read", [objects.sockets, objects.threads, objects.without_file, objects.other_users])
def test_a_look_at_all_threads_takes_a_few_requests(group: Group, read: object) -> None:
    with local.guest() as guest:
        vmi, costs = Libvmi.over(guest), list[int]()
        for _ in range(6):
            asked = guest.link.requests
            whole(vmi, read)  # type: ignore[arg-type]
            costs.append(guest.link.requests - asked)
        assert min(costs[2:]) <= REQUESTS_MAX, costs
