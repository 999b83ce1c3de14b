"""Learns what to bring from what is read: explains a read by the last walks, and adds a field once it was met twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD, Field, Hop, Path, Stage
from vmishim.readahead.listing import Listing
from vmishim.readahead.pointees import ARRAY, Pointees
from vmishim.readahead.snapshot import TAGS
from vmishim.readahead.trails import ABOVE, BELOW, IMAGE, IMAGE_ABOVE
from vmishim.wire.plan import Step, Take, Text

LEARN_MAX = 12288
"""Bytes of the largest read that is learned as a field, a whole ``task_struct``; larger ones go one by one."""
TEXT, LONG_TEXT = 64, 256
"""Bytes that are brought of a string: at first, and once it turned out longer."""
DEPTH = 8
"""Pointers from a node that are followed."""
CHAINS = 16
"""Lists learned from chains of reads that are kept; the one learned first makes room."""
CHAIN_WORTH = 8
"""Nodes from which on such a list is worth a walk of its own."""


class Lesson(NamedTuple):
    """What was learned, to be fetched for all nodes at once."""

    stage: Stage
    rings: bool
    """Whether the stage's root is rings that were not walked yet."""


def explain(
    listings: Iterable[Listing], pointees: Pointees, address: int, count: int, text: bool
) -> tuple[Listing, Field] | None:
    """Which field of which list's nodes a read is, as far as the last walks tell.

    :raises LinkError: the guest could not be asked for the types of pointers
    """
    if count > LEARN_MAX:
        return None
    known = [listing for listing in listings if listing.snapshot.nodes[()]]
    for listing in known:
        kernel_list, snapshot = listing.kernel_list, listing.snapshot
        sizes = {inner.root: inner.size for inner in kernel_list.inner}
        for root in snapshot.nodes:
            node = snapshot.node_near(root, address, kernel_list.before, sizes.get(root, kernel_list.after))
            if node is not None:
                return listing, _field(root, address - node, count, text)
    best: tuple[Listing, Field] | None = None
    closest = ARRAY
    for listing in known:
        kernel_list, snapshot = listing.kernel_list, listing.snapshot
        pointees.ask(kernel_list, snapshot)
        for inner in kernel_list.inner:
            # A ring's head first: pointers of the ring's own nodes lead there too.
            hop = inner.head.path[-1]
            column = inner.head.path[:-1], hop.offset, WORD
            if snapshot.pointer_near(column, hop.tags, address - inner.head.offset, 1) is not None:
                return listing, inner.head
        for column in snapshot.candidates:
            path, offset, span = column
            if span != WORD and Field(path, offset, span) not in listing.fields.whole:
                continue  # an array that has since become part of a larger one
            reach = pointees.reach(kernel_list, column) if len(path) < DEPTH else 0
            for tags in TAGS if reach else ():
                base = snapshot.pointer_near(column, tags, address, reach)
                if base is not None and address - base < closest:
                    closest = address - base
                    best = listing, _field((*path, Hop(offset, tags, span)), address - base, count, text)
    return best


def leads_to(listing: Listing, address: int) -> bool:
    """Whether a word of a list's last walk points near ``address``: closely enough for what is read there to be behind
    that pointer."""
    snapshot = listing.snapshot
    above, below = (ABOVE, BELOW) if address < IMAGE else (IMAGE_ABOVE, 0)
    return any(
        snapshot.pointer_near(column, tags, address, above, below) is not None
        for column in snapshot.candidates
        for tags in TAGS
    )


def learn(listing: Listing, field: Field) -> Lesson | None:
    """Add a field of a list's nodes the second time that it is met; a ring that hangs from them at once.

    :returns: what to fetch; None when there is nothing to
    """
    fields = listing.fields
    for inner in listing.kernel_list.inner:
        head = inner.head
        if (field.path, field.offset & -16) == (head.path, head.offset & -16) and inner.fields[0] not in fields:
            wanted = [Field(inner.root[:-2], inner.root[-2].offset, WORD), *inner.fields]
            if not all(fields.add(each) for each in wanted):
                return None
            return Lesson(next(stage for stage in fields.stages if stage.root == inner.root), rings=True)
    if field.text and field in fields:
        field = field._replace(size=LONG_TEXT)  # it was brought, and is longer than that
    parts = [part for part in field.parts() if part not in fields]
    if not parts:
        return None  # it comes along already: here it could not be read
    key = field.path, field.offset
    if key not in listing.seen:
        listing.seen.add(key)  # once may be a look at one node only
        return None
    if not all(fields.add(part) for part in parts):
        return None
    # A row of words may have become an array; what is fetched is what comes along from now on.
    brought = {next(known for known in fields if known.covers(part)) for part in parts}
    sources = tuple((known.path, known.offset) for known in brought)
    ops = tuple((Text if known.text else Take)(0, known.offset, known.size) for known in brought)
    return Lesson(Stage(field.path, ops, sources), rings=False)


def chain(start: int, bias: int) -> KernelList:
    """A chain of reads as a list: ``bias`` bytes from where a pointer points is the next link."""
    reach = ARRAY // 4
    name = f"chain at {start:#x}"
    return KernelList(name, start, Step.CHAIN, 0, reach, reach, (Field((), 0, WORD),), bias=bias, max_nodes=1 << 16)


def _field(path: Path, offset: int, count: int, text: bool) -> Field:
    return Field(path, offset, TEXT if text else count, text)
