"""One list as it is read: what is wanted of its nodes, what its last walk brought, and where its head stands."""

from __future__ import annotations

from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.companions import Companions
from vmishim.readahead.fields import WORD, Fields, Path
from vmishim.readahead.head import Head
from vmishim.readahead.snapshot import Snapshot
from vmishim.readahead.store import Batch
from vmishim.readahead.trails import Trail
from vmishim.readahead.walker import nothing_apart
from vmishim.wire.plan import Plan, Step


class Listing:
    """One list.

    :ivar kernel_list: where it is
    :ivar head: its phase: which of the following is good for what
    :ivar fields: what is wanted of its nodes
    :ivar seen: fields that were met once, by path and offset
    :ivar companions: single reads that go with it
    :ivar snapshot: where the last walk's nodes were, and what may point to more; without memory
    :ivar apart: the head's memory and that of its neighbours
    :ivar batch: the memory of all else, in the store
    :ivar trail: what is read behind pointers where no field explains it
    :ivar on: the trail that it is on, of a chain that a pointer leads to
    :ivar empty_words: for a table, what its heads hold when they are empty, by address
    :ivar empty_heads: the same as a batch in the store
    :ivar lines: addresses of the memory that was brought behind arrays, see `vmishim.readahead.lines`
    :ivar walks: how often it was walked
    """

    def __init__(self, kernel_list: KernelList) -> None:
        self.kernel_list = kernel_list
        self.head = Head()
        self.fields = Fields(kernel_list.fields)
        self.seen: set[tuple[Path, int]] = set()
        self.companions = Companions()
        self.snapshot = Snapshot()
        self.apart = nothing_apart()
        self.batch = Batch()
        self.trail = Trail()
        self.on: Trail | None = None
        self.empty_words: dict[int, int] = {}
        self.empty_heads = Batch()
        self.lines: list[int] = []
        self.walks = 0
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """What walks the list and brings its own fields; another one once a field was learned."""
        ops = self.fields.stages[0].ops
        if self._plan is None or self._plan.ops is not ops:
            self._plan = self.kernel_list.plan(ops)
        return self._plan

    def locate(self, kernel_list: KernelList) -> None:
        """Take in where a table was found to be."""
        self.kernel_list = kernel_list
        if kernel_list.step == Step.NULLS:
            start, stride, heads = kernel_list.start, kernel_list.stride, kernel_list.heads
            ends = range(kernel_list.nulls * 2 + 1, (kernel_list.nulls + heads) * 2 + 1, 2)
            self.empty_words = dict(zip(range(start, start + heads * stride, stride), ends, strict=True))

    def head_number(self, address: int) -> int:
        """Number of the head at an address of `KernelList.head_addresses`; a ring's two pointers are one head."""
        return self.kernel_list.head_addresses.index(address) if self.kernel_list.table is not None else 0

    def covers_head(self, address: int, count: int) -> bool:
        """Whether a read that begins in the node that the head is in, such as ``init_task``, has the head in it."""
        start = self.kernel_list.start
        return self.kernel_list.is_head_node(address) and address < start + 2 * WORD and start < address + count

    def peek(self, address: int, data: bytes) -> list[int]:
        """Take in that the head was brought alone, in ``data``. Returns the nodes next to it, of a ring or chain."""
        own = self.kernel_list
        if own.table is not None:
            self.apart = nothing_apart().watching([(own.start, own.start + own.heads * own.stride)])
            return []
        heads = [at for at in own.head_addresses if address <= at <= address + len(data) - WORD]
        links = {int.from_bytes(data[at - address :][:WORD], "little") for at in heads} - {own.start}
        nodes = [link + own.bias - own.link for link in links]
        self.apart = nothing_apart().watching((node - own.before, node + own.after) for node in nodes)
        return nodes
