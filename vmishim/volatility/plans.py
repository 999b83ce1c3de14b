"""What Volatility's plugins begin with, brought together: one walk tells where tasks are and what they point to, then
their pages come in few requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from vmishim.guests.target import Target
from vmishim.kernel.types import Types
from vmishim.memory.pagecache import PageCache
from vmishim.memory.reader import KERNEL_FLOOR, Extent
from vmishim.wire.plan import Kind, Load, Plan, Step

TASKS_MAX = 4096
"""Tasks whose pages are brought together; those of more are fetched as they are read."""
POINTERS = (
    "mm",
    "active_mm",
    "real_cred",
    "cred",
    "files",
    "fs",
    "signal",
    "thread_pid",
    "nsproxy",
    "real_parent",
    "sighand",
)
"""Members of a task that plugins follow."""
MODULES = ("mkobj.kobj.name", "sect_attrs", "kallsyms")
"""The same of a module."""


def register(cache: PageCache, target: Target, types: Types) -> None:
    """Have the pages of all tasks, or of all modules, brought when a plugin begins with the first."""
    profile = target.profile
    with suppress(KeyError):
        size = types.size("task_struct")  # Volatility asks whether all of it is there
        start = profile.symbol("init_task")
        link = types.member("task_struct", "tasks").offset
        tasks = Plan(
            start + link, Step.RING_NODE, _loads(types, "task_struct", POINTERS), link=link, max_nodes=TASKS_MAX
        )
        cache.plan(start, size, _fetch(cache, target, tasks, size))
    with suppress(KeyError):
        size, start = types.size("module"), profile.symbol("modules")
        link = types.member("module", "list").offset
        modules = Plan(start, Step.RING, _loads(types, "module", MODULES), link=link, max_nodes=TASKS_MAX)
        cache.plan(start, 16, _fetch(cache, target, modules, size))


def _loads(types: Types, struct: str, members: Iterable[str]) -> tuple[Load, ...]:
    found: list[Load] = []
    for member in members:
        with suppress(KeyError):
            found.append(Load(len(found) + 1, 0, types.member(struct, member).offset))
    return tuple(found)


def _fetch(cache: PageCache, target: Target, plan: Plan, size: int) -> Callable[[], Iterable[Extent]]:
    done = False

    def fetch() -> Iterable[Extent]:
        nonlocal done
        if done or target.agent is None:
            return ()
        done = True
        nodes: dict[int, None] = {}
        pointed: dict[int, None] = {}
        for chunk in target.agent.walk(plan):
            for node, faults, _, kind, *slots in plan.records(chunk.bulk):
                if kind != Kind.NODE:
                    continue
                nodes[node] = None
                for number, word in enumerate(slots):
                    if not faults >> number & 1 and isinstance(word, int) and word >= KERNEL_FLOOR:
                        pointed[word] = None
        cache.prefetch(nodes, size)
        cache.prefetch(pointed)
        return ()

    return fetch
