"""What workers of a cluster send: only plain data of the right shape is a list, and only TLS leaves this machine."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmishim.errors import LinkError
from vmishim.guests.domains import Domain
from vmishim.inspection import cluster, fleet
from vmishim.inspection.cluster import KINDS, Scheduler, engine, error_line, parsed, plain
from vmishim.inspection.cluster_client import refuse
from vmishim.inspection.lists import MARKS_MAX
from vmishim.inspection.objects import Task

GUEST = Domain("web-1", ramfile="/nowhere")
TASKS = [Task(1, 1, 0, 0, "init\x1b\udc80\u202e", "sleeping", 2**64 - 1), Task(2, 2, 1, 2**32 - 1, "", "running", 0)]
WRONG = {
    "no JSON": b"\x80\x04.\n",
    "a dict": b"{}\n",
    "too few": b"[1]\n",
    "a number too large": plain([Task(2**64, 1, 0, 0, "x", "running", 0)]),
    "a negative number": plain([Task(-1, 1, 0, 0, "x", "running", 0)]),
    "a bool": json.dumps([True, 1, 0, 0, "x", "running", 0, ""]).encode(),
    "a float": json.dumps([1.0, 1, 0, 0, "x", "running", 0, ""]).encode(),
    "a list as a name": json.dumps([1, 1, 0, 0, ["x"], "running", 0, ""]).encode(),
    "a long name": plain([Task(1, 1, 0, 0, "x" * (cluster.TEXT_MAX + 1), "running", 0)]),
    "a long line": b" " * (cluster.LINE_MAX + 1) + plain(TASKS),
    "deep": b"[" * cluster.LINE_MAX,
    "nobody's name": json.dumps([1, 1, 0, 0, None, "running", 0, ""]).encode(),
    "no damage": b'{"damage": 1}\n',
    "more than damage": b'{"damage": "x", "more": 1}\n',
    "too much damage": plain([], ["x"] * (MARKS_MAX + 2)),
    "a long damage": json.dumps({"damage": "x" * (cluster.ERROR_MAX + 1)}).encode(),
    "an error after a list": plain(TASKS) + error_line("no"),
}


def test_a_list_arrives_as_it_was() -> None:
    assert parsed(GUEST, "ps", plain(TASKS)) == fleet.Answer("web-1", TASKS, damage=[])
    damaged = [replace(TASKS[0], uid=None, unreadable="cred of 1 init: it is gone")]
    assert parsed(GUEST, "ps", plain(damaged, ["cred", "\x1b"])) == fleet.Answer(
        "web-1", damaged, damage=["cred", "\x1b"]
    )
    assert parsed(GUEST, "ps", b"") == fleet.Answer("web-1", [], damage=[])
    assert parsed(GUEST, "ps", error_line("it is gone")) == fleet.Answer("web-1", error="it is gone")
    assert KINDS.keys() == fleet.LISTS.keys()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_list_is_an_error(name: str) -> None:
    answer = parsed(GUEST, "ps", WRONG[name])
    assert answer.error.endswith("of the worker's answer is malformed")
    assert answer.entries == ()


@given(st.binary() | st.binary().map(lambda data: plain(TASKS) + data), st.sampled_from(sorted(KINDS)))
def test_any_bytes_are_a_list_or_an_error(data: bytes, what: str) -> None:
    answer = parsed(GUEST, what, data)
    assert all(type(entry) is KINDS[what] for entry in answer.entries)
    assert not (answer.entries and answer.error)


def test_a_worker_returns_an_error_as_plain_bytes() -> None:
    told = cluster.plainly(GUEST, "ps", "batch")
    assert type(told) is bytes
    assert "/nowhere" in parsed(GUEST, "ps", told).error


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "127.8.9.1:1", "[::1]:8786"])
def test_plain_tcp_is_for_this_machine_if_asked_for(address: str) -> None:
    assert Scheduler.named(f"dask+tcp://{address}") == Scheduler(f"tcp://{address}")
    assert Scheduler.named(f"dask://{address}").address == f"tls://{address}"


@pytest.mark.parametrize("address", ["10.0.0.9:8786", "0.0.0.0:1", "localhost:8786", "[fe80::1]:1", "127.0.0.1.evil:1"])
def test_plain_tcp_never_leaves_this_machine(address: str) -> None:
    with pytest.raises(LinkError, match="would send unprotected TCP over a network; give dask://"):
        engine(f"dask+tcp://{address}")


@pytest.mark.parametrize(
    ("number", "mode", "why"),
    [
        (0, 0o666, "other users can change it; run: chmod go-w"),
        (1, 0o664, "other users can change it; run: chmod go-w"),
        (2, 0o644, "other users can access this private key; run: chmod 600"),
    ],
)
def test_files_of_tls_are_trusted_as_keys_are(tmp_path: Path, number: int, mode: int, why: str) -> None:
    tls = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    for file in tls:
        file.touch(0o600)
    engine("dask://10.0.0.9:8786", [str(file) for file in tls])
    tls[number].chmod(mode)
    with pytest.raises(LinkError, match=f"^--engine-tls {tls[number]}: {why}"):
        engine("dask://10.0.0.9:8786", [str(file) for file in tls])
    tls[number].unlink()
    with pytest.raises(LinkError, match=f"^--engine-tls {tls[number]}: No such file"):
        engine("dask://10.0.0.9:8786", [str(file) for file in tls])


@pytest.mark.parametrize("value", [print, Task, OSError("x"), KINDS, ("a", {"b": TASKS[0]})])
def test_no_pickle_may_name_a_function_or_a_class(value: object) -> None:
    names: list[tuple[str, ...]] = []

    class Named(pickle._Unpickler):  # the same look-ups, which the hook sees
        def find_class(self, module: str, name: str) -> object:
            names.append((module, name))
            return super().find_class(module, name)

    import io

    Named(io.BytesIO(pickle.dumps(value))).load()
    assert names
    for each in names:
        with pytest.raises(pickle.UnpicklingError):
            refuse("pickle.find_class", each)
    refuse("pickle.find_class", ("builtins", "bytes"))
    refuse("import", ("os",))
