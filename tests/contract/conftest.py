"""One guest, three backends that read it: ours over its RAM file, ours through its agent, and the genuine bindings.

The genuine bindings are LibVMI, not ours: what they do is recorded in ``behaviour.json``. They are asked again only if
the record is not of these cases and this version (``record.stamp``), or by ``--genuine``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest

from lab.agent import InstalledAgent, install
from tests.contract import record
from tests.contract import scene as scenes
from tests.contract.genuine import Genuine
from vmishim.libvmi import Libvmi

OURS = {"vmi": ["ramfile", "agent"], "make": ["ramfile"]}
"""The backends that a fixture is made of, each a parameter; those of ours."""


def genuine_is_asked(config: pytest.Config) -> bool:
    """Whether tests of the genuine bindings are collected."""
    return bool(config.getoption("--genuine")) or not record.fits(record.load())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of ``vmi`` runs on each backend, unless it names those that it means."""
    named = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    for fixture, backends in OURS.items():
        if fixture in metafunc.fixturenames and fixture not in named:
            asked = [*backends, "genuine"] if genuine_is_asked(metafunc.config) else backends
            scope: Literal["session", "function"] = "session" if fixture == "vmi" else "function"
            metafunc.parametrize(fixture, asked, indirect=True, scope=scope)


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenes.Scene]:
    """The guest."""
    with scenes.scene(tmp_path_factory.mktemp("contract")) as made:
        yield made


@pytest.fixture(scope="session")
def installed(scene: scenes.Scene) -> InstalledAgent:
    """The agent in the guest, running."""
    return install(scene.vm)


@pytest.fixture(scope="session")
def genuine(scene: scenes.Scene) -> Iterator[Genuine]:
    """The genuine bindings on the guest."""
    vmi = scene.genuine()
    yield vmi
    vmi.close()


@pytest.fixture(scope="session")
def genuine_too(request: pytest.FixtureRequest) -> bool:
    """Whether the genuine bindings are asked."""
    return genuine_is_asked(request.config)


@pytest.fixture(scope="session")
def vmi(request: pytest.FixtureRequest, scene: scenes.Scene) -> Iterator[Any]:
    """The guest, by each of the ways. Of whatever class, it is used as a ``Libvmi``."""
    if request.param == "genuine":
        yield request.getfixturevalue("genuine")
        return
    if request.param == "ramfile":
        ours = scene.ramfile()
    else:
        ours = Libvmi.over(request.getfixturevalue("installed").connect(str(scene.vm.ram)))
    with ours:
        yield ours


@pytest.fixture
def backend(request: pytest.FixtureRequest, vmi: Any) -> str:
    """Which backend ``vmi`` is."""
    return str(request.node.callspec.params["vmi"])
