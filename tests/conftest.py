"""What all tests share: which kernel to boot, the console of a VM beside a failure, and no skipping in CI."""

from __future__ import annotations

import os
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

settings.register_profile("quick", max_examples=30)  # make unit; make test draws hypothesis's 100
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


def pytest_configure(config: pytest.Config) -> None:
    for tier, needs in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {needs} (all of tests/{tier})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(getattr(pytest.mark, _tier(item)))
    # What takes long comes first, so that the workers end together; tests of the session's own VM after those that boot
    # VMs of their own.
    items.sort(key=lambda item: (ORDER.index(_tier(item)), "lab" in getattr(item, "fixturenames", ())))


def _tier(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
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
