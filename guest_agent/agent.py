"""The agent without its sockets: a request goes in, a reply comes out."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence
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
"""Unfinished walks kept, of all sessions; the one longest unasked for makes room."""
READS_MAX, READ_MAX = 64, 4096
"""Single reads that a walk brings along, and bytes of one."""
REMEMBERED_MAX = 4096
"""Bytes of the longest walk that is remembered, to be understood at once when it comes again."""
NAMES_MAX = 1024
"""Names one request may ask about: each is a search through the kernel's own list."""
NOT_ASKED = Evidence("this agent has not asked for a report", b"")
_WALK = bytes([Walk.KIND])
PHYSICAL = 1
"""`vmishim.memory.reader.PHYSICAL`, which the agent does not carry."""


@dataclass
class _Unfinished:
    session: bytes
    plan: Plan
    heads: bytes
    state: bytes
    ahead: Gathered | None = None


class Agent:
    """Answers requests about this machine's kernel.

    :param injections: what becomes of programs that IDSs send; without it they are refused
    :param evidence: what the machine's hardware says of the agent's key
    :param sealer: reads memory in place of ``kernel``, which is asked for names only then
    :param freezer: what stops the monitored system; without it nobody may
    """

    def __init__(
        self,
        kernel: Kernel,
        injections: Injections | None = None,
        evidence: Evidence = NOT_ASKED,
        sealer: Sealer | None = None,
        freezer: Freezer | None = None,
    ) -> None:
        self._kernel = kernel
        self._evidence = evidence
        self._sealer = sealer
        self._injections = injections or Injections()
        self._freezer = freezer or Freezer()
        self._walks: OrderedDict[int, _Unfinished] = OrderedDict()
        self._numbers = itertools.count(1)

    def answer(self, session: bytes, request: bytes) -> bytes:
        """The reply to a request, both in the clear. Never raises for what a request says.

        :param session: who asks; a walk can only be continued by the one who began it
        """
        try:
            reply = self._answer(session, _understood(request))
            # Now that what was asked has been read: only then it is known that a freeze has lasted as long.
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
                return Failure("kernel-encryption", "this agent's kernel encrypts: ask by a vmishim that knows of that")
            case Sealing(key, tags, bulk):
                if self._sealer is None:
                    return Failure("kernel-encryption", _NO_SEALER)
                inner = _understood(bulk[CHALLENGE_SIZE:])
                if not isinstance(inner, Asking):
                    return Failure("malformed", f"{type(inner).__name__} is nothing to seal the answer of")
                try:
                    given = bytes.fromhex(tags)
                except ValueError:
                    return Failure("malformed", "tags are hexadecimal")
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
                also = [kernel.read(address, count) for address, count in reads]
                return self._chunk(_Unfinished(session, plan, heads, b""), kernel.walk(plan, heads), also)
            case More(number):
                walk = self._walks.get(number)
                if walk is None or walk.session != session:
                    return Failure("walk", f"there is no unfinished walk {number}; begin it again")
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
                log.info("an IDS of version %.40r is here", version)
                facts = kernel.facts()
                facts["version"] = __version__
                facts["kernel_encryption"] = self._sealer is not None
                facts["symbols"] = [kernel.symbol(name) for name in symbols]
                facts["members"] = [kernel.member(name) for name in members]
                return Welcome(facts)
        return Failure("malformed", f"{type(request).__name__} is no request")

    def _refusal(self, request: Asking) -> Failure | None:
        """Why a request about memory can't be carried out; None if it can."""
        match request:
            case Read(_, _, count) if not 0 <= count <= BULK_MAX:
                return Failure("oversize", f"{count} bytes asked for, one read carries at most {BULK_MAX}")
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
                return Memory(b"")  # beyond the end of the direct map, so no memory
            return Memory(kernel.read(kernel.page_offset + address, count))
        return Memory(kernel.read(address, count, space))

    def _chunk(self, walk: _Unfinished, gathered: Gathered, also: Sequence[bytes] = ()) -> Chunk:
        number = 0
        if gathered.more is not None:
            number = next(self._numbers)
            walk.state, walk.ahead = gathered.more, None
            self._walks[number] = walk
            if len(self._walks) > WALKS_MAX:
                self._walks.popitem(last=False)
        return Chunk(
            number,
            gathered.truncated,
            gathered.faulted,
            gathered.fault_at,
            gathered.cycles,
            gathered.cycle_at,
            gathered.torn,
            [len(data) for data in also],
            list(gathered.head),
            b"".join((*also, gathered.records)),
        )

    def walk_ahead(self) -> None:
        """Walk the next chunk of the walk asked for last, while the network carries the chunk before it."""
        if self._walks:
            walk = next(reversed(self._walks.values()))
            if walk.ahead is None:
                walk.ahead = self._kernel.walk(walk.plan, walk.heads, walk.state)

    def end(self, session: bytes) -> None:
        """Forget a session's unfinished walks and its freeze, unload its programs."""
        with contextlib.suppress(FreezeError):
            self._freezer.thaw(session)
        self._injections.end(session)
        if self._sealer:
            self._sealer.end(session)
        for number in [number for number, walk in self._walks.items() if walk.session == session]:
            del self._walks[number]


_remembered = lru_cache(64)(decode)


def _understood(data: bytes) -> Message:
    """A message, as `decode` has it. Walks come again, listing after listing, and their plans take the most time."""
    if data[:1] == _WALK and len(data) <= REMEMBERED_MAX:
        return _remembered(data)
    return decode(data)


def _is_read(value: object) -> bool:
    return (
        type(value) is list
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < 1 << 64
        and 0 < value[1] <= READ_MAX
    )


_NO_SEALER = "this agent encrypts by itself: its kernel does only if it is started with `agent.pyz serve --kernel-key`"
_PERMITTED_LATER = (
    "its kernel has no key for this IDS, which was permitted after the agent was started: restart the agent"
)
_NO_DIRECT_MAP = (
    "this kernel does not say where its direct map is (built without KALLSYMS_ALL), so physical memory and page tables "
    "cannot be read"
)
