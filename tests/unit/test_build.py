"""An installation from source: without a compiler it says what it lacks, and takes nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from bpf.hatch_build import CustomBuildHook
from vmishim import cli, ebpf_objects
from vmishim.commands.doctor import _objects
from vmishim.errors import LibvmiError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one program, which an earlier version compiled, on a machine with a shell and make."""
    (tmp_path / "bpf" / ".output").mkdir(parents=True)
    shutil.copy(ROOT / "bpf" / "Makefile", tmp_path / "bpf")
    old = tmp_path / "bpf" / ".output" / "memory.bpf.o"
    old.write_bytes(b"of an earlier version")
    os.utime(old, (0, 0))
    (tmp_path / "bpf" / "memory.bpf.c").write_text("int nothing;\n")
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "make", "uname", "mkdir", "mv"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CLANG", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def built(checkout: Path) -> tuple[dict[str, str], list[str]]:
    """What goes into the wheel of a checkout, path by path in the wheel, and the warnings."""
    warnings: list[str] = []
    app: Any = SimpleNamespace(display_warning=warnings.append)
    nothing: Any = None
    hook = CustomBuildHook(str(checkout), {}, nothing, nothing, str(checkout / "dist"), "wheel", app)
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize("standard", data)
    return {inside: path for path, inside in data["force_include"].items()}, warnings


def clang(checkout: Path, lines: str) -> None:
    tool = checkout / "bin" / "clang"
    tool.write_text(f"#!/bin/sh\n{lines}\n")
    tool.chmod(0o755)


def reason(checkout: Path) -> str:
    """Why the wheel has no objects, according to the wheel."""
    inside, warnings = built(checkout)
    assert set(inside) == {"vmishim/include/inject.h", "guest_agent/objects/not-built.txt"}  # no object of earlier
    text = Path(inside["guest_agent/objects/not-built.txt"]).read_text()
    assert warnings == [f"the eBPF programs were not built, so no agent can be made or run: {text.strip()}"]
    return text


def test_without_make_the_wheel_says_so(checkout: Path) -> None:
    (checkout / "bin" / "make").unlink()
    assert reason(checkout) == "make is not installed\n"


def test_without_clang_the_wheel_says_so(checkout: Path) -> None:
    assert reason(checkout) == "no clang is installed\n"


def test_a_clang_that_is_too_old_is_not_used(checkout: Path) -> None:
    clang(checkout, "echo 14")
    said = reason(checkout)
    assert said == f"{checkout}/bin/clang is of version 14, and 16 is the oldest that can be used\n"


def test_the_compilers_first_error_is_the_reason(checkout: Path) -> None:
    said = "kernel.h:3: 'bpf/bpf_helpers.h' file not found"
    clang(checkout, f'[ $1 = -E ] && {{ echo 16; exit; }}\necho "{said}" >&2; exit 1')
    assert reason(checkout) == f"{said}\n"


def test_with_a_compiler_the_wheel_has_the_objects(checkout: Path) -> None:
    clang(checkout, '[ $1 = -E ] && { echo 16; exit; }\nwhile [ "$1" != -o ]; do shift; done; echo new >"$2"')
    inside, warnings = built(checkout)
    assert set(inside) == {"vmishim/include/inject.h", "guest_agent/objects/memory.bpf.o"}
    assert Path(inside["guest_agent/objects/memory.bpf.o"]).read_text() == "new\n"
    assert warnings == []


def test_an_installation_without_objects_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "not-built.txt").write_text("no clang is installed\n")
    monkeypatch.setattr("vmishim.ebpf_objects.resources.files", lambda package: tmp_path)
    with pytest.raises(LibvmiError, match=r"memory\.bpf\.o is not in this installation \(no clang is installed\)"):
        ebpf_objects.object_bytes("memory")
    found = _objects("note")
    assert (found.verdict, found.remedy) == ("note", ebpf_objects.REMEDY)
    assert cli.main(["bundle", "-o", str(tmp_path / "agent.pyz")]) == 1
    assert ebpf_objects.REMEDY in capsys.readouterr().err
    assert not (tmp_path / "agent.pyz").exists()


def test_compat_needs_the_vmishim_of_its_own_checkout() -> None:
    """On a package index, the name may be another's."""
    (needed,) = ProjectMetadata(str(ROOT / "compat"), PluginManager()).core.dependencies
    assert needed == f"vmishim @ {ROOT.as_uri()}"
