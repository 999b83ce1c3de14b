"""Many agents at once, on this machine: by threads and by a Dask cluster; a broken one does not delay the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.ground import dask
from tests.until import until
from vmishim import cli
from vmishim.guests import local
from vmishim.inspection import cluster, fleet
from vmishim.inspection.objects import Task
from vmishim.wire.keys import generate

AGENTS = [f"web-{number}" for number in range(6)]


def processes_with(argument: str) -> list[int]:
    """Those with a word in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has gone
            continue
    return found


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Six agents of this machine: entries of ``domains.toml`` by name."""
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            started = list(pool.map(lambda _: stack.enter_context(local.agent()), AGENTS))
        yield {
            name: f'[{name}]\nagent = "{one.agent}"\nagent_key = "{one.agent_key}"\nkey = "{one.key}"\ntimeout = 60.0\n'
            for name, one in zip(AGENTS, started, strict=True)
        }


@pytest.fixture
def enrolled(agents: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``domains.toml``, with the six."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    (tmp_path / "domains.toml").write_text("\n".join(agents.values()))
    return tmp_path / "domains.toml"


@pytest.fixture
def planted() -> Iterator[set[int]]:
    """Processes that are there throughout."""
    children = [subprocess.Popen(["sleep", "infinity"]) for _ in range(3)]
    until(lambda: all(Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n" for child in children), what="exec")
    yield {child.pid for child in children}
    for child in children:
        child.kill()
        child.wait()


def sleeps(rows: list[dict[str, Any]], name: str, planted: set[int]) -> set[int]:
    """Planted processes that a guest has listed."""
    return {row["pid"] for row in rows if row["domain"] == name and row.get("comm") == "sleep"} & planted


def test_all_are_asked_and_one_table_has_them(
    enrolled: Path, planted: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ps", "--domains", "web-*", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["domain"] for row in rows} == set(AGENTS)
    assert all(sleeps(rows, name, planted) == planted for name in AGENTS)
    assert cli.main(["ps", "--domains", "web-[0-2]", "--stats"]) == 0
    said = capsys.readouterr()
    head, *lines = said.out.splitlines()
    assert head.split() == ["DOMAIN", "PID", "PPID", "UID", "STATE", "TASK_STRUCT", "NAME"]
    assert list(dict.fromkeys(line.split()[0] for line in lines)) == AGENTS[:3]
    assert {(words[0], int(words[1])) for line in lines if (words := line.split())[-1] == "sleep"} >= {
        (name, pid) for name in AGENTS[:3] for pid in planted
    }
    assert said.err.startswith("vmishim: 3 guests, ")


def test_a_broken_guest_is_one_row_and_holds_nobody_up(
    enrolled: Path, planted: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = enrolled.read_text()
    key = text.split('\nkey = "')[1].split('"')[0]
    wrong = text.split("\n\n")[0].replace("[web-0]", "[web-impostor]")
    wrong = wrong.replace(wrong.split('agent_key = "')[1].split('"')[0], generate().public.text)
    entry = f'agent_key = "{generate().public.text}"\nkey = "{key}"\n'
    broken = (
        f'[web-gone]\nagent = "ipc://{tmp_path}/nobody"\ntimeout = 1.0\n{entry}',
        f'[web-keyless]\nagent = "ipc://{tmp_path}/nobody"\n{entry.replace(key, "/nowhere")}',
        wrong.replace("60.0", "2.0"),
        f'[web-file]\nramfile = "{tmp_path}/no-ram"\n',
    )
    enrolled.write_text("\n".join((*broken, text)))
    assert cli.main(["ps", "--domains", "web-*", "--json"]) == 1
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    errors = {row["domain"]: row["error"] for row in rows if "error" in row}
    assert set(errors) == {"web-gone", "web-keyless", "web-impostor", "web-file"}
    assert "nobody" in errors["web-gone"]
    assert "/nowhere" in errors["web-keyless"]
    assert "agent's key has changed" in errors["web-impostor"]
    assert all(sleeps(rows, name, planted) == planted for name in AGENTS)
    assert "vmishim: 10 guests, 4 not read, " in said.err
    assert cli.main(["lsmod", "--domains", "web-*"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[0] for line in lines if "not read: " in line]
    assert failed == ["web-gone", "web-keyless", "web-impostor", "web-file"]


def test_what_is_late_has_failed_and_the_others_have_not(enrolled: Path, agents: dict[str, str]) -> None:
    endpoint = agents["web-3"].split('agent = "')[1].split('"')[0]
    (stopped,) = processes_with(endpoint)
    os.kill(stopped, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answers = {answer.domain: answer for answer in fleet.over(fleet.matching("web-*"), "ps", deadline=5.0)}
        taken = time.monotonic() - begun
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert answers["web-3"].error == "no answer within 5 s"
    assert {name for name, answer in answers.items() if not answer.error} == set(AGENTS) - {"web-3"}
    assert 5.0 <= taken < 9.0


def test_a_cluster_gives_the_same_and_survives_a_worker(
    enrolled: Path, agents: dict[str, str], planted: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with dask.cluster(workers=2, folder=tmp_path) as (client, scheduler):
        engine = ["--engine", scheduler.address.replace("tls://", "dask://"), "--engine-tls", *scheduler.tls]
        assert cli.main(["ps", "--domains", "web-*", *engine, "--json", "--deadline", "60"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(sleeps(rows, name, planted) == planted for name in AGENTS)

        # One agent stands still, so the worker that asks it is known; that one is killed.
        endpoint = agents["web-5"].split('agent = "')[1].split('"')[0]
        (stopped,) = processes_with(endpoint)
        os.kill(stopped, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as pool:
                fleet_of_six = fleet.matching("web-*")
                asked = pool.submit(lambda: list(cluster.by_dask(scheduler, fleet_of_six, "ps", deadline=90.0)))

                def busy() -> list[str]:
                    working = {worker: tasks for worker, tasks in client.processing().items() if tasks}
                    return list(working) if sum(map(len, working.values())) == 1 else []

                (worker,) = until(busy, what="five answers")
                os.kill(int(client.run(os.getpid, workers=[worker])[worker]), signal.SIGKILL)
                until(lambda: worker not in busy(), what="the scheduler to see it")
                os.kill(stopped, signal.SIGCONT)
                answers = asked.result(90)
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert {answer.domain: answer.error for answer in answers} == dict.fromkeys(AGENTS, "")
    assert all({task.pid for task in answer.entries if isinstance(task, Task)} >= planted for answer in answers)


def test_an_engine_that_is_not_there_is_one_line(enrolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ps", "--domains", "web-*", "--engine", "ray://x"]) == 1
    told = "--engine 'ray://x' is not valid; give dask://HOST:PORT, or leave --engine out to ask from this machine"
    assert capsys.readouterr().err == f"vmishim: {told}\n"
    assert cli.main(["ps", "--domains", "web-*", "--engine", "dask+tcp://127.0.0.1:1", "--deadline", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("vmishim: no Dask scheduler answers at tcp://127.0.0.1:1")
    assert said.count("\n") == 1
