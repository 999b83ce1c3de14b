"""Injected programs in booted kernels: the documented example, by CO-RE and by bcc without BTF; what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.agent import InstalledAgent, install
from lab.headers import HeadersError, headers
from lab.vm import LabVM
from tests.guest.ids import Ids
from vmishim.guests import agent as guests
from vmishim.guests.agent import AgentGuest
from vmishim.inject import Extents, InjectedProgram, InjectError, compile_core, inject, injected
from vmishim.inject.bcc import compile_by_headers, member_offsets
from vmishim.kernel.offsets import Offsets
from vmishim.libvmi import Libvmi
from vmishim.link import Link
from vmishim.memory.reader import Extent
from vmishim.readahead.catalogue import KNOWN

DOCUMENT = Path(__file__).parents[2] / "docs" / "injection.md"
EXAMPLE = re.findall(r"```c\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0]
MEMBERS = sorted({*guests.MEMBERS, *(member for shape in KNOWN for member in shape.members), "task_struct no_such"})
HIDE_BTF = "/etc/systemd/system/vmishim-agent.service.d/hide-btf.conf"


@pytest.fixture(scope="module")
def vm(request: pytest.FixtureRequest) -> Iterator[LabVM]:
    """A VM whose agent is this module's own."""
    with LabVM.boot(request.param) as booted:
        # Devices to be found, beside the loopback: interfaces that no test and no system makes.
        for name in ("planted0", "planted1"):
            booted.run("ip", "link", "add", name, "type", "dummy")
        yield booted


@pytest.fixture(scope="module")
def open_agent(vm: LabVM) -> InstalledAgent:
    """An agent that takes programs."""
    return install(vm, "--allow-injection")


@pytest.fixture
def guest(open_agent: InstalledAgent) -> Iterator[AgentGuest]:
    target = open_agent.connect()
    yield target
    target.close()


@pytest.fixture(scope="module")
def agent_without_btf(vm: LabVM, open_agent: InstalledAgent) -> Iterator[InstalledAgent]:
    """The same, in a mount namespace in which the kernel shows no BTF."""
    vm.write(HIDE_BTF, b"[Service]\nTemporaryFileSystem=/sys/kernel/btf\n")
    try:
        yield install(vm, "--allow-injection")
    finally:
        vm.run("rm", HIDE_BTF)
        vm.run("systemctl", "stop", "vmishim-agent")


@pytest.fixture(scope="module")
def kernel_headers(vm: LabVM) -> Path:
    """The headers of the guest's kernel, and that bcc is there to use them."""
    try:
        found = headers(vm.image.release)
        compile_by_headers('#include "inject.h"\nint run(void *unused) { return 0; }', found)
    except (HeadersError, InjectError) as error:
        pytest.skip(f"cannot compile against the guest's headers: {error}")
    return found


@pytest.fixture(scope="module")
def offsets(kernel_headers: Path) -> Offsets:
    """Offsets that a guest's listings need, and one of a member that does not exist."""
    return member_offsets(kernel_headers, MEMBERS)


def links(vm: LabVM) -> dict[str, int]:
    """Network devices of the guest, name to index, by its ``/sys``."""
    lines = vm.run("sh", "-c", "cd /sys/class/net && grep -H . */ifindex").stdout.decode().splitlines()
    return {line.split("/")[0]: int(line.rpartition(":")[2]) for line in lines}


def devices(program: InjectedProgram, guest: AgentGuest) -> dict[str, int]:
    """What the example finds, and that nothing of it is missing."""
    found = program.run(guest.profile.symbol("init_net").to_bytes(8, "little"))
    assert (found.faults, found.truncated) == (0, None)
    return as_devices(found)


def as_devices(found: Extents) -> dict[str, int]:
    data = [extent.data for extent in found]
    return {
        name.split(b"\0")[0].decode(): int.from_bytes(index, "little")
        for name, index in zip(data[::2], data[1::2], strict=True)
    }


def test_the_example_finds_what_sys_says(vm: LabVM, guest: AgentGuest) -> None:
    with inject(guest, EXAMPLE, name="devices") as program:
        assert devices(program, guest) == links(vm)
        assert links(vm).keys() >= {"lo", "planted0", "planted1"}
        vm.run("ip", "link", "add", "late", "type", "dummy")
        assert devices(program, guest) == links(vm)
        vm.run("ip", "link", "delete", "late")
        assert devices(program, guest) == links(vm)


def test_extents_are_what_a_read_gives(guest: AgentGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[Extent] = []
    monkeypatch.setattr(guest, "learned", learned.extend, raising=False)
    with inject(guest, EXAMPLE) as program:
        found = program.run(guest.profile.symbol("init_net").to_bytes(8, "little"))
    assert learned == found
    assert [guest.remote.read(address, len(data)) for address, data in found] == [data for _, data in found]


def test_extents_are_known_to_the_read_ahead(guest: AgentGuest) -> None:
    with inject(guest, EXAMPLE) as program:
        found = program.run(guest.profile.symbol("init_net").to_bytes(8, "little"))
    before = guest.link.requests
    assert [guest.reader.read(address, len(data)) for address, data in found] == [data for _, data in found]
    assert guest.link.requests == before


def test_mounted_file_systems(vm: LabVM, guest: AgentGuest) -> None:
    source = """
    #include "inject.h"
    KERNEL_TYPES
    struct list_head { struct list_head *next; };
    struct file_system_type { const char *name; };
    struct super_block { struct list_head s_list; struct file_system_type *s_type; };
    KERNEL_TYPES_END
    struct walk { struct list_head *head, *at; };
    BODY(visit, struct walk, walk)
    {
        struct super_block *block = CONTAINER(walk->at, struct super_block, s_list);
        struct file_system_type *type = READ_FIELD(block, s_type);
        EMIT_TEXT(READ_FIELD(type, name), 32);
        walk->at = READ_FIELD(walk->at, next);
        return !walk->at || walk->at == walk->head;
    }
    SEC("syscall") int run(void *unused)
    {
        struct list_head **head = INPUT(struct list_head *);
        if (!head)
            return 1;
        struct walk walk = { *head, READ_FIELD(*head, next) };
        LOOP(10000, visit, &walk);
        return 0;
    }
    """
    with inject(guest, source) as program:
        found = program.run(guest.profile.symbol("super_blocks").to_bytes(8, "little"))
    assert (found.faults, found.truncated) == (0, None)
    mounted = {line.split()[2] for line in vm.read("/proc/self/mounts").decode().splitlines()}
    assert {data.rstrip(b"\0").decode() for _, data in found} >= mounted >= {"ext4", "proc", "sysfs"}


REJECTED = {
    "an unbounded loop": ("LOOP(256, visit, &walk);", 'while (1) asm volatile("" ::: "memory");', "verifier"),
    "a bad access": ("walk.at = READ_FIELD(walk.head, next);", "walk.at = *(void *volatile *)8;", "verifier"),
    "an unknown member": ("ifindex", "no_such", r"no struct net_device\.no_such"),
    "another section": ('SEC("syscall")', 'SEC("kprobe/do_exit")', r"accepted is SEC\(\"syscall\"\) int run"),
    "a helper that does more": ("if (!net)", "if (!net || bpf_sys_bpf(0, net, 8))", "helper 166"),
}


@pytest.mark.parametrize("what", REJECTED)
def test_a_rejected_program_leaves_the_agent_running(vm: LabVM, guest: AgentGuest, what: str) -> None:
    part, replacement, word = REJECTED[what]
    assert part in EXAMPLE
    source = EXAMPLE.replace(part, replacement)
    with pytest.raises(InjectError, match=word) as refused:
        inject(guest, source)
    assert "\n" not in str(refused.value)
    if word == "verifier":
        assert "processed" in refused.value.log
    assert injected(guest) == []
    with inject(guest, EXAMPLE) as program:
        assert devices(program, guest) == links(vm)


def test_a_session_holds_eight(guest: AgentGuest) -> None:
    data = compile_core(EXAMPLE)
    programs = [inject(guest, data, name=f"number {n}") for n in range(8)]
    with pytest.raises(InjectError, match="this session holds 8 programs"):
        inject(guest, data)
    programs[0].close()
    with inject(guest, data):
        assert [program.name for program in injected(guest)] == [*(f"number {n}" for n in range(1, 8)), "program"]
    for program in programs:
        program.close()
    assert injected(guest) == []


def test_sessions_make_room_and_load_again(vm: LabVM, open_agent: InstalledAgent) -> None:
    data = compile_core(EXAMPLE)
    guests = [open_agent.connect() for _ in range(5)]
    first = inject(guests[0], data, name="first")
    for target in guests[1:]:
        for number in range(8):
            inject(target, data, name=f"{number}")
    names = [program.name for program in injected(guests[0])]
    assert len(names) == 32
    assert "first" not in names
    assert devices(first, guests[0]) == links(vm)
    assert "first" in [program.name for program in injected(guests[0])]
    for target in guests:
        target.close()
    restart(vm)


def test_programs_end_with_their_session(vm: LabVM, open_agent: InstalledAgent) -> None:
    leaver, other = open_agent.connect(), open_agent.connect()
    inject(leaver, EXAMPLE, name="left behind")
    assert [(program.name, program.own) for program in injected(other)] == [("left behind", False)]
    programs = loaded(vm)
    leaver.close()
    # An agent keeps 64 sessions; the one that left is pushed out by those that come.
    for _ in range(64):
        open_agent.connect().close()
    watcher = open_agent.connect()
    assert injected(watcher) == []
    assert loaded(vm) == programs - 1
    watcher.close()
    other.close()


def restart(vm: LabVM) -> None:
    """End every session of the agent; its keys stay."""
    vm.run("systemctl", "restart", "vmishim-agent")


def loaded(vm: LabVM) -> int:
    """How many eBPF programs the agent holds, by the kernel's word on its descriptors."""
    script = 'cd /proc/$(systemctl show -P MainPID vmishim-agent)/fdinfo && grep -l "^prog_id:" * | wc -l'
    return int(vm.run("sh", "-c", script).stdout)


def test_offsets_of_headers_are_those_of_btf(guest: AgentGuest, offsets: Offsets) -> None:
    told = dict(zip(MEMBERS, guest.remote.members(MEMBERS), strict=True))
    assert offsets.release == guest.profile.release
    assert {**offsets.members, "task_struct no_such": None} == told


# From here on the VM has other agents than open_agent.


def test_off_by_default(vm: LabVM) -> None:
    agent = install(vm)
    guest = agent.connect()
    with pytest.raises(InjectError, match="serve --allow-injection"):
        inject(guest, EXAMPLE)
    assert injected(guest) == []
    assert guest.remote.read(guest.profile.symbol("linux_banner"), 13) == b"Linux version"
    guest.close()


def test_without_btf_core_says_what_to_do(agent_without_btf: InstalledAgent) -> None:
    guest = agent_without_btf.connect()
    assert guest.remote.members(["task_struct comm"]) == [None]
    with pytest.raises(InjectError, match=r"has no BTF.*headers"):
        inject(guest, EXAMPLE)
    guest.close()


def test_processes_are_listed_without_btf(vm: LabVM, agent_without_btf: InstalledAgent, offsets: Offsets) -> None:
    link = Link(agent_without_btf.endpoint, agent_without_btf.private, agent_without_btf.public, 30.0)
    guest = AgentGuest("lab", link, offsets=offsets)
    planted = vm.spawn("sleep", "infinity", count=3, comm="planted")
    listed = Ids(Libvmi.over(guest)).processes()
    assert {pid for pid, comm in listed.items() if comm == "planted"} == planted
    vm.kill(planted)
    guest.close()


def test_bcc_finds_the_same_without_btf(vm: LabVM, agent_without_btf: InstalledAgent, kernel_headers: Path) -> None:
    bundle = compile_by_headers(EXAMPLE, kernel_headers)
    guest = agent_without_btf.connect()
    with inject(guest, bundle, name="devices") as program:
        assert [(listed.name, listed.format) for listed in injected(guest)] == [("devices", "bytecode")]
        assert devices(program, guest) == links(vm)
    assert injected(guest) == []
    bad = EXAMPLE.replace("walk.at = READ_FIELD(walk.head, next);", "walk.at = *(void *volatile *)8;")
    bundle_of_bad = compile_by_headers(bad, kernel_headers)
    with pytest.raises(InjectError, match="verifier refused the program"):
        inject(guest, bundle_of_bad)
    with pytest.raises(InjectError, match=r"headers of Linux 0\.1, but this is"):
        inject(guest, bundle.replace(vm.image.release.encode(), b"0.1", 1))
    guest.close()
