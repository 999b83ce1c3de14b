"""What IDS and agent say to each other: requests and replies as values, and their bytes.

A message is ``kind (u8), length of the JSON part (u32 little-endian), JSON array of its fields, bulk bytes``. JSON
carries names and small numbers, where it costs nothing; addresses by the thousand and memory travel as bulk bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from vmishim.errors import LinkError
from vmishim.wire.plan import Plan, PlanError

_HEAD = struct.Struct("<BI")
BULK_MAX = 1 << 20
"""Bytes of memory one reply carries at most; a longer read is several."""
JSON_MAX = 1 << 20
"""Bytes of a message's JSON part: names by the thousand need a tenth. As objects it takes up to 30 times as much."""


@dataclass(frozen=True, slots=True)
class Message:
    """Any message. ``bulk`` is the last field where a kind has one."""

    KIND: ClassVar[int]


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Who is there, and the answers to the first questions. Answered by `Welcome`.

    :ivar version: of the asking side, for the agent's log
    :ivar symbols: as in `Symbols`
    :ivar members: as in `Members`
    """

    KIND = 1
    version: str
    symbols: list[str]
    members: list[str]


@dataclass(frozen=True, slots=True)
class Symbols(Message):
    """Addresses of kernel symbols by name. Answered by `Answer`: a list of addresses, null for an unknown name."""

    KIND = 2
    names: list[str]


@dataclass(frozen=True, slots=True)
class Names(Message):
    """Symbols that start exactly at addresses. Answered by `Answer`: a list of names, null where none starts."""

    KIND = 3
    addresses: list[int]


@dataclass(frozen=True, slots=True)
class Members(Message):
    """Where members are: ``"task_struct comm"``, ``"file f_path.dentry"``; a structure alone asks for its size.
    Answered by `Answer`: for each ``[offset, size]`` in bytes, or null where there is no such structure or member."""

    KIND = 4
    names: list[str]


@dataclass(frozen=True, slots=True)
class Read(Message):
    """Memory. Answered by `Memory`: ``count`` bytes, or fewer when the byte after them cannot be read."""

    KIND = 5
    space: int
    address: int
    count: int


@dataclass(frozen=True, slots=True)
class Lookup(Message):
    """Translate an address by the page tables of ``dtb``. Answered by `Answer`: ``[physical, page size, entries]``;
    a page size of 0 says it is not mapped. Entries are those met, from the root down."""

    KIND = 6
    dtb: int
    address: int


@dataclass(frozen=True, slots=True)
class Walk(Message):
    """Begin a walk. Answered by `Chunk`.

    :ivar reads: pairs of address and count: kernel memory to bring along, whatever the walk finds
    :ivar bulk: the heads as u64 when the plan lists them, else empty
    """

    KIND = 7
    plan: Plan
    reads: list[Any] = field(default_factory=list)
    bulk: bytes = b""


@dataclass(frozen=True, slots=True)
class More(Message):
    """The next chunk of a walk that said there is more. Answered by `Chunk`."""

    KIND = 8
    walk: int


@dataclass(frozen=True, slots=True)
class Pointees(Message):
    """What words of structures point to: ``"task_struct 2272"``, structure and offset; a structure that an earlier
    answer named by its number is ``"#77"``. Answered by `Answer`: for each ``[number, bytes]`` of the type pointed to
    (8 bytes: a pointer to pointers; 1: a string; 0: void), or null where no pointer is known."""

    KIND = 9
    questions: list[str]


@dataclass(frozen=True, slots=True)
class Inject(Message):
    """Load a program for this session: an object of clang's, or a bundle of bytecode (docs/injection.md). Answered by
    `Answer`: ``[number]``, or by `Rejected`.

    :ivar name: what `Injected` will call it
    """

    KIND = 10
    name: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Run(Message):
    """Run an injected program; ``bulk`` is its input. Answered by `Memory`: its output map up to what was used."""

    KIND = 11
    program: int
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Injected(Message):
    """The programs there are. Answered by `Answer`: for each ``[number, name, format, bytes, bytes of maps, runs,
    whether this session's own]``."""

    KIND = 12


@dataclass(frozen=True, slots=True)
class Eject(Message):
    """Unload an injected program. Answered by `Answer`: an empty list."""

    KIND = 13
    program: int


@dataclass(frozen=True, slots=True)
class Attest(Message):
    """What the machine's own hardware says of the agent's key. Answered by `Evidence`."""

    KIND = 14


@dataclass(frozen=True, slots=True)
class Envelope(Message):
    """The key by which the guest's kernel encrypts for an IDS (`vmishim.wire.sealed`). Answered by `Answer`: the
    envelope that only this IDS can open, hexadecimal; or by `Failure` where there is none.

    :ivar public: the IDS's public key, hexadecimal
    """

    KIND = 15
    public: str


@dataclass(frozen=True, slots=True)
class Sealing(Message):
    """A request whose answer the guest's kernel is to seal. Answered by `Sealed`.

    :ivar key: the key's name, `vmishim.wire.sealed.name_of`
    :ivar tags: by which the kernel knows the questions for an IDS's, hexadecimal: of a `Walk`'s reads, then of the rest
    :ivar bulk: the challenge, then a `Read`, `Lookup`, `Walk` or `More`
    """

    KIND = 16
    key: str
    tags: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Freeze(Message):
    """Stop the monitored system for this session, or refuse. Answered by `Answer`, an empty list, once it stands still.

    It goes on by itself when the session has asked nothing for ``milliseconds``. From then on the agent refuses what
    the session asks until it says `Thaw`, or freezes anew: no reply within a freeze is of another instant.
    """

    KIND = 17
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Thaw(Message):
    """Let the monitored system go on, as far as this session is concerned. Answered by `Answer`: an empty list."""

    KIND = 18


# ---- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The agent and its kernel.

    ``facts``: ``release``, ``version`` (of the agent), ``hostname``, ``boot_id``, ``page_offset``, ``kaslr_offset``,
    ``memory_size``, ``vcpus``, ``levels``: see `vmishim.kernel.profile.Profile`. ``kernel_encryption``: whether the
    kernel encrypts what is read of it, so that it is asked by `Sealing`. ``symbols`` and ``members`` answer the lists
    of `Hello`, in their order.
    """

    KIND = 64
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """A list, as the request says."""

    KIND = 65
    values: list[Any]


@dataclass(frozen=True, slots=True)
class Memory(Message):
    """Bytes of guest memory."""

    KIND = 66
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """Records of a walk.

    :ivar walk: ask `More` of this number; 0 when this chunk is the last
    :ivar truncated: the plan's ``max_nodes`` ended it
    :ivar faulted: chains that ended in unreadable memory, ``fault_at`` the first such address
    :ivar cycles: chains that loop without meeting their head, ``cycle_at`` the first such link
    :ivar torn: links that changed under the walk
    :ivar reads: bytes that came of each of the `Walk`'s reads, up to the first that can't be read
    :ivar head: what the last head visited held (two pointers), for a ring
    :ivar bulk: the bytes of the reads, then whole records, see `Plan.records`
    """

    KIND = 67
    walk: int
    truncated: bool
    faulted: int
    fault_at: int
    cycles: int
    cycle_at: int
    torn: int
    reads: list[int]
    head: list[int]
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Rejected(Message):
    """A program was not loaded. ``text`` is why, in a line; ``bulk`` the log of libbpf and verifier, or its end."""

    KIND = 68
    text: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Evidence(Message):
    """A report of AMD SEV-SNP for the agent's key, see `vmishim.wire.attestation`.

    :ivar text: where it is from; where there is none, why
    :ivar bulk: the report, then the table of certificates that came with it, if any did; empty where there is none
    """

    KIND = 69
    text: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Sealed(Message):
    """What the guest's kernel sealed.

    :ivar walk: ask `More` of this number, if what is inside says that there is more
    :ivar bulk: a ``struct sealed`` (``bpf/plan.h``) for each of a `Walk`'s reads, then that of the request itself
    """

    KIND = 70
    walk: int
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The request cannot be answered; nothing was done. ``code`` is one word, ``text`` says what and why."""

    KIND = 127
    code: str
    text: str


_KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        *(Hello, Symbols, Names, Members, Read, Lookup, Walk, More, Pointees, Inject, Run, Injected, Eject, Attest),
        *(Envelope, Sealing, Freeze, Thaw),
        *(Welcome, Answer, Memory, Chunk, Rejected, Evidence, Sealed, Failure),
    )
}
# What each kind's fields must be, once: annotations are strings here, and decoding is on the path of every read.
_CHECKS: dict[str, Any] = {
    "int": lambda v: type(v) is int and 0 <= v < 1 << 64,
    "bool": lambda v: type(v) is bool,
    "str": lambda v: type(v) is str,
    "list[str]": lambda v: type(v) is list and all(type(i) is str for i in v),
    "list[int]": lambda v: type(v) is list and all(type(i) is int and 0 <= i < 1 << 64 for i in v),
    "list[Any]": lambda v: type(v) is list,
    "dict[str, Any]": lambda v: type(v) is dict,
    "Plan": lambda v: type(v) is list,
}
_FIELDS = {
    kind: [(part.name, _CHECKS[str(part.type)]) for part in fields(kind) if part.name != "bulk"]
    for kind in _KINDS.values()
}
_HAS_BULK = {kind: any(part.name == "bulk" for part in fields(kind)) for kind in _KINDS.values()}


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    kind = type(message)
    values = [getattr(message, name) for name, _ in _FIELDS[kind]]
    plan = values.pop(0) if kind is Walk else None
    text = json.dumps(values, separators=(",", ":"))
    if plan is not None:
        text = f"[{plan.text},{text[1:]}"
    data = text.encode()
    return b"".join((_HEAD.pack(kind.KIND, len(data)), data, message.bulk if _HAS_BULK[kind] else b""))  # type: ignore[attr-defined]


def decode(data: bytes) -> Message:
    """The message of these bytes.

    :raises LinkError: they are no message: an unknown kind, a wrong length, a field of another type. A `Walk` whose
    plan is out of bounds raises `PlanError`, which says so.
    """
    try:
        number, length = _HEAD.unpack_from(data)
        kind = _KINDS[number]
        end = _HEAD.size + length
        if length > JSON_MAX:
            raise ValueError(f"its JSON part has {length} bytes, at most {JSON_MAX} are taken")
        if end > len(data):
            raise ValueError("the JSON part is longer than the message")
        values = json.loads(data[_HEAD.size : end])
        checks = _FIELDS[kind]
        if type(values) is not list or len(values) != len(checks):
            raise ValueError(f"{kind.__name__} has {len(checks)} fields")
        for value, (name, check) in zip(values, checks, strict=True):
            if not check(value):
                raise ValueError(f"{kind.__name__}.{name} is not what it should be")
        if kind is Walk:
            values[0] = Plan.from_json(values[0])
        if _HAS_BULK[kind]:
            values.append(data[end:])
        elif end != len(data):
            raise ValueError(f"{kind.__name__} carries no bulk")
        return kind(*values)
    except PlanError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise LinkError(f"a message that makes no sense: {error}") from None


M = TypeVar("M", bound=Message)


class AgentError(LinkError):
    """The agent refused: its `Failure` is the reply. ``code`` is that one's."""

    def __init__(self, failure: Failure) -> None:
        # Its words reach a terminal: they must not drive it.
        code, text = (part if part.isprintable() else repr(part) for part in (failure.code, failure.text))
        super().__init__(f"the agent refused ({code}): {text}")
        self.code = failure.code


def expect(data: bytes, kind: type[M]) -> M:
    """Decode a reply that must be of ``kind``.

    :raises AgentError: it is a `Failure`, whose text is then the error's
    :raises LinkError: it is another kind
    """
    return expected(decode(data), kind)


def expected(message: Message, kind: type[M]) -> M:
    """A reply that must be of ``kind``; otherwise as `expect`."""
    if isinstance(message, kind):
        return message
    if isinstance(message, Failure):
        raise AgentError(message)
    raise LinkError(f"the agent answered {type(message).__name__} where {kind.__name__} was due")
