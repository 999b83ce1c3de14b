"""A lab VM as a guest to play with: with an agent, enrolled in ``domains.toml``, and with processes to look at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.agent import install
from lab.steps import say
from lab.vm import LabVM
from vmishim.commands import CommandError, enrolment
from vmishim.errors import LibvmiError
from vmishim.guests import domains
from vmishim.wire.keys import save_private

PLANTED = {"webserver": 4, "database": 2, "worker": 6, "cryptominer": 1}
"""Names of the processes started in the monitored container, and how many of each."""


def plant(vm: LabVM) -> dict[int, str]:
    """Start the processes of `PLANTED` in the container; returns their names by pid."""
    return {
        pid: name for name, count in PLANTED.items() for pid in vm.spawn("sleep", "infinity", count=count, comm=name)
    }


def check(name: str) -> None:
    """Whether a VM can be enrolled under this name, before it takes the time to boot one.

    :raises CommandError: another guest has the name
    """
    try:
        found = domains.load().get(name)
    except LibvmiError as error:
        raise CommandError(str(error).removeprefix("NO_CONFIG: ")) from None
    if found and Path(found.key).expanduser() != _key(name):
        raise CommandError(f"{domains.path()} already has an entry {name}; choose another name")


@contextmanager
def enrolled(vm: LabVM, name: str) -> Iterator[None]:
    """Install an agent in the VM and enrol it for the length of the block; prints what to try with it.

    Its key and entry are those of this VM alone, so one that an earlier lab left behind is replaced.

    :raises CommandError: see `check`
    :raises lab.vm.CommandError: the agent did not start
    """
    check(name)
    agent = install(vm)
    processes = plant(vm)
    _key(name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    save_private(_key(name), agent.private, overwrite=True)
    entry = {
        "agent": agent.endpoint,
        "agent_key": agent.public.text,
        "key": str(_key(name)),
        # The VM's own memory, for `vmishim compare`: an ordinary VM, so we can read it.
        "ramfile": str(vm.ram),
    }
    enrolment.write(name, entry, replace=True)
    try:
        say(f"lab: {len(processes)} processes run in the VM's container: {', '.join(PLANTED)}")
        say(f"lab: enrolled as {name} in {domains.path()}; in another terminal, try:\n")
        for command in ("ps {} --tree", "ss {}", "watch {}", f"run --stats {_script()} {{}}", "doctor {}"):
            print(f"  {_vmishim()} {command.format(name)}")
        print(flush=True)
        yield
    finally:
        if name in domains.load():
            enrolment.forget(argparse.Namespace(names=[name]))
        _key(name).unlink(missing_ok=True)


def _key(name: str) -> Path:
    return domains.path().with_name(f"lab-{name}.key")


def _script() -> Path:
    return _near(Path(__file__).parents[1] / "compat" / "examples" / "process_list.py")


def _vmishim() -> Path:
    return _near(Path(sys.executable).with_name("vmishim"))


def _near(path: Path) -> Path:
    """As it is called in the current folder."""
    here = Path(os.getcwd())
    return path.relative_to(here) if path.is_relative_to(here) else path
