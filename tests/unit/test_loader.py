"""The process that loads programs, by its socket: what it says arrives as it was said, and its end is noticed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from guest_agent import loader
from guest_agent.loader import InjectionError, Loaded, Loader
from guest_agent.programs import LoadError
from vmishim.wire.injection import Bundle, MapDefinition


@pytest.fixture
def start() -> Iterator[Callable[[], Loader]]:
    """Starts such processes; each has ended, and as it should, when the test has."""
    started: list[Loader] = []

    def make() -> Loader:
        started.append(Loader(1))
        return started[-1]

    yield make
    for process in started:
        process.close()
        _, status = os.waitpid(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)


def test_a_refusal_arrives(start: Callable[[], Loader]) -> None:
    load = start()
    for _ in range(3):
        with pytest.raises(InjectionError, match="neither an eBPF object") as refused:
            load(b"junk")
        assert refused.value.code == "injection"


def test_a_verifiers_long_log_arrives(start: Callable[[], Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    log = "R2 invalid mem access 'scalar' \u2026\n" * 200_000

    def load(data: bytes, cpus: int) -> Loaded:
        raise LoadError(f"{len(data)} bytes for {cpus} CPU", log)

    monkeypatch.setattr(loader, "load", load)
    with pytest.raises(LoadError, match="1048576 bytes for 1 CPU") as rejected:
        start()(bytes(1 << 20))
    assert rejected.value.log == log


def test_descriptors_arrive(start: Callable[[], Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    held = [os.memfd_create(name) for name in ("program", "input", "output")]
    monkeypatch.setattr(loader, "load", lambda data, cpus: Loaded("CO-RE", 5, 6, 7, (held[0], held[1], held[2])))
    loaded = start()(b"")
    assert (loaded.format, loaded.maps, loaded.input_size, loaded.output_size) == ("CO-RE", 5, 6, 7)
    assert [os.readlink(f"/proc/self/fd/{here}") for here in loaded.descriptors] == [
        f"/memfd:{name} (deleted)" for name in ("program", "input", "output")
    ]
    assert not set(loaded.descriptors) & set(held)
    loaded.close()
    for descriptor in held:
        os.close(descriptor)


def test_names_that_are_no_text_do_not_end_it(start: Callable[[], Loader]) -> None:
    load = start()
    maps = [MapDefinition.array(name, 1 << 17) for name in ("input", "output", "\ud800")]
    exits = bytes.fromhex("b700000000000000 9500000000000000")
    for data, told in (
        (Bundle(os.uname().release, "GPL", maps, [], exits).pack(), "the map name .* is not ASCII text"),
        (Bundle(os.uname().release, "\ud800", maps[:2], [], exits).pack(), "the license is not ASCII text"),
    ):
        with pytest.raises(InjectionError, match=told):
            load(data)


def test_its_death_is_said(start: Callable[[], Loader]) -> None:
    load = start()
    os.kill(load.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(InjectionError, match="process that loads programs has ended"):
            load(b"junk")
