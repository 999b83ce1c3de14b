"""Frames and sessions: only the next frame of this session, complete and unaltered, is ever data."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.pair import Pair
from vmishim.errors import LinkError
from vmishim.wire import session as wire
from vmishim.wire.keys import PrivateKey, PublicKey, generate
from vmishim.wire.noise import TAG_SIZE, HandshakeState
from vmishim.wire.session import (
    HEADER,
    MAX_FRAME,
    MAX_MESSAGE,
    NONCE_SIZE,
    OVERHEAD,
    VERSION,
    Initiator,
    Reason,
    RefusedError,
    Responder,
    Session,
    refusal,
)
from vmishim.wire.sessions import DOUBTFUL_PER_KEY, UNPROVEN_PER_KEY, Answered, Sessions

unhurried = settings(deadline=None)  # a slow machine must not fail the test


def flip(frame: bytes, bit: int) -> bytes:
    bit %= len(frame) * 8
    return (int.from_bytes(frame, "little") ^ 1 << bit).to_bytes(len(frame), "little")


def damaged(frame: bytes) -> st.SearchStrategy[bytes]:
    """One bit flipped, cut anywhere, or with bytes added at either end."""
    return st.one_of(
        st.integers(0, len(frame) * 8 - 1).map(lambda bit: flip(frame, bit)),
        st.integers(0, len(frame) - 1).map(lambda size: frame[:size]),
        st.binary(min_size=1, max_size=40).map(lambda more: frame + more),
        st.binary(min_size=1, max_size=40).map(lambda more: more + frame),
    )


def echo(session_id: bytes, message: bytes) -> bytes:
    return b"echo " + message


def greeted(sessions: Sessions, agent: PublicKey, key: PrivateKey) -> Session:
    """A host's session with an agent that has only sent its welcome."""
    initiator = Initiator(key, agent)
    return initiator.finish(sessions.answer(initiator.hello(), echo))


def proven(sessions: Sessions, agent: PublicKey, key: PrivateKey) -> Session:
    session = greeted(sessions, agent, key)
    assert session.open(sessions.answer(session.seal(b"1"), echo)) == b"echo 1"
    return session


def reason(frame: bytes) -> Reason:
    with pytest.raises(RefusedError) as caught:
        Pair().host.open(frame)
    return caught.value.reason


@unhurried
@given(st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=200)), max_size=5))
def test_every_message_arrives_unchanged(exchanges: list[tuple[bytes, bytes]]) -> None:
    pair = Pair()
    assert pair.host.id == pair.agent.id
    assert pair.agent.remote == pair.host_key.public
    assert pair.host.remote == pair.agent_key.public
    for request, reply in exchanges:
        assert pair.ask(request) == request
        assert pair.reply(reply) == reply


@unhurried
@given(st.binary(max_size=60), st.data())
def test_a_damaged_frame_is_never_data_and_never_ends_the_session(message: bytes, data: st.DataObject) -> None:
    pair = Pair()
    request = pair.host.seal(message)
    with pytest.raises(LinkError):
        pair.agent.open(data.draw(damaged(request)))
    assert pair.agent.open(request) == message
    reply = pair.agent.seal(message)
    with pytest.raises(LinkError):
        pair.host.open(data.draw(damaged(reply)))
    assert pair.host.open(reply) == message


@unhurried
@given(st.data())
def test_a_damaged_handshake_makes_no_session(data: st.DataObject) -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    hello = initiator.hello()
    responder = Responder(agent, {host.public})
    with pytest.raises(LinkError):
        responder.accept(data.draw(damaged(hello)))
    welcome, *_ = responder.accept(hello)
    with pytest.raises(LinkError):
        initiator.finish(data.draw(damaged(welcome)))


@unhurried
@given(st.data())
def test_only_the_next_frame_of_this_session_opens(data: st.DataObject) -> None:
    """Tries every frame of two sessions between the same keys, in any order."""
    pair = Pair()
    other = Pair(pair.host_key, pair.agent_key)
    seen = [pair.hello, pair.welcome, other.hello, other.welcome]
    for turn in range(data.draw(st.integers(1, 4))):
        for each in (pair, other):
            request = each.host.seal(b"request %d" % turn)
            for frame in data.draw(st.lists(st.sampled_from(seen), max_size=3)):
                with pytest.raises(LinkError):
                    each.agent.open(frame)
            assert each.agent.open(request) == b"request %d" % turn
            reply = each.agent.seal(b"reply %d" % turn)
            seen.append(request)
            for frame in data.draw(st.lists(st.sampled_from(seen), max_size=3)):
                with pytest.raises(LinkError):
                    each.host.open(frame)
            assert each.host.open(reply) == b"reply %d" % turn
            seen.append(reply)


@unhurried
@given(st.integers(0, 200), st.integers(0, 200))
def test_halves_of_two_frames_are_refused(head: int, tail: int) -> None:
    one, two = Pair(), Pair()
    first, second = one.host.seal(bytes(90)), two.host.seal(bytes(90))
    spliced = first[:head] + second[tail:]
    for pair, whole in ((one, first), (two, second)):
        if spliced != whole:
            with pytest.raises(LinkError):
                pair.agent.open(spliced)


def test_a_reply_answers_the_last_request_only() -> None:
    pair = Pair()
    pair.ask(b"first")
    late = pair.agent.seal(b"late")
    second = pair.host.seal(b"second")
    with pytest.raises(LinkError, match="frame 0 came, but 1 was expected"):
        pair.host.open(late)
    assert pair.agent.open(second) == b"second"
    assert pair.reply(b"in time") == b"in time"
    with pytest.raises(LinkError, match="no request is waiting"):
        pair.host.open(late)


def test_an_agent_seals_one_reply_per_request() -> None:
    pair = Pair()
    with pytest.raises(LinkError, match="no request"):
        pair.agent.seal(b"unasked")
    pair.ask(b"request")
    pair.agent.seal(b"reply")
    with pytest.raises(LinkError, match="no request"):
        pair.agent.seal(b"another reply under the same number")


def test_a_request_that_had_no_reply_can_be_followed_by_the_next() -> None:
    pair = Pair()
    pair.ask(b"the agent fails at this one")
    assert pair.ask(b"and goes on") == b"and goes on"
    assert pair.reply(b"reply") == b"reply"


def test_a_frame_sent_back_to_its_sender_is_refused() -> None:
    pair = Pair()
    request = pair.host.seal(b"request")
    with pytest.raises(LinkError, match="not expected here"):
        pair.host.open(request)
    pair.agent.open(request)
    with pytest.raises(LinkError, match="not expected here"):
        pair.agent.open(pair.agent.seal(b"reply"))


def test_oversize() -> None:
    pair = Pair()
    message = bytes(MAX_MESSAGE + 1)
    with pytest.raises(LinkError, match="too long"):
        pair.host.seal(message)
    frame = pair.host.seal(message[1:])
    assert len(frame) == MAX_FRAME
    with pytest.raises(LinkError, match="too long"):
        pair.agent.open(frame + b"x")
    assert pair.agent.open(frame) == message[1:]


def test_a_session_has_a_request_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_REQUESTS", 2)
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append)
    session = proven(sessions, agent.public, host)
    assert not session.spent
    session.open(sessions.answer(session.seal(b"2"), echo))
    assert session.spent
    with pytest.raises(LinkError, match="new handshake"):
        session.seal(b"3")
    monkeypatch.setattr(wire, "MAX_REQUESTS", 3)
    frame = session.seal(b"3")
    monkeypatch.setattr(wire, "MAX_REQUESTS", 2)
    assert reason(sessions.answer(frame, echo)) is Reason.UNKNOWN_SESSION
    assert ended == [session.id]


def test_frames_beyond_the_limit_are_refused_though_they_are_authentic(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = Pair(), Pair()
    request = asked.host.seal(b"1")
    answered.agent.open(answered.host.seal(b"1"))
    reply = answered.agent.seal(b"2")
    monkeypatch.setattr(wire, "MAX_REQUESTS", 0)
    with pytest.raises(LinkError, match="request limit"):
        asked.agent.open(request)
    with pytest.raises(LinkError, match="request limit"):
        answered.host.open(reply)


def test_the_id_in_a_welcome_is_that_of_its_handshake() -> None:
    """The handshake does not cover it."""
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    welcome, *_ = Responder(agent, {host.public}).accept(initiator.hello())
    altered = HEADER.pack(VERSION, wire.WELCOME, bytes(8), 0) + welcome[HEADER.size :]
    with pytest.raises(LinkError, match="session id was altered"):
        initiator.finish(altered)


@pytest.mark.parametrize("header", [(wire.REPLY, 0), (wire.HELLO, 0), (wire.WELCOME, 1)])
def test_only_a_welcome_with_the_number_zero_answers_a_hello(header: tuple[int, int]) -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    welcome, session, _ = Responder(agent, {host.public}).accept(initiator.hello())
    kind, number = header
    with pytest.raises(LinkError, match="came instead of the answer to a hello"):
        initiator.finish(HEADER.pack(VERSION, kind, session.id, number) + welcome[HEADER.size :])


def test_a_wrong_agent_key_makes_no_session() -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, generate().public)
    answer = Sessions(agent, {host.public}).answer(initiator.hello(), echo)
    with pytest.raises(RefusedError, match="agent's key has changed"):
        initiator.finish(answer)


def test_a_host_that_is_not_permitted_makes_no_session() -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    answer = Sessions(agent, {generate().public}).answer(initiator.hello(), echo)
    with pytest.raises(RefusedError, match=r"the peer says \(not authenticated\).*not permitted"):
        initiator.finish(answer)


def test_only_the_agent_can_answer_a_hello() -> None:
    host, agent, forger = generate(), generate(), generate()
    initiator = Initiator(host, agent.public)
    initiator.hello()
    to_forger = Initiator(host, forger.public)
    welcome, *_ = Responder(forger, {host.public}).accept(to_forger.hello())
    with pytest.raises(LinkError, match="not authentic"):
        initiator.finish(welcome)


def test_another_version_is_named_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    initiator = Initiator(host, agent.public)
    newer = bytes([VERSION + 1]) + initiator.hello()[1:]
    answer = sessions.answer(newer, echo)
    assert reason(answer) is Reason.OTHER_VERSION
    monkeypatch.setattr(wire, "VERSION", VERSION + 1)
    with pytest.raises(
        RefusedError, match=r"the peer says.*speaks wire version 2, this end speaks version 3"
    ) as caught:
        initiator.finish(answer)
    assert caught.value.reason is Reason.OTHER_VERSION


def test_each_reason_to_refuse_has_a_number_and_a_text_of_its_own() -> None:
    """The numbers are those of version 1: two versions understand each other's refusals."""
    numbers = {name: reason.value for name, reason in Reason.__members__.items()}
    names = ("OTHER_VERSION", "UNKNOWN_SESSION", "NOT_PERMITTED", "MALFORMED", "BUSY", "FAULT")
    assert numbers == dict(zip(names, range(1, 7), strict=True))
    assert len({str(RefusedError(reason)) for reason in Reason}) == 6


def test_a_frame_of_another_version_is_refused() -> None:
    pair = Pair()
    frame = pair.host.seal(b"request")
    with pytest.raises(LinkError, match="wire version 9, this end speaks version 2"):
        pair.agent.open(bytes([9]) + frame[1:])


def test_two_versions_never_connect_even_if_the_network_alters_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    host, agent = generate(), generate()
    monkeypatch.setattr(wire, "PROLOGUE", b"vmishim wire 3")
    hello = Initiator(host, agent.public).hello()
    monkeypatch.undo()
    with pytest.raises(LinkError, match="not authentic"):
        Responder(agent, {host.public}).accept(hello)


@pytest.mark.parametrize("why", list(Reason))
def test_a_refusal_is_an_error_that_names_its_reason(why: Reason) -> None:
    assert reason(refusal(why)) is why
    with pytest.raises(LinkError, match="without a valid reason"):
        Pair().host.open(refusal(why)[:-1] + b"\xee")


# The agent's table


@unhurried
@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_served(frame: bytes) -> None:
    def never(session_id: bytes, message: bytes) -> bytes:
        raise AssertionError("served")

    answer = Sessions(generate(), set()).answer(frame, never)
    assert answer[1] == wire.REFUSAL
    assert len(answer) == HEADER.size + 1


@unhurried
@given(st.data())
def test_a_damaged_request_is_refused_and_the_session_lives(data: st.DataObject) -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    session = proven(sessions, agent.public, host)
    frame = session.seal(b"2")
    answer = sessions.answer(data.draw(damaged(frame)), echo)
    assert answer[1] in (wire.REFUSAL, wire.WELCOME)
    assert session.open(sessions.answer(frame, echo)) == b"echo 2"
    assert reason(sessions.answer(frame, echo)) is Reason.MALFORMED  # a replay


def test_an_agent_refuses_a_refusal() -> None:
    for why in Reason:
        assert reason(Sessions(generate(), set()).answer(refusal(why), echo)) is Reason.MALFORMED


def test_an_unknown_session_is_refused() -> None:
    pair = Pair()
    assert reason(Sessions(pair.agent_key, {pair.host_key.public}).answer(pair.host.seal(b""), echo)) is (
        Reason.UNKNOWN_SESSION
    )


def hello_made(at_ns: int, host: PrivateKey, agent: PublicKey) -> tuple[Initiator, bytes]:
    """A hello of a host whose clock says ``at_ns``, and what finishes its handshake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: at_ns)
        initiator = Initiator(host, agent)
        return initiator, initiator.hello()


def test_replayed_hellos_end_no_live_session() -> None:
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append, live=3)
    old = [hello_made(number, host, agent.public)[1] for number in range(1, 50)]
    live = [proven(sessions, agent.public, host) for _ in range(3)]
    for hello in old * 3:
        assert sessions.answer(hello, echo)[1] == wire.WELCOME
    assert f"3 live, {DOUBTFUL_PER_KEY} unproven" in repr(sessions)
    assert not ended
    for session in live:
        assert session.open(sessions.answer(session.seal(b"x"), echo)) == b"echo x"


@pytest.mark.parametrize("at", range(1, HEADER.size))
def test_a_hello_has_no_other_header_than_a_hellos(at: int) -> None:
    host, agent = generate(), generate()
    hello = Initiator(host, agent.public).hello()
    altered = hello[:at] + bytes([hello[at] ^ 1]) + hello[at + 1 :]
    with pytest.raises(LinkError):
        Responder(agent, {host.public}).accept(altered)
    Responder(agent, {host.public}).accept(hello)


def test_the_same_hello_gets_the_same_welcome_and_slot() -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    initiator = Initiator(host, agent.public)
    hello = initiator.hello()
    first = sessions.handle(hello, echo)
    assert (first.outcome, first.key) == ("greeted", host.public)
    for _ in range(20):
        assert sessions.handle(hello, echo) == Answered(first.frame)  # sending it again proves nothing
    assert "1 unproven" in repr(sessions)
    session = initiator.finish(first.frame)
    assert session.open(sessions.answer(session.seal(b"1"), echo)) == b"echo 1"


@unhurried
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 60))
def test_no_recording_displaces_a_hello_that_was_just_sent(replayed: list[int], at: int) -> None:
    """A restarted agent has seen no hello yet, but every recording is older than the new hello."""
    host, agent = HELLO_HOST, HELLO_AGENT
    sessions = Sessions(agent, {host.public})
    welcome = b""
    initiator, hello = hello_made(1000, host, agent.public)
    for number in replayed[:at]:
        sessions.answer(RECORDED[number], echo)
    welcome = sessions.answer(hello, echo)
    for number in replayed[at:]:
        sessions.answer(RECORDED[number], echo)
    session = initiator.finish(welcome)
    assert session.open(sessions.answer(session.seal(b"1"), echo)) == b"echo 1"


HELLO_HOST, HELLO_AGENT = generate(), generate()
RECORDED = [hello_made(number, HELLO_HOST, HELLO_AGENT.public)[1] for number in range(41)]


def test_unproven_sessions_are_bounded_by_key() -> None:
    hosts, agent = [generate(), generate()], generate()
    sessions = Sessions(agent, {host.public for host in hosts})
    waiting, hello = hello_made(0, hosts[1], agent.public)
    welcome = sessions.answer(hello, echo)
    for number in range(30):
        sessions.answer(hello_made(number, hosts[0], agent.public)[1], echo)
    assert f"{UNPROVEN_PER_KEY + 1} unproven" in repr(sessions)
    session = waiting.finish(welcome)
    assert session.open(sessions.answer(session.seal(b"1"), echo)) == b"echo 1"


def test_a_hello_older_than_all_that_wait_is_refused() -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    for number in range(UNPROVEN_PER_KEY):
        sessions.answer(hello_made(10 + number, host, agent.public)[1], echo)
    assert reason(sessions.answer(hello_made(9, host, agent.public)[1], echo)) is Reason.BUSY
    assert sessions.handle(hello_made(30, host, agent.public)[1], echo).outcome == "greeted"


def test_the_oldest_hello_makes_room_whatever_their_order() -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    made = [hello_made(number, host, agent.public) for number in range(UNPROVEN_PER_KEY, 0, -1)]
    welcomes = [sessions.answer(hello, echo) for _, hello in made]
    sessions.answer(hello_made(100, host, agent.public)[1], echo)
    *kept, oldest = [initiator.finish(welcome) for (initiator, _), welcome in zip(made, welcomes, strict=True)]
    assert reason(sessions.answer(oldest.seal(b"1"), echo)) is Reason.UNKNOWN_SESSION
    assert kept[0].open(sessions.answer(kept[0].seal(b"1"), echo)) == b"echo 1"


@pytest.mark.parametrize(("made_at", "outcome"), [(49, "refused"), (50, "refused"), (51, "greeted")])
def test_a_hello_as_old_as_the_last_that_was_proven_may_be_a_recording(made_at: int, outcome: str) -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    initiator, hello = hello_made(50, host, agent.public)
    session = initiator.finish(sessions.answer(hello, echo))
    sessions.answer(session.seal(b"1"), echo)
    assert sessions.handle(hello_made(made_at, host, agent.public)[1], echo).outcome == outcome


def test_nothing_is_left_of_sessions_that_were_closed() -> None:
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append)
    live = proven(sessions, agent.public, host)
    initiator = Initiator(host, agent.public)
    hello = initiator.hello()
    welcome = sessions.answer(hello, echo)
    waiting = initiator.finish(welcome)
    sessions.close()
    assert ended == [live.id]
    assert "0 live, 0 unproven" in repr(sessions)
    assert reason(sessions.answer(waiting.seal(b"1"), echo)) is Reason.UNKNOWN_SESSION
    assert sessions.answer(hello, echo) != welcome


def test_a_host_whose_clock_was_set_back_still_gets_in() -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    proven(sessions, agent.public, host)
    initiator, hello = hello_made(5, host, agent.public)
    answered = sessions.handle(hello, echo)
    assert answered.outcome == "refused"  # it may be a recording, so it has proved nothing
    session = initiator.finish(answered.frame)
    assert session.open(sessions.answer(session.seal(b"1"), echo)) == b"echo 1"


@pytest.mark.parametrize("payload", [b"", bytes(7), bytes(9), bytes(1000)])
def test_a_hello_carries_its_time_and_nothing_else(payload: bytes) -> None:
    host, agent = generate(), generate()
    handshake = HandshakeState(wire.PROLOGUE, host, agent.public)
    hello = HEADER.pack(VERSION, wire.HELLO, bytes(8), 0) + handshake.write(payload)
    with pytest.raises(LinkError, match="payload of 8 bytes"):
        Responder(agent, {host.public}).accept(hello)


def test_a_welcome_carries_nothing() -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    handshake = HandshakeState(wire.PROLOGUE, agent)
    handshake.read(initiator.hello()[HEADER.size :])
    message = handshake.write(b"x")
    with pytest.raises(LinkError, match="payload"):
        initiator.finish(HEADER.pack(VERSION, wire.WELCOME, handshake.hash[:8], 0) + message)


# A machine that is restored from a saved state


@pytest.mark.parametrize("size", [8, 16, wire.SHORT_MAX - 1, wire.SHORT_MAX, wire.SHORT_MAX + 1, 100_000])
def test_a_restored_agent_never_seals_two_messages_under_one_nonce(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The attack on AES-GCM with a repeated nonce: the two ciphertexts' difference is the two messages'."""
    monkeypatch.setattr(os, "urandom", bytes)  # its random generator was restored too
    pair = Pair()
    request = pair.host.seal(b"read")
    saved = copy.copy(pair.agent)
    assert pair.agent.open(request) == saved.open(request) == b"read"  # the host of the machine replays the request
    secret, known = bytes(size - 1) + b"1", bytes(size - 1) + b"2"  # they differ in their last bits only
    one, two = pair.agent.seal(secret), saved.seal(known)
    assert one[: HEADER.size] == two[: HEADER.size]
    bodies = [frame[HEADER.size + NONCE_SIZE :] for frame in (one, two)]
    difference = bytes(a ^ b for a, b in zip(*bodies, strict=True))
    assert bytes(a ^ b for a, b in zip(difference, known, strict=False)) != secret
    assert one[HEADER.size : HEADER.size + NONCE_SIZE] != two[HEADER.size : HEADER.size + NONCE_SIZE]
    assert pair.host.open(one) == secret


def test_a_message_that_is_the_hash_of_another_has_another_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long message is hashed first: a short one must never stand for it."""
    monkeypatch.setattr(os, "urandom", bytes)
    pair = Pair()
    saved = copy.copy(pair.host)
    long = bytes(wire.SHORT_MAX + 1)
    short = pair.host._hash(bytes(NONCE_SIZE), b"", long)
    assert len(short) <= wire.SHORT_MAX
    one, two = pair.host.seal(long), saved.seal(short)
    assert one[: HEADER.size] == two[: HEADER.size]
    assert one[HEADER.size : HEADER.size + NONCE_SIZE] != two[HEADER.size : HEADER.size + NONCE_SIZE]


def test_a_restored_agent_that_seals_the_same_message_again_reveals_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    pair = Pair()
    request = pair.host.seal(b"read")
    saved = copy.copy(pair.agent)
    pair.agent.open(request), saved.open(request)
    assert pair.agent.seal(b"the same") == saved.seal(b"the same")


def test_a_restored_agent_makes_other_session_keys_for_another_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    host, agent = generate_from(1), generate_from(2)
    hellos = []
    for at in (1, 2):
        initiator = Initiator(host, agent.public)
        initiator._handshake._ephemeral = generate_from(10 + at)
        hellos.append(initiator.hello())
    first, second, again = (Responder(agent, {host.public}).accept(hello)[0] for hello in (*hellos, hellos[0]))
    ephemeral = slice(HEADER.size, HEADER.size + 32)
    assert first[ephemeral] != second[ephemeral]
    assert first == again


def generate_from(number: int) -> PrivateKey:
    return PrivateKey(bytes([number]) * 32)


# Room for every key


def test_a_key_that_takes_all_sessions_ends_its_own() -> None:
    greedy, modest, agent, ended = generate(), generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {greedy.public, modest.public}, on_end=ended.append, live=8, live_per_key=6)
    kept = proven(sessions, agent.public, modest)
    many = [proven(sessions, agent.public, greedy) for _ in range(20)]
    assert sessions.live == 7
    assert ended == [session.id for session in many[:14]]
    assert kept.open(sessions.answer(kept.seal(b"x"), echo)) == b"echo x"
    assert sessions.key_of(kept.id) == modest.public
    assert sessions.key_of(many[0].id) is None


def test_when_all_sessions_are_taken_the_key_with_most_loses_one() -> None:
    greedy, modest, agent, ended = generate(), generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {greedy.public, modest.public}, on_end=ended.append, live=4)
    many = [proven(sessions, agent.public, greedy) for _ in range(4)]
    kept = [proven(sessions, agent.public, modest) for _ in range(2)]
    assert ended == [session.id for session in many[:2]]
    for session in (*kept, *many[2:]):
        assert session.open(sessions.answer(session.seal(b"x"), echo)) == b"echo x"


def test_the_least_recently_used_session_makes_room() -> None:
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append, live=2)
    one, two = proven(sessions, agent.public, host), proven(sessions, agent.public, host)
    one.open(sessions.answer(one.seal(b"used again"), echo))
    proven(sessions, agent.public, host)
    assert ended == [two.id]
    assert reason(sessions.answer(two.seal(b""), echo)) is Reason.UNKNOWN_SESSION
    sessions.close()
    assert len(ended) == 3
    assert sessions.live == 0


def test_a_revoked_key_is_out_at_its_next_request() -> None:
    host, agent, ended = generate(), generate(), list[bytes]()
    permitted = {host.public}
    sessions = Sessions(agent, permitted, on_end=ended.append)
    session = proven(sessions, agent.public, host)
    permitted.clear()
    assert reason(sessions.answer(session.seal(b""), echo)) is Reason.NOT_PERMITTED
    assert ended == [session.id]


def test_a_bug_in_the_agent_is_seen_and_its_session_goes_on() -> None:
    host, agent = generate(), generate()
    sessions = Sessions(agent, {host.public})
    session = proven(sessions, agent.public, host)

    def broken(session_id: bytes, message: bytes) -> bytes:
        raise ZeroDivisionError

    failures: list[tuple[Callable[[bytes, bytes], bytes], type[Exception]]] = [
        (broken, ZeroDivisionError),
        (lambda session_id, message: bytes(MAX_MESSAGE + 1), LinkError),
    ]
    for serve, error in failures:
        with pytest.raises(error):
            sessions.answer(session.seal(b""), serve)
    assert session.open(sessions.answer(session.seal(b"on"), echo)) == b"echo on"


def test_no_secret_shows() -> None:
    pair = Pair()
    sessions = Sessions(pair.agent_key, {pair.host_key.public})
    shown = f"{pair.host!r}{pair.agent!r}{sessions!r}{pair.host_key!r}"
    assert pair.host_key.raw.hex() not in shown
    assert repr(pair.host_key.raw) not in shown


def test_frame_overhead_is_as_documented() -> None:
    assert len(Pair().host.seal(os.urandom(64))) == OVERHEAD + 64 == HEADER.size + NONCE_SIZE + 64 + TAG_SIZE == 110
