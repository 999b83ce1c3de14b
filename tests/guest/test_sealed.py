"""The kernel of a guest encrypts what is read of it: the same tests as on this machine, and those that need a VM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from bench.machine import Machine, inside
from lab.agent import KEYS
from lab.vm import LabVM
from tests.guest.ids import Ids
from tests.local.test_sealed import (  # noqa: F401
    guest,
    tampered,
    test_a_bit_flipped_in_any_part_is_an_error,
    test_a_domain_may_name_its_kernels_key,
    test_a_kernel_key_that_is_pinned_must_be_the_agents,
    test_a_replayed_answer_is_an_error,
    test_a_walk_of_many_chunks_is_exact,
    test_every_kind_of_reading_gives_what_an_agent_in_the_clear_gives,
    test_no_counter_and_no_iv_comes_twice,
    test_nothing_is_read_in_the_clear,
    test_the_agent_holds_three_programs_and_what_it_asks_and_is_answered_by,
    test_the_agent_keeps_no_key,
    test_the_agent_never_holds_what_it_carries,
    test_the_chunks_of_a_walk_come_in_their_order_and_of_that_walk,
    test_the_kernel_takes_no_question_but_an_idss,
    test_the_list_is_that_of_proc_and_of_an_agent_that_reads_in_the_clear,
)
from vmishim.errors import LinkError
from vmishim.libvmi import Libvmi
from vmishim.wire.keys import generate

# The lab's first kernel that can.
pytestmark = pytest.mark.of_kernel("6.12")


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    with LabVM.boot(request.param) as booted:
        yield booted


@pytest.fixture(scope="module")
def machine(vm: LabVM) -> Iterator[Machine]:
    with inside(vm) as found:
        yield found


def test_a_restarted_agent_is_read_on(vm: LabVM, machine: Machine) -> None:
    """New keys, no new connection: the envelope is fetched and held to the pinned key. Who is permitted gets one."""
    with closing(machine.sealing.connect(kernel_key=machine.sealing.kernel)) as reader:
        ids = Ids(Libvmi.over(reader))
        before = ids.processes()
        later = generate()
        vm.run("sh", "-c", f"echo '{later.public.text}' >>{KEYS}/permitted")
        with pytest.raises(LinkError, match="restart the agent"):
            replace(machine.sealing, private=later).connect()
        vm.run("systemctl", "restart", "vmishim-agent")
        assert ids.processes().keys() >= before.keys() & {1, 2}
        with closing(replace(machine.sealing, private=later).connect()) as other:
            assert Ids(Libvmi.over(other)).processes()


def test_drgn_finds_what_it_finds_by_an_agent_in_the_clear(
    vm: LabVM, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("drgn", reason="pip install 'vmishim[drgn]', or run ci/setup again")
    from drgn.helpers.linux.module import for_each_module
    from drgn.helpers.linux.pid import for_each_task

    from vmishim.drgn.guest import Guest

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planted = vm.spawn("sleep", "infinity", count=5, comm="planted")
    try:
        with closing(machine.sealing.connect()) as sealing, closing(machine.plain.connect()) as plain:
            assert sealing.sealed
            guests = [Guest(target) for target in (sealing, plain)]
            for guest in guests:
                found = {task.pid.value_() for task in for_each_task(guest.prog) if task.comm.string_() == b"planted"}
                assert found == planted
            modules = [[module.name.string_() for module in for_each_module(guest.prog)] for guest in guests]
            told = [line.split()[0].encode() for line in vm.read("/proc/modules").decode().splitlines()]
            assert modules == [told, told]
    finally:
        vm.kill(planted)
