"""Asks the guest: walks a list, what hangs from its nodes, and what they point to. Gives back values, keeps nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from vmishim.client import Remote
from vmishim.memory.reader import ADDRESSES, KERNEL_FLOOR
from vmishim.readahead.catalogue import NODES_MAX, KernelList
from vmishim.readahead.fields import RING, WORD, Fields, Stage
from vmishim.readahead.lines import Lines
from vmishim.readahead.pieces import Pieces
from vmishim.readahead.snapshot import Snapshot, is_kernel
from vmishim.readahead.trails import LINE
from vmishim.wire.messages import Chunk
from vmishim.wire.plan import HEADS_MAX, Kind, Plan, Step

log = logging.getLogger(__name__)

STAGES_ALONE = 2
"""Stages behind arrays up to which each is a request of its own; the memory of more is brought at once, see `lines`."""

Range = tuple[int, int]
"""Start and end of memory."""


@dataclass(frozen=True, slots=True)
class Apart:
    """Memory at a list's head that is kept apart from what is known, since reading it is an event (`head`).

    :ivar head: the head's pointers, and all of the head's own node
    :ivar neighbours: the nodes one step from the head
    :ivar ranges: where these are
    """

    head: Pieces
    neighbours: Pieces
    ranges: tuple[Range, ...] = ()

    def has_neighbour(self, address: int, count: int) -> bool:
        """Whether a read is of a neighbour."""
        return any(start < address + count and address < end for start, end in self.ranges)

    def watching(self, ranges: Iterable[Range]) -> Apart:
        """The same, where the neighbours are in ``ranges``."""
        return replace(self, ranges=tuple(ranges))

    def moved_on(self) -> Apart:
        """The same, where nothing of the neighbours is kept apart any more."""
        return Apart(self.head, Pieces())


def nothing_apart() -> Apart:
    """What is kept apart of a list whose head was not looked at: nothing."""
    return Apart(Pieces(), Pieces())


@dataclass(frozen=True, slots=True)
class WalkResult:
    """What one walk brought.

    :ivar snapshot: nodes and their memory
    :ivar apart: the same of the head and its neighbours
    :ivar complete: the walk met each head and node: of a table, a head that has no word in ``snapshot`` is empty
    :ivar companions: what came of the single reads to bring along, by address and count
    """

    snapshot: Snapshot
    apart: Apart
    complete: bool
    companions: dict[tuple[int, int], bytes]


class Walker:
    """Walks lists of one guest.

    :param remote: the agent
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def walk(
        self,
        kernel_list: KernelList,
        plan: Plan,
        fields: Fields,
        companions: Sequence[tuple[int, int]],
        empty: Mapping[int, int],
    ) -> WalkResult:
        """Walk a list, and collect what is wanted of its own nodes.

        :param plan: does that
        :param fields: all that is wanted
        :param companions: single reads to bring along, address and count
        :param empty: of a table, what its heads hold when they are empty, by address
        :raises LinkError: the guest could not be asked
        """
        snapshot, own = Snapshot(), fields.stages[0]
        found: dict[int, bytes] = {}
        chunks = self._remote.walk_whole(plan, reads=companions, found=found)
        records = [snapshot.add(plan, own, chunk.bulk) for chunk in chunks]
        all_heads = kernel_list.table is None or _take_heads(kernel_list, snapshot, chain.from_iterable(records))
        nodes, last = snapshot.nodes[()], chunks[-1]
        if (
            kernel_list.step == Step.CHAIN
            and nodes
            and last.cycles
            and _ends_well(kernel_list, snapshot, last.cycle_at)
        ):
            last = replace(last, cycles=0)
            nodes[:] = dict.fromkeys(nodes)
        complete = not _report(kernel_list.name, last) and all_heads
        edge = {kernel_list.start, kernel_list.start + kernel_list.stride} if complete else set()
        ends = {at: empty[at] for at in edge if at in empty}
        apart = _apart(kernel_list, snapshot, last.head, ends, {field.offset for field in fields})
        log.debug("walked %s: %d nodes", kernel_list.name, len(nodes))
        brought = {(at, len(data)): data for at, data in found.items()}
        return WalkResult(snapshot, apart, complete, brought)

    def collect_rest(self, snapshot: Snapshot, fields: Fields, addresses: Sequence[int]) -> list[int]:
        """Add to a walk's snapshot what is wanted behind the arrays and rings of its nodes.

        :param addresses: of the lines that held it last time
        :returns: of those that hold it now; none where each stage is a request of its own, since that is quicker
        """
        stages = fields.stages[1:]
        if sum(stage.root[-1].span != RING for stage in stages) <= STAGES_ALONE:
            for stage in stages:
                self.collect(snapshot, stage, rings=stage.root[-1].span == RING)
            return []
        lines = Lines(addresses, self.lines(list(addresses)))
        rest = snapshot.bare()
        for stage in stages:
            if stage.root[-1].span == RING:
                self._walk_rings(snapshot, stage)
            else:
                self._gather(rest, stage, lines)
        snapshot.words.update(rest.words)
        snapshot.cells.update(rest.cells)
        return lines.used

    def collect(self, snapshot: Snapshot, stage: Stage, *, rings: bool) -> None:
        """Add a stage to a snapshot: fields of what its root leads to, or with ``rings`` of the nodes of the rings
        there."""
        (self._walk_rings if rings else self._gather)(snapshot, stage)

    def lines(self, addresses: list[int]) -> dict[int, bytes]:
        """`LINE` bytes at each of ``addresses``, where they can be read."""
        return dict(self._remote.scatter(addresses, LINE))

    def _gather(self, snapshot: Snapshot, stage: Stage, lines: Lines | None = None) -> None:
        heads = sorted({head for head in snapshot.addresses(stage.root) if head >= KERNEL_FLOOR})
        if lines is not None:
            columns, heads = lines.carry_out(stage, heads)
            if columns[0]:
                lines.use(stage, columns)
                snapshot.put(stage, columns)
        for some in _portions(heads):
            plan = Plan(0, Step.SELF, stage.ops, heads=len(some), stride=0)
            for chunk in self._remote.walk_whole(plan, some):
                snapshot.add(plan, stage, chunk.bulk)
                if lines is not None and lines.are_few:
                    lines.use(stage, plan.columns(chunk.bulk))

    def _walk_rings(self, snapshot: Snapshot, stage: Stage) -> None:
        path, hop = stage.root[:-1], stage.root[-1]
        snapshot.nodes[stage.root] = []
        heads = sorted({base + hop.offset for base in snapshot.addresses(path) if is_kernel(base + hop.offset)})
        for some in _portions(heads):
            plan = Plan(0, Step.RING, stage.ops, heads=len(some), stride=0, link=hop.link, max_nodes=NODES_MAX)
            ends: dict[int, list[int]] = {}
            for chunk in self._remote.walk_whole(plan, some):
                for node, number, kind in snapshot.add(plan, stage, chunk.bulk):
                    if kind == Kind.NODE:
                        link = (node + hop.link) % ADDRESSES
                        ends.setdefault(number, [link, 0])[1] = link
            if _report("rings", chunk):
                continue  # whose ends are not known for sure
            for number, head in enumerate(some):
                snapshot.words[head], snapshot.words[head + WORD] = ends.get(number, (head, head))


def _ends_well(kernel_list: KernelList, snapshot: Snapshot, link: int) -> bool:
    """Whether a chain that loops at ``link`` is undamaged: it is a ring that a pointer from outside leads into, or goes
    from parent to parent, and the last is its own, as the root's dentry is."""
    first = (snapshot.nodes[()][0] + kernel_list.link) % ADDRESSES
    return link == first or (snapshot.words.get(link, 0) + kernel_list.bias) % ADDRESSES == link


def _take_heads(kernel_list: KernelList, snapshot: Snapshot, records: Iterable[tuple[int, int, int]]) -> bool:
    """Add what a table's heads point to. False when one cannot be read."""
    before, all_heads = -1, True
    for value, head, kind in records:
        if head != before:
            if kind == Kind.FAULT:
                all_heads = False
            else:
                pointer = value if kind == Kind.HEAD else value + kernel_list.link - kernel_list.bias
                snapshot.words[kernel_list.start + head * kernel_list.stride] = pointer % ADDRESSES
        before = head
    return all_heads


def _apart(
    kernel_list: KernelList, snapshot: Snapshot, head_words: Sequence[int], empty: Mapping[int, int], offsets: set[int]
) -> Apart:
    """What is kept apart of a snapshot.

    :param head_words: what a ring's head holds
    :param empty: what a table's first two heads hold if ``snapshot`` has no word of them
    :param offsets: of what is wanted of a node
    """
    nodes, words = snapshot.nodes[()], snapshot.words
    start, table = kernel_list.start, kernel_list.table
    head, neighbours = Pieces(), Pieces()
    pointers: dict[int, int] = {}
    edge: list[int] = []
    ranges: tuple[Range, ...] = ()
    if kernel_list.step in (Step.RING, Step.RING_NODE):
        if any(head_words):
            pointers = {start: head_words[0], start + WORD: head_words[1]}
            edge = [link - kernel_list.link for link in dict.fromkeys(head_words) if link != start]
    elif table is not None:
        pointers = {at: words.get(at, empty.get(at, -1)) for at in kernel_list.head_addresses}
        pointer, _, first = table
        pointers[pointer] = start - first
        pointers = {at: value for at, value in pointers.items() if value >= 0}
        edge = nodes[:1]
        second = start + kernel_list.stride
        if kernel_list.heads > 1:
            ranges = ((second, second + WORD),)
            if second in words or second in empty:
                neighbours.words[second] = words.setdefault(second, empty.get(second, 0))
    elif nodes:
        pointers = {start: (nodes[0] + kernel_list.link - kernel_list.bias) % ADDRESSES}
        edge = nodes[:1]
    ranges += tuple((node - kernel_list.before, node + kernel_list.after) for node in edge)
    _copy(snapshot, [node + offset for node in edge for offset in offsets], neighbours)
    if kernel_list.step == Step.RING_NODE:
        _copy(snapshot, [start - kernel_list.link + offset for offset in offsets], head)
    head.words.update(pointers)
    return Apart(head, neighbours, ranges)


def _copy(snapshot: Snapshot, addresses: list[int], into: Pieces) -> None:
    words, cells = snapshot.words, snapshot.cells
    into.update({at: words[at] for at in addresses if at in words}, {at: cells[at] for at in addresses if at in cells})


def _portions(heads: list[int]) -> Iterator[list[int]]:
    """As many heads as one plan may list."""
    for start in range(0, len(heads), HEADS_MAX):
        yield heads[start : start + HEADS_MAX]


def _report(name: str, chunk: Chunk) -> bool:
    """Log what a walk met. True when it is not complete: what it could not bring is read one by one."""
    met = [
        text
        for text, happened in (
            (f"there are more than {NODES_MAX} nodes", chunk.truncated),
            (f"{chunk.faulted} chains end in unreadable memory, the first at {chunk.fault_at:#x}", chunk.faulted),
            (f"{chunk.cycles} chains loop without meeting their head, the first at {chunk.cycle_at:#x}", chunk.cycles),
        )
        if happened
    ]
    for text in met:
        log.warning("%s: %s; what lies past that is read one by one", name, text)
    if chunk.torn:
        log.info("%s: %d links changed under the walk", name, chunk.torn)
    return bool(met)
