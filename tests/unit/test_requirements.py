"""The agent on a machine that lacks its packages: each command works without them, or names them all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from guest_agent import requirements
from vmishim.bundle import START
from vmishim.version import __version__

ROOT = Path(__file__).parents[2]
RUN = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from guest_agent.__main__ import main; sys.exit(main())"


def bare(*arguments: str | Path, folders: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """The agent's command on a Python that has no packages beside the standard library, but those in ``folders``."""
    path = ":".join(map(str, [*(folders or []), ROOT]))
    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", RUN, path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def fake(folder: Path, **versions: str) -> Path:
    """A folder with packages that have nothing but a version."""
    for name, version in versions.items():
        (folder / f"{name}.py").write_text(f"__version__ = {version!r}\n")
    return folder


@pytest.mark.parametrize(("option", "shown"), [("--version", __version__), ("--help", "agent.pyz serve")])
def test_help_and_version_need_no_package(option: str, shown: str) -> None:
    done = bare(option)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


@pytest.mark.parametrize("command", ["check", "serve"])
def test_each_missing_package_is_named_and_the_command_that_installs_them(command: str) -> None:
    done = bare(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "vmishim-agent: pyzmq is not installed (No module named 'zmq')",
        "vmishim-agent: cryptography is not installed (No module named 'cryptography')",
        "vmishim-agent: install what is missing: apt install python3-zmq python3-cryptography",
    ]


def test_only_the_missing_one_is_named(tmp_path: Path) -> None:
    done = bare("check", folders=[fake(tmp_path, cryptography="41.0.7")])
    assert done.stderr.splitlines() == [
        "vmishim-agent: pyzmq is not installed (No module named 'zmq')",
        "vmishim-agent: install what is missing: apt install python3-zmq",
    ]


def test_keygen_needs_no_more_than_cryptography(tmp_path: Path) -> None:
    done = bare("keygen", tmp_path / "key")
    assert done.returncode == 1
    assert "cryptography is not installed" in done.stderr
    assert "zmq" not in done.stderr
    assert not (tmp_path / "key").exists()


def test_an_old_package_is_named(tmp_path: Path) -> None:
    done = bare("check", folders=[fake(tmp_path, cryptography="3.4.8", zmq="22.3.0")])
    assert done.stderr.splitlines()[:2] == [
        "vmishim-agent: pyzmq 22.3.0 is too old; 24 is the oldest supported",
        "vmishim-agent: cryptography 3.4.8 is too old; 38 is the oldest supported",
    ]


def test_a_missing_library_is_named() -> None:
    nothing = requirements.Package("libnothing", "libnothing0", library="libnothing.so.0")
    says, remedy = requirements.missing([nothing])
    assert says.startswith("libnothing is not installed (libnothing.so.0:")
    assert remedy == "install what is missing: apt install libnothing0"


def test_in_a_virtual_environment_pip_installs_what_python_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    lacking = [
        requirements.Package("nothing", "python3-nothing", module="nothing_of_this_name", oldest=3),
        requirements.Package("libnothing", "libnothing0", library="libnothing.so.0"),
    ]
    assert requirements.missing(lacking)[2:] == [
        "install what is missing: apt install libnothing0",
        f"install what is missing: {sys.executable} -m pip install 'nothing>=3'",
    ]


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert requirements.missing([requirements.CRYPTOGRAPHY, requirements.PYZMQ]) == []


def test_the_oldest_versions_are_those_of_the_project() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    packages = [package for package in requirements.ALL if package.module]
    assert {f"{package.name}>={package.oldest}" for package in packages} <= set(wanted)


def test_an_older_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    ast.parse(START, feature_version=(3, 7))
    with pytest.raises(SystemExit) as ended:
        exec(compile(START, "__main__.py", "exec"), {})
    assert ended.value.code == "vmishim-agent: this is Python 3.9; 3.11 is the oldest supported"
