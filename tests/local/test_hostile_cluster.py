"""Workers and schedulers of a Dask cluster that send code: none of it runs here, and each guest still has an answer."""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from tests.ground import dask
from tests.ground.dask import Hostile, Mark, distributed, marked
from tests.until import until
from vmishim import isolated
from vmishim.errors import LinkError
from vmishim.guests.domains import Domain
from vmishim.inspection import cluster
from vmishim.inspection.cluster import Scheduler
from vmishim.watching.rounds import Guest
from vmishim.watching.schedule import Schedule
from vmishim.watching.session import Seen
from vmishim.watching.workers import Workers

to_serialize: Any = distributed.protocol.to_serialize
ToPickle: Any = import_module("distributed.protocol.serialize").ToPickle

GUEST = Domain("web-1", ramfile="/nowhere")
WITHOUT_HOOK = f"""
import sys
sys.path.insert(0, {isolated.FOLDER!r})
from vmishim.inspection import cluster_client
cluster_client.refuse = lambda *_: None
cluster_client.main()
"""

Payload = Callable[[Any, str], Any]
"""Makes a message that carries a `Mark`, for the task with this key."""


def erred(key: str, exception: Any, traceback: Any = None) -> list[dict[str, Any]]:
    """The message that a task failed."""
    return [{"op": "task-erred", "key": key, "exception": exception, "traceback": traceback}]


def warned(message: bytes) -> list[dict[str, Any]]:
    """The message that a worker warns."""
    return [{"op": "event", "topic": "warn", "event": (0, {"message": message})}]


MESSAGES: dict[str, tuple[str, Payload]] = {
    "metadata": ("identity", lambda mark, _: {"type": "Scheduler", "workers": ToPickle(mark)}),
    "whole reply": ("identity", lambda mark, _: ToPickle(mark)),
    "registration": ("stream-start", lambda mark, _: [{"op": "stream-start", "warning": ToPickle(mark)}]),
    "result": ("gather", lambda mark, key: {"status": "OK", "data": {key: to_serialize(mark)}}),
    "result's type": ("op", lambda mark, key: [{"op": "key-in-memory", "key": key, "type": pickle.dumps(mark)}]),
    "exception": ("op", lambda mark, key: erred(key, pickle.dumps(mark))),
    "serialized exception": ("op", lambda mark, key: erred(key, to_serialize(mark))),
    "traceback": ("op", lambda mark, key: erred(key, pickle.dumps("text"), pickle.dumps(mark))),
    "error": ("op", lambda mark, _: [{"status": "error", "exception": pickle.dumps(mark)}]),
    "warning": ("op", lambda mark, _: warned(pickle.dumps(mark))),
    "heartbeat": ("op", lambda mark, _: [{"op": "adjust-heartbeat-interval", "interval": ToPickle(mark)}]),
}


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def asked(scheduler: Scheduler, deadline: float) -> str:
    """The error of the only guest, or of the scheduler."""
    try:
        (answer,) = cluster.by_dask(scheduler, [GUEST], "ps", deadline=deadline)
    except LinkError as error:
        return str(error)
    assert (answer.domain, answer.entries) == ("web-1", ())
    return answer.error


@pytest.mark.parametrize("name", MESSAGES)
def test_no_message_of_a_scheduler_runs_code(
    name: str, marks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    attack(name, marks, lambda hostile: hostile.sent.is_set())
    assert marked(marks) == set()
    # The very same child without its hook shows that the message arrives where it is unpickled.
    monkeypatch.setattr(isolated, "module", lambda *_: [sys.executable, "-I", "-c", WITHOUT_HOOK])
    attack(name, marks, lambda _: bool(marked(marks)))
    assert capfd.readouterr() == ("", "")


def attack(name: str, marks: Path, done: Callable[[Hostile], bool]) -> None:
    """Ask a hostile scheduler, with more time if a busy machine did not come as far. Some messages leave Dask's client
    waiting until the deadline."""
    where, payload = MESSAGES[name]
    for deadline in (4.0, 8.0, 16.0, 32.0):
        with closing(Hostile(where, lambda key: payload(Mark(str(marks)), key))) as hostile:
            assert asked(Scheduler(hostile.address), deadline)
            if done(hostile):
                return
    pytest.fail("the message did not arrive")


@pytest.mark.parametrize("name", ["metadata", "exception", "warning"])
def test_no_message_of_a_scheduler_runs_code_of_a_watch(name: str, marks: Path) -> None:
    where, payload = MESSAGES[name]
    answered: SimpleQueue[Seen] = SimpleQueue()
    with closing(Hostile(where, lambda key: payload(Mark(str(marks)), key))) as hostile:
        workers = Workers(Scheduler(hostile.address), lambda _, seen: answered.put(seen))
        with closing(workers):
            workers.ask(Guest(GUEST, Schedule(1.0, 0.0, lambda: 0.5)))
            until(lambda: not answered.empty(), what="an answer, or the end of the child")
            assert hostile.sent.is_set()
    assert marked(marks) == set()


def test_a_scheduler_cannot_print(capfd: pytest.CaptureFixture[str]) -> None:
    event = {"op": "event", "topic": "print", "event": (0, {"args": ("\x1b[2J",), "file": 2})}
    with closing(Hostile("op", lambda _: [event, {**event, "event": (0, {"args": ("\x1b[2J",)})}])) as hostile:
        assert asked(Scheduler(hostile.address), deadline=60.0).startswith("the worker failed: ")
        assert hostile.sent.is_set()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Scheduler]]:
    with dask.cluster(workers=1, folder=tmp_path_factory.mktemp("tls")) as made:
        yield made


def poison(folder: str, how: str) -> None:
    """Make the worker that runs this answer so."""
    from vmishim.inspection import cluster

    mark = Mark(folder)

    def hostile(*_: Any) -> Any:
        return {"is": mark, "holds": [b"", mark], "bytes": type("Bytes", (bytes,), {})()}[how]

    def failed(*_: Any, **__: Any) -> dict[str, Any]:
        wrapped = distributed.protocol.to_serialize(mark)
        texts = {"exception_text": "", "traceback_text": ""}
        return {"status": "error", "exception": wrapped, "traceback": wrapped} | texts

    cluster.plainly = hostile  # type: ignore[assignment]
    # Dask's own function would unpickle the exception in the worker.
    distributed.worker.error_message = failed


@pytest.mark.parametrize("how", ["is", "holds", "bytes", "raises"])
def test_no_result_of_a_worker_runs_code(how: str, workers: tuple[Any, Scheduler], marks: Path) -> None:
    client, scheduler = workers
    client.run(poison, str(marks), how)
    error = asked(scheduler, deadline=30.0)
    assert error.startswith("the worker ")
    assert marked(marks) == set()


def test_no_private_key_leaves_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a scheduler is sent for a guest: the entry, with the path of the key."""
    from vmishim.wire.keys import generate, save_private

    key = generate()
    save_private(tmp_path / "key", key)
    secret = (tmp_path / "key").read_bytes().split()[-1]
    with closing(Hostile("op", lambda _: [])) as hostile:
        domain = Domain("web-1", agent="tcp://10.0.0.5:5555", agent_key=key.public.text, key=str(tmp_path / "key"))
        assert list(cluster.by_dask(Scheduler(hostile.address), [domain], "ps", deadline=60.0))
    assert str(tmp_path / "key").encode() in hostile.graph
    assert secret not in hostile.graph
    assert base64.b64decode(secret) not in hostile.graph


def test_a_scheduler_without_our_ca_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    with dask.cluster(workers=1, folder=tmp_path) as (_, scheduler):
        others = dask.tls_files(dask.distributed.Security.temporary(), tmp_path / "theirs")
        told = asked(Scheduler(scheduler.address, others), deadline=10.0)
    assert told.startswith(f"no Dask scheduler answers at {scheduler.address}: ")
    assert "certificate" in told.lower()
