"""What is measured: three listings as LibVMI's users write them, independent of the backend that answers.

The benchmark imports them with vmishim as ``libvmi``; the genuine bindings' interpreter runs this very file as
``python listings.py``, a `Task` as JSON on standard input, a `Result` on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import repeat
from time import perf_counter
from typing import Any, TypedDict

from libvmi import Libvmi, VMIConfig

Offsets = dict[str, int]
"""Where things are, by ``"symbol"`` or ``"struct member"``, looked up before anything is timed."""


def processes(vmi: Libvmi, at: Offsets) -> list[tuple[int, str]]:
    """(pid, name) of every task."""
    tasks, pid, comm = at["task_struct tasks"], at["task_struct pid"], at["task_struct comm"]
    found = []
    entry = head = at["init_task"] + tasks
    while True:
        task = entry - tasks
        found.append((vmi.read_32_va(task + pid, 0), vmi.read_str_va(task + comm, 0)))
        entry = vmi.read_addr_va(entry, 0)
        if entry == head:
            return found


def modules(vmi: Libvmi, at: Offsets) -> list[tuple[str]]:
    """(name,) of every loaded module."""
    to_name = at["module name"] - at["module list"]
    found = []
    head = at["modules"]
    entry = vmi.read_addr_va(head, 0)
    while entry != head:
        found.append((vmi.read_str_va(entry + to_name, 0),))
        entry = vmi.read_addr_va(entry, 0)
    return found


def sockets(vmi: Libvmi, at: Offsets) -> list[tuple[int, int, int]]:
    """(local port, remote port, state) of every TCP socket but listeners: every bucket of the hash is looked into."""
    link, chain = at["sock __sk_common.skc_nulls_node"], at["inet_ehash_bucket chain"]
    num, dport = at["sock __sk_common.skc_num"] - link, at["sock __sk_common.skc_dport"] - link
    state, stride = at["sock __sk_common.skc_state"] - link, at["inet_ehash_bucket"]
    found = []
    table = vmi.read_addr_va(at["tcp_hashinfo"] + at["inet_hashinfo ehash"], 0) + chain
    mask = vmi.read_32_va(at["tcp_hashinfo"] + at["inet_hashinfo ehash_mask"], 0)
    for bucket in range(table, table + (mask + 1) * stride, stride):
        entry = vmi.read_addr_va(bucket, 0)
        while not entry & 1:
            remote = vmi.read_16_va(entry + dport, 0)
            local = vmi.read_16_va(entry + num, 0)
            found.append((local, (remote & 0xFF) << 8 | remote >> 8, vmi.read_8_va(entry + state, 0)))
            entry = vmi.read_addr_va(entry, 0)
    return found


LISTINGS: dict[str, Callable[[Libvmi, Offsets], list[Any]]] = {
    "processes": processes,
    "modules": modules,
    "sockets": sockets,
}
HEADS = {"processes": "init_task", "modules": "modules", "sockets": "tcp_hashinfo"}
"""The symbol that each listing starts from."""
SYMBOLS = tuple(HEADS.values())
MEMBERS = (
    "task_struct tasks",
    "task_struct pid",
    "task_struct comm",
    "module list",
    "module name",
    "inet_hashinfo ehash",
    "inet_hashinfo ehash_mask",
    "inet_ehash_bucket chain",
    "sock __sk_common.skc_nulls_node",
    "sock __sk_common.skc_num",
    "sock __sk_common.skc_dport",
    "sock __sk_common.skc_state",
)
SIZES = ("inet_ehash_bucket",)
"""Structures whose size the script looks up."""


def once(vmi: Libvmi, at: Offsets, name: str) -> tuple[float, list[Any]]:
    """Seconds of one listing, and what it found."""
    begun = perf_counter()
    found = LISTINGS[name](vmi, at)
    return perf_counter() - begun, found


def flushed(vmi: Libvmi, at: Offsets, name: str) -> float:
    """Seconds of a listing that begins with no cache: where its head is has to be looked up, too."""
    vmi.symcache_flush()
    vmi.v2pcache_flush()
    vmi.pagecache_flush()
    begun = perf_counter()
    listed(vmi, at, name)
    return perf_counter() - begun


def listed(vmi: Libvmi, at: Offsets, name: str) -> list[Any]:
    """A listing that begins with a name, as a script's first does."""
    vmi.translate_ksym2v(HEADS[name])
    return LISTINGS[name](vmi, at)


def cached_read(vmi: Libvmi, at: Offsets, count: int = 50_000) -> float:
    """Seconds of one ``read_addr_va`` of a word that was read just before: the second task's link."""
    processes(vmi, at)
    entry = vmi.read_addr_va(vmi.read_addr_va(at["init_task"] + at["task_struct tasks"], 0), 0)
    read = vmi.read_addr_va
    begun = perf_counter()
    for _ in repeat(None, count):
        read(entry, 0)
    return (perf_counter() - begun) / count


class Task(TypedDict):
    """A task for the genuine bindings."""

    domain: str
    config: dict[str, int | str]
    at: Offsets
    name: str
    """Of the listing."""
    runs: int
    flushed: int
    """Listings that each begin with no cache."""
    cached: bool
    """Measure a cached read, too."""


class Result(TypedDict):
    """The result of a task; times are in seconds."""

    first: float
    """The bindings' start and their first listing."""
    runs: list[float]
    """Listings after that."""
    flushed: list[float]
    found: list[list[Any]]
    cached: float


def main() -> None:
    """Run a task."""
    task: Task = json.load(sys.stdin)
    begun = perf_counter()
    with Libvmi(task["domain"], config_mode=VMIConfig.DICT, config=task["config"]) as vmi:
        listed(vmi, task["at"], task["name"])
        first = perf_counter() - begun
        runs = [once(vmi, task["at"], task["name"]) for _ in range(task["runs"])]
        slow = [flushed(vmi, task["at"], task["name"]) for _ in range(task["flushed"])]
        cached = cached_read(vmi, task["at"]) if task["cached"] else 0.0
    result = Result(first=first, runs=[run[0] for run in runs], flushed=slow, found=runs[-1][1], cached=cached)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
