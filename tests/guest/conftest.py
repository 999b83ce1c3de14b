"""One VM for the whole session, one agent in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import image
from lab.agent import InstalledAgent, install
from lab.vm import CONTAINERS_SLICE, LabVM
from tests.guest.ids import Ids
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import Libvmi


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of ``lab`` runs once a kernel; all of one kernel before any of the next."""
    if "lab" in metafunc.fixturenames:
        names: list[str] = metafunc.config.getoption("--kernel") or [image.default_kernel()]
        groups = {"all": list(image.kernels()), "others": [k for k in image.kernels() if k != image.default_kernel()]}
        chosen = list(dict.fromkeys(kernel for name in names for kernel in groups.get(name, [name])))
        metafunc.parametrize("lab", chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    """The lab VM, booted once for the session."""
    with LabVM.boot(request.param) as vm:
        yield vm


@pytest.fixture(scope="session")
def agent(lab: LabVM) -> InstalledAgent:
    """The agent in ``lab``, running; it may freeze the container."""
    return install(lab, "--freeze", CONTAINERS_SLICE)


@pytest.fixture
def guest(agent: InstalledAgent) -> Iterator[AgentGuest]:
    """The VM through its agent, read ahead of; a connection of its own for each test."""
    target = agent.connect()
    yield target
    target.close()


@pytest.fixture
def ids(guest: AgentGuest) -> Ids:
    """An IDS that reads ``guest``."""
    return Ids(Libvmi.over(guest))
