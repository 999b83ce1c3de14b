"""The kernel lists worth reading ahead: where each begins, how it steps, which fields come along from the start.

Plain data. A new list is a new entry of ``KNOWN``. What it names is looked up in the guest's own symbols and BTF; a
kernel that lacks it goes without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from vmishim.errors import LinkError
from vmishim.kernel.profile import Profile
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, MemoryReader
from vmishim.readahead.fields import RING, WORD, Field, Hop, Path
from vmishim.wire.plan import Op, Plan, Step

NODES_MAX = 1 << 20
"""Nodes of one list that are brought; a list that is longer is read on one by one."""
TABLE_HEADS_MAX = 1 << 20
"""Heads of the largest table that is walked: twice as many as the kernel makes by itself (tcp_init, net/ipv4/tcp.c)."""
LISTENING_NULLS_BASE = 1 << 29
"""Number that ends the first chain of the listeners' table (include/net/inet_hashtables.h)."""


class InnerRing(NamedTuple):
    """A ring that hangs from each node of a list."""

    head: Field
    """The head's field."""
    fields: tuple[Field, ...]
    """What to bring of each of its nodes."""
    struct: str
    """A node's type."""
    size: int
    """A node's bytes."""

    @property
    def root(self) -> Path:
        """How to get from a node of the list to those of the ring."""
        return self.fields[0].path


@dataclass(frozen=True)
class KernelList:
    """A list of one kernel: addresses and offsets instead of names.

    :ivar start: address of the head, or of a table's first one; 0 for a table that was not `located` yet
    :ivar heads: how many
    :ivar before: bytes below a node that still belong to it
    :ivar after: bytes above
    :ivar table: for a table, addresses of the pointer to it and of its mask, and the first head's offset in it
    """

    name: str
    start: int
    step: Step
    link: int
    before: int
    after: int
    fields: tuple[Field, ...]
    struct: str = ""
    """Type of a node; empty when it is not known."""
    heads: int = 1
    stride: int = WORD
    nulls: int = 0
    bias: int = 0
    max_nodes: int = NODES_MAX
    table: tuple[int, int, int] | None = None
    inner: tuple[InnerRing, ...] = ()
    """Rings that hang from each node."""

    @property
    def head_addresses(self) -> tuple[int, ...]:
        """Addresses where a read is a look: the head's pointers; of a table, the pointer to it and its first head."""
        if self.table is not None:
            return (self.table[0], self.start) if self.start else (self.table[0],)
        return (self.start, self.start + WORD) if self.step in (Step.RING, Step.RING_NODE) else (self.start,)

    def is_head_node(self, address: int) -> bool:
        """Whether ``address`` lies in the node that holds the head, such as ``init_task``."""
        node = self.start - self.link
        return self.step == Step.RING_NODE and node <= address < node + self.after

    def plan(self, ops: tuple[Op, ...]) -> Plan:
        """The plan that collects ``ops`` of this list."""
        return Plan(
            self.start,
            self.step,
            ops,
            heads=self.heads,
            stride=self.stride,
            link=self.link,
            nulls=self.nulls,
            bias=self.bias,
            max_nodes=self.max_nodes,
        )

    def located(self, reader: MemoryReader) -> KernelList:
        """The same, and of a table where it is according to the guest; it stays where it was allocated at boot.

        :raises FaultError: its pointer cannot be read
        :raises LinkError: the guest says that it lies where no table can, or is larger than any
        """
        if self.table is None or self.start:
            return self
        pointer, mask, first = self.table
        start = int.from_bytes(reader.read(pointer, 8, KERNEL), "little") + first
        heads = int.from_bytes(reader.read(mask, 4, KERNEL), "little") + 1
        if heads > TABLE_HEADS_MAX or not KERNEL_FLOOR <= start < (1 << 64) - heads * self.stride:
            raise LinkError(
                f"the guest says that its table {self.name!r} lies at {start:#x} and has {heads:,} chains (at most "
                f"{TABLE_HEADS_MAX:,} are walked): if that may be true, read it with `vmishim run --strategy page`"
            )
        return replace(self, start=start, heads=heads)


@dataclass(frozen=True)
class Inner:
    """A ``list_head`` ring that hangs from each node of another list, such as a process's threads.

    :ivar pointer: the member of the outer node that points to what holds the head
    :ivar holder: type of what holds it, and its ``head`` member
    :ivar struct: type of a node of the ring
    :ivar link: the member that links it
    :ivar fields: members to bring along once the ring is looked at
    """

    pointer: str
    holder: str
    head: str
    struct: str
    link: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Ring:
    """A ``list_head`` ring.

    :ivar name: what it is called in messages
    :ivar symbol: the kernel symbol its head is at
    :ivar struct: type of a node
    :ivar link: the member that links a node
    :ivar in_node: the symbol is a node itself, its link the head
    :ivar fields: members to bring along from the start
    :ivar inner: rings that hang from each node
    """

    name: str
    symbol: str
    struct: str
    link: str
    fields: tuple[str, ...]
    in_node: bool = False
    inner: tuple[Inner, ...] = ()

    @property
    def members(self) -> list[str]:
        """Every member and size it names, as the agent is asked for them."""
        named = [self.struct, *(f"{self.struct} {member}" for member in (self.link, *self.fields))]
        for inner in self.inner:
            named += [inner.struct, f"{self.struct} {inner.pointer}", f"{inner.holder} {inner.head}"]
            named += [f"{inner.struct} {member}" for member in (inner.link, *inner.fields)]
        return named

    def find(self, profile: Profile) -> KernelList:
        """Where it is. :raises KeyError: the kernel has no such list, or does not say where"""
        link = profile.member(self.struct, self.link)
        start = profile.symbol(self.symbol) + (link.offset if self.in_node else 0)
        fields = (Field((), link.offset, WORD), *_fields(self, profile))
        step = Step.RING_NODE if self.in_node else Step.RING
        inner = tuple(_inner(self, ring, profile) for ring in self.inner)
        return KernelList(
            self.name, start, step, link.offset, 0, profile.size(self.struct), fields, self.struct, inner=inner
        )


@dataclass(frozen=True)
class Table:
    """A hash table of ``hlist_nulls`` chains.

    :ivar symbol: the kernel symbol of the structure that points to the table
    :ivar holder: that structure, its ``pointer`` to the table and its ``mask``
    :ivar bucket: type of a bucket, and its ``head`` member
    :ivar nulls: number that ends the first chain
    """

    name: str
    symbol: str
    holder: str
    pointer: str
    mask: str
    bucket: str
    head: str
    struct: str
    link: str
    fields: tuple[str, ...]
    nulls: int = 0

    @property
    def members(self) -> list[str]:
        """Every member and size it names, as the agent is asked for them."""
        named = [self.struct, *(f"{self.struct} {member}" for member in (self.link, *self.fields))]
        return [
            *named,
            f"{self.holder} {self.pointer}",
            f"{self.holder} {self.mask}",
            self.bucket,
            f"{self.bucket} {self.head}",
        ]

    def find(self, profile: Profile) -> KernelList:
        """Where it is. :raises KeyError: the kernel has no such list, or does not say where"""
        holder = profile.symbol(self.symbol)
        link = profile.member(self.struct, self.link)
        return KernelList(
            self.name,
            0,
            Step.NULLS,
            link.offset,
            0,
            profile.size(self.struct),
            (Field((), link.offset, WORD), *_fields(self, profile)),
            self.struct,
            stride=profile.size(self.bucket),
            nulls=self.nulls,
            table=(
                holder + profile.member(self.holder, self.pointer).offset,
                holder + profile.member(self.holder, self.mask).offset,
                profile.member(self.bucket, self.head).offset,
            ),
        )


def _fields(shape: Ring | Table, profile: Profile) -> tuple[Field, ...]:
    members = [profile.member(shape.struct, name) for name in shape.fields]
    return tuple(Field((), member.offset, member.size) for member in members)


def _inner(shape: Ring, inner: Inner, profile: Profile) -> InnerRing:
    pointer = Hop(profile.member(shape.struct, inner.pointer).offset)
    head = profile.member(inner.holder, inner.head).offset
    link = profile.member(inner.struct, inner.link).offset
    path = (pointer, Hop(head, span=RING, link=link))
    members = [profile.member(inner.struct, name) for name in inner.fields]
    fields = [Field(path, link, WORD), Field(path, link + WORD, WORD)]
    fields += [Field(path, member.offset, member.size) for member in members]
    return InnerRing(Field((pointer,), head, WORD), tuple(fields), inner.struct, profile.size(inner.struct))


_SOCK = (
    "__sk_common.skc_daddr",
    "__sk_common.skc_rcv_saddr",
    "__sk_common.skc_dport",
    "__sk_common.skc_num",
    "__sk_common.skc_family",
    "__sk_common.skc_state",
)
_SOCK_LINK = "__sk_common.skc_nulls_node"

# Since 5.1 and to this day (signal_struct.thread_head); task_struct.thread_group went in 6.7 (8e1f385104ac).
_THREADS = (Inner("signal", "signal_struct", "thread_head", "task_struct", "thread_node", ("pid", "tgid", "comm")),)

KNOWN: tuple[Ring | Table, ...] = (
    # LibVMI's examples read of each task: tasks.next, pid, comm (examples/process-list.c). What others read is learned:
    # each field costs time in every walk, read or not.
    Ring("tasks", "init_task", "task_struct", "tasks", ("pid", "comm"), in_node=True, inner=_THREADS),
    # ... and of each module: list.next, name (examples/module-list.c).
    Ring("modules", "modules", "module", "list", ("name",)),
    # Established, time-wait and request sockets begin alike, with sock_common, and share these chains.
    Table(
        "tcp",
        "tcp_hashinfo",
        "inet_hashinfo",
        "ehash",
        "ehash_mask",
        "inet_ehash_bucket",
        "chain",
        "sock",
        _SOCK_LINK,
        _SOCK,
    ),
    # Listeners: since 5.19 (cae3873c5b3a) in this table only, on the same link.
    Table(
        "tcp listeners",
        "tcp_hashinfo",
        "inet_hashinfo",
        "lhash2",
        "lhash2_mask",
        "inet_listen_hashbucket",
        "nulls_head",
        "sock",
        _SOCK_LINK,
        _SOCK,
        LISTENING_NULLS_BASE,
    ),
)


def find_lists(profile: Profile) -> list[KernelList]:
    """The known lists that this kernel has."""
    lists = []
    for shape in KNOWN:
        try:
            lists.append(shape.find(profile))
        except KeyError:
            continue
    return lists
