"""``python -m trials.mutation``: break each security check and each promise of freshness; does a unit test fail?

A mutant that all tests pass survives: a check that no test holds, or a change that changes nothing. Each mutant runs in
a process forked from this one, which has imported the libraries already; no file is changed. Results are kept: a
mutant is tried again when its module changes, a survivor also when its tests do. So if you weaken a test, give
``--again``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

import cryptography.x509
import hypothesis
import pytest
import pytest_timeout
import zmq

from trials.mutation import freshness
from trials.mutation.freshness import Replacement
from trials.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
UNIT, GROUND = ROOT / "tests/unit", ROOT / "tests/ground"
_SESSIONS = ("test_session.py", "test_noise.py", "test_connections.py")
_ATTESTATION = ("test_attestation.py", "test_agent_attestation.py", "test_domains.py")
TESTS = {
    "vmishim.wire.session": _SESSIONS,
    "vmishim.wire.sessions": _SESSIONS,
    "vmishim.wire.noise": ("test_noise.py", "test_session.py"),
    "vmishim.wire.keys": ("test_keys.py", "test_session.py", "test_files.py", "test_noise.py"),
    "vmishim.wire.sealed": ("test_sealed_frames.py",),
    "vmishim.wire.messages": ("test_messages.py",),
    "vmishim.wire.attestation": _ATTESTATION,
    "vmishim.attestation": _ATTESTATION,
    "vmishim.attestation.chain": _ATTESTATION,
    "vmishim.attestation.report": _ATTESTATION,
    "vmishim.attestation.requirements": _ATTESTATION,
    "guest_agent.attestation": ("test_agent_attestation.py",),
    "guest_agent.connections": ("test_connections.py",),
}
"""Modules whose checks are made wrong, each with the tests of tests/unit that must notice."""
FRESHNESS = "freshness"
"""What is given instead of a module for the promises of docs/freshness.md."""
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"
_PLUGINS = ("-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "-p", "pytest_timeout")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
# The same examples each time, and few: a wrong check that only luck finds counts as a survivor.
hypothesis.settings.register_profile("mutation", max_examples=15, derandomize=True, deadline=None, database=None)
_WARM = cryptography.x509, pytest_timeout, zmq
"""Imported once, before the first fork."""


def main() -> int:
    """Print the score and the survivors; returns 1 if a module's tests fail without any mutation."""
    options = _parser().parse_args()
    known: dict[str, str] = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    deadline = time.monotonic() + options.time
    seen: Counter[str] = Counter()
    survivors: list[Mutant | Replacement] = []
    skipped = 0
    work = [each for chosen in options.modules or [*TESTS, FRESHNESS] for each in _work(chosen)]
    random.Random(options.seed).shuffle(work)
    sound: dict[tuple[str, ...], bool] = {}
    for mutant, names in work:
        text = _file(mutant.module).read_text(encoding="utf-8")
        key, survived = _hash(text, repr(mutant)), f"{SURVIVED} {_hash(*_texts(names))}"
        result = "" if options.again else known.get(key, "")
        if not result or (result.startswith(SURVIVED) and result != survived):
            if time.monotonic() > deadline:
                skipped += 1
                continue
            if names not in sound:
                sound[names] = _run(mutant.module, ast.parse(text), names, options.limit) == SURVIVED
            if not sound[names]:
                print(f"{', '.join(names)}: these tests fail without any mutation", file=sys.stderr)
                return 1
            result = _run(mutant.module, mutant.tree(text), names, options.limit)
            known[key] = result = survived if result == SURVIVED else result
            options.cache.parent.mkdir(parents=True, exist_ok=True)
            options.cache.write_text(json.dumps(known))
        seen[result] += 1
        if result.startswith(SURVIVED):
            survivors.append(mutant)
            if options.verbose:
                print(mutant.name, flush=True)
    if not options.verbose:
        for mutant in sorted(survivors, key=lambda each: (each.module, each.line)):
            print(mutant.name)
    tried = seen.total()
    print(
        f"{tried - len(survivors)} of {tried} mutants were noticed ({seen[TIMEOUT]} by taking longer than "
        f"{options.limit} s), {len(survivors)} survived; {skipped} of {len(work)} not tried for lack of time"
    )
    return 0


def _work(chosen: str) -> list[tuple[Mutant | Replacement, tuple[str, ...]]]:
    """Mutants of a module, or of the promises of freshness, each with the tests that must notice."""
    if chosen == FRESHNESS:
        return [(each, freshness.TESTS) for each in freshness.REPLACEMENTS]
    return [(each, TESTS[chosen]) for each in mutants(chosen, _file(chosen).read_text(encoding="utf-8"))]


def _run(module: str, tree: ast.Module, names: Sequence[str], limit: float) -> str:
    """Run tests on a changed module, in a process of their own."""
    code = compile(tree, str(_file(module)), "exec")
    child = os.fork()
    if not child:
        _in_child(module, code, names)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return SURVIVED if status == 0 else KILLED
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMEOUT


def _in_child(module: str, code: CodeType, names: Sequence[str]) -> None:
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.meta_path.insert(0, _Changed(module, code))
        os.chdir(ROOT)
        tests = [str(UNIT / name) for name in names]
        status = pytest.main(["-x", "-q", *_PLUGINS, "--hypothesis-profile=mutation", *tests])
    finally:
        os._exit(int(status != 0))


class _Changed(importlib.machinery.SourceFileLoader):
    """Imports one module from changed code; a package keeps its other files."""

    def __init__(self, module: str, code: CodeType) -> None:
        super().__init__(module, str(_file(module)))
        self._module, self._code = module, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        file = _file(name)
        places = [str(file.parent)] if file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, file, loader=self, submodule_search_locations=places)

    def get_code(self, fullname: str) -> CodeType:
        return self._code


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _texts(names: Sequence[str]) -> list[str]:
    """Tests, and what they share."""
    return [
        path.read_text(encoding="utf-8") for path in (*(UNIT / name for name in names), *sorted(GROUND.glob("*.py")))
    ]


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m trials.mutation", description=(__doc__ or "").partition("\n\n")[2])
    whole.add_argument(
        "modules",
        nargs="*",
        metavar="MODULE",
        choices=[*TESTS, FRESHNESS],
        help=f"modules that hold security checks, or '{FRESHNESS}' (default: all)",
    )
    whole.add_argument("--time", type=float, default=600, metavar="S", help="seconds in all (%(default)s)")
    whole.add_argument("--limit", type=float, default=60, metavar="S", help="seconds for one mutant (%(default)s)")
    whole.add_argument("--seed", type=int, default=1, help="in which order mutants are drawn (%(default)s)")
    whole.add_argument("--again", action="store_true", help="use no results of earlier runs")
    whole.add_argument("--verbose", "-v", action="store_true", help="print each survivor at once")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vmishim" / "mutation.json"
    whole.add_argument("--cache", type=Path, default=cache, metavar="FILE", help="results so far (%(default)s)")
    return whole


if __name__ == "__main__":
    sys.exit(main())
