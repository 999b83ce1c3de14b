"""The agent as a reader: each call is one request, a long one several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from struct import Struct
from typing import Any

import vmishim
from vmishim.errors import FaultError, LinkError
from vmishim.memory.reader import KERNEL, KERNEL_FLOOR
from vmishim.wire.messages import (
    BULK_MAX,
    Answer,
    Chunk,
    Hello,
    Lookup,
    Members,
    Memory,
    More,
    Names,
    Pointees,
    Read,
    Symbols,
    Walk,
    Welcome,
    encode,
    expect,
)
from vmishim.wire.plan import Plan


class Remote:
    """A guest's memory and kernel, asked of its agent.

    :param exchange: carries a request to the agent and brings its reply (`vmishim.link.Link.exchange`)
    """

    def __init__(self, exchange: Callable[[bytes], bytes]) -> None:
        self._exchange = exchange

    def hello(self, symbols: Sequence[str], members: Sequence[str]) -> dict[str, Any]:
        """The agent's facts, see `vmishim.wire.messages.Welcome`.

        :raises LinkError: there is no agent, or we can't talk to it
        """
        request = Hello(vmishim.__version__, list(symbols), list(members))
        facts = expect(self._exchange(encode(request)), Welcome).facts
        if len(facts.get("symbols", ())) != len(symbols) or len(facts.get("members", ())) != len(members):
            raise LinkError("the agent's welcome does not answer what was asked")
        return facts

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        """See `vmishim.memory.reader.MemoryReader.read`."""
        if space == KERNEL and address < KERNEL_FLOOR:
            raise FaultError(address)
        parts: list[bytes] = []
        done = 0
        while done < count:
            wanted = min(count - done, BULK_MAX)
            if address + done >= 1 << 64:
                raise FaultError(address + done, b"".join(parts))
            data = expect(self._exchange(encode(Read(space, address + done, wanted))), Memory).bulk
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
        chunk = expect(self._exchange(encode(request)), Chunk)
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
        chunk = replace(chunk, bulk=chunk.bulk[at:])
        # A head that holds no node may have a record of its own, so that a caller knows.
        most, records = plan.max_nodes + plan.heads, 0
        while True:
            if len(chunk.bulk) % plan.record.size or len(chunk.head) != 2 or len(chunk.bulk) > BULK_MAX:
                raise LinkError("the agent's records do not fit the plan")
            records += len(chunk.bulk) // plan.record.size
            if records > most:
                raise LinkError(f"the agent sent {records} records where the plan allows {most}")
            yield chunk
            if not chunk.walk:
                return
            chunk = expect(self._exchange(encode(More(chunk.walk))), Chunk)

    def symbols(self, names: Sequence[str]) -> list[int | None]:
        """Addresses of symbols; None for unknown ones."""
        return self._ask(Symbols(list(names)), len(names))

    def names(self, addresses: Sequence[int]) -> list[str | None]:
        """Symbols that start at addresses; None where none does."""
        return self._ask(Names(list(addresses)), len(addresses))

    def members(self, names: Sequence[str]) -> list[list[int] | None]:
        """``"struct member"`` -> [offset, size], or None."""
        return self._ask(Members(list(names)), len(names))

    def pointees(self, questions: Sequence[str]) -> list[list[int] | None]:
        """``"struct offset"`` -> [number, bytes] of the type that word points to, see
        `vmishim.wire.messages.Pointees`."""
        return self._ask(Pointees(list(questions)), len(questions))

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        """Translate by the page tables at ``dtb``: (physical address, page size, entries from the root down); a page
        size of 0 says that it is not mapped."""
        physical, size, entries = self._ask(Lookup(dtb, address), 3)
        return physical, size, entries

    def _ask(self, request: Symbols | Names | Members | Pointees | Lookup, count: int) -> list[Any]:
        values = expect(self._exchange(encode(request)), Answer).values
        if len(values) != count:
            raise LinkError(f"the agent answered {len(values)} of {count} questions")
        return values
