"""The kernel encrypts what is read of it: an IDS reads as before, and the agent carries what it can't read.

On this machine's kernel; tests/guest/test_sealed.py runs the same in a VM.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import guest_agent.__main__
from bench.machine import Machine, here
from bench.variants import RunningAgent
from tests.ground.walks import Ground, LongWalks, Walks
from tests.guest.ids import Ids
from tests.local.bpf_root import maps_of
from vmishim import cli
from vmishim.client import Remote
from vmishim.errors import FaultError, LinkError
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import Libvmi
from vmishim.memory.reader import PHYSICAL
from vmishim.wire import sealed
from vmishim.wire.keys import PublicKey, generate, save_private
from vmishim.wire.messages import Envelope, Lookup, Message, More, Read, Sealed, Sealing, Walk, decode, encode
from vmishim.wire.noise import HandshakeState
from vmishim.wire.plan import HEADS_MAX, Plan, Step, Take
from vmishim.wire.sealed import CHUNK_MAX, HEAD, REPORT, Ask, Unsealing, question

NODE = 64

# Run as root where an agent runs: how often each needle, in hexadecimal, stands in its memory, and in how much of it.
SEARCH = """
import sys
needles = [bytes.fromhex(text) for text in sys.argv[2:]]
found, seen = [0] * len(needles), 0
with open(f"/proc/{sys.argv[1]}/maps") as maps, open(f"/proc/{sys.argv[1]}/mem", "rb", 0) as memory:
    for line in maps:
        begin, end = (int(text, 16) for text in line.split()[0].split("-"))
        if line.split()[1][0] != "r" or "[v" in line:
            continue
        data = b""
        memory.seek(begin)
        while len(data) < end - begin and (more := memory.read(end - begin - len(data))):
            data += more
        seen += len(data)
        found = [before + data.count(needle) for before, needle in zip(found, needles)]
print(seen, *found)
"""


def search(machine: Machine, agent: RunningAgent, *needles: bytes) -> list[int]:
    """How often each stands in the memory of an agent."""
    words = machine.run("python3", "-IS", "-c", SEARCH, str(agent.pid), *(needle.hex() for needle in needles)).split()
    seen, *found = map(int, words)
    assert seen > 10 << 20
    return found


def plant(machine: Machine) -> tuple[Plan, list[bytes]]:
    """Fresh secrets in kernel memory, and the plan that reads them: of more than a chunk."""
    secret = [secrets.token_bytes(NODE) for _ in range(16000)]
    machine.ground.write(0, b"".join(secret))
    return Plan(machine.ground.address, Step.SELF, (Take(0, 0, NODE),), heads=len(secret), stride=NODE), secret


@pytest.fixture(scope="module")
def on_this_machine() -> Iterator[Machine]:
    if os.geteuid():
        pytest.skip("only root can read this kernel")
    with here() as found:
        yield found


@pytest.fixture(scope="module")
def machine(on_this_machine: Machine) -> Machine:
    """Where the tests run; tests/guest/test_sealed.py has another."""
    return on_this_machine


@pytest.fixture
def guest(machine: Machine) -> Iterator[AgentGuest]:
    with closing(machine.sealing.connect(kernel_key=machine.sealing.kernel)) as connected:
        yield connected


class Tampered:
    """The connection to a compromised agent, which can change requests and answers.

    :ivar asks: what becomes of each `Sealing`, its challenge and request
    :ivar answers: what becomes of each `Sealed`
    """

    def __init__(self, agent: RunningAgent) -> None:
        self._guest = agent.connect(strategy="scalar")
        self._request = Sealing("", "", b"")
        self.asks: Callable[[bytes, Message], tuple[bytes, Message]] = lambda *asked: asked
        self.answers: Callable[[Sealed], Sealed] = lambda answer: answer
        self.remote = Remote(self.exchange, Unsealing(agent.private, agent.kernel))
        self.remote.hello([], [])

    def exchange(self, message: bytes) -> bytes:
        request = decode(message)
        if isinstance(request, Sealing):
            self._request = request
            challenge, inner = self.asks(request.bulk[:16], decode(request.bulk[16:]))
            message = encode(Sealing(request.key, request.tags, challenge + encode(inner)))
        reply = self._guest.link.exchange(message)
        answer = decode(reply)
        return encode(self.answers(answer)) if isinstance(answer, Sealed) else reply

    def ask(self, tags: str | None = None) -> Message:
        """The last question once more."""
        tags = self._request.tags if tags is None else tags
        return decode(self._guest.link.exchange(encode(replace(self._request, tags=tags))))

    def close(self) -> None:
        self._guest.close()


@pytest.fixture
def tampered(machine: Machine) -> Iterator[Tampered]:
    with closing(Tampered(machine.sealing)) as connection:
        yield connection


# ---- what is read is what is there -----------------------------------------------------------------------------------


def test_the_list_is_that_of_proc_and_of_an_agent_that_reads_in_the_clear(machine: Machine, guest: AgentGuest) -> None:
    for _ in range(20):
        pids = machine.run("ls", "/proc")
        listed = Ids(Libvmi.over(guest)).processes()
        clear = Ids(Libvmi.over(machine.plain.connect())).processes()
        after = machine.run("ls", "/proc")
        proc = {int(word) for word in pids.split() if word.isdigit()} & {int(w) for w in after.split() if w.isdigit()}
        if listed == clear and listed.keys() == proc:
            return
    assert listed == clear
    assert listed.keys() == proc


def test_every_kind_of_reading_gives_what_an_agent_in_the_clear_gives(machine: Machine, guest: AgentGuest) -> None:
    _, secret = plant(machine)
    plain = machine.plain.connect(strategy="scalar")
    address, size = machine.ground.address, len(secret) * NODE
    assert guest.remote.read(address, size) == b"".join(secret)
    for start, count in ((1, 1), (15, 17), (16, 16), (4095, 2), (7, 4096 * 3)):
        assert guest.remote.read(address + start, count) == b"".join(secret)[start : start + count]
    with pytest.raises(FaultError) as fault:
        guest.remote.read(address + machine.ground.size - 8, 16)
    assert (fault.value.address, len(fault.value.data)) == (address + machine.ground.size, 8)
    comm = guest.profile.symbol("init_task") + guest.profile.member("task_struct", "comm").offset
    assert guest.remote.read(comm, 10) == b"swapper/0\0"
    if not guest.profile.page_offset:  # a kernel that does not tell
        for agent in (guest, plain):
            with pytest.raises(LinkError, match="direct map"):
                agent.remote.read(4096, 8, PHYSICAL)
            with pytest.raises(LinkError, match="direct map"):
                agent.remote.lookup(4096, comm)
        return
    root = Libvmi.over(machine.plain.connect()).pid_to_dtb(1)
    translated = guest.remote.lookup(root, comm)
    assert translated == plain.remote.lookup(root, comm)
    assert translated[1] > 0
    assert guest.remote.read(comm, 10, root) == b"swapper/0\0"
    assert guest.remote.read(translated[0], 10, PHYSICAL) == b"swapper/0\0"
    assert guest.remote.lookup(root, 8)[1] == plain.remote.lookup(root, 8)[1] == 0
    for space in (PHYSICAL, root):
        with pytest.raises(FaultError):
            guest.remote.read((1 << 64) - 8, 8, space)


def test_a_walk_of_many_chunks_is_exact(machine: Machine, guest: AgentGuest) -> None:
    plan, secret = plant(machine)
    found: dict[int, bytes] = {}
    reads = [(machine.ground.address + NODE, NODE), (machine.ground.address, 5), (8, 8)]
    chunks = list(guest.remote.walk(plan, (), reads, found))
    assert len(chunks) > 1
    assert [row[4] for chunk in chunks for row in plan.records(chunk.bulk)] == secret
    assert found == {reads[0][0]: secret[1], reads[1][0]: secret[0][:5]}
    listed = Plan(0, Step.SELF, (Take(0, 0, NODE),), heads=15001, stride=0)
    order = [number * 7 % len(secret) for number in range(listed.heads)]
    chunks = list(guest.remote.walk(listed, [machine.ground.address + NODE * number for number in order]))
    assert len(chunks) > 1
    assert [row[4] for chunk in chunks for row in listed.records(chunk.bulk)] == [secret[number] for number in order]


class TestWalksHere(Walks, LongWalks):
    """All that is promised of walks, of walks that the kernel seals."""

    @pytest.fixture(scope="class")
    @classmethod
    def ground(cls, on_this_machine: Machine) -> Iterator[Ground]:
        def another() -> AgentGuest:
            return on_this_machine.sealing.connect(strategy="scalar")

        with closing(another()) as guest:
            yield Ground(on_this_machine.ground, guest, another, CHUNK_MAX)


# ---- the agent can't read it -----------------------------------------------------------------------------------------


def test_the_agent_never_holds_what_it_carries(machine: Machine, guest: AgentGuest) -> None:
    plan, secret = plant(machine)
    looked_for = secret[0], secret[100], secret[-1]
    for _ in guest.remote.walk(plan):
        pass
    guest.remote.read(machine.ground.address, NODE)
    assert search(machine, machine.sealing, *looked_for) == [0, 0, 0]
    # Which shows that they can be found: an agent that reads in the clear holds them.
    plain = machine.plain.connect(strategy="scalar")
    for _ in plain.remote.walk(plan):
        pass
    assert search(machine, machine.plain, secret[-1])[0] > 0
    plain.remote.read(machine.ground.address, NODE)
    assert search(machine, machine.plain, secret[0])[0] > 0


def test_the_agent_keeps_no_key(machine: Machine, guest: AgentGuest) -> None:
    answer = decode(guest.link.exchange(encode(Envelope(machine.sealing.private.public.raw.hex()))))
    envelope = bytes.fromhex(answer.values[0])  # type: ignore[attr-defined]
    root = HandshakeState(sealed.PROLOGUE, machine.sealing.private, pattern="X").read(envelope)
    keys = sealed.kernel_keys(root)
    assert search(machine, machine.sealing, root, keys.cipher, keys.mac, keys.subkey, keys.mac[:16]) == [0] * 5
    # What is there, to show that the search sees this agent's memory: the envelope it hands out.
    assert search(machine, machine.sealing, envelope.hex().encode())[0] > 0


def test_the_agent_holds_three_programs_and_what_it_asks_and_is_answered_by(machine: Machine) -> None:
    pid = machine.sealing.pid
    # A connection that closes meanwhile takes its file along, and grep reports that by its status.
    script = f"grep -Ehs '^(prog_type|value_size)' /proc/{pid}/fdinfo/* || [ $? = 2 ]"
    held = machine.run("sh", "-c", script).splitlines()
    plan = Plan(8, Step.SELF, ())
    sizes = [
        len(question(bytes(16), Ask.READ)) + len(plan.to_c()) + 24,
        8 * HEADS_MAX,
        HEAD.size + REPORT.size + CHUNK_MAX,
    ]
    programs = [31, 3, 3]  # BPF_PROG_TYPE_SYSCALL, BPF_PROG_TYPE_SCHED_CLS (include/uapi/linux/bpf.h)
    assert sorted(held) == sorted([*(f"value_size:\t{n}" for n in sizes), *(f"prog_type:\t{n}" for n in programs)])


@pytest.mark.parametrize(
    "request_",
    [Read(0, 1 << 63, 8), Lookup(4096, 8), Walk(Plan(8, Step.SELF, ())), More(1)],
    ids=lambda r: type(r).__name__,
)
def test_nothing_is_read_in_the_clear(guest: AgentGuest, request_: Message) -> None:
    refused = decode(guest.link.exchange(encode(request_)))
    assert getattr(refused, "code", refused) == "kernel-encryption"


# ---- and can't change it ---------------------------------------------------------------------------------------------


def test_a_bit_flipped_in_any_part_is_an_error(machine: Machine, tampered: Tampered) -> None:
    _, secret = plant(machine)
    whole = HEAD.size + REPORT.size + NODE
    places = {
        "counter": 0,
        "length": 8,
        "tag": 16,
        "iv": 32,
        "report": HEAD.size,
        "bytes": whole - NODE,
        "end": whole - 1,
    }
    for place in places.values():
        for bit in (0, 7):

            def flip(answer: Sealed, place: int = place, bit: int = bit) -> Sealed:
                data = bytearray(answer.bulk)
                assert len(data) == whole
                data[place] ^= 1 << bit
                return Sealed(answer.walk, bytes(data))

            tampered.answers = flip
            with pytest.raises(LinkError, match="the kernel"):
                tampered.remote.read(machine.ground.address, NODE)
    tampered.answers = lambda answer: answer
    assert tampered.remote.read(machine.ground.address, NODE) == secret[0]


def test_a_replayed_answer_is_an_error(machine: Machine, tampered: Tampered) -> None:
    """To the same question asked again, to another one, and for a chunk of a walk."""
    plan, _ = plant(machine)
    at = machine.ground.address
    kept: list[Sealed] = []

    def replay(answer: Sealed) -> Sealed:
        kept.append(answer)
        return kept[0]

    for other in (Read(0, at, NODE), Read(0, at + 1, NODE), Read(0, at, NODE - 1)):
        kept.clear()
        tampered.answers = replay
        tampered.remote.read(at, NODE)
        with pytest.raises(LinkError, match="not authentic"):
            tampered.remote.read(other.address, other.count)
    kept.clear()
    walk = tampered.remote.walk(plan)
    next(walk)
    with pytest.raises(LinkError, match="not authentic"):
        next(walk)


def test_the_kernel_takes_no_question_but_an_idss(machine: Machine, tampered: Tampered) -> None:
    plan, _ = plant(machine)
    at = machine.ground.address

    def ask(instead: Message | None, challenge: bytes | None = None) -> None:
        tampered.asks = lambda given, request: (challenge or given, instead or request)
        with pytest.raises(LinkError, match="rejected this question: its tag is not from a permitted IDS"):
            tampered.remote.read(at, NODE)

    ask(None, bytes(16))
    for instead in (Read(0, at + 1, NODE), Read(0, at, NODE + 1), Read(0x1000, at, NODE), Walk(plan)):
        if instead != Read(0x1000, at, NODE) or machine.plain.connect().profile.page_offset:
            ask(instead)
    listed = Plan(0, plan.step, plan.ops, heads=3, stride=0)
    heads = struct.pack("<3Q", at, at + NODE, at + 2 * NODE)
    for walk in (
        Walk(replace(listed, start=8), [], heads),
        Walk(replace(listed, max_nodes=7), [], heads),
        Walk(replace(listed, ops=(Take(0, 8, NODE),)), [], heads),
        Walk(listed, [], heads[:-1] + b"\x7f"),
        Walk(replace(listed, heads=2), [], heads[:-8]),
    ):
        tampered.asks = lambda challenge, request, walk=walk: (challenge, walk)  # type: ignore[misc]
        with pytest.raises(LinkError, match="rejected this question: its tag is not from a permitted IDS"):
            next(tampered.remote.walk(listed, [at, at + NODE, at + 2 * NODE]))
    tampered.asks = lambda *asked: asked
    assert len(tampered.remote.read(at, NODE)) == NODE
    assert isinstance(tampered.ask(), Sealed)
    for tags in ("00" * 16, "ff" * 16):
        assert getattr(tampered.ask(tags), "code", "") == "kernel-refused"


def test_the_chunks_of_a_walk_come_in_their_order_and_of_that_walk(machine: Machine, tampered: Tampered) -> None:
    plan, secret = plant(machine)
    wide = replace(plan, ops=plan.ops * 2)
    walk = tampered.remote.walk(wide)
    chunks = [next(walk), next(walk)]
    # The question for the second chunk, again: the kernel's walk has gone on.
    assert getattr(tampered.ask(), "code", "") == "kernel-refused"
    chunks += walk
    assert [row[4] for chunk in chunks for row in wide.records(chunk.bulk)] == secret
    assert len(chunks) > 2

    numbers: list[int] = []

    def note(answer: Sealed) -> Sealed:
        numbers.append(answer.walk)
        return answer

    tampered.answers = note
    one, two = tampered.remote.walk(plan), tampered.remote.walk(plan)
    next(one), next(two)
    tampered.asks = lambda challenge, request: (challenge, More(numbers[1]))
    with pytest.raises(LinkError, match="rejected this question: its tag is not from a permitted IDS"):
        next(one)


def test_no_counter_and_no_iv_comes_twice(machine: Machine) -> None:
    """Over sessions, and requests of every kind that go on beside each other."""
    counters, ivs = list[int](), set[bytes]()
    plan, _ = plant(machine)

    def note(answer: Sealed) -> Sealed:
        for part in sealed.parts(answer.bulk):
            counter, _, _, iv = HEAD.unpack_from(part)
            counters.append(counter)
            ivs.add(iv)
        return answer

    for _ in range(3):
        with closing(Tampered(machine.sealing)) as connection:
            connection.answers = note
            connection.remote.read(machine.ground.address, 100)
            list(connection.remote.walk(plan, (), [(machine.ground.address, 8)]))
    assert len(counters) >= 3 * 4
    assert counters == sorted(set(counters))
    assert len(ivs) == len(counters)


def test_a_rollback_of_the_kernels_memory_repeats_no_iv(on_this_machine: Machine) -> None:
    """A host that restores a snapshot brings the counter back; neither another question nor the same gets its IV again.

    The rollback is emulated: root writes back the map with the counter.
    """
    plan, _ = plant(on_this_machine)
    maps = maps_of(on_this_machine.sealing.pid)
    seen: list[tuple[int, bytes]] = []

    def note(answer: Sealed) -> Sealed:
        seen.extend((counter, iv) for counter, _, _, iv in map(HEAD.unpack_from, sealed.parts(answer.bulk)))
        return answer

    snapshot = maps["job"].read()
    for address in (plan.start, plan.start + NODE):
        with closing(Tampered(on_this_machine.sealing)) as connection:
            connection.answers = note
            maps["job"].write(snapshot)
            connection.remote.read(address, NODE)
            maps["job"].write(snapshot)
            reply = connection.ask()
            assert isinstance(reply, Sealed)
            note(reply)
            # And the IDS that saw the counter notices.
            maps["job"].write(snapshot)
            with pytest.raises(LinkError, match=r"has number .* the guest's memory was rolled back"):
                connection.remote.read(address, NODE)
            connection.answers = lambda answer: answer
    for found in maps.values():
        found.close()
    assert len(seen) == 6
    assert len({counter for counter, _ in seen}) == 1
    assert len({iv for _, iv in seen}) == 6


# ---- who may, and who must -------------------------------------------------------------------------------------------


def test_a_kernel_key_that_is_pinned_must_be_the_agents(machine: Machine) -> None:
    with pytest.raises(LinkError, match=r"the guest's kernel key is .*another machine, or a new key"):
        machine.sealing.connect(kernel_key=generate().public)
    with pytest.raises(LinkError, match="does not encrypt"):
        machine.plain.connect(kernel_key=machine.sealing.kernel)
    assert Ids(Libvmi.over(machine.sealing.connect())).processes()


@pytest.mark.skipif(bool(os.geteuid()), reason="only root can read this kernel")
def test_the_agent_asks_for_a_report_of_both_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own set-up, up to where it asks for the report."""

    class Asked(Exception):
        pass

    def ask(key: PublicKey, *, kernel_key: PublicKey | None) -> None:
        raise Asked(key, kernel_key)

    monkeypatch.setattr("guest_agent.attestation.evidence", ask)
    keys = {name: generate() for name in ("agent", "kernel", "ids")}
    for name, key in keys.items():
        save_private(tmp_path / name, key)
    (tmp_path / "permitted").write_text(f"{keys['ids'].public.text}\n")
    serve = ["serve", "--key", str(tmp_path / "agent"), "--permitted", str(tmp_path / "permitted")]
    for more, kernel in (([], None), (["--kernel-key", str(tmp_path / "kernel")], keys["kernel"].public)):
        with pytest.raises(Asked) as asked:
            guest_agent.__main__.main([*serve, *more])
        assert asked.value.args == (keys["agent"].public, kernel)


def test_a_domain_may_name_its_kernels_key(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    save_private(tmp_path / "key", machine.sealing.private)
    save_private(tmp_path / "other", machine.plain.private)
    sealing, plain = (
        ["enroll", name, agent.endpoint, agent.public.text, "--key", str(tmp_path / key)]
        for name, agent, key in (("sealing", machine.sealing, "key"), ("plain", machine.plain, "other"))
    )
    pinned = ["--kernel-key", machine.sealing.kernel.text]
    assert cli.main([*plain, *pinned]) == 1
    assert "does not encrypt, but the domain's kernel_key requires it" in capfd.readouterr().err
    assert cli.main([*plain, "--replace"]) == 0
    assert cli.main([*sealing, "--kernel-key", generate().public.text]) == 1
    assert "another machine, or a new key" in capfd.readouterr().err
    assert cli.main([*sealing, *pinned, "--replace"]) == 0
    for name, by in (("sealing", "by the guest's kernel; "), ("plain", "by the agent, ")):
        capfd.readouterr()
        cli.main(["doctor", name, "--json"])
        (text,) = (found["text"] for found in json.loads(capfd.readouterr().out) if found["about"] == "encryption")
        assert text.startswith(by)
