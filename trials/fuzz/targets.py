"""The fuzz targets. A target takes bytes, and raises only exceptions that callers of the code do not expect."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from struct import Struct, pack
from typing import Any

from guest_agent.agent import Agent
from guest_agent.kernel import Gathered
from trials.fuzz import ram
from vmishim import attestation
from vmishim.attestation.errors import AttestationError
from vmishim.attestation.report import Report
from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.guests import packed
from vmishim.guests.agent import AgentGuest
from vmishim.guests.ramfile import BANNER, Ram, RamFile
from vmishim.inspection import objects
from vmishim.kernel import btf as types
from vmishim.kernel.btf import Btf
from vmishim.kernel.kallsyms import DIGITS
from vmishim.kernel.kallsyms import decode as decode_symbols
from vmishim.kernel.offsets import Offsets
from vmishim.libvmi import Libvmi, config
from vmishim.libvmi.profiles import JsonProfile, SystemMap
from vmishim.memory import elf, pagetable
from vmishim.wire import messages as wire
from vmishim.wire.attestation import REPORT_SIZE
from vmishim.wire.keys import generate
from vmishim.wire.noise import HandshakeState
from vmishim.wire.plan import Load, Plan, PlanError, Step, Take, Text
from vmishim.wire.session import WELCOME, Initiator, Session
from vmishim.wire.sessions import Sessions

WORD = Struct("<Q")
BASE = 0xFFFF_8880_0000_0000
MOST = 60
"""How many entries of a list to look at."""


@dataclass(frozen=True)
class Target:
    """A function of bytes, and seed inputs that reach deep into it."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]] = list


# ---- the wire --------------------------------------------------------------------------------------------------------

_PLAN = Plan(BASE, Step.RING, (Load(1, 0, 8), Take(1, 16, 4), Text(0, 64, 16)), link=8)
_MESSAGES: list[wire.Message] = [
    wire.Hello("1", ["init_task"], ["task_struct comm"]),
    wire.Walk(_PLAN, [[BASE, 8]]),
    wire.Walk(Plan(0, Step.SELF, (Take(0, 0, 8),), stride=0), [], WORD.pack(BASE)),
    wire.More(1),
    wire.Read(0, BASE, 64),
    wire.Lookup(0x1000, BASE),
    wire.Pointees(["task_struct 8"]),
    wire.Symbols(["init_task"]),
    wire.Chunk(0, False, 0, 0, 0, 0, 0, [1], [BASE, BASE], b"x"),
    wire.Welcome({"release": "6.1.0"}),
    wire.Failure("plan", "no"),
]


def _messages(data: bytes) -> None:
    with suppress(LinkError, PlanError):
        message = wire.decode(data)
        assert wire.decode(wire.encode(message)) == message


def _encoded() -> list[bytes]:
    return [wire.encode(message) for message in _MESSAGES]


@dataclass
class _Ends:
    """Sessions whose keys the fuzzer does not know."""

    hello: bytes = b""
    request: bytes = b""
    reply: bytes = b""
    served: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        host, agent = generate(), generate()
        self.sessions = Sessions(agent, {host.public})
        initiator = Initiator(host, agent.public)
        self.hello = initiator.hello()
        self.host: Session = initiator.finish(self.sessions.answer(self.hello, self.serve))
        self.host.open(self.sessions.answer(self.host.seal(b"first"), self.serve))
        self.request = self.host.seal(b"second")
        self.served.clear()

    def serve(self, session: bytes, message: bytes) -> bytes:
        self.served.append(message)
        return message


_ends = cache(_Ends)


def _session(data: bytes) -> None:
    ends = _ends()
    if data in (ends.hello, ends.request):
        return
    answer = ends.sessions.answer(data, ends.serve)
    assert not ends.served
    assert answer[1] != WELCOME
    with suppress(LinkError):
        ends.host.open(data)
        raise AssertionError("a forged reply was accepted")


def _noise(data: bytes) -> None:
    ours, theirs = generate(), generate()
    initiator = HandshakeState(b"fuzz", ours, theirs.public)
    initiator.write()
    for end in (initiator, HandshakeState(b"fuzz", theirs)):
        with suppress(LinkError):
            end.read(data)
            raise AssertionError("a forged handshake was accepted")


# ---- an agent that lies ----------------------------------------------------------------------------------------------


class _Liar:
    """Makes replies of the right kind from the input's bytes; raises LinkError when the input is used up."""

    def __init__(self, data: bytes) -> None:
        self._bytes = data
        self._at = 0
        self._plan = _PLAN

    def _take(self, count: int) -> bytes:
        part = self._bytes[self._at : self._at + count]
        self._at += count
        if not part:
            raise LinkError("the fuzzed agent has no bytes left to answer with")
        return part

    def _number(self) -> int:
        kind = self._take(1)[0]
        if kind < 128:
            return BASE + kind * 0x100
        return int.from_bytes(self._take(8), "little") if kind < 192 else 2**64 - 192 + kind % 64

    def _memory(self, count: int) -> bytes:
        words = [WORD.pack(self._number()) for _ in range(min(count // 8 + 1, 16))]
        return b"".join(islice(cycle(words), count // 8 + 1))[:count]

    def exchange(self, request: bytes) -> bytes:
        return wire.encode(self._reply(wire.decode(request)))

    def close(self) -> None:
        pass

    def _reply(self, request: wire.Message) -> wire.Message:
        match request:
            case wire.Hello(_, symbols, members):
                facts: dict[str, Any] = {"release": "6.1.0", "hostname": "lab", "version": "1", "boot_id": "1"}
                facts |= {"page_offset": BASE, "kaslr_offset": 0, "memory_size": 1 << 30, "vcpus": 1, "levels": 4}
                facts["symbols"] = [BASE + number * 0x400 for number, _ in enumerate(symbols)]
                facts["members"] = [[8 * number, 8 if " " in name else 1024] for number, name in enumerate(members)]
                return wire.Welcome(facts)
            case wire.Symbols(names):
                return wire.Answer([self._number() for _ in names])
            case wire.Members(names) | wire.Pointees(names):
                return wire.Answer([[self._number() % 2048, self._number() % 2048] for _ in names])
            case wire.Names(addresses):
                return wire.Answer([self._take(4).decode("latin-1") for _ in addresses])
            case wire.Lookup():
                return wire.Answer([self._number(), 4096, [self._number()]])
            case wire.Read(_, _, 4):
                return wire.Memory(pack("<I", self._number() % 64))  # a table of millions would be too slow to fuzz
            case wire.Read(_, _, count):
                return wire.Memory(self._memory(count))
            case wire.Walk():
                self._plan = request.plan
                return self._chunk([count for _, count in request.reads])
        return self._chunk([])

    def _chunk(self, reads: list[int]) -> wire.Chunk:
        size = self._plan.record.size
        few, told = self._take(1)[0], self._take(1)[0]
        records = b"".join(
            pack("<QQII", self._number(), told & 4, number % 3, (told & 3) * (number % 5 == 4))
            + self._memory(size - 24)
            for number in range(few % 16)
        )
        bulk = b"".join(self._memory(count) for count in reads) + records
        head = [self._number(), self._number()]
        return wire.Chunk(told >> 7, bool(told & 64), told & 8, BASE, told & 16, BASE, 0, reads, head, bulk)


def _readahead(data: bytes) -> None:
    liar: Any = _Liar(data)
    vmi = Libvmi.over(AgentGuest("fuzz", liar))
    for read in (objects.tasks, objects.tasks, objects.modules, objects.sockets, objects.without_file):
        with suppress(LibvmiError):
            for _ in islice(read(vmi), MOST):
                pass
    with suppress(LibvmiError):
        at = vmi.translate_ksym2v("modules")
        for _ in range(MOST):
            at = vmi.read_addr_va(at, 0)
            assert 0 <= at < 2**64
    vmi.destroy()


# ---- what is read of a guest's memory --------------------------------------------------------------------------------


def _btf(data: bytes) -> None:
    with suppress(ValueError):
        types.length(data)
    try:
        blob = Btf(data)
    except ValueError:
        return
    for name in islice(blob.structs(), MOST):
        with suppress(KeyError):
            for member in islice(blob.layout(name), MOST):
                blob.member(name, f"{member}[1]")
        with suppress(KeyError):
            blob.size(name)
            for offset in (0, 8, 2**31):
                blob.pointee(name, offset)


def _blob() -> list[bytes]:
    """A structure of an integer, and of a pointer to itself."""
    words = Struct("<III")
    parts = [
        words.pack(1, 4 << 24 | 2, 16) + words.pack(3, 2, 0) + words.pack(0, 3, 64),
        words.pack(0, 1 << 24, 4) + pack("<I", 32),
        words.pack(0, 2 << 24, 1),
        words.pack(0, 3 << 24, 0) + words.pack(1, 2, 4),
        words.pack(1, 8 << 24, 4),
    ]
    body, strings = b"".join(parts), b"\0a\0b\0"
    return [pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings)) + body + strings]


@cache
def _tokens() -> bytes:
    """A token table and its index, as the kernel's build makes them."""
    tokens = [bytes([code]) if bytes([code]).isalnum() else b"x%d" % (code % 7) for code in range(256)]
    starts = [sum(len(token) + 1 for token in tokens[:code]) for code in range(256)]
    table = b"".join(token + b"\0" for token in tokens)
    return table + bytes(-len(table) % 8) + pack("<256H", *starts)


def _kallsyms(data: bytes) -> None:
    half = len(data) // 2 & -8
    memory = data[:half] + _tokens() + data[half:]
    with suppress(ValueError):
        decode_symbols(memory, memory.find(DIGITS, half))


def _symbols() -> list[bytes]:
    """300 symbols: first their number and names, then two markers, the tokens, the offsets and the base."""
    names = b"\x03Tab" * 300
    front = pack("<II", 300, 0) + names + bytes(-len(names) % 8) + pack("<II", 0, 1024)
    back = pack("<300i", *range(300)) + WORD.pack(0xFFFF_FFFF_8100_0000)
    return [front.rjust(max(len(front), len(back)), b"\0") + back.ljust(max(len(front), len(back)), b"\0")]


def _ramfile(data: bytes) -> None:
    """What a process has in its memory hides no kernel."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(ram.guest(_blob()[0], data * (ram.IMAGE // max(len(data), 1))))
        file.flush()
        guest = RamFile("fuzz", file.name)
        assert guest.profile.release == "6.12.0-small"
        assert guest.profile.btf.layout("a")
        guest.close()


def _kernel(data: bytes) -> None:
    """Nothing that is where the kernel has its page tables, symbols and types is more than an error."""
    memory = bytearray(ram.guest(_blob()[0], low=(0, ram.SIZE - ram.BLOCK, ram.IMAGE)[len(data) % 3]))
    for number, (place, value) in enumerate(Struct("<IQ").iter_unpack(data[: len(data) // 12 * 12])):
        at = ram.IMAGE + (place if number % 2 else place % 0x10_8000) % (ram.SIZE - ram.IMAGE - 8)
        memory[at : at + 8] = WORD.pack(value)
    with tempfile.NamedTemporaryFile() as file, suppress(LibvmiError, KeyError):
        file.write(memory)
        file.flush()
        guest = RamFile("fuzz", file.name)
        guest.profile.btf.layout("a")
        guest.close()


def _pagetable(data: bytes) -> None:
    def read(address: int, count: int) -> bytes:
        if address + count > len(data):
            raise FaultError(address)
        return data[address : address + count]

    with suppress(ValueError):
        for page in islice(pagetable.pages(read, 0), MOST):
            with suppress(FaultError):
                pagetable.walk(read, 0, page.address)


def _config(data: bytes) -> None:
    with suppress(LibvmiError):
        config.parse(data.decode("utf-8", "surrogateescape"), "fuzz")


def _file(parse: Callable[[str], Any]) -> Callable[[bytes], None]:
    """A target that parses a file."""

    def run(data: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file, suppress(LibvmiError, KeyError):
            file.write(data)
            file.flush()
            parse(file.name)

    return run


def _profile(path: str) -> None:
    profile = JsonProfile(path)
    for name in ("a", "b"):
        for ask in (profile.symbol, profile.size, partial(profile.member, "a"), partial(profile.member, "b")):
            with suppress(KeyError, LibvmiError):
                ask(name)


def _profiles() -> list[bytes]:
    """One of Volatility 3, one of Rekall."""
    fields = {"b": {"offset": 8, "type": {"kind": "base", "name": "int"}}}
    embedded = {"c": {"offset": 0, "anonymous": True, "type": {"kind": "struct", "name": "b"}}}
    types = {"a": {"size": 16, "fields": embedded}, "b": {"size": 16, "fields": fields}}
    isf = {"symbols": {"a": {"address": BASE}}, "base_types": {"int": {"size": 4}}, "user_types": types}
    rekall = {"$CONSTANTS": {"a": 1}, "$STRUCTS": {"a": [16, {"b": [8, ["int"]]}]}}
    return [json.dumps(each).encode() for each in (isf, rekall)]


def _elf(data: bytes) -> None:
    def read(address: int, count: int) -> bytes:
        if not BASE <= address <= address + count <= BASE + len(data):
            raise FaultError(address)
        return data[address - BASE : address - BASE + count]

    with suppress(FaultError):
        for _ in islice(elf.exports(read, BASE), MOST):
            pass


def _image() -> list[bytes]:
    """An object that exports one symbol."""
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    programs = pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 512, 512, 0) + pack("<IIQQQQQQ", 2, 4, 176, 176, 0, 80, 80, 0)
    dynamic = b"".join(pack("<QQ", *tag) for tag in ((4, 256), (5, 272), (6, 280), (10, 8), (0, 0)))
    tables = pack("<IIII", 1, 2, 0, 0) + b"\0name\0\0\0" + bytes(24) + pack("<IBBHQQ", 1, 18, 0, 7, 0x40, 8)
    return [header + programs + dynamic + tables]


def _dumps(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file, suppress(LibvmiError):
        file.write(data)
        file.flush()
        with closing(Ram(file.name)) as memory:
            assert all(0 <= segment.start < segment.end <= packed.HIGHEST for segment in memory.segments)
            for _ in memory.blocks(BANNER):
                pass
            for start, _, _ in islice(memory.segments, 16):
                with suppress(FaultError):
                    memory.read(start, 5000)


def _dumped() -> list[bytes]:
    """A core of one page, a compressed dump of two, the same flattened, an image of LiME and one of AVML."""
    import cramjam

    page = bytes(range(256)) * 16
    core = b"\x7fELF\2\1\1".ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    core += pack("<IIQQQQQQ", 1, 7, 120, 0, 0x1000, 4096, 4096, 0) + page
    header = b"KDUMP   " + pack("<I", 6) + bytes(412) + pack("<IIIII", 0, 4096, 1, 2, 0)
    blocks = [header, bytes(96) + pack("<Q", 2), b"\x03", b"\x03", pack("<QIIQ", 20480, 4096, 0, 0) * 2]
    dump = b"".join(block.ljust(4096, b"\0") for block in blocks) + page
    flat = b"makedumpfile".ljust(16, b"\0") + pack(">qq", 1, 1)
    flat = flat.ljust(4096, b"\0") + pack(">qq", 0, len(dump)) + dump + pack(">qq", -1, -1)
    lime = pack("<4sIQQ8x", b"EMiL", 1, 0x1000, 0x1FFF) + page
    frames = bytes(cramjam.snappy.compress(page))
    avml = pack("<4sIQQ8x", b"AVML", 2, 0x1000, 0x1FFF) + frames + pack("<Q", len(frames))
    return [core, dump, flat, lime, avml]


# ---- what a machine says about itself --------------------------------------------------------------------------------


def _attestation(data: bytes) -> None:
    with suppress(AttestationError):
        attestation.verify(data)
        raise AssertionError("a report without AMD's signature was accepted")
    with suppress(AttestationError):
        Report.parse(data[:REPORT_SIZE].ljust(REPORT_SIZE, b"\0"))


def _reports() -> list[bytes]:
    """A real report followed by its VCEK, in the table format that a host provides."""
    folder = Path(__file__).parents[2] / "tests" / "unit" / "data" / "attestation"
    report, vcek = (folder.joinpath(f"milan-v2.{end}").read_bytes() for end in ("bin", "vcek.der"))
    kind = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
    return [report + kind + pack("<II", 48, len(vcek)) + bytes(24) + vcek]


# ---- the agent -------------------------------------------------------------------------------------------------------


class _Kernel:
    """A kernel whose memory is all zeros: its content does not matter to the agent."""

    page_offset = BASE

    def read(self, address: int, count: int, dtb: int = 0) -> bytes:
        assert 0 <= address < 2**64
        assert 0 <= count <= wire.BULK_MAX
        WORD.pack(dtb)
        return bytes(count)

    def walk(self, plan: Plan, heads: bytes = b"", state: bytes | None = None) -> Gathered:
        assert len(heads) == (0 if plan.stride else 8 * plan.heads)
        return Gathered(bytes(plan.record.size), None if state else b"more", False, 0, 0, 0, 0, 0, (0, 0))

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        WORD.pack(dtb), WORD.pack(address)
        return 0, 0, []

    def symbol(self, name: str) -> int | None:
        return len(name.encode(errors="replace"))

    def symbol_at(self, address: int) -> str | None:
        return f"{address:x}"

    def member(self, name: str) -> list[int] | None:
        with suppress(KeyError):
            return list(_types().member("a", name))
        return None

    def pointee(self, question: str) -> list[int] | None:
        return None

    def changed(self) -> list[str]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return None


@cache
def _types() -> Btf:
    return Btf(_blob()[0])


@cache
def _answering() -> Agent:
    kernel: Any = _Kernel()
    return Agent(kernel)


def _agent(data: bytes) -> None:
    agent = _answering()
    reply = wire.decode(agent.answer(b"12345678", data))
    assert isinstance(reply, wire.Message)
    agent.walk_ahead()
    agent.answer(b"12345678", wire.encode(wire.More(1)))


def _plan(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    with suppress(PlanError):
        plan = Plan.from_json(value)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.record.size >= 24


def _plans() -> list[bytes]:
    return [json.dumps(_PLAN.to_json()).encode()]


def _requests() -> Iterator[bytes]:
    return (wire.encode(message) for message in _MESSAGES[:8])


TARGETS = {
    "messages": Target(_messages, _encoded),
    "session": Target(_session, lambda: [_ends().hello, _ends().request, bytes([1, 4]) + bytes(60)]),
    "noise": Target(_noise, lambda: [bytes(48), bytes(96)]),
    "readahead": Target(_readahead, lambda: [bytes(range(256)) * 8, bytes(4096)]),
    "btf": Target(_btf, _blob),
    "kallsyms": Target(_kallsyms, _symbols),
    "elf": Target(_elf, _image),
    "dumps": Target(_dumps, _dumped),
    "ramfile": Target(_ramfile, lambda: [ram.BANNER + bytes(6) + ram.tokens()]),
    "kernel": Target(_kernel, lambda: [pack("<IQ", 0x4000, 300)]),
    "pagetable": Target(_pagetable, lambda: [pack("<512Q", *[0x1003] * 512) + pack("<512Q", *[0xE3] * 512)]),
    "config": Target(_config, lambda: [b'domain { ostype = "Linux"; linux_tasks = 0x10; }']),
    "profiles": Target(_file(_profile), _profiles),
    "maps": Target(_file(SystemMap), lambda: [b"ffffffff81000000 T _text\n"]),
    "offsets": Target(
        _file(lambda path: Offsets.read(Path(path))), lambda: [b'{"release": "6.1", "members": {"a b": [0, 8]}}']
    ),
    "attestation": Target(_attestation, _reports),
    "agent": Target(_agent, lambda: list(_requests())),
    "plan": Target(_plan, _plans),
}
