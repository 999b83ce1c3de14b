"""One C program, on our ``libvmi.so.0`` by both backends and on LibVMI's own: it prints the same."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lab.agent import InstalledAgent
from tests.contract import record
from tests.contract.cases import cases
from tests.contract.genuine import Genuine
from tests.contract.outcome import VARIES, kind, outcome
from tests.contract.scene import Scene
from tests.ground import capi
from vmishim.wire.keys import save_private

HERE = Path(__file__).parent
RECORD = HERE / "program.txt"
"""What it prints on LibVMI's own library, without values: those are the guest's."""

OTHER = ("vmi_read_pa, over the end: ",)
"""What an agent tells otherwise than a RAM file: where memory ends, it counts less."""
NOISE = ("VMI_ERROR", "Invalid offset name")
"""What LibVMI prints between the lines, on standard output."""
TOLD = {"success", "failure", "none", "some"}

Run = Callable[[str], list[str]]
"""Runs the program by one of the backends; gives its lines."""


def _of_ours(line: str) -> str:
    """A line without what LibVMI printed before it."""
    return re.sub(r"^[^a-zA-Z0-9]+", "", line)


@contextmanager
def still(scene: Scene) -> Iterator[None]:
    """The VM stopped, so that its memory stays as it is."""
    scene.vm.pause()
    try:
        yield
    finally:
        scene.vm.resume()


def shape(line: str) -> str:
    """A line without what differs from guest to guest."""
    call, _, told = line.partition(": ")
    if not told:
        return call.partition("|")[0]  # a line of vmi_print_hex
    first = told.split(",")[0]
    return f"{call}: {first if first in TOLD else '...'}{', untouched' if told.endswith('untouched') else ''}"


def is_steady(line: str) -> bool:
    """Whether it is the same however the guest is read, while it runs."""
    return not line.startswith(("task ", *OTHER))


@pytest.fixture(scope="module")
def run(scene: Scene, installed: InstalledAgent, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The program, compiled once."""
    folder = tmp_path_factory.mktemp("program")
    program = capi.compiled(HERE / "program.c", folder / "program")
    entries = "".join(
        f"{key} = {value if isinstance(value, int) else chr(34) + value + chr(34)}; "
        for key, value in scene.config.items()
    )
    places = [f"{name}={value}" for name, value in asdict(scene.places).items()]
    save_private(folder / "key", installed.private)
    (folder / "domains.toml").write_text(
        f'["{scene.vm.ram}"]\nramfile = "{scene.vm.ram}"\n'
        f'[agent]\nagent = "{installed.endpoint}"\nagent_key = "{installed.public.text}"\n'
        f'key = "{folder / "key"}"\ntimeout = 30\n'
    )

    def run(backend: str) -> list[str]:
        environment = capi.environment(folder / "domains.toml")
        if backend == "genuine":
            (libraries,) = Path(scene.python).parents[1].glob("lib/python*/site-packages/libvmi.libs")
            (genuine,) = libraries.glob("libvmi-*.so*")
            (folder / "genuine").mkdir(exist_ok=True)
            (folder / "genuine" / "libvmi.so.0").unlink(missing_ok=True)
            (folder / "genuine" / "libvmi.so.0").symlink_to(genuine)
            environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder / 'genuine'}:{libraries}", "HOME": str(folder)}
        domain = "agent" if backend == "agent" else str(scene.vm.ram)
        done = subprocess.run(
            [str(program), domain, f"{{{entries}}}", *places],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:], done.stdout[-500:])
        return [line for line in map(_of_ours, done.stdout.splitlines()) if not line.startswith(NOISE)]

    return run


@pytest.fixture(scope="module")
def by_ramfile(run: Run, scene: Scene) -> list[str]:
    """The lines by our library over the RAM file."""
    with still(scene):
        return run("ramfile")


def test_it_prints_what_libvmi_prints(run: Run, scene: Scene, genuine_too: bool, by_ramfile: list[str]) -> None:
    assert [shape(line) for line in by_ramfile if not line.startswith("task ")] == RECORD.read_text().splitlines()
    if genuine_too:
        with still(scene):
            assert run("genuine") == run("ramfile")


def test_libvmis_own_python_bindings_run_over_it(
    scene: Scene, genuine_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preloaded: what they were recorded to do, or what is recorded of ours, in every case."""
    if not genuine_too:
        return
    (tmp_path / "domains.toml").write_text(f'["{scene.vm.ram}"]\nramfile = "{scene.vm.ram}"\n')
    monkeypatch.setenv("LD_PRELOAD", str(capi.library()))
    monkeypatch.setenv("PYTHONPATH", f"{capi.ROOT}:{sysconfig.get_path('purelib')}")
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "domains.toml"))
    bindings: Any = Genuine(scene.python, tmp_path / "log", str(scene.vm.ram))
    monkeypatch.undo()
    recorded = record.load()["cases"]
    places = replace(scene.places, memory=bindings.get_memsize())
    different = {}
    for case in cases():
        expected = recorded[case.name]
        if expected["genuine"] != VARIES:
            found = kind(case, outcome(bindings, case, places))
            if found not in (expected["genuine"], expected.get("ours")):
                different[case.name] = found
    bindings.close()
    assert different == {}


def test_it_prints_the_same_by_an_agent(run: Run, by_ramfile: list[str]) -> None:
    assert [line for line in run("agent") if is_steady(line)] == [line for line in by_ramfile if is_steady(line)]
