"""An agent that proved who it is, and lies: whatever it answers, the shim gives data or LibVMI's error, and soon."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from struct import Struct
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.pair import Pair
from vmishim import client
from vmishim.commands.inspection import SHAPES
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests.agent import STRATEGIES, AgentGuest, Strategy
from vmishim.inspection import objects, open_files
from vmishim.inspection.lists import Damage
from vmishim.libvmi import AccessContext, Libvmi, limits
from vmishim.libvmi.constants import TranslateMechanism
from vmishim.output import show
from vmishim.wire.messages import (
    BULK_MAX,
    JSON_MAX,
    Answer,
    Chunk,
    Failure,
    Hello,
    Lookup,
    Members,
    Memory,
    Message,
    More,
    Names,
    Pointees,
    Read,
    Symbols,
    Walk,
    Welcome,
    decode,
    encode,
)
from vmishim.wire.plan import Load, Plan, Step

REQUESTS_MAX = 50_000
"""Requests that one call may take, with the limits of `small`: more is a loop."""
GROWTH_MAX = 512 << 10
"""KiB of memory that all lies together may cost."""
WORD, HEAD = Struct("<Q"), Struct("<QQII")
NODE, NODES, END = 0x400, 40, 0x380
"""Bytes of a node, how many there are, and where in each one the words end a chain."""
BASE = 0xFFFF_8880_0000_0000
EDGES = [0, 1, 7, 4095, 2**31, 2**32 - 1, 2**47 - 1, 2**63 - 1, 2**63, *(2**64 - far for far in (1, 2, 8, 4095, 4096))]
ADDRESSES = [BASE, BASE + 8, BASE + NODE, BASE + END, 0xFFFF_FFFF_8100_0000, 0xFF00_0000_0000_0000, *EDGES]
TEXTS = ["", "init", "\x1b[2J\x1b]0;gotcha\x07", "a" * 5000, "\ud800", "\u202e", "\n\r\0", '"; rm -rf /', "😀"]
VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    2**64,
    2**300,
    float("inf"),
    float("nan"),
    "x",
    [],
    {},
    [[]] * 3,
    *TEXTS,
    *EDGES,
]


class Liar:
    """The agent's end. Without lies its kernel is a wheel of nodes, each word of which points to the same place of the
    next node: everything is a list that closes. A lie is another number, or another answer.

    :param lies: how likely a part of an answer is one
    """

    def __init__(self, seed: int, lies: float) -> None:
        self._random = random.Random(seed)
        self._lies = lies
        self._walk = Walk(Plan(BASE, Step.SELF, ()))

    def answer(self, request: bytes) -> bytes:
        chance = self._random
        if chance.random() < self._lies / 8:
            return chance.choice(
                [b"", chance.randbytes(40), b"\x41\xff\xff\xff\xff", encode(Failure("no", chance.choice(TEXTS[:4])))]
            )
        return encode(self._reply(decode(request)))

    def _lie(self) -> bool:
        return self._random.random() < self._lies

    def _number(self) -> int:
        chance = self._random
        near = chance.choice(ADDRESSES) + chance.choice([0, 8, -8, 0x40, NODE])
        return near % 2**64 if chance.random() < 0.8 else chance.getrandbits(64)

    def _word(self, address: int) -> int:
        if self._lie():
            return self._number()
        if address % NODE >= END:
            return address % NODE | 1  # the end of a chain
        return BASE + (address + NODE - BASE) % (NODES * NODE) // 8 * 8

    def _memory(self, address: int, count: int) -> bytes:
        words = b"".join(WORD.pack(self._word(at)) for at in range(address, address + min(count, 512) + 8, 8))
        return words.ljust(count, b"\xff")[:count]

    def _list(self, names: Sequence[Any], value: Callable[[Any], Any]) -> list[Any]:
        found = [self._random.choice(VALUES) if self._lie() else value(name) for name in names]
        return found[:-1] if self._lie() else found

    def _symbol(self, name: str) -> int:
        return BASE + crc32(name.encode()) % NODES * NODE

    def _member(self, name: str) -> list[int]:
        if self._lie():
            return self._random.choices([*EDGES, 5000, 1 << 20, (1 << 20) + 1], k=2)
        size = NODE if " " not in name else 56 if name == "module name" else self._random.choice([4, 8, 8, 16])
        return [crc32(name.encode()) % (NODE // 8 - 4) * 8 if " " in name else 0, size]

    def _reply(self, request: Message) -> Message:
        chance = self._random
        match request:
            case Hello(_, symbols, members):
                facts: dict[str, Any] = {"release": "6.1.0", "hostname": "lab", "version": "1", "boot_id": "1"}
                facts |= {"page_offset": BASE, "vcpus": 1}
                facts |= {"kaslr_offset": 0, "memory_size": 1 << 30, "levels": chance.choice([4, 5])}
                facts |= {"symbols": self._list(symbols, self._symbol), "members": self._list(members, self._member)}
                return Welcome({fact: chance.choice(VALUES) if self._lie() else facts[fact] for fact in facts})
            case Symbols(names):
                return Answer(self._list(names, self._symbol))
            case Members(names):
                return Answer(self._list(names, self._member))
            case Names(addresses):
                return Answer(self._list(addresses, lambda _: chance.choice(TEXTS)))
            case Pointees(questions):
                return Answer(self._list(questions, lambda _: [chance.randrange(9), chance.choice([0, 1, 8, NODE])]))
            case Lookup():
                sizes = [4096, 1 << 21, 1 << 30, *([1, 2**63] if self._lie() else [])]
                return Answer(
                    [self._number(), chance.choice(sizes), [self._number() for _ in range(chance.randrange(5))]]
                )
            case Read(_, address, count):
                return Memory(
                    self._memory(address, chance.choice([0, count // 2, count + 1]) if self._lie() else count)
                )
            case Walk():
                self._walk = request
                return self._chunk([self._number() if self._lie() else count for _, count in request.reads])
            case More():
                return self._chunk([])
        raise AssertionError(request)

    def _chunk(self, counts: list[int]) -> Chunk:
        chance, plan = self._random, self._walk.plan
        heads = [at for (at,) in WORD.iter_unpack(self._walk.bulk)] or [plan.start]
        nodes = [at - plan.link for at in heads[:NODES]] if plan.step == Step.SELF else self._ring(heads[0], plan)
        records = b"".join(self._record(plan, node % 2**64) for node in nodes)
        if self._lie():
            records = records[:48] * chance.choice([0, 2, BULK_MAX // plan.record.size])
            records = records[: len(records) // plan.record.size * plan.record.size]
        more = chance.choice([0, 1, 2**64 - 1]) if self._lie() else 0
        faulted, fault_at, cycles, cycle_at, torn = (chance.choice(EDGES) if self._lie() else 0 for _ in range(5))
        ends = [nodes[0] + plan.link, nodes[-1] + plan.link] if nodes else [plan.start] * 2
        ends = [at % 2**64 for at in (ends[:1] if self._lie() else ends)]
        also = b"".join(
            self._memory(at, min(came, 8192)) for (at, _), came in zip(self._walk.reads, counts, strict=False)
        )
        return Chunk(more, self._lie(), faulted, fault_at, cycles, cycle_at, torn, counts, ends, also + records)

    def _ring(self, head: int, plan: Plan) -> list[int]:
        at, found = self._word(head), [head - plan.link] * (plan.step == Step.RING_NODE)
        while len(found) < NODES and at != head and not at & 1:
            found.append(at + plan.bias - plan.link)
            at = self._word(at + plan.bias)
        return found

    def _record(self, plan: Plan, node: int) -> bytes:
        chance, registers, slots = self._random, {0: node}, b""
        for op in plan.ops:
            at = (registers[op.src] + op.offset) % 2**64
            slots += self._memory(at, 8 if isinstance(op, Load) else op.size)
            if isinstance(op, Load):
                registers[op.dst] = WORD.unpack(slots[-8:])[0] & ~op.tags
        kind = chance.choice([0, 1, 2, 77]) if self._lie() else 0
        number = chance.choice([1, 2**32 - 1]) if self._lie() else 0
        return HEAD.pack(node, chance.getrandbits(64) if self._lie() else 0, number, kind) + slots


class Wire:
    """What `AgentGuest` needs of a link, with a session's two real ends back to back."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._pair = Pair()
        self._answer = answer
        self.requests = 0

    def exchange(self, message: bytes) -> bytes:
        self.requests += 1
        assert self.requests < REQUESTS_MAX, "there is no end to the requests"
        return self._pair.reply(self._answer(self._pair.ask(message)))

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Lists that are long enough to be believed, but not for a test."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("MODULES_MAX", "NAMESPACES_MAX", "SOCKETS_MAX", "BUCKETS_MAX", "TASK_LIMIT"):
            patch.setattr(objects, limit, 300)
        for limit in ("SLOTS_MAX", "FILES_MAX", "ALL_FILES_MAX"):
            patch.setattr(open_files, limit, 2000)
        patch.setattr(limits, "TASK_LIMIT", 300)
        patch.setattr(limits, "PAGES_LIMIT", 300)
        patch.setattr(limits, "STRING_LIMIT", 1 << 16)
        yield


class LyingGuest(RuleBasedStateMachine):
    """An IDS that goes on, whatever comes."""

    @initialize(
        seed=st.integers(0, 2**32),
        lies=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5]),
        strategy=st.sampled_from(STRATEGIES),
    )
    def connect(self, seed: int, lies: float, strategy: Strategy) -> None:
        self.wire = Wire(Liar(seed, lies).answer)
        self.vmi: Libvmi | None = None
        self.held = 0
        with suppress(LibvmiError):
            link: Any = self.wire
            self.vmi = Libvmi.over(AgentGuest("liar", link, strategy))

    def call(self, what: Callable[[Libvmi], Any]) -> Any:
        """Data or LibVMI's error: any other exception fails the test."""
        self.wire.requests = 0
        if self.vmi is not None:
            with suppress(LibvmiError):
                return what(self.vmi)
        return None

    @rule(address=st.sampled_from(ADDRESSES), width=st.sampled_from(["8", "16", "32", "64", "addr"]))
    def read_number(self, address: int, width: str) -> None:
        found = self.call(lambda vmi: getattr(vmi, f"read_{width}_va")(address, 0))
        assert found is None or 0 <= found < 2 ** (64 if width == "addr" else int(width))

    @rule(symbol=st.sampled_from(["init_task", "modules", "tcp_hashinfo", "nobody"]), far=st.integers(0, NODE // 8))
    def read_near(self, symbol: str, far: int) -> None:
        """Dependent reads from where a list may begin: doors, nodes, and what hangs from them."""

        def follow(vmi: Libvmi) -> None:
            at = (vmi.translate_ksym2v(symbol) + far * 8) % 2**64
            for _ in range(12):
                value = vmi.read_addr_va(at, 0)
                assert 0 <= value < 2**64
                at = (value + far % 5 * 8) % 2**64

        self.call(follow)

    @rule(address=st.sampled_from(ADDRESSES), count=st.sampled_from([0, 1, 8, 9, 300, 4097, 13000, (1 << 20) + 1]))
    def read_bytes(self, address: int, count: int) -> None:
        for read in (lambda vmi: vmi.read_va(address, 0, count), lambda vmi: vmi.read_pa(address, count)):
            found = self.call(read)
            assert found is None or (len(found[0]) == count and found[1] == count)

    @rule(address=st.sampled_from(ADDRESSES))
    def read_text(self, address: int) -> None:
        with suppress(UnicodeDecodeError):  # as LibVMI's own bindings have it
            self.call(lambda vmi: vmi.read_str_va(address, 0))

    @rule(address=st.sampled_from(ADDRESSES), dtb=st.sampled_from([0x1000, 2**52 - 1, 2**64 - 1]))
    def translate(self, address: int, dtb: int) -> None:
        self.call(lambda vmi: vmi.pagetable_lookup_extended(dtb, address))
        self.call(lambda vmi: vmi.translate_kv2p(address))
        self.call(lambda vmi: vmi.translate_v2ksym(AccessContext(TranslateMechanism.PROCESS_PID), address))
        self.call(lambda vmi: vmi.get_va_pages(dtb))
        self.call(lambda vmi: vmi.translate_sym2v(AccessContext(TranslateMechanism.PROCESS_DTB, address, dtb=dtb), "f"))

    @rule(pid=st.sampled_from([1, 2, 2**31 - 1]))
    def process(self, pid: int) -> None:
        self.call(lambda vmi: vmi.read_va(0x400000, pid, 64))
        self.call(lambda vmi: vmi.dtb_to_pid(pid << 12))

    @rule(
        read=st.sampled_from(
            [
                *(objects.tasks, objects.threads, objects.modules, objects.sockets),
                *(objects.without_file, objects.other_users, objects.unlisted_modules),
            ]
        ),
        strict=st.booleans(),
    )
    def list_all(self, read: Callable[..., Iterator[Any]], strict: bool) -> None:
        self.call(lambda vmi: list(islice(read(vmi) if strict else read(vmi, Damage()), 2000)))

    @rule()
    def pause(self) -> None:
        self.call(lambda vmi: vmi.pause_vm())

    @rule()
    def resume(self) -> None:
        self.call(lambda vmi: vmi.resume_vm())

    @rule()
    def flush(self) -> None:
        self.call(lambda vmi: vmi.pagecache_flush())

    @invariant()
    def what_is_known_is_memory(self) -> None:
        vmi = getattr(self, "vmi", None)
        if vmi is not None:
            assert all(0 <= word < 2**64 for word in list(vmi.vmi.words.values()))

    def teardown(self) -> None:
        self.call(lambda vmi: vmi.destroy())


@pytest.fixture(autouse=True, scope="module")
def flat() -> Iterator[None]:
    """All of it together costs hardly any memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MAX


TestLyingGuest = LyingGuest.TestCase
TestLyingGuest.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


# One test for each lie that had an effect once.


def guest(answer: Callable[[Message], Message]) -> tuple[Wire, AgentGuest]:
    """A guest whose agent answers what it is greeted with honestly, and everything else so."""
    honest = Liar(0, 0.0)

    def reply(request: bytes) -> bytes:
        message = decode(request)
        return honest.answer(request) if isinstance(message, Hello) else encode(answer(message))

    wire = Wire(reply)
    link: Any = wire
    return wire, AgentGuest("liar", link)


def chunk(bulk: bytes = b"", walk: int = 0, reads: Sequence[int] = (), head: Sequence[int] = (0, 0)) -> Chunk:
    return Chunk(walk, False, 0, 0, 0, 0, 0, list(reads), list(head), bulk)


def test_chunks_without_an_end_are_an_error() -> None:
    wire, lying = guest(lambda request: chunk(walk=1))
    with pytest.raises(LinkError, match="more partly filled chunks"):
        lying.reader.read(lying.profile.symbol("init_task") + lying.profile.member("task_struct", "tasks").offset, 8)
    assert wire.requests == 3  # hello, walk, and one more: a table with so few heads takes no second run


def test_a_walk_that_is_too_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WALK_MAX", 3 * BULK_MAX)
    plan = Plan(BASE, Step.RING, ())
    full = plan.record.pack(BASE, 0, 0, 0) * (BULK_MAX // plan.record.size)
    _, lying = guest(lambda request: chunk(full, walk=1))
    chunks = list(lying.remote.walk(plan))
    assert [(len(each.bulk), each.truncated) for each in chunks] == [(len(full), False)] * 3 + [(len(full), True)]


@pytest.mark.parametrize("reads", [[9], [8, 8], [], [2**64 - 1]])
def test_reads_that_were_not_asked_for_are_an_error(reads: list[int]) -> None:
    _, lying = guest(lambda request: chunk(bytes(4), reads=reads))
    with pytest.raises(LinkError, match="other reads than the walk asked for"):
        list(lying.remote.walk(Plan(BASE, Step.SELF, ()), reads=[(BASE, 8)]))


def test_reads_that_did_not_come_are_an_error() -> None:
    _, lying = guest(lambda request: chunk(bytes(7), reads=[8]))
    with pytest.raises(LinkError, match="other reads than the walk asked for"):
        list(lying.remote.walk(Plan(BASE, Step.SELF, ()), reads=[(BASE, 8)]))


@pytest.mark.parametrize(
    ("read", "unknown"),
    [
        (objects.modules, "module_memory size"),
        (objects.modules, "module_memory base"),
        (objects.sockets, "inet_ehash_bucket"),
        (objects.sockets, "inet_listen_hashbucket"),
    ],
)
def test_a_structure_that_the_guest_does_not_know_is_an_error(read: Callable[..., Iterator[Any]], unknown: str) -> None:
    """It knows the one that the reader looks for, and not the next."""
    honest = Liar(0, 0.0)

    def reply(request: bytes) -> bytes:
        asked, answer = decode(request), decode(honest.answer(request))
        if isinstance(asked, Hello) and isinstance(answer, Welcome):
            known = zip(asked.members, answer.facts["members"], strict=True)
            answer = Welcome({**answer.facts, "members": [None if name == unknown else found for name, found in known]})
        if isinstance(asked, Members) and isinstance(answer, Answer):
            known = zip(asked.names, answer.values, strict=True)
            answer = Answer([None if name == unknown else found for name, found in known])
        return encode(answer)

    link: Any = Wire(reply)
    with pytest.raises(LibvmiError, match=unknown.replace(" ", r"\.")):
        list(read(Libvmi.over(AgentGuest("liar", link)), Damage()))


def test_a_message_of_a_million_empty_lists_is_refused_unread() -> None:
    text = b"[" + b"[]," * (JSON_MAX // 3) + b"[]]"
    with pytest.raises(LinkError, match="JSON part has"):
        decode(Struct("<BI").pack(Answer.KIND, len(text)) + text)


NO_FACTS: dict[str, list[Any]] = {
    "levels": [3, 10**9, "4", 4.0, None, True],
    "page_offset": [-1, 2**64, float("inf"), float("nan"), "1", None],
    "release": [6.1, "6\x1b[2J", '6.1"; evil', "6" * 1000, None],
    "symbols": [None, {}, 1, []],
}


@pytest.mark.parametrize(("fact", "value"), [(fact, value) for fact, values in NO_FACTS.items() for value in values])
def test_a_malformed_fact_is_an_error(fact: str, value: Any) -> None:
    honest = Liar(0, 0.0)

    def reply(request: bytes) -> bytes:
        welcome = decode(honest.answer(request))
        assert isinstance(welcome, Welcome)
        return encode(Welcome(welcome.facts | {fact: value}))

    link: Any = Wire(reply)
    with pytest.raises(LinkError, match="the agent"):
        AgentGuest("liar", link)


@pytest.mark.parametrize("value", [[], [1], [1, 2, 3], [-1, 8], [0, 2**30], [2**40, 8], ["a", 1], [True, 1], 7, "ab"])
def test_a_malformed_member_is_an_error(value: Any) -> None:
    _, lying = guest(lambda request: Answer([value]))
    with pytest.raises(LinkError, match="the agent sent a malformed answer"):
        lying.profile.member("file", "f_inode")


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "x", True, [1]])
def test_a_malformed_address_is_an_error(value: Any) -> None:
    _, lying = guest(lambda request: Answer([value]))
    with pytest.raises(LinkError, match="the agent sent a malformed answer"):
        lying.profile.symbol("anything")


@pytest.mark.parametrize(
    "values", [[1, 1, []], [1, 4096, [1] * 6], [1, 4096, [-1]], [2**64, 4096, []], [1, 4096], [[]] * 3]
)
def test_a_malformed_translation_is_an_error(values: list[Any]) -> None:
    _, lying = guest(lambda request: Answer(values))
    with pytest.raises(LinkError, match="the agent sent a malformed translation"):
        lying.lookup(0x1000, BASE)


def test_a_node_at_the_end_of_all_addresses_has_its_link_where_the_kernel_would() -> None:
    def answer(request: Message) -> Message:
        match request:
            case Read(_, _, count):
                return Memory(bytes(4) if count == 4 else WORD.pack(BASE))  # a table of one chain
            case Walk(plan):
                return chunk(HEAD.pack(2**64 - 8, 0, 0, 0) + bytes(plan.record.size - HEAD.size))
        return Answer([None])

    _, lying = guest(answer)
    vmi, member = Libvmi.over(lying), lying.profile.member
    vmi.read_addr_va(lying.profile.symbol("tcp_hashinfo") + member("inet_hashinfo", "ehash").offset, 0)
    link = member("sock", "__sk_common.skc_nulls_node").offset
    assert link >= 8
    assert vmi.read_addr_va(BASE + member("inet_ehash_bucket", "chain").offset, 0) == link - 8


def test_page_tables_that_go_round_in_circles_are_an_error() -> None:
    entry = WORD.pack(0x1003)  # present, and refers to the table it stands in
    _, lying = guest(
        lambda request: Memory(entry * (request.count // 8)) if isinstance(request, Read) else Answer([None])
    )
    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
        Libvmi.over(lying).get_va_pages(0x1000)


HOSTILE = "\x1b[2J\x1b]0;gotcha\x07"


def test_a_name_reaches_the_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    task = objects.Task(1, 1, 0, 0, objects._text(HOSTILE.encode()), "running", BASE)
    show(SHAPES["ps"].columns, [SHAPES["ps"].row(task)])
    shown = capsys.readouterr().out
    assert r"\x1b[2J\x1b]0;gotcha\x07" in shown
    assert shown.replace("\n", "").isprintable()


def test_an_agents_own_words_reach_the_terminal_escaped() -> None:
    _, lying = guest(lambda request: Failure("plan", HOSTILE))
    with pytest.raises(LinkError, match=r"\\x1b\[2J") as caught:
        lying.profile.symbol("anything")
    assert str(caught.value).isprintable()
