"""What the soak holds listings to, and the connection that it cuts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from trials.soak.forwarder import Forwarder
from trials.soak.truth import Entry, Interval, Truth

STAYS: Entry = ("stays", 1, 0)
PASSES: Entry = ("passes", 2, 0)


@pytest.fixture
def truth() -> Truth:
    """One process that stays."""
    made = Truth()
    made.plant("process", "stays", STAYS)
    return made


def begin(truth: Truth, number: int, entry: Entry) -> None:
    truth.tell(number, "starting", "process", entry[0])
    truth.tell(number, "begun", list(entry))


def end(truth: Truth, number: int) -> None:
    truth.tell(number, "ending")
    truth.tell(number, "ended")


def closed(interval: Interval) -> Interval:
    interval.close()
    return interval


def listed(*entries: Entry) -> list[tuple[str, Entry]]:
    return [(str(entry[0]), entry) for entry in entries]


@pytest.mark.parametrize(
    "entries",
    [(), (STAYS, STAYS), (("stays", 1, 7),), (STAYS, PASSES)],
    ids=["not listed", "listed twice", "of another user", "with one that never was"],
)
def test_a_listing_that_differs_is_wrong(truth: Truth, entries: tuple[Entry, ...]) -> None:
    interval = closed(Interval(truth))
    assert interval.wrong("process", listed(STAYS)) == []
    (said,) = interval.wrong("process", listed(*entries))
    assert ("stays" in said) != (PASSES in entries)


def test_what_ended_before_is_not_there(truth: Truth) -> None:
    begin(truth, 1, PASSES)
    end(truth, 1)
    interval = closed(Interval(truth))
    assert interval.wrong("process", listed(STAYS)) == []
    assert len(interval.wrong("process", listed(STAYS, PASSES))) == 1


@pytest.mark.parametrize("change", ["begins", "ends", "begins and ends"])
def test_what_comes_or_goes_meanwhile_may_be_listed_once(truth: Truth, change: str) -> None:
    if change == "ends":
        begin(truth, 1, PASSES)
    interval = Interval(truth)
    if "begins" in change:
        begin(truth, 1, PASSES)
    if "ends" in change:
        end(truth, 1)
    interval.close()
    assert interval.wrong("process", listed(STAYS)) == []
    assert interval.wrong("process", listed(STAYS, PASSES)) == []
    assert len(interval.wrong("process", listed(STAYS, PASSES, PASSES))) == 1


def test_what_is_there_throughout_has_to_be_listed_as_it_is(truth: Truth) -> None:
    begin(truth, 1, PASSES)
    interval = closed(Interval(truth))
    assert interval.wrong("process", listed(STAYS, PASSES)) == []
    assert len(interval.wrong("process", listed(STAYS))) == 1
    # A key may come again.
    end(truth, 1)
    begin(truth, 2, ("passes", 3, 0))
    assert len(closed(Interval(truth)).wrong("process", listed(STAYS, PASSES))) == 1


def test_kinds_are_apart(truth: Truth) -> None:
    truth.plant("module", "stays", ("stays",))
    assert closed(Interval(truth)).wrong("module", listed(("stays",))) == []


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that sends back what comes."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(100):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.fixture
def forwarder(echo: int) -> Iterator[Forwarder]:
    made = Forwarder(echo)
    yield made
    made.close()


def connect(forwarder: Forwarder) -> socket.socket:
    return socket.create_connection(("127.0.0.1", forwarder.port), timeout=10)


def test_a_forwarder_carries_both_directions(forwarder: Forwarder) -> None:
    with connect(forwarder) as one, connect(forwarder) as other:
        for each, data in ((one, b"1"), (other, b"2"), (one, b"3")):
            each.sendall(data)
            assert each.recv(10) == data


def test_a_forwarder_that_is_cut_ends_connections_and_accepts_none(forwarder: Forwarder) -> None:
    with connect(forwarder) as one:
        one.sendall(b"1")
        assert one.recv(10) == b"1"
        forwarder.cut()
        assert one.recv(10) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(forwarder)
    forwarder.resume()
    with connect(forwarder) as one:
        one.sendall(b"2")
        assert one.recv(10) == b"2"


def test_a_stalled_forwarder_holds_data_back(forwarder: Forwarder) -> None:
    with connect(forwarder) as one:
        one.sendall(b"1")
        assert one.recv(10) == b"1"
        forwarder.stall()
        one.sendall(b"2")
        with connect(forwarder) as other:
            other.sendall(b"3")
            one.settimeout(0.1)
            with pytest.raises(TimeoutError):
                one.recv(10)
            forwarder.resume()
            one.settimeout(10)
            assert (one.recv(10), other.recv(10)) == (b"2", b"3")
