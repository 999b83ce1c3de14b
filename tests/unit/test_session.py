"""Frames and sessions: whatever is not the next frame of this session, whole and unaltered, is never data."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.pair import Pair
from vmishim.errors import LinkError
from vmishim.wire import session as wire
from vmishim.wire.keys import PrivateKey, PublicKey, generate
from vmishim.wire.noise import TAG_SIZE
from vmishim.wire.session import (
    HEADER,
    MAX_FRAME,
    MAX_MESSAGE,
    VERSION,
    Initiator,
    Reason,
    RefusedError,
    Responder,
    Session,
    Sessions,
    refusal,
)

unhurried = settings(deadline=None)  # a loaded machine is no failure


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
def test_every_message_arrives_as_it_was(exchanges: list[tuple[bytes, bytes]]) -> None:
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
    welcome, _ = responder.accept(hello)
    with pytest.raises(LinkError):
        initiator.finish(data.draw(damaged(welcome)))


@unhurried
@given(st.data())
def test_only_the_next_frame_of_this_session_opens(data: st.DataObject) -> None:
    """Any frame that ever was on the wire, of two sessions between the same keys, in any order."""
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
def test_halves_of_two_frames_are_no_frame(head: int, tail: int) -> None:
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
    with pytest.raises(LinkError, match="frame 0 came where 1 was due"):
        pair.host.open(late)
    assert pair.agent.open(second) == b"second"
    assert pair.reply(b"in time") == b"in time"
    with pytest.raises(LinkError, match="no request waits"):
        pair.host.open(late)


def test_an_agent_seals_one_reply_a_request() -> None:
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


def test_a_frame_sent_back_to_its_sender_is_no_data() -> None:
    pair = Pair()
    request = pair.host.seal(b"request")
    with pytest.raises(LinkError, match="out of place"):
        pair.host.open(request)
    pair.agent.open(request)
    with pytest.raises(LinkError, match="out of place"):
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


def test_a_session_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_REQUESTS", 2)
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append)
    session = proven(sessions, agent.public, host)
    assert not session.spent
    session.open(sessions.answer(session.seal(b"2"), echo))
    assert session.spent
    with pytest.raises(LinkError, match="fresh handshake"):
        session.seal(b"3")
    monkeypatch.setattr(wire, "MAX_REQUESTS", 3)
    frame = session.seal(b"3")
    monkeypatch.setattr(wire, "MAX_REQUESTS", 2)
    assert reason(sessions.answer(frame, echo)) is Reason.UNKNOWN_SESSION
    assert ended == [session.id]


def test_a_wrong_agent_key_makes_no_session() -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, generate().public)
    answer = Sessions(agent, {host.public}).answer(initiator.hello(), echo)
    with pytest.raises(RefusedError, match="agent's public key has changed"):
        initiator.finish(answer)


def test_a_host_that_is_not_permitted_makes_no_session() -> None:
    host, agent = generate(), generate()
    initiator = Initiator(host, agent.public)
    answer = Sessions(agent, {generate().public}).answer(initiator.hello(), echo)
    with pytest.raises(RefusedError, match=r"the peer says \(not authenticated\).*not permitted"):
        initiator.finish(answer)


def test_nobody_but_the_agent_can_answer_a_hello() -> None:
    host, agent, forger = generate(), generate(), generate()
    initiator = Initiator(host, agent.public)
    initiator.hello()
    to_forger = Initiator(host, forger.public)
    welcome, _ = Responder(forger, {host.public}).accept(to_forger.hello())
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
        RefusedError, match=r"the peer says.*speaks wire version 1, this end speaks version 2"
    ) as caught:
        initiator.finish(answer)
    assert caught.value.reason is Reason.OTHER_VERSION


def test_a_frame_of_another_version_is_no_data() -> None:
    pair = Pair()
    frame = pair.host.seal(b"request")
    with pytest.raises(LinkError, match="wire version 9, this end speaks version 1"):
        pair.agent.open(bytes([9]) + frame[1:])


def test_two_versions_never_connect_even_if_the_network_alters_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    host, agent = generate(), generate()
    monkeypatch.setattr(wire, "PROLOGUE", b"vmishim wire 2")
    hello = Initiator(host, agent.public).hello()
    monkeypatch.undo()
    with pytest.raises(LinkError, match="not authentic"):
        Responder(agent, {host.public}).accept(hello)


@pytest.mark.parametrize("why", list(Reason))
def test_a_refusal_is_an_error_that_names_its_reason(why: Reason) -> None:
    assert reason(refusal(why)) is why
    with pytest.raises(LinkError, match="without a reason"):
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


def test_a_flood_of_hellos_moves_no_live_session() -> None:
    host, agent, ended = generate(), generate(), list[bytes]()
    sessions = Sessions(agent, {host.public}, on_end=ended.append, live=3, unproven=4)
    live = [proven(sessions, agent.public, host) for _ in range(3)]
    hello = Initiator(host, agent.public).hello()
    for _ in range(20):
        assert sessions.answer(hello, echo)[1] == wire.WELCOME
    assert sessions.live == 3
    assert "3 live, 4 unproven" in repr(sessions)
    assert not ended
    for session in live:
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
    assert len(Pair().host.seal(os.urandom(64))) == HEADER.size + 64 + TAG_SIZE == 98
