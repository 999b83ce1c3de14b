"""One guest, three ways to read it: ours over its RAM file, ours through its agent, and the genuine bindings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lab.agent import InstalledAgent, install
from tests.contract import scene as scenes
from tests.contract.genuine import Genuine
from vmishim.libvmi import Libvmi

BACKENDS = ("ramfile", "agent", "genuine")


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


@pytest.fixture(scope="session", params=BACKENDS)
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
