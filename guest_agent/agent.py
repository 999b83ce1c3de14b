"""The agent without its sockets: a request goes in, a reply comes out."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from guest_agent.freezer import FreezeError, Freezer
from guest_agent.injections import Injections, cut, explain
from guest_agent.kernel import Gathered, Kernel
from guest_agent.loader import InjectionError
from guest_agent.programs import LoadError
from guest_agent.sealed import Sealer
from vmishim.errors import LinkError
from vmishim.version import __version__
from vmishim.wire.messages import (
    BULK_MAX,
    Answer,
    Attest,
    Chunk,
    Eject,
    Envelope,
    Evidence,
    Failure,
    Freeze,
    Hello,
    Inject,
    Injected,
    Lookup,
    Members,
    Memory,
    Message,
    More,
    Names,
    Pointees,
    Read,
    Rejected,
    Run,
    Sealing,
    Symbols,
    Thaw,
    Walk,
    Welcome,
    decode,
    encode,
)
from vmishim.wire.plan import HEADS_MAX, Plan, PlanError
from vmishim.wire.sealed import CHALLENGE_SIZE, Asking

log = logging.getLogger(__name__)

WALKS_MAX = 16
"""Unfinished walks kept for all sessions together; a new one displaces the one begun or continued longest ago."""
READS_MAX, READ_MAX = 64, 4096
"""How many single reads a walk may carry, and the bytes of each."""
CACHED_MAX = 4096
"""Bytes of the longest walk request whose decoding is cached."""
NAMES_MAX = 1024
"""Names that one request may ask about."""
NOT_ASKED = Evidence("this agent did not request an attestation report", b"")
_WALK = bytes([Walk.KIND])
PHYSICAL = 1
"""`vmishim.memory.reader.PHYSICAL`, which the agent does not carry."""


@dataclass
class _UnfinishedWalk:
    session: bytes
    plan: Plan
    heads: bytes
    state: bytes
    ahead: Gathered | None = None


class Agent:
    """Answers requests about this machine's kernel.

    :param injections: loads and runs the programs that IDSs send; without it they are refused
    :param evidence: the hardware's attestation of the agent's key
    :param sealer: reads memory instead of ``kernel``, which then answers questions about names only
    :param freezer: freezes the monitored system; without it every freeze is refused
    :param owner: from a session's id to whose it is, by which unfinished walks are counted
    """

    def __init__(
        self,
        kernel: Kernel,
        injections: Injections | None = None,
        evidence: Evidence = NOT_ASKED,
        sealer: Sealer | None = None,
        freezer: Freezer | None = None,
        owner: Callable[[bytes], Hashable] = bytes,
    ) -> None:
        self._kernel = kernel
        self._owner = owner
        self._evidence = evidence
        self._sealer = sealer
        self._injections = injections or Injections()
        self._freezer = freezer or Freezer()
        self._walks: OrderedDict[int, _UnfinishedWalk] = OrderedDict()
        self._numbers = itertools.count(1)
        self._found: list[str] = []

    def answer(self, session: bytes, request: bytes) -> bytes:
        """Return the reply to a request, both in the clear. No request, however malformed, makes it raise.

        :param session: id of the asking session; only the session that began a walk can continue it
        """
        try:
            reply = self._answer(session, _decode(request))
            # After the reading, not before: only now is it certain that the freeze lasted until the memory was read.
            self._freezer.renew(session)
            return encode(reply)
        except PlanError as error:
            return encode(Failure("plan", str(error)))
        except FreezeError as error:
            return encode(Failure("freeze", str(error)))
        except InjectionError as error:
            return encode(Failure(error.code, str(error)))
        except LoadError as error:
            return encode(Rejected(explain(error), cut(error.log)))
        except LinkError as error:
            return encode(Failure("malformed", str(error)))

    def _answer(self, session: bytes, request: Message) -> Message:
        kernel = self._kernel
        match request:
            case Read() | Lookup() | Walk() | More() if self._sealer:
                return Failure(
                    "kernel-encryption", "this agent's kernel encrypts what is read: upgrade vmishim on the IDS's side"
                )
            case Sealing(key, tags, bulk):
                if self._sealer is None:
                    return Failure("kernel-encryption", _NO_SEALER)
                inner = _decode(bulk[CHALLENGE_SIZE:])
                if not isinstance(inner, Asking):
                    return Failure(
                        "malformed", f"{type(inner).__name__} is not a request whose answer the kernel can seal"
                    )
                try:
                    given = bytes.fromhex(tags)
                except ValueError:
                    return Failure("malformed", "tags must be hexadecimal")
                return self._refusal(inner) or self._sealer.answer(session, key, given, bulk[:CHALLENGE_SIZE], inner)
            case Envelope(public):
                if self._sealer is None:
                    return Failure("kernel-encryption", _NO_SEALER)
                envelope = self._sealer.envelope(public)
                return Answer([envelope]) if envelope else Failure("kernel-encryption", _PERMITTED_LATER)
            case Read() | Walk() | Lookup() if refusal := self._refusal(request):
                return refusal
            case Read(space, address, count):
                return self._read(space, address, count)
            case Walk(plan, reads, heads):
                extra = [kernel.read(address, count) for address, count in reads]
                return self._chunk(_UnfinishedWalk(session, plan, heads, b""), kernel.walk(plan, heads), extra)
            case More(number):
                walk = self._walks.get(number)
                if walk is None or walk.session != session:
                    return Failure("walk", f"there is no unfinished walk {number}; start the walk again")
                del self._walks[number]
                return self._chunk(walk, walk.ahead or kernel.walk(walk.plan, walk.heads, walk.state))
            case Symbols(several) | Names(several) | Members(several) | Pointees(several) if len(several) > NAMES_MAX:
                return Failure("oversize", f"{len(several)} names in one request, at most {NAMES_MAX}")
            case Symbols(names):
                return Answer([kernel.symbol(name) for name in names])
            case Names(addresses):
                return Answer([kernel.symbol_at(address) for address in addresses])
            case Members(names):
                return Answer([kernel.member(name) for name in names])
            case Pointees(questions):
                return Answer([kernel.pointee(question) for question in questions])
            case Lookup(dtb, address):
                return Answer(list(kernel.lookup(dtb, address)))
            case Inject(name, data):
                return Answer([self._injections.add(session, name, data)])
            case Run(number, data):
                return Memory(self._injections.run(session, number, data))
            case Injected():
                return Answer(self._injections.listing(session))
            case Eject(number):
                self._injections.eject(session, number)
                return Answer([])
            case Attest():
                return self._evidence
            case Freeze(milliseconds):
                self._freezer.freeze(session, milliseconds)
                return Answer([])
            case Thaw():
                self._freezer.thaw(session)
                return Answer([])
            case Hello(version, symbols, members):
                if len(symbols) + len(members) > NAMES_MAX:
                    return Failure("oversize", f"a hello asks about at most {NAMES_MAX} names")
                log.info("an IDS connected, version %.40r", version)
                facts = kernel.facts()
                facts["version"] = __version__
                facts["kernel_encryption"] = self._sealer is not None
                facts["self_check"] = self._check()
                facts["symbols"] = [kernel.symbol(name) for name in symbols]
                facts["members"] = [kernel.member(name) for name in members]
                return Welcome(facts)
        return Failure("malformed", f"{type(request).__name__} is not a request")

    def _check(self) -> str:
        """ "ok", or what of our programs and maps was found changed, now or since our start."""
        for found in (*self._kernel.changed(), *(self._sealer.changed() if self._sealer else ())):
            if found not in self._found:
                log.error("self-check: %s by another process, which has root's rights on this machine", found)
                self._found.append(found)
        return "; ".join(self._found) or "ok"

    def _refusal(self, request: Asking) -> Failure | None:
        """Why a request about memory can't be answered; None if it can."""
        match request:
            case Read(_, _, count) if not 0 <= count <= BULK_MAX:
                return Failure("oversize", f"{count} bytes asked for, one read returns at most {BULK_MAX}")
            case Read(space) if space and not self._kernel.page_offset:
                return Failure("physical", _NO_DIRECT_MAP)
            case Lookup() if not self._kernel.page_offset:
                return Failure("physical", _NO_DIRECT_MAP)
            case Walk(_, reads) if len(reads) > READS_MAX or not all(_is_read(read) for read in reads):
                return Failure(
                    "plan", f"a walk brings at most {READS_MAX} reads along, each [address, count <= {READ_MAX}]"
                )
            case Walk(plan, _, heads) if len(heads) != (0 if plan.stride else plan.heads * 8):
                return Failure("plan", f"{len(heads)} bytes of heads do not match the plan (at most {HEADS_MAX} heads)")
        return None

    def _read(self, space: int, address: int, count: int) -> Message:
        kernel = self._kernel
        if space == PHYSICAL:
            if kernel.page_offset + address + count > 1 << 64:
                return Memory(b"")  # past the end of the direct map there is no memory
            return Memory(kernel.read(kernel.page_offset + address, count))
        return Memory(kernel.read(address, count, space))

    def _chunk(self, walk: _UnfinishedWalk, gathered: Gathered, reads: Sequence[bytes] = ()) -> Chunk:
        number = 0
        if gathered.more is not None:
            number = next(self._numbers)
            walk.state, walk.ahead = gathered.more, None
            self._walks[number] = walk
            if len(self._walks) > WALKS_MAX:
                # The owner of most walks loses its oldest: an IDS that begins many ends no other's.
                owners = {at: self._owner(other.session) for at, other in self._walks.items()}
                counts = Counter(owners.values())
                # Not most_common(1): it imports heapq, and the confined agent can open no file.
                most = max(counts, key=counts.__getitem__)
                del self._walks[next(at for at, owner in owners.items() if owner == most)]
        return Chunk(
            number,
            gathered.truncated,
            gathered.faulted,
            gathered.fault_at,
            gathered.cycles,
            gathered.cycle_at,
            gathered.torn,
            [len(data) for data in reads],
            list(gathered.head),
            b"".join((*reads, gathered.records)),
        )

    def walk_ahead(self) -> None:
        """Walk the next chunk of the latest walk, while the network carries the chunk before it."""
        if self._walks:
            walk = next(reversed(self._walks.values()))
            if walk.ahead is None:
                walk.ahead = self._kernel.walk(walk.plan, walk.heads, walk.state)

    def end(self, session: bytes) -> None:
        """End a session: drop its unfinished walks, thaw what it froze, unload its programs."""
        with contextlib.suppress(FreezeError):
            self._freezer.thaw(session)
        self._injections.end(session)
        if self._sealer:
            self._sealer.end(session)
        for number in [number for number, walk in self._walks.items() if walk.session == session]:
            del self._walks[number]


_decode_cached = lru_cache(64)(decode)


def _decode(data: bytes) -> Message:
    """Decode a message. Walks are cached: each listing repeats them, and their plans take the longest to decode."""
    if data[:1] == _WALK and len(data) <= CACHED_MAX:
        return _decode_cached(data)
    return decode(data)


def _is_read(value: object) -> bool:
    return (
        type(value) is list
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < 1 << 64
        and 0 < value[1] <= READ_MAX
    )


_NO_SEALER = "this agent's kernel does not encrypt: start the agent with `agent.pyz serve --kernel-key`"
_PERMITTED_LATER = "its kernel has no key for this IDS, which was permitted after the agent started: restart the agent"
_NO_DIRECT_MAP = (
    "this kernel does not show where its direct map is (built without KALLSYMS_ALL), so physical memory and page "
    "tables cannot be read"
)
