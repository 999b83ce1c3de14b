"""The lists worth reading ahead: where each begins, how it steps, which fields come along before anything was learned.

Plain data. A new one is a new entry of ``KNOWN``; what it names is asked of the guest's own symbols and BTF, so a kernel
without it just goes without.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmishim.kernel.profile import Profile
from vmishim.memory.snapshot import Field
from vmishim.wire.plan import Plan, Step


@dataclass(frozen=True)
class Shape:
    """A kernel list, by names.

    :ivar name: what people call it
    :ivar symbol: the kernel symbol its head is at
    :ivar struct: type of a node
    :ivar link: the member of a node that links it
    :ivar head: the member of the symbol's own structure that is the head, ``"task_struct tasks"``; empty when the
        symbol is the head
    :ivar step: how to get from the head to the nodes
    :ivar fields: members to bring along from the start
    """

    name: str
    symbol: str
    struct: str
    link: str
    head: str
    step: Step
    fields: tuple[str, ...]

    @property
    def members(self) -> list[str]:
        """Every place this names, as the agent is asked for them."""
        named = [self.struct, *(f"{self.struct} {member}" for member in (self.link, *self.fields))]
        return [*named, self.head] if self.head else named


KNOWN = (
    # LibVMI's examples read of each task: tasks.next, pid, comm (examples/process-list.c).
    Shape(
        "tasks",
        "init_task",
        "task_struct",
        "tasks",
        "task_struct tasks",
        Step.RING_NODE,
        ("pid", "tgid", "comm", "mm"),
    ),
    # ... and of each module: list.next, name (examples/module-list.c).
    Shape("modules", "modules", "module", "list", "", Step.RING, ("name", "state")),
)


@dataclass(frozen=True)
class Place:
    """A list found in one kernel: addresses and offsets instead of names."""

    name: str
    start: int
    step: Step
    link: int
    before: int
    """Bytes below a node that still belong to it."""
    after: int
    """Bytes above."""
    fields: tuple[Field, ...]
    bias: int = 0
    max_nodes: int = 1 << 20

    @property
    def doors(self) -> tuple[int, ...]:
        """Addresses whose reading begins a listing: the pointers of the head."""
        return (self.start, self.start + 8) if self.step in (Step.RING, Step.RING_NODE) else (self.start,)

    def plan(self, ops: tuple[object, ...]) -> Plan:
        """The plan that collects ``ops`` of this list."""
        return Plan(
            self.start,
            self.step,
            ops,  # type: ignore[arg-type]
            link=self.link,
            bias=self.bias,
            max_nodes=self.max_nodes,
        )


def find(shape: Shape, profile: Profile) -> Place | None:
    """Where a list is in this kernel; None when the kernel has no such list, or doesn't say where."""
    try:
        start = profile.symbol(shape.symbol)
        if shape.head:
            start += profile.member(*shape.head.split(" ")).offset
        link = profile.member(shape.struct, shape.link)
        fields = [Field((), link.offset, link.size)]
        for name in shape.fields:
            place = profile.member(shape.struct, name)
            fields.append(Field((), place.offset, place.size))
        return Place(shape.name, start, shape.step, link.offset, 0, profile.size(shape.struct), tuple(fields))
    except KeyError:
        return None
