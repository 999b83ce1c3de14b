"""Sealed mode: answers match published vectors, and open only complete and as the answer to their question."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.agent import Agent
from vmishim.client import Remote
from vmishim.errors import LinkError
from vmishim.inject import InjectError, inject
from vmishim.link import Link
from vmishim.wire import sealed
from vmishim.wire.keys import PrivateKey, PublicKey, generate
from vmishim.wire.messages import (
    AgentError,
    Answer,
    Envelope,
    Failure,
    Lookup,
    Message,
    More,
    Read,
    Sealed,
    Sealing,
    Walk,
    Welcome,
    decode,
    encode,
)
from vmishim.wire.plan import Plan, Step, Take
from vmishim.wire.sealed import HEAD, REPORT, Ask, Opener, Unsealing, question

unhurried = settings(deadline=None)  # a slow machine must not fail the test

# NIST SP 800-38B, appendix D.3 (AES-256), and SP 800-38A, F.2.5 (CBC-AES256): the same key and plaintext.
KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
IV = bytes(range(16))
TEXT = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
K1 = bytes.fromhex("cad1ed03299eedac2e9a99808621502f")
MACS = {16: "28a7023f452e8f82bd4bf28d8c37c35c", 64: "e1992190549f6ed5696a2c056c315410"}
CBC_TEXT = bytes.fromhex(
    "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"
    "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b"
)


# ---- the kernel's part, block by block, out of nothing but AES -------------------------------------------------------


def chained(key: bytes, text: bytes, chain: bytes) -> bytes:
    """AES-CBC of whole blocks."""
    encryptor, blocks = Cipher(AES(key), ECB()).encryptor(), []
    for at in range(0, len(text), 16):
        chain = encryptor.update(bytes(a ^ b for a, b in zip(text[at : at + 16], chain, strict=True)))
        blocks.append(chain)
    return b"".join(blocks)


def mac(key: bytes, text: bytes) -> bytes:
    """AES-CMAC of whole blocks, as RFC 4493 defines it by CBC and K1."""
    last = bytes(a ^ b for a, b in zip(text[-16:], sealed.subkey(key), strict=True))
    return chained(key, text[:-16] + last, bytes(16))[-16:]


class Kernel:
    """An agent and its kernel, as far as an IDS can tell: answers `Sealing` from its own memory.

    :ivar change: alters each reply in transit
    :ivar strict: whether it accepts only questions with valid tags
    :ivar end: how a walk ends: 1, whole; 2, because its plan names no more nodes
    """

    def __init__(self, ids: PublicKey) -> None:
        self.key = generate()
        self.ids = ids
        self.change: Callable[[bytes], bytes] = lambda reply: reply
        self.counter = 0
        self.asked: list[bytes] = []
        self.tags: list[str] = []
        self.strict = False
        self.end = 1
        self.start()

    def start(self) -> None:
        """Restart: with another root key."""
        self.root = os.urandom(32)
        self.envelope = sealed.seal_root(self.root, self.key, self.ids)

    def seal(self, covered: bytes, report: tuple[int, ...] = (0,) * 16, data: bytes = b"") -> bytes:
        """Answer a question."""
        cipher, tag = (
            HKDF(SHA256(), 64, None, b"vmishim kernel key 1").derive(self.root)[at : at + 32] for at in (0, 32)
        )
        if self.strict:
            assert self.tags.pop(0) == mac(tag, covered + bytes(16)).hex()
        self.counter += 1
        iv = os.urandom(16)
        text = chained(cipher, struct.pack("<16Q", *report) + data + bytes(-len(data) % 16), iv)
        numbers = struct.pack("<QQ", self.counter, len(data))
        return numbers + mac(tag, covered + iv + text + numbers) + iv + text

    def exchange(self, request: bytes) -> bytes:
        return self.change(encode(self.answer(decode(request))))

    def answer(self, request: Message) -> Message:
        match request:
            case Envelope(public):
                assert public == self.ids.raw.hex()
                return Answer([self.envelope.hex()])
            case Sealing(key) if key != sealed.name_of(self.envelope):
                return Failure(sealed.NO_KEY, "unknown")
            case Sealing(_, tags, bulk):
                self.asked.append(bulk)
                self.tags = [tags[at : at + 32] for at in range(0, len(tags), 32)]
                return self.carry_out(bulk[:16], decode(bulk[16:]))
        raise AssertionError(request)

    def carry_out(self, challenge: bytes, request: Message) -> Sealed:
        match request:
            case Read(space, address, count):
                return Sealed(0, self.read(challenge, space, address, count))
            case Lookup(dtb, address):
                report = (*(0,) * 8, 0x5000, 4096, 1, 2, 3, 4, 0, 4)
                return Sealed(0, self.seal(question(challenge, Ask.LOOKUP, dtb, address), report))
            case Walk(plan, reads, heads):
                parts = [self.read(challenge, 0, *read) for read in reads]
                self.plan, self.heads, self.chunk = plan, heads, 0
                parts.append(self.chunk_of(challenge, Ask.WALK))
                self.began = self.counter
                return Sealed(5, b"".join(parts))
            case More(_):
                self.chunk += 1
                return Sealed(5, self.chunk_of(challenge, Ask.MORE))
        raise AssertionError(request)

    def read(self, challenge: bytes, space: int, address: int, count: int) -> bytes:
        data = bytes((address + at) & 255 for at in range(count))
        return self.seal(question(challenge, Ask.READ, space, address, count), data=data)

    def chunk_of(self, challenge: bytes, kind: Ask) -> bytes:
        """A walk of two chunks."""
        began = self.began if kind is Ask.MORE else 0
        asked = question(challenge, kind, chunk=self.chunk, began=began, heads=len(self.heads))
        record = self.plan.record.pack(0xA0 + self.chunk, 0, 0, 0, self.chunk)
        report = (0, 0, 0, 0, 0, 11, 12, self.end if self.chunk else 0, *(0,) * 8)
        covered = asked + self.plan.to_c() + self.heads + bytes(-len(self.heads) % 16)
        return self.seal(covered, report, record)


@pytest.fixture
def ids() -> PrivateKey:
    return generate()


@pytest.fixture
def kernel(ids: PrivateKey) -> Kernel:
    return Kernel(ids.public)


@pytest.fixture
def remote(ids: PrivateKey, kernel: Kernel) -> Remote:
    """An IDS with a session."""
    return greeted(kernel, Unsealing(ids, kernel.key.public))


def greeted(kernel: Kernel, unsealing: Unsealing, encrypts: bool = True) -> Remote:
    def exchange(request: bytes) -> bytes:
        if request[0] == 1:
            return encode(Welcome({"symbols": [], "members": [], "kernel_encryption": encrypts}))
        return kernel.exchange(request)

    asking = Remote(exchange, unsealing)
    asking.hello([], [])
    return asking


PLAN = Plan(0, Step.SELF, (Take(0, 0, 8),), heads=3, stride=0)


# ---- published vectors -----------------------------------------------------------------------------------------------


def test_the_subkey_is_that_of_the_published_vectors() -> None:
    assert sealed.subkey(KEY) == K1


def test_this_files_ciphers_match_the_published_vectors() -> None:
    assert chained(KEY, TEXT, IV) == CBC_TEXT
    assert {size: mac(KEY, TEXT[:size]).hex() for size in MACS} == MACS


# ---- opening ---------------------------------------------------------------------------------------------------------


@unhurried
@given(st.binary(max_size=100), st.integers(0, 2**64 - 1))
def test_a_sealed_answer_opens(data: bytes, word: int) -> None:
    kernel = Kernel(generate().public)
    covered = question(os.urandom(16), Ask.READ, 0, word, len(data))
    opened = Opener(kernel.root).open(kernel.seal(covered, (word,) * 16, data), covered)
    assert opened == (1, (word,) * 16, data)


@unhurried
@given(st.data())
def test_an_answer_with_any_bit_altered_does_not_open(data: st.DataObject) -> None:
    kernel = Kernel(generate().public)
    covered = question(os.urandom(16), Ask.READ, 0, 8, 50)
    whole = kernel.seal(covered, data=os.urandom(50))
    opener = Opener(kernel.root)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1), label="bit")
    flipped = (int.from_bytes(whole, "little") ^ 1 << bit).to_bytes(len(whole), "little")
    for forged in (flipped, whole[: bit // 8], whole + bytes(16), whole[:-16]):
        with pytest.raises(LinkError, match=r"the kernel's answer is (not authentic|cut short)"):
            opener.open(forged, covered)
    for other in (covered[:-1] + b"\1", bytes([covered[0] ^ 1]) + covered[1:], covered + bytes(16), b""):
        with pytest.raises(LinkError, match="not authentic"):
            opener.open(whole, other)
    assert len(opener.open(whole, covered).data) == 50


def test_the_keys_of_another_kernel_open_nothing() -> None:
    one, other = Kernel(generate().public), Kernel(generate().public)
    covered = question(bytes(16), Ask.READ)
    with pytest.raises(LinkError, match="not authentic"):
        Opener(other.root).open(one.seal(covered), covered)


def test_an_answer_of_part_of_a_block_is_an_error_even_if_the_kernel_made_it() -> None:
    kernel = Kernel(generate().public)
    covered = question(bytes(16), Ask.READ, 0, 8, 8)
    authentic = CMAC(AES(HKDF(SHA256(), 64, None, b"vmishim kernel key 1").derive(kernel.root)[32:]))
    iv, text, numbers = os.urandom(16), os.urandom(REPORT.size + 8), struct.pack("<QQ", 1, 8)
    authentic.update(covered + iv + text + numbers)
    with pytest.raises(LinkError, match="cut short"):
        Opener(kernel.root).open(numbers + authentic.finalize() + iv + text, covered)


@pytest.mark.parametrize("back", [1, 2])
def test_a_kernel_whose_counter_goes_back_is_not_believed(remote: Remote, kernel: Kernel, back: int) -> None:
    """As after a snapshot of the guest was restored; the same number twice is as bad."""
    address = 0xFFFF_FFFF_8100_0000
    assert remote.read(address, 1) + remote.read(address + 1, 1) == b"\0\1"
    kernel.counter -= back
    with pytest.raises(LinkError, match=rf"has number {3 - back}, but number 2 came before: .* rolled back"):
        remote.read(address, 1)
    kernel.counter = 2
    assert remote.read(address, 1) == b"\0"


def test_another_number_of_answers_than_questions_is_refused(remote: Remote, kernel: Kernel) -> None:
    """Each answer is authentic."""
    carry_out = kernel.carry_out

    def doubled(challenge: bytes, request: Message) -> Sealed:
        answered = carry_out(challenge, request)
        return replace(answered, bulk=2 * answered.bulk)

    kernel.carry_out = doubled  # type: ignore[method-assign]
    with pytest.raises(LinkError, match="2 sealed answers to 1 questions"):
        remote.read(0xFFFF_FFFF_8100_0000, 8)


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_every_memory_request_has_a_tag_and_is_answered(remote: Remote, kernel: Kernel) -> None:
    kernel.strict = True
    base = 0xFFFF_FFFF_8100_0000
    assert remote.read(base + 7, 100) == bytes((7 + at) & 255 for at in range(100))
    assert remote.lookup(0x1000, 0x2000) == (0x5000, 4096, [1, 2, 3, 4])
    found: dict[int, bytes] = {}
    chunks = list(remote.walk(PLAN, [1, 2, 3], [(base, 4)], found))
    assert [row[0] for chunk in chunks for row in PLAN.records(chunk.bulk)] == [0xA0, 0xA1]
    assert found == {base: bytes(range(4))}
    assert chunks[0].head == [11, 12]


@pytest.mark.parametrize(("end", "truncated"), [(1, False), (2, True)])
def test_a_walk_that_was_cut_off_says_so(remote: Remote, kernel: Kernel, end: int, truncated: bool) -> None:
    kernel.end = end
    assert [chunk.truncated for chunk in remote.walk(PLAN, [1, 2, 3], [], {})] == [False, truncated]


def test_no_challenge_is_used_twice(remote: Remote, kernel: Kernel) -> None:
    for _ in range(50):
        remote.read(1 << 63 | 1 << 62 | 0xFFFF << 48, 1)
    assert len({bulk[:16] for bulk in kernel.asked}) == 50


def test_an_old_answer_to_the_same_question_is_refused(remote: Remote, kernel: Kernel) -> None:
    replies: list[bytes] = []

    def replay(reply: bytes) -> bytes:
        replies.append(reply)
        return replies[0]

    kernel.change = replay
    address = 0xFFFF_FFFF_8100_0000
    assert remote.read(address, 1) == b"\0"
    with pytest.raises(LinkError, match="not authentic"):
        remote.read(address, 1)


@pytest.mark.parametrize(
    "instead",
    [
        Read(0, 0xFFFF_FFFF_8100_0001, 8),
        Read(0, 0xFFFF_FFFF_8100_0000, 7),
        Read(0x1000, 0xFFFF_FFFF_8100_0000, 8),
        Lookup(0, 0xFFFF_FFFF_8100_0000),
    ],
    ids=["address", "count", "space", "kind"],
)
def test_an_answer_to_another_question_is_refused(remote: Remote, kernel: Kernel, instead: Message) -> None:
    carry_out = kernel.carry_out
    kernel.carry_out = lambda challenge, request: carry_out(challenge, instead)  # type: ignore[method-assign]
    with pytest.raises(LinkError, match="not authentic"):
        remote.read(0xFFFF_FFFF_8100_0000, 8)


OTHER_PLAN = Plan(0, Step.SELF, (Take(0, 8, 8),), heads=3, stride=0)


@pytest.mark.parametrize(
    "instead",
    [
        Walk(OTHER_PLAN, [], struct.pack("<3Q", 1, 2, 3)),
        Walk(PLAN, [], struct.pack("<3Q", 1, 2, 4)),
        Walk(PLAN, [], struct.pack("<4Q", 1, 2, 3, 0)),
        Walk(PLAN, [[0, 8]], struct.pack("<3Q", 1, 2, 3)),
    ],
    ids=["plan", "heads", "a head more", "a read more"],
)
def test_a_walk_with_another_plan_is_refused(remote: Remote, kernel: Kernel, instead: Walk) -> None:
    carry_out = kernel.carry_out
    kernel.carry_out = lambda challenge, request: carry_out(challenge, instead)  # type: ignore[method-assign]
    with pytest.raises(LinkError):
        list(remote.walk(PLAN, [1, 2, 3]))


def test_a_missing_chunk_is_noticed(remote: Remote, kernel: Kernel) -> None:
    walk = remote.walk(PLAN, [1, 2, 3])
    next(walk)
    kernel.chunk += 1
    with pytest.raises(LinkError, match="not authentic"):
        next(walk)


def test_a_chunk_of_another_walk_by_the_same_plan_is_refused(remote: Remote, kernel: Kernel) -> None:
    walk = remote.walk(PLAN, [1, 2, 3])
    next(walk)
    kernel.began += 1
    with pytest.raises(LinkError, match="not authentic"):
        next(walk)


def test_a_chunk_of_another_walk_that_has_its_number_is_refused(remote: Remote, kernel: Kernel) -> None:
    """The agent gives a walk the number of another unfinished walk."""
    walk, other = remote.walk(PLAN, [1, 2, 3]), remote.walk(OTHER_PLAN, [1, 2, 3])
    next(walk), next(other)
    with pytest.raises(LinkError, match="not authentic"):
        next(walk)
    kernel.chunk = 0
    assert [row[0] for chunk in other for row in OTHER_PLAN.records(chunk.bulk)] == [0xA1]


def test_a_restarted_agent_is_asked_for_its_envelope(remote: Remote, kernel: Kernel) -> None:
    kernel.start()
    assert remote.read(0xFFFF_FFFF_8100_0000, 2) == b"\0\1"


def test_a_walk_that_an_agent_lost_is_reported(remote: Remote, kernel: Kernel) -> None:
    walk = remote.walk(PLAN, [1, 2, 3])
    next(walk)
    kernel.start()
    with pytest.raises(AgentError) as lost:
        next(walk)
    assert lost.value.code == "walk"


def test_the_walk_begun_longest_ago_is_forgotten_beyond_a_number(remote: Remote) -> None:
    walks = [remote.walk(PLAN, [1, 2, 3]) for _ in range(65)]
    for walk in walks:
        next(walk)
    with pytest.raises(AgentError) as forgotten:
        next(walks[0])
    assert forgotten.value.code == "walk"
    # The next one is asked for; this kernel has gone on to other walks, so its answer is another walk's.
    with pytest.raises(LinkError, match="not authentic"):
        next(walks[1])


@pytest.mark.parametrize("size", [1, HEAD.size - 1, HEAD.size, HEAD.size + 1, HEAD.size + REPORT.size + 15])
def test_sealed_answers_that_are_cut_short_are_refused(kernel: Kernel, size: int) -> None:
    whole = kernel.seal(question(bytes(16), Ask.READ, 0, 8, 8), data=b"12345678")
    assert sealed.parts(whole + whole) == [whole, whole]
    for before in (b"", whole):
        with pytest.raises(LinkError, match="cut short"):
            sealed.parts(before + whole[:size])


class Lying(Link):
    """A session with an agent that accepts any program."""

    def exchange(self, message: bytes, timeout: float | None = None) -> bytes:
        return encode(Answer([1]))


def test_injection_is_refused_in_sealed_mode(remote: Remote, ids: PrivateKey) -> None:
    """It comes from the agent, unauthenticated, and the read-ahead would keep it."""
    agent = SimpleNamespace(sealed=remote.sealed, link=Lying("ipc:///nowhere", ids, generate().public))
    target: Any = SimpleNamespace(name="web", agent=agent)
    with pytest.raises(InjectError, match=r"web's kernel encrypts .* injection is refused"):
        inject(target, b"\x7fELF")


# ---- envelopes -------------------------------------------------------------------------------------------------------


def test_only_its_addressee_opens_an_envelope(kernel: Kernel) -> None:
    other = generate()
    kernel.answer = lambda request: Answer([kernel.envelope.hex()])  # type: ignore[method-assign]
    with pytest.raises(LinkError, match="not authentic"):
        Unsealing(other).take(kernel.exchange)


def test_an_envelope_by_another_kernel_key_is_refused(ids: PrivateKey, kernel: Kernel) -> None:
    kernel.key = generate()
    kernel.start()
    with pytest.raises(LinkError, match=r"the guest's kernel key is .*another machine, or a new key"):
        greeted(kernel, Unsealing(ids, generate().public))


@pytest.mark.parametrize("values", [[], [None], ["zz"], ["00"], [5], ["00", "00"]])
def test_a_malformed_envelope_is_refused(ids: PrivateKey, kernel: Kernel, values: list[Any]) -> None:
    kernel.answer = lambda request: Answer(values)  # type: ignore[method-assign]
    with pytest.raises(LinkError):
        greeted(kernel, Unsealing(ids))


def test_a_kernel_that_does_not_encrypt_as_required_is_refused(ids: PrivateKey, kernel: Kernel) -> None:
    with pytest.raises(LinkError, match="serve --kernel-key"):
        greeted(kernel, Unsealing(ids, kernel.key.public), encrypts=False)
    greeted(kernel, Unsealing(ids), encrypts=False)


# ---- the agent -------------------------------------------------------------------------------------------------------


def test_an_agent_whose_kernel_encrypts_reads_nothing_in_the_clear() -> None:
    sealer = SimpleNamespace(envelope=lambda public: None, end=lambda session: None)
    agent = Agent(SimpleNamespace(page_offset=1), sealer=sealer)  # type: ignore[arg-type]
    for request in (Read(0, 8, 8), Lookup(0, 8), Walk(PLAN, [], bytes(24)), More(1)):
        refused = decode(agent.answer(b"", encode(request)))
        assert isinstance(refused, Failure)
        assert refused.code == "kernel-encryption"
    later = decode(agent.answer(b"", encode(Envelope("00"))))
    assert isinstance(later, Failure)
    assert "restart the agent" in later.text


def test_a_request_out_of_bounds_is_refused_in_sealed_mode_too() -> None:
    sealer = SimpleNamespace(answer=None)
    agent = Agent(SimpleNamespace(page_offset=0), sealer=sealer)  # type: ignore[arg-type]
    for request, code in (
        (Read(0, 8, 1 << 21), "oversize"),
        (Read(1, 8, 8), "physical"),
        (Lookup(4096, 8), "physical"),
        (Walk(PLAN, [], bytes(16)), "plan"),
        (Walk(PLAN, [[0, 4097]], bytes(24)), "plan"),
        (Envelope("00"), "malformed"),
    ):
        refused = decode(agent.answer(b"", encode(Sealing("key", "", bytes(16) + encode(request)))))
        assert isinstance(refused, Failure)
        assert refused.code == code
    for tags, bulk in (("", bytes(16)), ("not hexadecimal", bytes(16) + encode(Read(0, 8, 8)))):
        assert isinstance(decode(agent.answer(b"", encode(Sealing("key", tags, bulk)))), Failure)


def test_an_agent_that_reads_in_the_clear_seals_nothing() -> None:
    agent = Agent(SimpleNamespace())  # type: ignore[arg-type]
    for request in (Sealing("key", "", bytes(16) + encode(Read(0, 8, 8))), Envelope("00")):
        refused = decode(agent.answer(b"", encode(request)))
        assert isinstance(refused, Failure)
        assert refused.code == "kernel-encryption"
