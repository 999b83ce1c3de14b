"""Children run only code of this installation: whatever folder they start in, whatever variables are set."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from tests.ground.hostile import plant, ran
from vmishim import isolated, script
from vmishim.guests import resolver
from vmishim.guests.domains import Domain

ROOT = Path(__file__).parents[2]
STARTS = {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
OS_STARTS = {"system", "popen", "posix_spawn", "posix_spawnp", "startfile"}
CHILDREN = {
    # A module of ours, isolated.
    "vmishim/guests/local.py: agent": 1,
    "vmishim/inspection/cluster.py: by_dask": 1,
    "vmishim/watching/workers.py: _start": 1,
    "lab/demo.py: _show": 1,
    "trials/fuzz/__main__.py: _alone": 1,
    # A file or text of ours, by an interpreter with -I.
    "bench/delay.py: delayed": 1,
    "bench/hosts.py: plant_sockets": 1,
    "bench/hosts.py: inside": 1,
    "bench/variants.py: here": 1,
    "lab/planter/__init__.py: here": 1,
    "vmishim/inject/bcc.py: _compile": 1,
    "vmishim/inject/bcc.py: _interpreter": 1,
    # An interpreter that the user names: isolated to try it, then a file of ours that runs the user's script. The
    # script's own backends are isolated except for the user's packages.
    "vmishim/compare/backends.py: _native": 1,
    "vmishim/compare/backends.py: run": 1,
    "bench/hosts.py: native": 1,
    "trials/configs/compared.py: genuine": 2,
    # pip, isolated.
    "lab/environment.py: interpreter": 1,
    "trials/two_vms.py: wheels": 2,
    # Tools found by `isolated.tool`.
    "vmishim/inject/clang.py: _run": 1,
    # The program that the user names.
    "vmishim/program.py: become": 1,
    "vmishim/program.py: run": 1,
    # Tools of the system, started by hand in a checkout or a build, or inside the lab VM.
    "bench/fleet.py: planted": 1,
    "bench/hosts.py: plant_processes": 1,
    "bench/machine.py: run": 1,
    "bench/sealed.py: _sleepers": 1,
    "bench/volatility.py: __init__": 1,
    "bench/volatility.py: copy": 1,
    "bench/volatility.py: plugins": 1,
    "bpf/hatch_build.py: _build": 1,
    "bpf/hatch_build.py: _library": 1,
    "lab/headers.py: _run": 1,
    "lab/steps.py: command": 1,
    "lab/modules.py: _run": 1,
    "lab/overlay/usr/lib/vmishim-lab/plant.py: <module>": 1,
    "lab/overlay/usr/lib/vmishim-lab/planter.py: <module>": 1,
    "lab/planter/__init__.py: compile_planter": 1,
    "lab/launch.py: _kvm_works": 1,
    "lab/launch.py: start": 2,
    "trials/soak/churn.py: module": 1,
    "trials/soak/churn.py: unload": 1,
}
"""Every place that starts a process, with how often: file, and the function around it."""


@cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    folders = ("vmishim", "guest_agent", "bpf", "lab", "bench", "trials", "docs")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple((str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths)


def starts_process(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name("subprocess"), attr=name)):
            return name in STARTS
        case ast.Call(func=ast.Attribute(value=ast.Name("os"), attr=name)):
            return name in OS_STARTS or name.startswith(("exec", "spawn"))
        case ast.Import(names=names):
            return any(each.name.partition(".")[0] in ("multiprocessing", "pty") for each in names)
        case ast.ImportFrom(module=name) if name:
            return name.partition(".")[0] in ("multiprocessing", "pty", "subprocess")
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return "ProcessPool" in name
    return False


def within(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every node, with the function around it."""
    left = [("<module>", tree)]
    while left:
        name, above = left.pop()
        if isinstance(above, ast.FunctionDef):
            name = above.name
        for node in ast.iter_child_nodes(above):
            yield name, node
            left.append((name, node))


def test_every_place_that_starts_a_process_is_known() -> None:
    found = (f"{path}: {name}" for path, tree in sources() for name, node in within(tree) if starts_process(node))
    assert Counter(found) == CHILDREN


def test_every_interpreter_that_is_started_is_isolated() -> None:
    """Where a command begins with an interpreter, what follows is -I; only `isolated` itself has more to say."""
    bare = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1 and path != "vmishim/isolated.py":
                if not isinstance(node.elts[0], ast.Attribute | ast.Name | ast.Call):
                    continue
                first, second = map(ast.unparse, node.elts[:2])
                named = first in ("sys.executable", "python", "str(python)", "genuine", "_interpreter()")
                if named and second not in ("'-I'", "'/usr/bin/python3'", "recorder.__file__"):
                    bare.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert bare == []


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with code under every name that a child could import or run."""
    folder = plant(tmp_path / "hostile")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("variable", ["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE"])
def test_a_module_of_ours_runs_no_code_of_the_folder_it_is_started_in(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(hostile))
    done = subprocess.run(isolated.module("guest_agent", "--version"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:13]) == (0, "vmishim-agent"), done.stderr
    assert ran(hostile) == set()


def test_a_child_has_this_very_installation(tmp_path: Path) -> None:
    """Also if its environment has another one, and nothing of a package may replace a module of Python's."""
    other = tmp_path / "installed"
    (other / "vmishim").mkdir(parents=True)
    (other / "vmishim" / "__init__.py").write_text("")
    (other / "vmishim" / "version.py").write_text("print('the other')")
    (other / "json.py").write_text("print('not the standard library')")
    for folder, said in ((str(other), "the other\n"), (isolated.FOLDER, "")):
        command = isolated.module("vmishim.version", folder=folder)
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said
    command = isolated.module("json.tool", folder=str(other))
    done = subprocess.run(command, input="[]", capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_child_gets_no_variable_that_decides_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "CPATH", "BASH_ENV", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "/hostile")
    monkeypatch.setenv("PATH", "/hostile")
    monkeypatch.setenv("LANG", "C.UTF-8")
    made = isolated.environment()
    assert (made["LANG"], made["PATH"]) == ("C.UTF-8", isolated.SYSTEM_PATH)
    assert made.keys() <= {*isolated.KEPT, "PATH"}


@pytest.mark.parametrize("path", [".", "", "hostile/..", "{hostile}"])
def test_a_tool_is_never_one_that_another_user_put_there(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PATH", path.format(hostile=hostile))
    assert isolated.tool("clang-22") is None
    assert os.path.realpath(isolated.tool("sh", "/bin") or "") == os.path.realpath("/bin/sh")


def test_a_tool_of_a_relative_folder_is_never_used(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.chmod(0o755)
    monkeypatch.setenv("PATH", ".::")
    assert isolated.tool("clang-22") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_tool_of_another_users_folder_is_never_used(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.chmod(0o755)
    os.chown(hostile, 4242, 4242)
    monkeypatch.setenv("PATH", str(hostile))
    assert isolated.tool("clang-22") is None


def test_a_tool_of_a_folder_of_ours_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "tools").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    assert isolated.tool("clang-22") == str(tmp_path / "tools" / "clang-22")


def test_what_children_inherit_opens_guests_as_their_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Domain, str]] = []
    monkeypatch.setattr(script, "reach", lambda domain, strategy: asked.append((domain, strategy)))
    entry = Domain("local", agent="ipc:///s", agent_key="k", key="/k", timeout=3.0)
    inherited = script.Inherited("page", asdict(entry))
    monkeypatch.setenv(script.INHERITED, json.dumps(asdict(inherited)))
    monkeypatch.setattr(resolver, "_blocks", [])
    script.inherit()
    resolver.current().reach(resolver.current().find("any", False))
    assert asked == [(replace(entry, name="any"), "page")]


def test_a_script_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    (tmp_path / "script.py").write_text("import os; print(os.environ['PYTHONPATH'].endswith('/children:/theirs'))")
    before = dict(os.environ)
    assert script.execute(str(tmp_path / "script.py"), []) == 0
    assert dict(os.environ) == before
