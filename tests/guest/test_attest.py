"""Attestation in a booted guest that is not an AMD confidential VM: it says so, and nothing accepts it as one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lab import modules
from lab.agent import AGENT, KEYS, InstalledAgent, install
from lab.vm import LabVM
from tests.authority import REPORT, SIGNED, authority, chip, fill, sign, table
from tests.guest.ids import Ids
from vmishim.attestation import Requirements, ask, verify
from vmishim.attestation.errors import AttestationError, NoReportError, VmplError
from vmishim.guests.agent import AgentGuest, connect
from vmishim.libvmi import Libvmi
from vmishim.wire.attestation import report_data
from vmishim.wire.keys import PublicKey

PROVIDER = Path(modules.__file__).with_name("tsm_provider")
REQUIRED = Requirements(frozenset({bytes(48)}))


def test_a_guest_without_attestation_says_so(guest: AgentGuest) -> None:
    with pytest.raises(NoReportError) as caught:
        ask(guest.link.exchange)
    for way in ("/sys/kernel/config/tsm/report: ", "/dev/sev-guest: "):
        assert way in str(caught.value)


def test_an_ids_that_requires_attestation_does_not_read_it(agent: InstalledAgent) -> None:
    with pytest.raises(NoReportError, match="the agent's machine gives no attestation report"):
        connect(replace(agent.domain(), attestation=REQUIRED), private=agent.private)


def test_the_device_can_be_reached_from_within_the_unit(lab: LabVM, agent: InstalledAgent) -> None:
    """Another device stands in for it, which knows nothing of reports: what matters is that the agent may ask it."""
    lab.run("mknod", "-m", "600", "/dev/sev-guest", "c", "1", "3")
    try:
        lab.run("systemctl", "restart", "vmishim-agent")
        with pytest.raises(NoReportError, match="/dev/sev-guest: Inappropriate ioctl for device"):
            ask(agent.connect().link.exchange)
    finally:
        lab.run("rm", "/dev/sev-guest")
        lab.run("systemctl", "restart", "vmishim-agent")


@pytest.mark.of_kernel("6.12")
def test_a_report_comes_through_the_kernels_configfs() -> None:
    """All the way: the agent's key, configfs-tsm, the wire, and what an IDS requires."""
    with LabVM.boot("6.12") as vm:
        agent = install(vm)
        raw = fill(REPORT, report_data=report_data(agent.public), vmpl=2)
        key, certificate = chip()
        vm.write("/run/tsm/report", sign(raw, key))
        vm.write("/run/tsm/certificates", table(VCEK=certificate, ASK=authority().ask, ARK=authority().ark))
        vm.write("/run/tsm_provider.ko", modules.build(PROVIDER, vm.image.release).read_bytes())
        # The driver itself finds that this is not a machine of its kind.
        assert b"No such device" in vm.run("modprobe", "sev-guest", check=False).stderr
        vm.run("modprobe", "tsm")
        vm.run("mount", "-t", "configfs", "none", "/sys/kernel/config")
        assert refused(vm, agent, agent.public, REQUIRED, NoReportError).startswith(
            "the agent's machine gives no attestation report: "
            "/sys/kernel/config/tsm/report: No such device or address; "
        )

        vm.run("insmod", "/run/tsm_provider.ko")
        vm.run("systemctl", "restart", "vmishim-agent")
        required = Requirements(frozenset({b"\x4d" * 48}), vmpl=2, roots=frozenset({authority().root}))
        entry = replace(agent.domain(), attestation=required)
        with closing(connect(entry, private=agent.private)) as guest:
            assert {1, 2} <= Ids(Libvmi.over(guest)).processes().keys()
            assert ask(guest.link.exchange)[:SIGNED] == raw[:SIGNED]
        assert vm.run("ls", "/sys/kernel/config/tsm/report").stdout == b""
        vm.run("python3", AGENT, "attest", "/run/saved")
        assert verify(vm.read("/run/saved"), agent.public, roots=required.roots).report.vmpl == 2
        refused(vm, agent, agent.public, replace(required, vmpl=0), VmplError)

        # The report is for that key: after a change of keys the same report is of no use.
        vm.run("rm", f"{KEYS}/agent.key")
        fresh = PublicKey.from_text(vm.run("python3", AGENT, "keygen", f"{KEYS}/agent.key").stdout.decode())
        assert "/sys/kernel/config/tsm/report: Invalid argument" in refused(vm, agent, fresh, required, NoReportError)


def refused(
    vm: LabVM, agent: InstalledAgent, key: PublicKey, required: Requirements, error: type[AttestationError]
) -> str:
    """What a freshly started agent is refused for."""
    vm.run("systemctl", "restart", "vmishim-agent")
    with pytest.raises(AttestationError) as caught:
        connect(replace(agent.domain(), agent_key=key.text, attestation=required), private=agent.private)
    assert type(caught.value) is error
    return str(caught.value)
