"""The agent as a memory reader: each call is one request, or several if it is long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from struct import Struct
from typing import Any

from vmishim.errors import FaultError, LinkError
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR, PAGE_SIZE, Extent, check_scatter
from vmishim.version import __version__
from vmishim.wire.messages import (
    BULK_MAX,
    AgentError,
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
from vmishim.wire.plan import HEADS_MAX, STEPS_MAX, Plan, Step, Take
from vmishim.wire.sealed import CHUNK_MAX, Asking, Unsealing

MEMBER_MAX = 1 << 20
"""Bytes of the largest structure accepted; the largest of Linux 6.18, ``cpu_entry_area``, has 241,664."""
NAME_MAX = 512
"""Characters of a symbol's name (``KSYM_NAME_LEN``), or of a fact."""
WALK_MAX = 256 << 20
"""Bytes of records accepted of one walk, which then ends as if it had reached the plan's ``max_nodes``."""


class Remote:
    """A guest's memory and kernel, asked of its agent. What the agent says about memory is believed; that each reply
    fits its request, and that replies come to an end, is checked here.

    :param exchange: carries a request to the agent and returns its reply (`vmishim.link.Link.exchange`)
    :param unsealing: opens what the guest's kernel sealed; if it names a kernel key, the kernel must seal
    :ivar sealed: whether the guest's kernel encrypts what it reads
    """

    def __init__(self, exchange: Callable[[bytes], bytes], unsealing: Unsealing | None = None) -> None:
        self._exchange = exchange
        self._unsealing = unsealing
        self.sealed = False
        self._most = BULK_MAX

    def hello(self, symbols: Sequence[str], members: Sequence[str]) -> dict[str, Any]:
        """The agent's facts, see `vmishim.wire.messages.Welcome`.

        :raises LinkError: nothing answers, the answer is malformed, or the kernel does not encrypt as it must
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
                "the guest's kernel does not encrypt, but the domain's kernel_key requires it: start the agent with "
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
                raise LinkError(f"the agent sent {len(data)} bytes in reply to a read of {wanted}")
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
        """Walk, chunk by chunk; the agent goes on walking while you use a chunk.

        :param heads: addresses of heads, for a plan that lists them
        :param reads: (address, count) of kernel memory to read in the same request
        :param found: takes the bytes of ``reads`` by address; what can't be read whole is left out
        :raises LinkError: the agent's records do not fit the plan
        """
        request = Walk(plan, [list(read) for read in reads], Struct(f"<{len(heads)}Q").pack(*heads))
        chunk = self._memory(request, Chunk)
        counts = [count for _, count in reads]
        if len(chunk.reads) != len(counts) or any(
            came > count for came, count in zip(chunk.reads, counts, strict=True)
        ):
            raise LinkError("the agent sent other reads than the walk asked for")
        at = 0
        for came, (address, count) in zip(chunk.reads, reads, strict=True):
            if found is not None and came == count:
                found[address] = chunk.bulk[at : at + came]
            at += came
        if at > len(chunk.bulk):
            raise LinkError("the agent sent other reads than the walk asked for")
        if at:
            chunk = replace(chunk, bulk=chunk.bulk[at:])
        size = plan.record.size
        # A head without a node may have a record too, which says so.
        most, records = plan.max_nodes + plan.heads, 0
        # Every chunk but the last is full, unless its run used up its steps on heads without nodes.
        short = 1 + plan.heads // STEPS_MAX
        while True:
            if len(chunk.bulk) % size or len(chunk.head) != 2 or len(chunk.bulk) > BULK_MAX:
                raise LinkError("the agent's records do not fit the plan")
            records += len(chunk.bulk) // size
            if records > most:
                raise LinkError(f"the agent sent {records} records, but the plan allows {most}")
            if records * size > WALK_MAX and chunk.walk:
                chunk = replace(chunk, walk=0, truncated=True)
            yield chunk
            if not chunk.walk:
                return
            short -= len(chunk.bulk) + size <= self._most
            if short < 0:
                raise LinkError("the agent sent more partly filled chunks than the plan allows")
            chunk = self._memory(More(chunk.walk), Chunk)

    def walk_whole(self, plan: Plan, heads: Sequence[int] = (), **also: Any) -> list[Chunk]:
        """All chunks of a walk, see `walk`; from the start again, once, if the agent was restarted in the middle."""
        try:
            return list(self.walk(plan, heads, **also))
        except AgentError as error:
            if error.code != "walk":
                raise
            return list(self.walk(plan, heads, **also))

    def scatter(self, addresses: Sequence[int], count: int = PAGE_SIZE) -> Iterator[Extent]:
        """See `vmishim.memory.reader.ScatterReader.scatter`."""
        check_scatter(count)
        wanted = [address for address in addresses if KERNEL_FLOOR <= address <= (1 << 64) - count]
        for start in range(0, len(wanted), HEADS_MAX):
            some = wanted[start : start + HEADS_MAX]
            plan = Plan(0, Step.SELF, (Take(0, 0, count),), heads=len(some), stride=0)
            for chunk in self.walk_whole(plan, some):
                for at, fault, number, _, data in plan.records(chunk.bulk):
                    if not fault and number < len(some) and some[number] == at:  # else it is not what was asked for
                        yield Extent(at, data.to_bytes(8, "little") if count == 8 else data)

    def symbols(self, names: Sequence[str]) -> list[int | None]:
        """Addresses of symbols; None for unknown ones."""
        return self._ask(Symbols(list(names)), len(names), _is_address)

    def names(self, addresses: Sequence[int]) -> list[str | None]:
        """Names of the symbols that start at addresses; None where no symbol starts."""
        return self._ask(Names(list(addresses)), len(addresses), _is_name)

    def members(self, names: Sequence[str]) -> list[list[int] | None]:
        """``"struct member"`` -> [offset, size], or None."""
        return self._ask(Members(list(names)), len(names), _is_member)

    def pointees(self, questions: Sequence[str]) -> list[list[int] | None]:
        """``"struct offset"`` -> [number, bytes] of the type that the word there points to, or None: see
        `vmishim.wire.messages.Pointees`."""
        return self._ask(Pointees(list(questions)), len(questions), _is_pointee)

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate by the page tables at ``dtb``: (physical address, page size, entries from the root down). Page size
        0 means not mapped."""
        match self._memory(Lookup(dtb, address), Answer).values:
            case [physical, (0 | 0x1000 | 0x20_0000 | 0x4000_0000) as size, [*entries]] if len(entries) <= 5 and all(
                map(_is_address, (physical, *entries))
            ):
                return physical, size, entries
        raise LinkError("the agent sent a malformed translation")

    def freeze(self, milliseconds: int) -> None:
        """Stop the monitored system, see `vmishim.wire.messages.Freeze`.

        :raises LinkError: the agent may not stop it, or it did not come to a stop
        """
        expect(self._exchange(encode(Freeze(milliseconds))), Answer)

    def thaw(self) -> None:
        """End our stop of the monitored system, which goes on unless another session stops it too."""
        expect(self._exchange(encode(Thaw())), Answer)

    def _ask(self, request: Symbols | Names | Members | Pointees, count: int, fits: Callable[[Any], bool]) -> list[Any]:
        return _checked(expect(self._exchange(encode(request)), Answer).values, count, fits)

    def _memory(self, request: Asking, kind: type[M]) -> M:
        """The reply to a request that kernel memory answers."""
        if self.sealed and self._unsealing:
            return expected(self._unsealing.ask(self._exchange, request), kind)
        return expect(self._exchange(encode(request)), kind)


def checked_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of a `vmishim.wire.messages.Welcome`, once all are present, of their type, and possible on some kernel.

    :raises LinkError: a fact is missing or malformed
    """
    for fact, fits in _FACTS.items():
        if fact not in facts:
            raise LinkError(f"the agent did not send its {fact}")
        if not fits(facts[fact]):
            raise LinkError(f"the agent sent a malformed {fact}")
    if not _is_word(facts.get("self_check", "")):  # which older agents don't send
        raise LinkError("the agent sent a malformed self_check")
    return facts


def _checked(values: Any, count: int, fits: Callable[[Any], bool]) -> list[Any]:
    """``values``. :raises LinkError: these are not ``count`` answers, each None or of the kind asked for"""
    if type(values) is not list or len(values) != count:
        raise LinkError(f"the agent did not send one answer to each of {count} questions")
    if not all(value is None or fits(value) for value in values):
        raise LinkError("the agent sent a malformed answer")
    return values


def _is_address(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= NAME_MAX


def _is_word(value: Any) -> bool:
    """Whether it can be shown on a terminal and written to a configuration file as it is."""
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
