"""The requests and replies of IDS and agent, as values and as bytes.

A message is ``kind (u8), length of the JSON part (u32 little-endian), JSON array of its fields, bulk bytes``. JSON
carries names and small numbers, where it costs nothing; memory and long lists of addresses are bulk bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from vmishim.errors import LinkError
from vmishim.foreign import printable
from vmishim.wire.plan import Plan, PlanError

_HEAD = struct.Struct("<BI")
# `json.dumps` makes an encoder for each call with separators, `json.loads` guesses the encoding of bytes.
_to_json, _from_json = json.JSONEncoder(separators=(",", ":")).encode, json.JSONDecoder().decode
BULK_MAX = 1 << 20
"""Maximum bytes of memory in one reply; a longer read takes several."""
JSON_MAX = 1 << 20
"""Maximum bytes of a message's JSON part; thousands of names need a tenth. Parsed, it takes up to 30 times as much."""


@dataclass(frozen=True, slots=True)
class Message:
    """Any message. If a kind has ``bulk``, it is the last field."""

    KIND: ClassVar[int]


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Open the conversation, and ask the first questions. Answered by `Welcome`.

    :ivar version: the IDS's version, for the agent's log
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
    """The symbols that start exactly at addresses. Answered by `Answer`: a list of names, null where none starts."""

    KIND = 3
    addresses: list[int]


@dataclass(frozen=True, slots=True)
class Members(Message):
    """Where structure members are: ``"task_struct comm"``, ``"file f_path.dentry"``; a structure alone asks
    for its size. Answered by `Answer`: for each ``[offset, size]`` in bytes, or null if it does not exist."""

    KIND = 4
    names: list[str]


@dataclass(frozen=True, slots=True)
class Read(Message):
    """Read memory. Answered by `Memory`: ``count`` bytes, or fewer if the byte after them cannot be read."""

    KIND = 5
    space: int
    address: int
    count: int


@dataclass(frozen=True, slots=True)
class Lookup(Message):
    """Translate an address by the page tables of ``dtb``. Answered by `Answer`: ``[physical, page size, entries]``;
    a page size of 0 means not mapped. The entries are those on the path, from the root down."""

    KIND = 6
    dtb: int
    address: int


@dataclass(frozen=True, slots=True)
class Walk(Message):
    """Begin a walk. Answered by `Chunk`.

    :ivar reads: pairs of address and count: kernel memory to return too, whatever the walk finds
    :ivar bulk: the heads as u64 when the plan lists them, else empty
    """

    KIND = 7
    plan: Plan
    reads: list[Any] = field(default_factory=list)
    bulk: bytes = b""


@dataclass(frozen=True, slots=True)
class More(Message):
    """The next chunk of an unfinished walk. Answered by `Chunk`."""

    KIND = 8
    walk: int


@dataclass(frozen=True, slots=True)
class Pointees(Message):
    """The types that pointers in structures point to: ``"task_struct 2272"`` is a structure and an offset; ``"#77 16"``
    has the number that an earlier answer gave a structure. Answered by `Answer`: for each ``[number, bytes]`` of the
    type pointed to (8 bytes: a pointer to pointers; 1: a string; 0: void), or null where no pointer is known."""

    KIND = 9
    questions: list[str]


@dataclass(frozen=True, slots=True)
class Inject(Message):
    """Load a program for this session: an object from clang, or a bytecode bundle (docs/injection.md). Answered by
    `Answer`: ``[number]``, or by `Rejected`.

    :ivar name: its name in `Injected`
    """

    KIND = 10
    name: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Run(Message):
    """Run an injected program; ``bulk`` is its input. Answered by `Memory`: the used part of its output map."""

    KIND = 11
    program: int
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Injected(Message):
    """List the injected programs. Answered by `Answer`: for each ``[number, name, format, bytes, bytes of maps, runs,
    whether this session's own]``."""

    KIND = 12


@dataclass(frozen=True, slots=True)
class Eject(Message):
    """Unload an injected program. Answered by `Answer`: an empty list."""

    KIND = 13
    program: int


@dataclass(frozen=True, slots=True)
class Attest(Message):
    """The hardware's attestation report for the agent's key. Answered by `Evidence`."""

    KIND = 14


@dataclass(frozen=True, slots=True)
class Envelope(Message):
    """The key with which the guest's kernel encrypts for an IDS (`vmishim.wire.sealed`). Answered by `Answer`: the
    envelope that only this IDS can open, hexadecimal; or by `Failure` if there is none.

    :ivar public: the IDS's public key, hexadecimal
    """

    KIND = 15
    public: str


@dataclass(frozen=True, slots=True)
class Sealing(Message):
    """A request whose answer the guest's kernel seals. Answered by `Sealed`.

    :ivar key: the key's name, from `vmishim.wire.sealed.name_of`
    :ivar tags: MACs that show the kernel that an IDS asks, hexadecimal: of a `Walk`'s reads, then of the request
    :ivar bulk: the challenge, then a `Read`, `Lookup`, `Walk` or `More`
    """

    KIND = 16
    key: str
    tags: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Freeze(Message):
    """Stop the monitored system for this session, or refuse. Answered by `Answer`, an empty list, once it stands still.

    It resumes by itself when the session has sent no request for ``milliseconds``. After that the agent refuses the
    session's requests until `Thaw` or a new `Freeze`: every reply within a freeze shows the same instant.
    """

    KIND = 17
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Thaw(Message):
    """End this session's freeze of the monitored system. Answered by `Answer`: an empty list."""

    KIND = 18


# ---- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Facts about the agent and its kernel.

    ``facts``: ``release``, ``version`` (of the agent), ``hostname``, ``boot_id``, ``page_offset``, ``kaslr_offset``,
    ``memory_size``, ``vcpus``, ``levels``: see `vmishim.kernel.profile.Profile`. ``kernel_encryption``: whether
    the kernel encrypts its answers, which requires `Sealing`. ``self_check``: "ok", or what of its eBPF programs and
    maps the agent found changed by another process since its start (older agents don't say). ``symbols`` and
    ``members`` answer the lists of `Hello`, in their order.
    """

    KIND = 64
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """A list; the request says of what."""

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

    :ivar walk: the number to use in `More`; 0 if this chunk is the last
    :ivar truncated: the plan's ``max_nodes`` ended the walk
    :ivar faulted: chains that ended in unreadable memory, ``fault_at`` the first such address
    :ivar cycles: chains that loop without meeting their head, ``cycle_at`` the first such link
    :ivar torn: links that changed during the walk
    :ivar reads: bytes returned for each of the `Walk`'s reads, up to the first unreadable byte
    :ivar head: the two pointers of the last head visited, for a ring
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
    """A program was not loaded. ``text`` says why, in one line; ``bulk`` the log of libbpf and verifier, or its end."""

    KIND = 68
    text: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Evidence(Message):
    """An AMD SEV-SNP report for the agent's key, see `vmishim.wire.attestation`.

    :ivar text: the report's source; if there is no report, why
    :ivar bulk: the report, then the table of certificates that came with it, if any; empty if there is no report
    """

    KIND = 69
    text: str
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Sealed(Message):
    """What the guest's kernel sealed.

    :ivar walk: the number to use in `More`, if the sealed state says that there is more
    :ivar bulk: a ``struct sealed`` (``bpf/plan.h``) for each of a `Walk`'s reads, then one for the request itself
    """

    KIND = 70
    walk: int
    bulk: bytes


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The request cannot be answered, and nothing was done. ``code`` is one word, ``text`` says what failed and why."""

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
# The checks of each kind's fields, resolved once: annotations are strings here, and every read decodes a message.
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
    """A message as bytes."""
    kind = type(message)
    values = [getattr(message, name) for name, _ in _FIELDS[kind]]
    plan = values.pop(0) if kind is Walk else None
    text = _to_json(values)
    if plan is not None:
        text = f"[{plan.text},{text[1:]}"
    data = text.encode()
    return b"".join((_HEAD.pack(kind.KIND, len(data)), data, message.bulk if _HAS_BULK[kind] else b""))  # type: ignore[attr-defined]


def decode(data: bytes) -> Message:
    """Parse a message.

    :raises LinkError: the bytes are not a valid message: unknown kind, wrong length, or a field of the wrong type
    :raises PlanError: the message is a `Walk` whose plan is out of bounds
    """
    try:
        number, length = _HEAD.unpack_from(data)
        kind = _KINDS[number]
        end = _HEAD.size + length
        if length > JSON_MAX:
            raise ValueError(f"its JSON part has {length} bytes, more than the limit of {JSON_MAX}")
        if end > len(data):
            raise ValueError("its JSON part is longer than the message")
        values = _from_json(str(data[_HEAD.size : end], "utf-8"))
        checks = _FIELDS[kind]
        if type(values) is not list or len(values) != len(checks):
            raise ValueError(f"{kind.__name__} must have {len(checks)} fields")
        for value, (name, check) in zip(values, checks, strict=True):
            if not check(value):
                raise ValueError(f"{kind.__name__}.{name} has the wrong type or is out of range")
        if kind is Walk:
            values[0] = Plan.from_json(values[0])
        if _HAS_BULK[kind]:
            values.append(data[end:])
        elif end != len(data):
            raise ValueError(f"{kind.__name__} must not have bulk bytes")
        return kind(*values)
    except PlanError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise LinkError(f"malformed message: {error}") from None


M = TypeVar("M", bound=Message)


class AgentError(LinkError):
    """The agent refused a request with a `Failure`, whose ``code`` this carries."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"the agent refused ({printable(failure.code)}): {printable(failure.text)}")
        self.code = failure.code


def expect(data: bytes, kind: type[M]) -> M:
    """Decode a reply that must be of ``kind``.

    :raises AgentError: it is a `Failure`; the error has its text
    :raises LinkError: it is another kind
    """
    return expected(decode(data), kind)


def expected(message: Message, kind: type[M]) -> M:
    """Check that a reply is of ``kind``; raises as `expect` does."""
    if isinstance(message, kind):
        return message
    if isinstance(message, Failure):
        raise AgentError(message)
    raise LinkError(f"the agent answered {type(message).__name__}, not {kind.__name__}")
