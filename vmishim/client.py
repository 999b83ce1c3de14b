"""The agent as a reader: each call is one request, a long one several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from struct import Struct
from typing import Any

from vmishim.errors import FaultError, LinkError
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR
from vmishim.version import __version__
from vmishim.wire.messages import (
    BULK_MAX,
    Answer,
    Chunk,
    Freeze,
    Hello,
    Lookup,
    M,
    Members,
    Memory,
    More,
    Names,
    Pointees,
    Read,
    Symbols,
    Thaw,
    Walk,
    Welcome,
    encode,
    expect,
    expected,
)
from vmishim.wire.plan import STEPS_MAX, Plan
from vmishim.wire.sealed import CHUNK_MAX, Asking, Unsealing

MEMBER_MAX = 1 << 20
"""Bytes of the largest structure that is believed; the largest of Linux 6.18, ``cpu_entry_area``, has 241,664."""
NAME_MAX = 512
"""Characters of a symbol's name (``KSYM_NAME_LEN``), or of a fact."""
WALK_MAX = 256 << 20
"""Bytes of records that are taken of one walk; it is over then, as if the plan's ``max_nodes`` had ended it."""


class Remote:
    """A guest's memory and kernel, asked of its agent. An agent is believed what it says of memory; that a reply fits
    its request, and that there is an end to them, is checked here.

    :param exchange: carries a request to the agent and brings its reply (`vmishim.link.Link.exchange`)
    :param unsealing: opens what a kernel sealed that encrypts by itself; one that must, if it names the kernel's key
    :ivar sealed: whether the kernel does
    """

    def __init__(self, exchange: Callable[[bytes], bytes], unsealing: Unsealing | None = None) -> None:
        self._exchange = exchange
        self._unsealing = unsealing
        self.sealed = False
        self._most = BULK_MAX

    def hello(self, symbols: Sequence[str], members: Sequence[str]) -> dict[str, Any]:
        """The agent's facts, see `vmishim.wire.messages.Welcome`.

        :raises LinkError: there is no agent, or we can't talk to it
        """
        request = Hello(__version__, list(symbols), list(members))
        facts = expect(self._exchange(encode(request)), Welcome).facts
        _checked(facts.get("symbols"), len(symbols), _is_address)
        _checked(facts.get("members"), len(members), _is_member)
        self.sealed = facts.get("kernel_encryption") is True
        if self.sealed and self._unsealing:
            self._unsealing.take(self._exchange)
            self._most = CHUNK_MAX
        elif self._unsealing and self._unsealing.kernel_key:
            raise LinkError(
                "the guest's kernel does not encrypt, as the domain's kernel_key wants it to: start its agent with "
                "`agent.pyz serve --kernel-key /etc/vmishim/kernel.key`"
            )
        return facts

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        if space == KERNEL and address < KERNEL_FLOOR:
            raise FaultError(address)
        parts: list[bytes] = []
        done = 0
        while done < count:
            wanted = min(count - done, self._most)
            if address + done >= 1 << 64:
                raise FaultError(address + done, b"".join(parts))
            data = self._memory(Read(space, address + done, wanted), Memory).bulk
            if len(data) > wanted:
                raise LinkError(f"the agent sent {len(data)} bytes where {wanted} were asked for")
            parts.append(data)
            done += len(data)
            if len(data) < wanted:
                raise FaultError(address + done, b"".join(parts))
        return b"".join(parts)

    def walk(
        self,
        plan: Plan,
        heads: Sequence[int] = (),
        reads: Sequence[tuple[int, int]] = (),
        found: dict[int, bytes] | None = None,
    ) -> Iterator[Chunk]:
        """Walk, chunk by chunk; the agent walks on while a chunk is used.

        :param heads: addresses, for a plan that lists its heads
        :param reads: (address, count) of kernel memory to bring along
        :param found: where to put what came of ``reads``, by address; what can't be read whole is left out
        :raises LinkError: the agent's records do not fit the plan
        """
        request = Walk(plan, [list(read) for read in reads], Struct(f"<{len(heads)}Q").pack(*heads))
        chunk = self._memory(request, Chunk)
        counts = [count for _, count in reads]
        if len(chunk.reads) != len(counts) or any(
            came > count for came, count in zip(chunk.reads, counts, strict=True)
        ):
            raise LinkError("the agent's reads are not those asked for")
        at = 0
        for came, (address, count) in zip(chunk.reads, reads, strict=True):
            if found is not None and came == count:
                found[address] = chunk.bulk[at : at + came]
            at += came
        if at > len(chunk.bulk):
            raise LinkError("the agent's reads are not those asked for")
        if at:
            chunk = replace(chunk, bulk=chunk.bulk[at:])
        size = plan.record.size
        # A head that holds no node may have a record of its own, so that a caller knows.
        most, records = plan.max_nodes + plan.heads, 0
        # A chunk that is not the last is full, unless its run took all its steps: over heads without nodes.
        short = 1 + plan.heads // STEPS_MAX
        while True:
            if len(chunk.bulk) % size or len(chunk.head) != 2 or len(chunk.bulk) > BULK_MAX:
                raise LinkError("the agent's records do not fit the plan")
            records += len(chunk.bulk) // size
            if records > most:
                raise LinkError(f"the agent sent {records} records where the plan allows {most}")
            if records * size > WALK_MAX and chunk.walk:
                chunk = replace(chunk, walk=0, truncated=True)
            yield chunk
            if not chunk.walk:
                return
            short -= len(chunk.bulk) + size <= self._most
            if short < 0:
                raise LinkError("the agent's chunks are not full, but do not end")
            chunk = self._memory(More(chunk.walk), Chunk)

    def symbols(self, names: Sequence[str]) -> list[int | None]:
        """Addresses of symbols; None for unknown ones."""
        return self._ask(Symbols(list(names)), len(names), _is_address)

    def names(self, addresses: Sequence[int]) -> list[str | None]:
        """Symbols that start at addresses; None where none does."""
        return self._ask(Names(list(addresses)), len(addresses), _is_name)

    def members(self, names: Sequence[str]) -> list[list[int] | None]:
        """``"struct member"`` -> [offset, size], or None."""
        return self._ask(Members(list(names)), len(names), _is_member)

    def pointees(self, questions: Sequence[str]) -> list[list[int] | None]:
        """``"struct offset"`` -> [number, bytes] of the type that word points to, see
        `vmishim.wire.messages.Pointees`."""
        return self._ask(Pointees(list(questions)), len(questions), _is_pointee)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate by the page tables at ``dtb``: (physical address, page size, entries from the root down); a page
        size of 0 says that it is not mapped."""
        match self._memory(Lookup(dtb, address), Answer).values:
            case [physical, (0 | 0x1000 | 0x20_0000 | 0x4000_0000) as size, [*entries]] if len(entries) <= 5 and all(
                map(_is_address, (physical, *entries))
            ):
                return physical, size, entries
        raise LinkError("the agent's translation is none")

    def freeze(self, milliseconds: int) -> None:
        """Stop the monitored system, see `vmishim.wire.messages.Freeze`.

        :raises LinkError: the agent may not, or it did not come to stand still
        """
        expect(self._exchange(encode(Freeze(milliseconds))), Answer)

    def thaw(self) -> None:
        """Let the monitored system go on, as far as we are concerned."""
        expect(self._exchange(encode(Thaw())), Answer)

    def _ask(self, request: Symbols | Names | Members | Pointees, count: int, fits: Callable[[Any], bool]) -> list[Any]:
        return _checked(expect(self._exchange(encode(request)), Answer).values, count, fits)

    def _memory(self, request: Asking, kind: type[M]) -> M:
        """The reply to a request that kernel memory answers."""
        if self.sealed and self._unsealing:
            return expected(self._unsealing.ask(self._exchange, request), kind)
        return expect(self._exchange(encode(request)), kind)


def checked_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facts of a `vmishim.wire.messages.Welcome`, of the types and within the bounds that they have on any kernel.

    :raises LinkError: one of them is missing, or is not
    """
    for fact, fits in _FACTS.items():
        if fact not in facts:
            raise LinkError(f"the agent's welcome lacks a fact: {fact}")
        if not fits(facts[fact]):
            raise LinkError(f"the agent's welcome has a {fact} that is none")
    return facts


def _checked(values: Any, count: int, fits: Callable[[Any], bool]) -> list[Any]:
    """:raises LinkError: these are not ``count`` answers, each None or of the kind asked for"""
    if type(values) is not list or len(values) != count:
        raise LinkError(f"the agent did not answer {count} questions one by one")
    if not all(value is None or fits(value) for value in values):
        raise LinkError("the agent answered something else than was asked")
    return values


def _is_address(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= NAME_MAX


def _is_word(value: Any) -> bool:
    """Whether it can be shown on a terminal and written to a configuration file."""
    return _is_name(value) and value.isprintable() and '"' not in value


def _is_member(value: Any) -> bool:
    return _is_pointee(value) and max(value) <= MEMBER_MAX


def _is_pointee(value: Any) -> bool:
    # In BTF numbers of types and sizes are u32.
    return type(value) is list and len(value) == 2 and all(map(_is_address, value)) and max(value) < 1 << 32


_FACTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("release", "hostname", "version", "boot_id"), _is_word),
    **dict.fromkeys(("page_offset", "kaslr_offset", "memory_size", "vcpus"), _is_address),
    "levels": lambda value: type(value) is int and value in (4, 5),
}
