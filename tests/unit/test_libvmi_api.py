"""The API class over memory that the test knows: the hit path, errors, pauses, caches, names of guests."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmishim.libvmi
from vmishim.errors import FaultError, LibvmiError, LinkError, UnknownNameError, failure
from vmishim.guests import domains
from vmishim.kernel.profile import Member
from vmishim.libvmi import AccessContext, Libvmi, Registers, check, pause
from vmishim.libvmi.constants import (
    INIT_DOMAINID,
    INIT_DOMAINNAME,
    INIT_EVENTS,
    MemAccess,
    RegAccess,
    TranslateMechanism,
    VMIInitData,
    VMIMode,
    X86Reg,
)
from vmishim.libvmi.event import DebugEvent, IntEvent, MemEvent, RegEvent, SingleStepEvent
from vmishim.libvmi.limits import STRING_LIMIT
from vmishim.memory import pagetable
from vmishim.memory.reader import KERNEL, PHYSICAL

BASE = 0xFFFF_8880_0000_0000
TABLES = 0x7000
MAX_PFN = 0x10000  # behind the memory that most tests have


class Kernel:
    """A kernel with two symbols."""

    release = "6.1.0"
    hostname = boot_id = ""
    page_offset = BASE
    kaslr_offset = 0
    memory_size = 1 << 30
    vcpus = 2
    levels = 4

    def symbol(self, name: str) -> int:
        return {"banner": BASE, "init_task": BASE + 64, "max_pfn": BASE + MAX_PFN}[name]

    def symbol_at(self, address: int) -> str:
        return {BASE: "banner"}[address]

    def member(self, struct: str, member: str) -> Member:
        return {("task_struct", "tasks"): Member(8, 16)}[struct, member]

    def size(self, struct: str) -> int:
        raise KeyError(struct)

    forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1


class Guest:
    """A stretch of kernel memory at ``BASE``, and what was asked of it."""

    name = "web-1"
    agent = None

    def __init__(self, memory: bytes = bytes(range(1, 128)) * 128 + bytes(64)) -> None:
        self.memory = memory
        self.profile = Kernel()
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.asked: list[tuple[int, int, int]] = []
        self.told: list[str] = []
        self.broken = False

    @property
    def reader(self) -> Guest:
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        self.asked.append((address, count, space))
        if self.broken:
            raise LinkError("the agent is gone; start it")
        start = address if space == PHYSICAL else address - BASE
        data = self.memory[start : start + count] if start >= 0 else b""
        if len(data) < count:
            raise FaultError(address + len(data), data)
        return data

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        try:
            found = pagetable.walk(lambda at, count: self.read(at, count, PHYSICAL), dtb, address)
        except FaultError:
            return 0, 0, []
        return found.physical, found.size, [entry.value for entry in found.entries]

    def hold(self) -> None:
        self.told.append("hold")

    def release(self) -> None:
        self.told.append("release")

    def flush(self) -> None:
        self.told.append("flush")

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def target() -> Guest:
    return Guest()


@pytest.fixture
def vmi(target: Guest) -> Iterator[Libvmi]:
    with Libvmi.over(target) as made:
        yield made


def test_a_known_cell_is_read_without_asking(vmi: Libvmi, target: Guest) -> None:
    target.words[BASE + 5000] = 0x0807060504030201
    target.cells[BASE + 5000] = b"\x01\x02\x03\x04\x05\x06\x07\x08name\0rest"
    assert vmi.read_addr_va(BASE + 5000, 0) == vmi.read_64_va(BASE + 5000, 0) == 0x0807060504030201
    assert vmi.read_32_va(BASE + 5000, 0) == 0x04030201
    assert vmi.read_8_va(BASE + 5000, 0) == 1
    assert vmi.read_va(BASE + 5000, 0, 3) == (b"\x01\x02\x03", 3)
    assert vmi.read_va(BASE + 5000, 0, 0) == (b"", 0)
    target.cells[BASE + 6000] = b"swapper/0\0\0"
    assert vmi.read_str_va(BASE + 6000, 0) == "swapper/0"
    assert target.asked == []


def test_a_cell_that_is_too_short_is_not_enough(vmi: Libvmi, target: Guest) -> None:
    target.cells[BASE] = b"\xff\xff"
    assert vmi.read_16_va(BASE, 0) == 0xFFFF
    assert vmi.read_32_va(BASE, 0) == 0x04030201
    assert vmi.read_va(BASE, 0, 4) == (b"\x01\x02\x03\x04", 4)
    target.cells[BASE + 32] = b"no end"
    assert vmi.read_str_va(BASE + 32, 0).startswith('!"#')


def test_a_cell_of_the_kernel_is_no_process_memory(vmi: Libvmi, target: Guest) -> None:
    target.words[0x1000] = 2**64 - 1
    target.cells[0x1000] = b"\xff" * 8
    vmi.pidcache_add(7, TABLES)
    with pytest.raises(LibvmiError):
        vmi.read_addr_va(0x1000, 7)
    assert target.asked == [(0x1000, 8, TABLES)]


@given(st.integers(0, 16000), st.sampled_from(["8", "16", "32", "64", "addr"]))
def test_every_width_is_little_endian(offset: int, width: str) -> None:
    target = Guest()
    vmi = Libvmi.over(target)
    size = 8 if width == "addr" else int(width) // 8
    expected = int.from_bytes(target.memory[offset : offset + size], "little")
    assert getattr(vmi, f"read_{width}_va")(BASE + offset, 0) == expected
    assert getattr(vmi, f"read_{width}_pa")(offset) == expected
    context = AccessContext(TranslateMechanism.PROCESS_PID, addr=BASE + offset)
    assert getattr(vmi, f"read_{width}")(context) == expected
    vmi.symcache_add(0, 0, "here", BASE + offset)
    assert getattr(vmi, f"read_{width}_ksym")("here") == expected


def test_a_fault_is_libvmi_s_failure(vmi: Libvmi) -> None:
    for call in (
        lambda: vmi.read_addr_va(0, 0),
        lambda: vmi.read_va(BASE + 16320 - 4, 0, 8),
        lambda: vmi.read_str_va(1, 0),
        lambda: vmi.read_pa(1 << 45, 8),
        lambda: vmi.read_pa(1 << 63, 8),
        lambda: vmi.translate_ksym2v("no_such_symbol"),
        lambda: vmi.get_offset("linux_mm"),
        lambda: vmi.get_offset("nonsense"),
        lambda: vmi.get_kernel_struct_offset("nonsense", "nonsense"),
        lambda: vmi.pagetable_lookup(TABLES, 0),
    ):
        with pytest.raises(LibvmiError) as caught:
            call()
        assert (str(caught.value), caught.value.args) == ("VMI_FAILURE", ("VMI_FAILURE",))
        assert not isinstance(caught.value, LinkError)


def test_a_failure_says_what_failed(vmi: Libvmi, target: Guest) -> None:
    end = BASE + len(target.memory)
    with pytest.raises(FaultError) as fault:
        vmi.read_va(end - 4, 0, 8)
    assert (fault.value.address, fault.value.data) == (end, target.memory[-4:])
    assert fault.value.__notes__ == [f"no readable memory at {end:#x}"]
    with pytest.raises(UnknownNameError) as unknown:
        vmi.get_kernel_struct_offset("task_struct", "no_such_member")
    assert unknown.value.name == "task_struct.no_such_member"
    assert unknown.value.__notes__ == ["this kernel has no member task_struct.no_such_member"]
    with pytest.raises(UnknownNameError) as symbol:
        vmi.translate_ksym2v("modules")
    assert symbol.value.__notes__ == ["this kernel has no symbol or structure modules"]


BY_PID, BY_DTB = (
    AccessContext(TranslateMechanism.PROCESS_PID, addr=BASE),
    AccessContext(TranslateMechanism.PROCESS_DTB, addr=BASE, dtb=TABLES),
)
REFUSED: dict[str, tuple[Callable[[Libvmi], object], str]] = {
    "write": (lambda vmi: vmi.write(BY_PID, b"x"), "never changes the guest"),
    "write_va": (lambda vmi: vmi.write_va(BASE, 0, b"x"), "never changes the guest"),
    "write_pa": (lambda vmi: vmi.write_pa(0, b"x"), "never changes the guest"),
    "write_8_va": (lambda vmi: vmi.write_8_va(BASE, 0, 1), "never changes the guest"),
    "request_page_fault": (lambda vmi: vmi.request_page_fault(0, BASE, 0), "never changes the guest"),
    "set_vcpureg": (lambda vmi: vmi.set_vcpureg(0, 0, 0), "never changes the guest"),
    "get_vcpureg": (lambda vmi: vmi.get_vcpureg(X86Reg.RAX.value, 0), "only CR3 is known"),
    "get_vcpuregs": (lambda vmi: vmi.get_vcpuregs(0), "cannot read a virtual CPU's registers"),
    "listen": (lambda vmi: vmi.listen(1), "events need a hypervisor's help"),
    "register_event": (
        lambda vmi: vmi.register_event(MemEvent(MemAccess.RW, lambda *_: None)),
        "events need a hypervisor's help",
    ),
    "slat_create": (lambda vmi: vmi.slat_create(), "second-level page tables are the hypervisor's"),
    "slat_switch": (lambda vmi: vmi.slat_switch(0), "second-level page tables are the hypervisor's"),
    "read_unicode_str_va": (lambda vmi: vmi.read_unicode_str_va(BASE, 0), "only Windows has unicode strings"),
    "pid_to_dtb": (lambda vmi: vmi.pid_to_dtb(99), ""),
    "read_va of no process": (lambda vmi: vmi.read_va(BASE, 99, 8), ""),
    "read_ksym": (lambda vmi: vmi.read_ksym("nothing", 8), "this kernel has no symbol or structure nothing"),
    "get_offset": (lambda vmi: vmi.get_offset("nonsense"), "this kernel has no symbol or structure nonsense"),
    "translate_v2ksym by other tables": (lambda vmi: vmi.translate_v2ksym(BY_DTB, 5), ""),
    "get_access_mode": (lambda vmi: vmi.get_access_mode("nobody", INIT_DOMAINNAME, None), "no domain 'nobody'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_failure_keeps_libvmi_s_text_and_adds_the_reason(vmi: Libvmi, name: str) -> None:
    call, reason = REFUSED[name]
    with pytest.raises(LibvmiError) as caught:
        call(vmi)
    assert str(caught.value) == "VMI_FAILURE"
    (note,) = caught.value.__notes__
    assert reason in note
    assert note.isprintable()


def test_a_partial_opening_says_what_is_missing(target: Guest) -> None:
    vmi = Libvmi.__new__(Libvmi)
    vmi._open(target, None, initialised=False)
    for call in (lambda: vmi.translate_ksym2v("x"), lambda: vmi.get_offset("linux_pid"), lambda: vmi.read_va(1, 1, 1)):
        with pytest.raises(LibvmiError) as caught:
            call()
        assert str(caught.value) == "VMI_FAILURE"
        assert "call init_os first" in caught.value.__notes__[0]


def test_no_bare_failure_is_raised() -> None:
    """`failure` adds the reason."""
    folder = Path(vmishim.libvmi.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "LibvmiError(FAILURE)" in path.read_text()] == []


def test_a_note_with_a_guests_text_does_not_act() -> None:
    assert failure("no \x1b[2J\u202e").__notes__ == [r"no \x1b[2J\u202e"]


def test_a_broken_link_is_never_memory_that_is_not_there(vmi: Libvmi, target: Guest) -> None:
    target.broken = True
    for call in (
        lambda: vmi.read_addr_va(BASE, 0),
        lambda: vmi.read_str_va(BASE, 0),
        lambda: vmi.read_pa(0, 8, padding=True),
        lambda: vmi.pagetable_lookup(TABLES, 0),
    ):
        with pytest.raises(LinkError, match="start it"):
            call()


def test_the_bytes_before_a_hole_are_padded_on_request(vmi: Libvmi, target: Guest) -> None:
    end = len(target.memory)
    assert vmi.read_pa(end - 3, 8, padding=True) == (target.memory[-3:] + bytes(5), 3)
    assert vmi.read_pa(end + 4096, 8, True) == (bytes(8), 0)


def test_a_string_goes_on_over_pages_and_ends_at_a_hole() -> None:
    memory = bytearray(b"x" * 8192)
    target = Guest(bytes(memory))
    vmi = Libvmi.over(target)
    assert vmi.read_str_va(BASE + 100, 0) == "x" * (8192 - 100)
    assert all((address % 4096) + count <= 4096 for address, count, _ in target.asked)
    memory[5000] = 0
    assert Libvmi.over(Guest(bytes(memory))).read_str_va(BASE, 0) == "x" * 5000


def test_a_string_without_an_end_is_refused() -> None:
    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
        Libvmi.over(Guest(b"x" * (STRING_LIMIT + 8192))).read_str_va(BASE, 0)


def test_a_string_that_is_not_text_is_a_unicode_error(vmi: Libvmi, target: Guest) -> None:
    target.cells[BASE] = b"\xff\0"
    with pytest.raises(UnicodeDecodeError):
        vmi.read_str_va(BASE, 0)


def test_pauses_nest(vmi: Libvmi, target: Guest) -> None:
    with pause(vmi), pause(vmi):
        assert target.told == ["hold"]
    assert target.told == ["hold", "release"]
    vmi.resume_vm()
    assert target.told == ["hold", "release"]


def test_a_pause_ends_with_an_error_inside(vmi: Libvmi, target: Guest) -> None:
    with pytest.raises(KeyError), pause(vmi):
        raise KeyError
    assert target.told == ["hold", "release"]


def test_destroy_ends_everything_once(target: Guest) -> None:
    vmi = Libvmi.over(target)
    vmi.pause_vm()
    vmi.destroy()
    vmi.destroy()
    assert target.told == ["hold", "release", "close"]
    target.cells[BASE] = bytes(8)
    assert vmi.vmi is None


class WalkingGuest(Guest):
    """A guest that walks its page tables by itself: it maps one page."""

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        self.told.append(f"lookup {dtb:#x} {address:#x}")
        return (0x5008, 4096, [0x8001, 0x9001, 0xA001, 0x5001]) if address == BASE + 8 else (0, 0, [])


def test_a_target_that_walks_is_asked_once() -> None:
    target = WalkingGuest()
    vmi = Libvmi.over(target)
    found = vmi.pagetable_lookup_extended(TABLES, BASE + 8)
    assert (found.paddr, found.size) == (0x5008, 4096)
    assert found.x86_ia32e.pte_location == 0xA000
    assert found.x86_ia32e.pml4e_value == 0x8001
    assert vmi.pagetable_lookup(TABLES + 5, BASE + 8 - (1 << 60)) == 0x5008
    with pytest.raises(FaultError) as fault:
        vmi.pagetable_lookup(TABLES, BASE)
    assert fault.value.address == BASE
    assert target.told == [f"lookup 0x7000 {BASE + 8:#x}"] * 2 + [f"lookup 0x7000 {BASE:#x}"]
    assert target.asked == []


def test_flushes_reach_the_target(vmi: Libvmi, target: Guest) -> None:
    vmi.pagecache_flush()
    vmi.v2pcache_flush()
    assert target.told == ["flush", "flush"]
    vmi.symcache_flush()
    assert target.profile.forgotten == 1


def test_what_was_added_is_believed(vmi: Libvmi) -> None:
    vmi.v2pcache_add(0x1234, TABLES, 0x9876)
    assert vmi.pagetable_lookup(TABLES, 0x1010) == 0x9010
    vmi.v2pcache_flush(TABLES)
    vmi.pidcache_add(9, TABLES)
    assert vmi.pid_to_dtb(9) == TABLES
    vmi.rvacache_add(0x400000, 9, 16, "name")
    context = AccessContext(TranslateMechanism.PROCESS_DTB, addr=0x400000, dtb=TABLES)
    assert vmi.translate_v2sym(context, 16) == "name"
    vmi.rvacache_flush()
    with pytest.raises(LibvmiError):
        vmi.translate_v2sym(context, 16)


@pytest.mark.parametrize("event", [MemEvent, RegEvent, SingleStepEvent, IntEvent, DebugEvent])
def test_events_can_be_made_and_are_refused(vmi: Libvmi, event: type) -> None:
    first: dict[type, list[Any]] = {
        MemEvent: [MemAccess.RW],
        RegEvent: [X86Reg.CR3, RegAccess.W],
        SingleStepEvent: [[0, 2]],
    }
    made = event(*first.get(event, []), lambda vmi, event: None, data="mine")
    assert made.to_dict()["data"] == "mine"
    with pytest.raises(LibvmiError, match="VMI_FAILURE"):
        vmi.register_event(made)
    assert made.vmi is vmi


def test_registers_are_a_dictionary_by_register() -> None:
    registers = Registers()
    registers[X86Reg.RAX] = 0x42
    assert registers[X86Reg.RAX] == 0x42
    assert "rax = 0x42" in str(registers).splitlines()
    with pytest.raises(RuntimeError):
        registers["rax"]  # type: ignore[index]
    with pytest.raises(RuntimeError):
        registers[X86Reg.DR0] = 1


def test_check() -> None:
    check(0)
    with pytest.raises(LibvmiError, match=r"^OS$"):
        check(1, "OS")


@pytest.mark.parametrize("error", [LinkError("gone"), FaultError(BASE, b"before"), UnknownNameError("init_task")])
def test_errors_survive_a_process_pool(error: Exception) -> None:
    came = pickle.loads(pickle.dumps(error))
    assert (type(came), str(came), vars(came)) == (type(error), str(error), vars(error))


# Names of guests.


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "domains.toml"
    monkeypatch.setenv("VMISHIM_CONFIG", str(file))
    file.write_text('[web-1]\nramfile = "/no/such/file"\nid = 7\n[db]\nramfile = "/x"\n')
    return file


def test_an_unknown_domain_names_the_known(known: Path) -> None:
    with pytest.raises(LibvmiError, match=r"^VM_NOT_FOUND: no domain 'web1' in .*; known are db, web-1"):
        Libvmi("web1")
    with pytest.raises(LibvmiError, match=r"^VM_NOT_FOUND: no id '8' in .*; known are 7"):
        Libvmi("8", INIT_DOMAINID)
    known.unlink()
    with pytest.raises(LibvmiError, match=r"^VM_NOT_FOUND: .*no domain is known yet.*vmishim enroll"):
        Libvmi("web-1")


def test_a_domain_s_memory_must_be_there(known: Path) -> None:
    with pytest.raises(LibvmiError, match=r"^VM_NOT_FOUND: guest memory /no/such/file cannot be read"):
        Libvmi("web-1")


def test_the_constructor_s_arguments_are_checked(known: Path) -> None:
    with pytest.raises(LibvmiError, match=r"^EVENTS: "):
        Libvmi("web-1", INIT_DOMAINNAME | INIT_EVENTS)
    with pytest.raises(TypeError):
        Libvmi("web-1", 0)
    with pytest.raises(RuntimeError, match="init_flags"):
        Libvmi("web-1", 0, partial=True)
    with pytest.raises(RuntimeError, match="VMIMode"):
        Libvmi("web-1", mode=5, partial=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="init_data"):
        Libvmi("web-1", init_data={VMIInitData.KVMI_SOCKET: 5})  # type: ignore[dict-item]


def test_access_mode(known: Path, vmi: Libvmi) -> None:
    assert vmi.get_access_mode("web-1", INIT_DOMAINNAME, None) is VMIMode.FILE
    assert vmi.get_access_mode("7", INIT_DOMAINID, None) is VMIMode.FILE
    with pytest.raises(LibvmiError) as caught:
        vmi.get_access_mode("nobody", INIT_DOMAINNAME, None)
    assert str(caught.value) == "VMI_FAILURE"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a]\n", "needs agent"),
        ('[a]\nagent = "x:1"\n', "agent: 'x:1' is not a valid endpoint"),
        ('[a]\nagent = "tcp://x:1"\n', "needs agent_key"),
        ('[a]\nramfle = "x"\n', "unknown setting 'ramfle'"),
        ("[a]\nramfile = 5\n", "ramfile cannot be 5"),
        ('[a]\nramfile = "x"\ntimeout = 0\n', "more than 0"),
        ('[a]\nramfile = "x"\nkernel_key = "k"\n', "has kernel_key, but no agent"),
        ('[a]\nramfile = "x"\nfreeze = 5\n', "needs an agent"),
        ('[a]\nagent = "tcp://x:1"\nagent_key = "k"\nkey = "k"\nfreeze = -1\n', "freeze must be more than 0"),
        ('[a]\nagent = "tcp://x:1"\nagent_key = "k"\nkey = "k"\nfreeze = true\n', "freeze cannot be True"),
        ("a = 5\n", "is a value"),
        ("[a\n", "cannot be read"),
    ],
)
def test_wrong_entries_are_named(known: Path, text: str, complaint: str) -> None:
    known.write_text(text)
    with pytest.raises(LibvmiError, match=rf"^NO_CONFIG: .*{complaint}"):
        domains.load()


def test_where_names_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VMISHIM_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert domains.path() == tmp_path / "vmishim" / "domains.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert domains.path() == tmp_path / ".config" / "vmishim" / "domains.toml"


def test_the_memory_size_is_that_of_now() -> None:
    """It grows when memory is plugged in, and a broken kernel cannot make it larger than any memory."""
    guest = Guest(bytearray(MAX_PFN + 8))  # type: ignore[arg-type]
    vmi = Libvmi.over(guest)
    for pages, size in ((0x40000, 1 << 30), (0x3FFDD, 1 << 30), (0x15_0000, 0x1_5000_0000), (1 << 60, 1 << 30)):
        guest.memory[MAX_PFN:] = pages.to_bytes(8, "little")  # type: ignore[index]
        assert (vmi.get_memsize(), vmi.get_max_physical_address()) == (size, size)
    guest.memory = b""
    assert vmi.get_memsize() == 1 << 30
