"""The checks of ``vmishim scan``, and one look at a guest, over a kernel that is a few structures in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vmishim import cli
from vmishim.commands import scan as command
from vmishim.errors import FaultError
from vmishim.inspection.again import LINE, Again
from vmishim.inspection.checks import CHECKS, Check, bpf, code, hooks, modules, processes, settings
from vmishim.inspection.checks.view import View
from vmishim.inspection.findings import Severity
from vmishim.inspection.lists import Damage
from vmishim.inspection.scan import FINDINGS_MAX, Scan
from vmishim.inspection.structures import BrokenError
from vmishim.kernel.profile import Member
from vmishim.libvmi import Libvmi
from vmishim.memory.reader import KERNEL, Extent

BASE, TEXT, MODULE_TEXT = 0xFFFF_8880_0000_0000, 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_C000_0000
SIZE = 1 << 20


class Guest:
    """Memory at ``BASE``, symbols and members as given. Implements `vmishim.guests.target.Target`."""

    name = "unit"
    agent: Any = None

    def __init__(self, symbols: dict[str, int], members: dict[str, tuple[int, int]]) -> None:
        self.memory = bytearray(SIZE)
        self.words: dict[int, int] = {}
        self.cells: dict[int, bytes] = {}
        self.asked = 0
        self.holds = 0
        sizes = {name: size for name, (_, size) in members.items()}

        def symbol(name: str) -> int:
            if name not in symbols:
                raise KeyError(f"no symbol {name!r}")
            return symbols[name]

        def member(of: str, name: str) -> Member:
            if f"{of} {name}" not in members:
                raise KeyError(f"no {of}.{name}")
            return Member(*members[f"{of} {name}"])

        def symbol_at(address: int) -> str:
            return {address: name for name, address in symbols.items()}[address]

        self.profile: Any = SimpleNamespace(
            release="6.1.0",
            symbol=symbol,
            symbol_at=symbol_at,
            member=member,
            size=lambda name: sizes[name],
            levels=4,
            page_offset=BASE,
            kaslr_offset=0,
            memory_size=SIZE,
            vcpus=1,
            hostname="unit",
            boot_id="",
        )

    @property
    def reader(self) -> Guest:
        return self

    @property
    def direct(self) -> Guest:
        return self

    def read(self, address: int, count: int, space: int = KERNEL, *, text: bool = False) -> bytes:
        self.asked += 1
        at = address - BASE
        if not 0 <= at <= SIZE - count:
            raise FaultError(address)
        return bytes(self.memory[at : at + count])

    def scatter(self, addresses: Sequence[int], count: int = 4096) -> Iterator[Extent]:
        self.asked += 1
        for address in addresses:
            if 0 <= address - BASE <= SIZE - count:
                yield Extent(address, bytes(self.memory[address - BASE :][:count]))

    def put(self, address: int, *words: int) -> None:
        self.memory[address - BASE : address - BASE + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    def text(self, address: int, text: bytes) -> None:
        self.memory[address - BASE : address - BASE + len(text) + 1] = text + b"\0"

    def lookup(self, dtb: int, address: int) -> tuple[int, int, list[int]]:
        raise NotImplementedError

    def hold(self) -> None:
        self.holds += 1

    def release(self) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


MODULES = BASE + 0x1000
MODULE_MEMBERS = {
    "module list": (8, 16),
    "module name": (24, 56),
    "module taints": (80, 8),
    "module mem": (88, 0),
    "module_memory base": (0, 8),
    "module_memory size": (8, 4),
}
TEXT_SYMBOLS = {"_stext": TEXT, "_etext": TEXT + 0x10_0000, "modules": MODULES}


def guest_with_module(symbols: dict[str, int], members: dict[str, tuple[int, int]], taints: int) -> Guest:
    """A guest with one module, whose code is at ``MODULE_TEXT``."""
    made = Guest({**TEXT_SYMBOLS, **symbols}, {**MODULE_MEMBERS, **members})
    module = BASE + 0x2000
    made.put(MODULES, module + 8, module + 8)
    made.put(module + 8, MODULES, MODULES)
    made.text(module + 24, b"driver")
    made.put(module + 80, taints, MODULE_TEXT, 0x1000)
    return made


def view_of(guest: Guest) -> View:
    return View(Libvmi.over(guest), Damage())


NOTIFIERS = {"atomic_notifier_head head": (8, 8), "notifier_block notifier_call": (0, 8), "notifier_block next": (8, 8)}
OUT_OF_TREE = 1 << 12


@pytest.mark.parametrize(
    ("taints", "called", "expected"),
    [
        (0, TEXT + 64, None),
        (0, MODULE_TEXT + 64, None),
        (1 << 9, MODULE_TEXT + 64, None),
        (OUT_OF_TREE, MODULE_TEXT + 64, (Severity.MEDIUM, "keyboard_notifier_list: driver")),
        (1 << 13, MODULE_TEXT + 64, (Severity.MEDIUM, "keyboard_notifier_list: driver")),
        (0, MODULE_TEXT + 0x1000, (Severity.HIGH, "keyboard_notifier_list")),
        (0, TEXT + 0x10_0000, (Severity.HIGH, "keyboard_notifier_list")),
        (0, BASE, (Severity.HIGH, "keyboard_notifier_list")),
    ],
)
def test_where_a_notifier_leads_decides(taints: int, called: int, expected: tuple[Severity, str] | None) -> None:
    head, block = BASE + 0x3000, BASE + 0x4000
    guest = guest_with_module({"keyboard_notifier_list": head}, NOTIFIERS, taints)
    guest.put(head + 8, block)
    guest.put(block, called, 0)
    found = [(each.severity, each.subject) for each in hooks.notifiers(view_of(guest))]
    assert found == ([expected] if expected else [])


def test_where_only_the_kernels_own_code_is_expected_no_module_is_good_enough() -> None:
    table = BASE + 0x3000
    members = {"seq_operations show": (24, 8), "proc_dir_entry proc_dir_ops": (0, 8)}
    symbols = {"tcp4_seq_ops": table, "proc_root": BASE + 0x5000, "proc_root_operations": BASE + 0x6000}
    guest = guest_with_module(symbols, members, 0)
    guest.put(BASE + 0x5000, BASE + 0x6000)
    guest.put(table + 24, MODULE_TEXT)
    assert [(each.severity, each.subject) for each in hooks.operations(view_of(guest))] == [
        (Severity.HIGH, "tcp4_seq_ops.show: driver")
    ]
    guest.put(table + 24, TEXT)
    guest.put(BASE + 0x5000, BASE + 0x7000)
    assert [each.subject for each in hooks.operations(view_of(guest))] == ["proc_root.proc_dir_ops"]


def test_notifiers_that_loop_are_marked_and_end() -> None:
    head, block = BASE + 0x3000, BASE + 0x4000
    guest = guest_with_module({"keyboard_notifier_list": head}, NOTIFIERS, 0)
    guest.put(head + 8, block)
    guest.put(block, TEXT, block)
    view = view_of(guest)
    assert list(hooks.notifiers(view)) == []
    assert view.damage.marks == [f"keyboard_notifier_list: it loops at {block:#x}"]


def calls(entries: dict[int, int]) -> list[tuple[str, str]]:
    table = BASE + 0x1_0000
    symbols = {"sys_call_table": table, "after": table + 8 * 400, "sys_ni_syscall": TEXT + 8}
    guest = guest_with_module(symbols, {}, 0)
    filled = {number: TEXT + 16 * (number + 1) for number in range(396)} | entries
    guest.put(table, *(filled.get(number, 0) for number in range(400)))
    return [(each.id, each.subject) for each in code.syscall_table(view_of(guest))]


def test_system_calls_lead_into_the_kernel_each_to_its_own_function() -> None:
    missing = TEXT + 8
    assert calls({}) == []
    assert calls({7: missing, 8: missing, 9: missing}) == []
    assert calls({7: MODULE_TEXT}) == [("syscall-hook", "sys_call_table[7]")]
    assert calls({7: 0}) == [("syscall-hook", "sys_call_table[7]")]
    assert calls({9: TEXT + 16 * 8}) == [("syscall-twice", "sys_call_table[9]")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"core_pattern": b"core", "modprobe_path": b"/sbin/modprobe"}, []),
        ({"core_pattern": b"|/usr/lib/systemd/systemd-coredump %P", "modprobe_path": b""}, []),
        ({"core_pattern": b"|", "modprobe_path": b""}, ["core_pattern=|"]),
        ({"core_pattern": b"|/tmp/x", "modprobe_path": b"/tmp/y"}, ["core_pattern=|/tmp/x", "modprobe_path=/tmp/y"]),
        ({"core_pattern": b"|/usr/lib/systemd/systemd-coredump/../x", "modprobe_path": b""}, 1),
    ],
)
def test_programs_that_the_kernel_starts(values: dict[str, bytes], expected: list[str] | int) -> None:
    places = {name: BASE + 0x1000 * number for number, name in enumerate(values, 1)}
    guest = Guest(places, {})
    for name, value in values.items():
        guest.text(places[name], value)
    found = [each.subject for each in settings.kernel_programs(view_of(guest))]
    assert found == expected if isinstance(expected, list) else len(found) == expected


@pytest.mark.parametrize(("mask", "ids"), [(0, []), (1 << 9 | 1 << 15 | 1 << 10, []), (1 << 12, ["foreign-module"]), (
    1 << 1 | 1 << 3 | 1 << 13, ["forced-module", "foreign-module"])])  # fmt: skip
def test_taints_that_speak_for_an_attack(mask: int, ids: list[str]) -> None:
    guest = guest_with_module({"tainted_mask": BASE + 0x8000}, {}, 0)
    guest.put(BASE + 0x8000, mask)
    assert [each.id for each in modules.taint(view_of(guest))] == ids


def test_an_xarray_that_leads_to_itself_is_marked_and_ends() -> None:
    members = {"xarray xa_head": (0, 8), "xa_node shift": (0, 1), "xa_node slots": (8, 512)}
    guest = Guest({}, members)
    node = BASE + 0x1000
    guest.put(BASE, node + 2)
    guest.put(node, 6, node + 2, BASE + 0x5000)
    view = view_of(guest)
    assert list(view.xarray(BASE, "the table")) == [(64, BASE + 0x5000)]
    assert view.damage.marks == [f"the table, {node:#x}: it is not a node of this array"]


def test_a_number_of_maps_that_none_has_is_refused() -> None:
    members = {"bpf_prog aux": (0, 8), "bpf_prog_aux used_map_cnt": (0, 4), "bpf_prog_aux used_maps": (8, 8)}
    guest = Guest({}, members)
    guest.put(BASE, BASE + 64)
    guest.put(BASE + 64, 0xFFFF_FFFF, BASE + 128)
    with pytest.raises(BrokenError, match="4294967295 maps"):
        bpf._maps(view_of(guest), BASE)


@pytest.mark.parametrize(
    ("comm", "family"), [("kworker/0:1", "kworker/"), ("kworker/u8:1-events", "kworker/"), ("kthreadd", "kthreadd")]
)
def test_a_kernel_thread_is_known_by_its_name_without_its_number(comm: str, family: str) -> None:
    assert processes._family(comm) == family


# ---- one look --------------------------------------------------------------------------------------------------------


SETTINGS = next(check for check in CHECKS if check.name == "kernel-programs")
PLACES = {"core_pattern": BASE + 0x1000, "modprobe_path": BASE + 0x2000}


def with_settings() -> Guest:
    guest = Guest(PLACES, {})
    guest.text(PLACES["core_pattern"], b"core")
    guest.text(PLACES["modprobe_path"], b"/tmp/x")
    return guest


def test_a_check_that_the_kernel_lacks_something_for_says_what() -> None:
    guest = with_settings()
    seen = Scan(guest).look()
    assert [each.check for each in seen.findings] == ["kernel-programs"]
    unchecked = dict(seen.unchecked)
    assert unchecked.keys() == {check.name for check in CHECKS} - {"kernel-programs"}
    assert unchecked["taint"] == "the kernel has no symbol tainted_mask"
    assert unchecked["promiscuous"] == "the kernel has no symbol net_namespace_list"


def test_only_what_two_looks_have_is_a_finding() -> None:
    guest = with_settings()

    def passing(view: View) -> Iterator[Any]:
        """Something that is there only once."""
        yield from settings.kernel_programs(view)
        guest.text(PLACES["modprobe_path"], b"/sbin/modprobe")

    once = Check("once", passing, (), (), "", "")
    assert Scan(guest, [once]).look().findings == []
    assert guest.holds == 2


def test_what_cannot_be_read_is_tried_again_and_then_told() -> None:
    guest = Guest({"core_pattern": BASE + SIZE, "modprobe_path": BASE}, {})
    seen = Scan(guest, [SETTINGS]).look()
    assert len(seen.damage) == 1
    assert seen.damage[0].startswith("core_pattern: no readable memory at ")
    assert guest.holds == 3


def test_a_guest_cannot_make_findings_without_end() -> None:
    finding = next(settings.kernel_programs(view_of(with_settings())))
    flood = Check("flood", lambda view: (finding for _ in range(10**9)), (), (), "", "")
    seen = Scan(with_settings(), [flood]).look()
    assert len(seen.findings) == FINDINGS_MAX
    assert seen.damage == [f"flood: there are more than the {FINDINGS_MAX:,} findings that are kept"]


def test_the_next_look_asks_for_all_of_it_at_once_and_gets_what_is_there_now() -> None:
    guest = with_settings()
    guest.agent = guest
    scan = Scan(guest, [SETTINGS])
    assert [each.subject for each in scan.look().findings] == ["modprobe_path=/tmp/x"]
    guest.text(PLACES["modprobe_path"], b"/tmp/y")
    guest.asked = 0
    assert [each.subject for each in scan.look().findings] == ["modprobe_path=/tmp/y"]
    assert guest.asked == 2  # the look, and the one that confirms it


def test_memory_of_an_earlier_hold_is_never_an_answer() -> None:
    guest = with_settings()
    guest.agent = guest
    again = Again(guest)
    again.hold()
    for at in range(BASE, BASE + 4 * LINE, 8):
        again.read(at, 8)
    again.release()
    guest.put(BASE + 60 & -8, 1, 2)
    assert again.read(BASE + 56, 16) == struct.pack("<2Q", 1, 2)
    again.hold()
    guest.asked = 0
    assert again.read(BASE + 56, 16) == struct.pack("<2Q", 1, 2)
    assert guest.asked == 0
    with pytest.raises(FaultError):
        again.read(BASE + SIZE, 8)
    again.release()


def test_every_check_says_what_it_does() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for check in CHECKS:
        assert check.what
        assert check.planted
        assert check.benign


# ---- the command -----------------------------------------------------------------------------------------------------


def test_no_such_check_and_no_check_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", "web-1", "--only", "taint,nothing"]) == 1
    assert "no check is called 'nothing'" in capsys.readouterr().err
    assert cli.main(["scan", "web-1", "--only", "taint", "--skip", "taint"]) == 1
    assert "leave no check" in capsys.readouterr().err
    assert cli.main(["scan"]) == 1
    assert "name a DOMAIN" in capsys.readouterr().err


def test_the_list_has_every_check_and_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(each["check"], each["symbols"]) for each in listed] == [
        (check.name, list(check.symbols)) for check in CHECKS
    ]
    assert cli.main(["scan", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{check.name}\n" in f"\n{shown}" for check in CHECKS)


def test_text_of_the_guest_makes_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    guest = with_settings()
    guest.text(PLACES["modprobe_path"], b"/x\nweb-1: HIGH\x1b[2J")
    command._show(command.Result("web-1", Scan(guest, [SETTINGS]).look()), Scan(guest, [SETTINGS]).look().findings, 0)
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("web-1: HIGH") for line in lines) == 1
