"""What all tests share: which kernel to boot, the console of a VM beside a failure, and no skipping in CI."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.ground")
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
TIERS = {
    "unit": "no root, nothing built, no VM",
    "local": "root and this machine's kernel, no VM",
    "contract": "LibVMI's behaviour, on a lab VM",
    "guest": "boots lab VMs",
}
"""Folders of tests, each a marker too: what its tests need (docs/testing.md)."""
ORDER = ("guest", "contract", "local", "unit")
LONGEST = {
    "guest": (
        *("ids", "injection", "lab", "readahead", "freeze", "agent", "sandbox", "rotation", "attest", "compare"),
        *("hostile_network", "commands", "watch"),
    ),
    "contract": (),
    "local": (
        *("watch", "release", "sealed", "hostile_cluster", "isolated", "bombs", "port", "walks", "fleet", "freshness"),
        *("hostile_network", "secrets", "attestation"),
    ),
    "unit": (
        *("freshness", "isolated", "cli", "link", "messages", "walks", "dumps", "histories", "session", "lying_guest"),
        *("trails", "attestation", "plan"),
    ),
}
"""The files of each tier that take longest, the longest first, as measured; without ``test_`` and ``.py``."""

# No deadline for an example: how long it takes says how busy this machine is.
settings.register_profile("default", deadline=None)  # hypothesis's 100 examples
settings.load_profile("default")
settings.register_profile("quick", max_examples=30)  # make unit
settings.register_profile("long", max_examples=3000)  # pytest --hypothesis-profile=long: long histories of reads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel",
        action="append",
        metavar="NAME",
        help="kernel of ci/kernels.toml for guest tests, 'all' or 'others'; may be given again (default: its default)",
    )
    parser.addoption(
        "--genuine",
        action="store_true",
        help="run the contract on LibVMI's own bindings too, not only on their record",
    )
    parser.addoption("--long", action="store_true", help="run the tests that are marked long too")


def pytest_configure(config: pytest.Config) -> None:
    for tier, needs in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {needs} (all of tests/{tier})")
    config.addinivalue_line("markers", "long: repeats for minutes what shorter tests prove; runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(getattr(pytest.mark, _tier(item)))
    if not config.getoption("--long"):
        left = [item for item in items if item.get_closest_marker("long") is not None]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.get_closest_marker("long") is None]
    # What takes long comes first, so that the workers end together; but the files that boot a VM of their own before
    # those of the session's VM, so that no worker has two.
    own = {item.path for item in items if "vm" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (ORDER.index(_tier(item)), item.path not in own, _rank(item)))


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay to the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


_told: set[str] = set()
"""Why there is no lab VM, as told before."""


def _rank(item: pytest.Item) -> int:
    """The place of a test's file among the longest of its tier."""
    longest, name = LONGEST[_tier(item)], item.path.stem.removeprefix("test_")
    return longest.index(name) if name in longest else len(longest)


def _tier(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    steps = sys.modules.get("lab.steps")
    if steps is not None and call.excinfo is not None and isinstance(call.excinfo.value, steps.ImageError):
        # Without an image all tests of a VM fail for the same reason: it is told once, and without a traceback.
        reason = str(call.excinfo.value)
        report.longrepr = "no lab VM: " + ("as above" if reason in _told else reason)
        _told.add(reason)
    elif report.failed:
        fixtures: dict[str, Any] = getattr(item, "funcargs", {})
        for vm in (fixtures.get("lab"), fixtures.get("vm")):
            if vm is not None and hasattr(vm, "serial_tail"):
                report.sections.append(("end of the guest's console", vm.serial_tail()))
    return _required(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long each folder of tests took."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = report.nodeid.partition("::")[0].rpartition("/")[0]
                seconds[folder] = seconds.get(folder, 0.0) + report.duration
    for folder, taken in seconds.items():
        terminalreporter.write_line(f"{folder}: {taken:.1f} s")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _required((yield))


def _required(report: Report) -> Report:
    """In CI every check is required, so one that would be skipped has failed."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason: Any = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {reason[2] if isinstance(reason, tuple) else reason}"
    return report
