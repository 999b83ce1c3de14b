"""What is released: the same bytes each time, nothing under names that are not ours, from what the lock names.

No code that is not pinned runs meanwhile.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.ground.hostile import plant, ran

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "release.txt"


def release(folder: Path, umask: int, checkout: Path = ROOT, **more: Any) -> dict[str, bytes]:
    """What ``ci/release`` makes, by name."""
    done = subprocess.run(
        [checkout / "ci" / "release", folder],
        umask=umask, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def released(folder: Path) -> dict[str, bytes]:
    return release(folder, 0o022)


@pytest.fixture
def wheel(released: dict[str, bytes], folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def checkout(released: dict[str, bytes], tmp_path: Path) -> Path:
    """Another checkout of the same commit, with the packages that were downloaded for this one."""
    folder = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    shutil.copy(ROOT / "ci" / "release", folder / "ci" / "release")
    if (ROOT / "build").exists():
        shutil.copytree(ROOT / "build", folder / "build", symlinks=True)
    return folder


def test_the_same_commit_makes_the_same_bytes_and_no_code_of_a_developer_runs(
    released: dict[str, bytes], checkout: Path, tmp_path: Path
) -> None:
    """Elsewhere, with another umask, and with code planted wherever a build could find it by mistake."""
    assert {name.rpartition(".")[2] for name in released} == {"whl", "gz", "pyz", "service", "SHA256SUMS"}
    hostile = plant(tmp_path / "hostile")
    # The development environment: its packages are the newest there were, and each may have a .pth file.
    venv.create(checkout / ".venv")
    (packages,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    for name in ("planted.pth", "sitecustomize.py", "pip.py", "hatchling.py"):
        shutil.copy(hostile / name, packages)
    (hostile / "startup").write_text(f"echo startup >>{hostile}/ran\n")
    variables: dict[str, Any] = {"PYTHONPATH": hostile, "BASH_ENV": hostile / "startup", "ENV": hostile / "startup"}
    variables |= {"PATH": f"{hostile}:{os.environ['PATH']}", "CLANG": hostile / "clang", "PYTHONHOME": hostile}
    again = release(tmp_path / "again", 0o077, checkout, cwd=hostile, env=os.environ | variables)
    assert ran(hostile) == set()
    assert {name for name in released | again if released.get(name) != again.get(name)} == set()


def test_a_package_that_was_altered_after_its_download_is_refused(checkout: Path, tmp_path: Path) -> None:
    (package,) = (checkout / "build").glob("release-wheels-*/hatchling-*.whl")
    with zipfile.ZipFile(package, "a") as altered:
        altered.writestr("planted.pth", "import sys")
    command = [checkout / "ci" / "release", tmp_path / "made"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode != 0
    assert "HASH" in done.stdout.upper(), done.stdout
    assert not (tmp_path / "made").exists()


def test_the_wheel_installs_under_our_names_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as made:
        names = set(made.namelist())
    (described,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {name.partition("/")[0] for name in names} == {"vmishim", "guest_agent", described}
    # With compiler and without: an agent is made of these.
    assert {f"guest_agent/objects/{name}.bpf.o" for name in ("memory", "locate", "sealed")} <= names
    assert {f"{described}/licenses/{name}" for name in ("LICENSE", "bpf/LICENSE", "bpf/LICENSE.GPL-2.0")} <= names


def test_a_script_runs_by_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as made:
        made.extractall(tmp_path / "installed")
    (tmp_path / "script.py").write_text("import libvmi, vmishim\nprint(libvmi.__file__, vmishim.__file__, sep='\\n')\n")
    done = subprocess.run(
        [sys.executable, "-m", "vmishim.cli", "run", "script.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    package = tmp_path / "installed" / "vmishim"
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(package / "compat" / "libvmi" / "__init__.py"), str(package / "__init__.py")]


def test_the_lock_names_all_that_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {re.split(r"[<>=~! ]", each)[0] for each in project["project"]["dependencies"]}
    needed |= {re.split(r"[<>=~! ]", each)[0] for each in project["build-system"]["requires"]}
    assert needed <= set(re.findall(r"^([a-z0-9-]+)==", LOCK.read_text(), re.MULTILINE))
