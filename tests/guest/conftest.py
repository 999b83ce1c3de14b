"""One VM for the whole session, one agent in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.agent import InstalledAgent, install, precompile
from lab.kernels import default_kernel, kernels
from lab.vm import CONTAINERS_SLICE, LabVM
from tests.guest.ids import FEW_BUCKETS, Ids
from vmishim.guests.agent import AgentGuest
from vmishim.libvmi import Libvmi


def chosen_kernels(config: pytest.Config) -> list[str]:
    """The kernels of ``--kernel``, of ci/kernels.toml."""
    known, default = list(kernels()), default_kernel()
    groups = {"all": known, "others": [name for name in known if name != default]}
    names: list[str] = config.getoption("--kernel") or [default]
    return list(dict.fromkeys(kernel for name in names for kernel in groups.get(name, [name])))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "of_kernel(name): needs this kernel, and runs only where ``--kernel`` names it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {item: item.get_closest_marker("of_kernel") for item in items}
    chosen = chosen_kernels(config)
    left = [item for item, mark in marked.items() if mark is not None and mark.args[0] not in chosen]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of ``lab``, or of its module's own ``vm``, runs once a kernel; all of one kernel before the next."""
    mark = metafunc.definition.get_closest_marker("of_kernel")
    kernels = [mark.args[0]] if mark else chosen_kernels(metafunc.config)
    for fixture, scope in (("lab", "session"), ("vm", "module")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, kernels, indirect=True, scope=scope)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    """The lab VM, booted once for the session."""
    with LabVM.boot(request.param, append=FEW_BUCKETS) as vm:
        yield vm


@pytest.fixture(scope="session")
def agent(lab: LabVM) -> InstalledAgent:
    """The agent in ``lab``, running; it may freeze the container."""
    installed = install(lab, "--freeze", CONTAINERS_SLICE)
    precompile(lab)  # many tests restart it
    return installed


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
