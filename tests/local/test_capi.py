"""``libvmi.so.0``, compiled, over an agent on this machine's kernel: what C programs do to a library."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ground import capi
from tests.unit.test_capi import FUNCTIONS, ISF
from vmishim import cli, program
from vmishim.guests import local
from vmishim.guests.domains import Domain

HERE = Path(__file__).parent

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
"""Runs a scene of ``capi.c``."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    return capi.compiled(HERE / "capi.c", tmp_path_factory.mktemp("capi") / "capi")


@pytest.fixture(scope="module")
def here() -> Iterator[Domain]:
    """An agent on this machine."""
    with local.agent() as domain:
        yield domain


def enrolled(domain: Domain, folder: Path) -> Path:
    """A ``domains.toml`` with this domain, named ``any``."""
    file = folder / "domains.toml"
    file.write_text(f'[any]\nagent = "{domain.agent}"\nagent_key = "{domain.agent_key}"\nkey = "{domain.key}"\n')
    file.chmod(0o600)
    return file


@pytest.fixture
def run(compiled: Path, here: Domain, tmp_path: Path) -> Run:
    config = enrolled(here, tmp_path)

    def run(*words: str, **more: str) -> Done:
        return subprocess.run(
            [str(compiled), *words],
            env=capi.environment(config, more),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_it_exports_the_functions_of_the_headers_and_nothing_else() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=posix", str(capi.library())],
        capture_output=True,
        text=True,
        check=True,
    )
    exported = {line.split()[0] for line in listed.stdout.splitlines()}
    assert exported == {name for names in FUNCTIONS.values() for name in names} | {"vmi_get_struct_field_type_name"}


@pytest.mark.parametrize(
    ("scene", "lines"),
    [
        ("threads", ["200 of 200 listings"]),
        ("forks", ["free: child 42, parent 1", "held: child 42, parent 1"]),
        ("instances", ["5 of 5 instances"]),
        ("many", ["20 of 20 instances, one after the other"]),
    ],
)
def test_programs_use_it_as_they_use_any_library(run: Run, scene: str, lines: list[str]) -> None:
    done = run(scene)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, lines, "")


def test_an_end_without_vmi_destroy_is_the_programs_own(run: Run) -> None:
    done = run("exit")
    assert (done.returncode, done.stdout, done.stderr) == (5, "1\n", "")


def test_signals_are_the_programs(run: Run) -> None:
    done = run("signal")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")


def test_a_program_that_does_not_link_it_may_load_and_unload_it(run: Run) -> None:
    done = run("loads", str(capi.library()))
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, ["0 0 1"] * 3, "")


@pytest.mark.parametrize(
    ("abi", "line", "other"),
    [
        ("0.15", "0.15: 0, 0.14: 1, symbol: 1, mode 4", "0.14"),
        ("0.14", "0.15: 1, 0.14: 0, symbol: 0, mode 3", "0.15"),
    ],
)
def test_contexts_of_the_other_abi_are_refused_once(run: Run, abi: str, line: str, other: str) -> None:
    done = run("contexts", VMISHIM_LIBVMI_ABI=abi)
    assert done.stdout == f"{line}\n"
    assert done.stderr == (
        f"libvmi.so.0 of vmishim: the program's access_context_t is not that of LibVMI {abi}: if it was compiled for "
        f"LibVMI {other}, start it by `vmishim run --abi {other}`, or set VMISHIM_LIBVMI_ABI={other}\n"
    )


def test_events_are_refused_unless_a_program_only_waits_for_them(run: Run) -> None:
    refused = run("events")
    assert (refused.returncode, refused.stdout) == (3, "failure, error 6\n")
    assert "EVENTS: vmishim has no events, and the program asked for them" in refused.stderr
    waited = run("events", VMISHIM_LIBVMI_EVENTS="poll")
    assert (waited.returncode, waited.stdout, waited.stderr) == (0, "0 0 1\n", "")


def test_json_profiles_by_the_programs_json_c(run: Run, tmp_path: Path) -> None:
    profile = tmp_path / "isf.json"
    symbols = {"init_task": {"address": 0xFFFFFFFF82000000}, "made_up": {"address": 0xFFFFFFFF81234560}}
    profile.write_text(json.dumps({**ISF, "symbols": symbols}))
    done = run("json", str(profile))
    values = "0xffffffff81234560 8 0 4 3 5 int 1"
    assert (done.returncode, done.stdout.splitlines()) == (0, [values, values, "its path"])


def test_an_agent_that_dies_in_the_middle_is_a_failure_and_never_zeros(compiled: Path, tmp_path: Path) -> None:
    with local.agent() as domain:
        reading = subprocess.Popen(
            [str(compiled), "gone"],
            env=capi.environment(enrolled(domain, tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert reading.stdout is not None
        assert reading.stdout.readline() == "reading\n"
    out, err = reading.communicate(timeout=60)
    assert (reading.returncode, out) == (0, "failure, 0xa5a5\n")
    assert err.startswith("libvmi.so.0 of vmishim ")
    assert err.count("\n") == 1


def test_an_unknown_domain_is_told_with_the_reason(compiled: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(compiled), "threads"],
        env=capi.environment(tmp_path / "domains.toml"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "failure, error 1\n")
    assert "any: VM_NOT_FOUND: " in done.stderr


def test_an_interpreter_without_vmishim_is_refused_in_words(run: Run) -> None:
    done = run("threads", VMISHIM_PYTHON="/usr/bin/python3")
    assert done.returncode == 3
    assert "/usr/bin/python3 cannot import vmishim: No module named 'vmishim'" in done.stderr
    assert "set VMISHIM_PYTHON to its interpreter" in done.stderr


def test_vmishim_run_starts_a_program_by_it(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "LIBRARY", capi.library())
    assert cli.main(["run", "--local", "--stats", "--", str(compiled), "instances"]) == 0
    out, err = capfd.readouterr()
    assert out == "5 of 5 instances\n"
    assert [line.split()[:3] for line in err.splitlines()] == [["vmishim:", "2", "requests,"]] * 5


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Program and library with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("checked")
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    library = capi.builder().build(folder / "library" / "libvmi.so.0", *options, "-Wl,-z,undefs")
    return capi.compiled(HERE / "capi.c", folder / "capi", *options), library


@pytest.mark.parametrize("scene", ["threads", "forks", "contexts", "json", "loads"])
def test_memory_is_used_as_it_may_be(checked: tuple[Path, Path], here: Domain, tmp_path: Path, scene: str) -> None:
    """No access outside of what was allocated, none after it was freed, nothing undefined."""
    compiled, library = checked
    (tmp_path / "isf.json").write_text(json.dumps({**ISF, "symbols": {"made_up": {"address": 1}}}))
    done = subprocess.run(
        [str(compiled), scene, str(library if scene == "loads" else tmp_path / "isf.json")],
        env={
            **capi.environment(enrolled(here, tmp_path)),
            "LD_LIBRARY_PATH": str(library.parent),
            # Python keeps what it has until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, "Sanitizer" in done.stderr, "runtime error" in done.stderr) == (0, False, False), done
    assert done.stdout
