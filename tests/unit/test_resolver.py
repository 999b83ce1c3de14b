"""How a name becomes a guest, and how one script, and its threads, are given other guests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from vmishim.errors import LibvmiError
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import ENROLLED, Resolver, current, resolving
from vmishim.guests.target import Target
from vmishim.libvmi import Libvmi
from vmishim.libvmi.constants import INIT_DOMAINID, INIT_DOMAINNAME, VMIInitData
from vmishim.script import execute

HERE = Domain("here", agent="ipc:///run/agent", agent_key="their key", key="our key")
SCRIPT = """\
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from libvmi import Libvmi, LibvmiError

def look(name):
    try:
        Libvmi(name)
    except LibvmiError as error:
        print(name, error)

look("main")
thread = threading.Thread(target=look, args=("thread",))
thread.start()
thread.join()
with ThreadPoolExecutor(1) as pool:
    pool.submit(look, "pool").result()
    pool.submit(pool.submit, look, "nested").result().result()
"""


@dataclass
class Asked:
    """Opens nothing; keeps the entries it was to open."""

    entries: list[Domain] = field(default_factory=list)

    def reach(self, domain: Domain) -> Target:
        self.entries.append(domain)
        raise LibvmiError(f"reached {domain.name}")

    @property
    def resolver(self) -> Resolver:
        return Resolver(find=lambda name, _: replace(HERE, name=name), reach=self.reach)


@pytest.fixture(autouse=True)
def _enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "domains.toml"
    names.write_text(f"[web-1]\nramfile = '{tmp_path}/ram'\nid = 7\n")
    monkeypatch.setenv("VMISHIM_CONFIG", str(names))


def test_every_thread_of_a_script_reaches_the_same_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    asked = Asked()
    assert execute(str(tmp_path / "script.py"), [], asked.resolver) == 0
    names = ["main", "thread", "pool", "nested"]
    assert capsys.readouterr().out.splitlines() == [f"{name} reached {name}" for name in names]
    assert asked.entries == [replace(HERE, name=name) for name in names]
    assert current() is ENROLLED


def test_a_script_that_names_another_endpoint_is_read_there() -> None:
    asked = Asked()
    with resolving(asked.resolver):
        for given in ("tcp://10.0.0.5:5555", "/run/kvmi.sock"):  # the second is LibVMI's own meaning, and not ours
            with pytest.raises(LibvmiError, match="reached web-1"):
                Libvmi("web-1", INIT_DOMAINNAME, {VMIInitData.KVMI_SOCKET: given})
    assert [entry.agent for entry in asked.entries] == ["tcp://10.0.0.5:5555", HERE.agent]


def test_without_a_resolver_a_name_is_that_of_domains_toml(tmp_path: Path) -> None:
    for name, flags in (("web-1", INIT_DOMAINNAME), ("7", INIT_DOMAINID)):
        with pytest.raises(LibvmiError, match=rf"VM_NOT_FOUND: guest memory {tmp_path}/ram cannot be read"):
            Libvmi(name, flags)
    with pytest.raises(LibvmiError, match="VM_NOT_FOUND: no domain 'web-2'"):
        Libvmi("web-2")


def test_the_inner_block_counts_and_an_error_ends_it() -> None:
    outer, inner = Asked().resolver, Asked().resolver
    with resolving(outer):
        with pytest.raises(KeyError), resolving(inner):
            raise KeyError(current() is inner)
        assert current() is outer
        assert _in_a_new_thread() is outer
    assert (current(), _in_a_new_thread()) == (ENROLLED, ENROLLED)


def test_two_threads_with_blocks_of_their_own_do_not_meet() -> None:
    meet = threading.Barrier(2, timeout=10)

    def block() -> bool:
        mine = Resolver(reach=lambda domain: cast(Target, None))
        with resolving(mine):
            meet.wait()  # both blocks are open
            right = current() is mine
            meet.wait()  # neither is closed before both have looked
        return right

    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in [pool.submit(block), pool.submit(block)]] == [True, True]
    assert current() is ENROLLED


def test_a_context_that_is_handed_on_keeps_its_resolver() -> None:
    mine = Asked().resolver
    with resolving(mine):
        context = copy_context()
    assert current() is ENROLLED
    assert context.run(current) is mine


def _in_a_new_thread() -> Resolver:
    found: list[Resolver] = []
    thread = threading.Thread(target=lambda: found.append(current()))
    thread.start()
    thread.join()
    return found[0]
