"""The command and the scripts that it runs, as processes: their output, their streams, their children."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ground.hostile import plant, ran
from vmishim import isolated


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder for the test."""
    monkeypatch.setenv("VMISHIM_CONFIG", str(tmp_path / "vmishim" / "domains.toml"))
    return tmp_path / "vmishim"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with code under every name that a child could import or run."""
    folder = plant(tmp_path / "hostile")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "ids.py"
        path.write_text(text)
        return path

    return write


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``vmishim`` with these arguments."""
    environment = os.environ | {"PYTHONPATH": isolated.FOLDER}
    command = [sys.executable, "-m", "vmishim.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["completion", "fish"], ["domains", "--json"], ["--help"]])
def test_a_full_output_is_one_line(words: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "vmishim.cli", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (1, b"vmishim: standard output: No space left on device\n")


CLOSED = """
import os, sys
os.close(int(sys.argv[1]))
os.execv(sys.executable, [sys.executable, "-m", "vmishim.cli", *sys.argv[2:]])
"""


def closed(number: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """``vmishim`` with a standard stream closed, as ``>&-`` does."""
    command = [sys.executable, "-c", CLOSED, str(number), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_output_that_was_closed_before_is_one_line() -> None:
    done = closed(1, "domains", "--json")
    assert (done.returncode, done.stderr) == (1, "vmishim: standard output is closed, so there is nowhere to print\n")


def test_what_is_for_closed_standard_error_goes_nowhere(script: Callable[[str], Path]) -> None:
    """Not into standard output, nor into a file that got its number."""
    done = closed(2, "run", "--stats", script("print('out')"))
    assert (done.returncode, done.stdout) == (0, "out\n")
    numbers = closed(2, "run", script("import os; print(os.readlink('/proc/self/fd/2'))"))
    assert numbers.stdout == "/dev/null\n"


def test_a_script_decides_what_it_does_with_a_closed_output(script: Callable[[str], Path]) -> None:
    done = closed(1, "run", script("import sys; print('out'); sys.exit(3 if sys.stdout is None else 4)"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_script_finds_our_libvmi_and_its_own_arguments(script: Callable[[str], Path]) -> None:
    path = script(
        "import sys, libvmi, vmishim\n"
        "print(libvmi.Libvmi is vmishim.Libvmi, __name__, sys.argv[1:], sys.path[0])\n"
        "import examples\n"
    )
    (path.parent / "examples.py").write_text("print('my own', __file__)\n")
    done = run("run", path, "--local", "-x", "web-1", "--help")
    own = path.parent / "examples.py"
    assert done.stdout == f"True __main__ ['--local', '-x', 'web-1', '--help'] {path.parent}\nmy own {own}\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "raise SystemExit",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('words')",
        "def f():\n    raise ValueError('no')\nf()",
        "def f(:",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('b') from e",
    ],
)
def test_a_script_ends_as_under_python(script: Callable[[str], Path], text: str) -> None:
    path = script(text)
    alone = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    ours = run("run", path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_statistics_come_last_and_on_standard_error(script: Callable[[str], Path]) -> None:
    done = run("run", "--stats", "--strategy", "page", script("import sys; print('out'); sys.exit(4)"))
    assert (done.returncode, done.stdout) == (4, "out\n")
    assert done.stderr.startswith("vmishim: page: 0 requests, 0 bytes, 0 handshakes, ")


def test_a_script_is_run_as_python_runs_it(hostile: Path, tmp_path: Path) -> None:
    """With its own folder first and the user's packages, and without the working folder; its children too."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "theirs.py").write_text("")
    (tmp_path / "scripts" / "beside.py").write_text("")
    script = tmp_path / "scripts" / "script.py"
    script.write_text(
        "import multiprocessing, os, sys\n"
        "import beside, theirs\n"
        "def shown(): print(os.path.realpath(sys.path[0]), os.getcwd() in sys.path, '' in sys.path, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    shown()\n"
        "    for method in sys.argv[1:]:\n"
        "        child = multiprocessing.get_context(method).Process(target=shown)\n"
        "        child.start()\n"
        "        child.join()\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "packages")}
    command = isolated.script_runner("vmishim.cli", "run", str(script), "fork", "spawn")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{script.parent} False False\n" * 3), done.stderr
    assert ran(hostile) == set()
    # Python itself starts the children of "spawn" in the working folder's reach, unless it was told not to.
    command = [str(Path(sys.executable).with_name("vmishim")), "run", str(script), "fork"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{script.parent} False False\n" * 2), done.stderr
    assert ran(hostile) == set()


CHILDREN_SCRIPT = """
import multiprocessing, os, subprocess, sys
from libvmi import Libvmi, LibvmiError
import report  # beside the script, and a name of compat/ids

def look(number):
    import libvmi, libvmi.event, report
    try:
        Libvmi("nobody")
    except LibvmiError as error:
        print(libvmi.__file__, str(error).partition(":")[0], report.__file__, flush=True)

if __name__ == "__main__":
    look(0)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            pool.map(look, [1])
    if "again" not in sys.argv:
        subprocess.run([sys.executable, *sys.argv, "again"], check=True)
        subprocess.run([sys.executable, "-c", "from libvmi.libvmi import Libvmi"], check=True)
"""


@pytest.mark.parametrize("safe", [False, True])
def test_every_child_of_a_script_has_our_libvmi(hostile: Path, tmp_path: Path, safe: bool) -> None:
    """However Python starts it: its parent's memory is not in "spawn" and "forkserver", nor in another interpreter."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "script.py"
    script.write_text(CHILDREN_SCRIPT)
    script.with_name("report.py").write_text("")
    environment = {"PATH": os.environ["PATH"], "VMISHIM_CONFIG": str(tmp_path / "domains.toml"), "HOME": str(tmp_path)}
    command = [*isolated.script_runner("vmishim.cli"), "run", str(script)]
    if safe:
        # Python itself starts the children of "spawn" in the working folder's reach, unless it was told not to.
        environment["PYTHONSAFEPATH"] = "1"
        environment["PYTHONPATH"] = str(script.parent)
    folder = hostile if safe else tmp_path
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    ours = Path(isolated.FOLDER, "vmishim", "compat", "libvmi", "__init__.py")
    assert done.stdout == f"{ours} VM_NOT_FOUND {script.with_name('report.py')}\n" * 8
    assert ran(hostile) == set()


@pytest.mark.parametrize("safe", ["", "1"])
def test_only_the_user_keeps_a_script_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: str
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", safe)
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "script.py"
    script.write_text("import sys; print(__file__.rpartition('/')[0] in sys.path)")
    alone = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert alone.stdout == f"{not safe}\n"
    for command in ([str(Path(sys.executable).with_name("vmishim"))], isolated.script_runner("vmishim.cli")):
        ours = subprocess.run([*command, "run", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ours.stdout == alone.stdout
