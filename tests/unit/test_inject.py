"""Injected programs without a guest: what compiles and what is said when it does not, the contract, the limits."""

from __future__ import annotations

import re
import runpy
import struct
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.agent import Agent
from guest_agent.injections import Injections, cut, explain, verdict
from guest_agent.loader import MAPS_MAX, SIZE_MAX, InjectionError, check_contents, check_helpers, load
from guest_agent.programs import Contents, LoadError
from vmishim import cli
from vmishim.errors import LibvmiError, LinkError
from vmishim.inject import CompileError, Extents, InjectError, bcc, compile_core, inject
from vmishim.inject.program import parse_output
from vmishim.inject.source import header
from vmishim.kernel.btf import Btf
from vmishim.kernel.offsets import Offsets
from vmishim.memory.reader import Extent
from vmishim.wire.injection import EXTENT_HEAD, INPUT_HEAD, MAGIC, OUTPUT_HEAD, Bundle, BundleError, MapDefinition
from vmishim.wire.messages import Eject, Failure, Inject, Injected, Rejected, Run, decode, encode

ROOT = Path(__file__).parents[2]
EXAMPLE = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "injection.md").read_text(), re.DOTALL)[0]
# Of what is only pointed to, an object's BTF has only the name.
KEEP_TYPE = """
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct inject_extent);
} extents SEC(".maps");
"""
OFFSETS = Offsets("6.1.0-1-amd64", {"task_struct comm": [2976, 16], "task_struct": [0, 9728]})
INPUT, OUTPUT = MapDefinition.array("input", 65544), MapDefinition.array("output", 1 << 20)


def section(data: bytes, name: bytes) -> bytes:
    """A section of a 64-bit ELF file."""
    table, size, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
    heads = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    strings = heads[names][4]
    for head in heads:
        if data[strings + head[0] :].split(b"\0")[0] == name:
            return data[head[4] : head[4] + head[5]]
    raise AssertionError(f"no section {name!r}")


# ---- compiling -------------------------------------------------------------------------------------------------------


def test_the_example_fits_on_a_screen() -> None:
    assert EXAMPLE.count("\n") <= 40


def test_layouts_are_those_of_the_header() -> None:
    btf = Btf(section(compile_core(EXAMPLE + KEEP_TYPE), b".BTF"))
    assert btf.member("inject_input", "bytes").offset == INPUT_HEAD.size
    assert [place.offset for place in btf.layout("inject_output").values()] == [0, 8, 16, 24, OUTPUT_HEAD.size]
    assert [tuple(place) for place in btf.layout("inject_extent").values()] == [(0, 8), (8, 4), (12, 4)]
    assert btf.size("inject_extent") == EXTENT_HEAD.size


def test_numbers_of_maps_are_those_of_the_header() -> None:
    text = header().read_text()
    for number, name in bcc.MAP_NUMBERS.items():
        assert f"inject_{name}_number = {number:#x}" in text


def test_a_file_compiles_as_text_does(tmp_path: Path) -> None:
    path = tmp_path / "devices.bpf.c"
    path.write_text(EXAMPLE)
    assert section(compile_core(path), b"syscall") == section(compile_core(EXAMPLE), b"syscall")


def test_an_error_names_file_line_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "devices.bpf.c"
    path.write_text(EXAMPLE.replace("READ_FIELD(walk->at, next)", "READ_FIELD(walk->at, nextt)"))
    with pytest.raises(CompileError, match=r"devices\.bpf\.c:\d+: no member named 'nextt'") as refused:
        compile_core(path)
    assert "\n" not in str(refused.value)
    assert "struct list_head { struct list_head *next; };" in refused.value.log


def test_a_missing_header_names_its_package() -> None:
    with pytest.raises(CompileError, match=r"'bpf/no_such\.h' file not found: apt install libbpf-dev"):
        compile_core("#include <bpf/no_such.h>\n")


def test_without_clang_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CompileError, match="no clang >= 14 on the PATH: apt install clang-16"):
        compile_core(EXAMPLE)


def test_an_old_clang_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clang").write_text("#!/bin/sh\necho 'Debian clang version 11.0.1-2'\n")
    (tmp_path / "clang").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="clang is older"):
        compile_core(EXAMPLE)


def test_a_vmlinux_h_is_taken_when_named(tmp_path: Path) -> None:
    given_header = tmp_path / "kernel-6.1.h"
    given_header.write_text(
        "#ifndef __VMLINUX_H__\n#define __VMLINUX_H__\n"
        "typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned int __u32; typedef int __s32;\n"
        "typedef unsigned long long __u64; typedef long long __s64; typedef __u16 __be16; typedef __u32 __be32;\n"
        "typedef __u32 __wsum; enum { BPF_MAP_TYPE_ARRAY = 2, BPF_F_MMAPABLE = 1024 };\n"
        "struct list_head { struct list_head *next; } __attribute__((preserve_access_index));\n#endif\n"
    )
    source = '#include "vmlinux.h"\n#include "inject.h"\nSEC("syscall") int run(struct list_head *at)\n{ return 0; }\n'
    assert compile_core(source, vmlinux=given_header).startswith(b"\x7fELF")
    with pytest.raises(CompileError, match=r"no-such-file cannot be read .* vmlinux=PATH"):
        compile_core(source, vmlinux=tmp_path / "no-such-file")


def test_a_folder_without_headers_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="holds no kernel headers"):
        bcc.compile_by_headers(EXAMPLE, tmp_path)


def test_half_of_split_headers_names_the_other(tmp_path: Path) -> None:
    build = tmp_path / "linux-headers-1.2-amd64"
    (build / "include" / "generated").mkdir(parents=True)
    (build / "include" / "generated" / "utsrelease.h").write_text('#define UTS_RELEASE "1.2-amd64"\n')
    (build / "Makefile").write_text("include /usr/src/linux-headers-1.2-common/Makefile\n")
    with pytest.raises(CompileError, match=r"unpack linux-headers-1\.2-common beside it"):
        bcc.Headers.find(build)
    (tmp_path / "linux-headers-1.2-common" / "include" / "linux").mkdir(parents=True)
    (tmp_path / "linux-headers-1.2-common" / "include" / "linux" / "kconfig.h").touch()
    found = bcc.Headers.find(build)
    assert (found.release, found.source) == ("1.2-amd64", tmp_path / "linux-headers-1.2-common")


def test_the_wheel_has_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interface:
        root = str(ROOT)

        def __class_getitem__(cls, item: object) -> type[Interface]:
            return cls

    # hatchling is there when a wheel is built, not when tests run.
    plugin = SimpleNamespace(BuildHookInterface=Interface)
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", plugin)
    monkeypatch.setenv("VMISHIM_CAPI", "no")  # which takes seconds
    hook: Any = runpy.run_path(str(ROOT / "bpf" / "hatch_build.py"))["CustomBuildHook"]()
    build_data: dict[str, dict[str, str]] = {"force_include": {}}
    hook.initialize("standard", build_data)
    assert build_data["force_include"][str(ROOT / "bpf" / "inject.h")] == "vmishim/include/inject.h"


def test_offsets_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "offsets.json"
    path.write_text(OFFSETS.to_json())
    assert Offsets.read(path) == OFFSETS
    for junk in (
        "",
        "[]",
        "{}",
        '{"release": "1", "members": {"a b": [1]}}',
        '{"release": "1", "members": {"a": [0, -1]}}',
    ):
        path.write_text(junk)
        with pytest.raises(LibvmiError, match="holds no offsets"):
            Offsets.read(path)
    with pytest.raises(LibvmiError, match="cannot read the offsets"):
        Offsets.read(tmp_path)


def test_code_in_place_of_a_name_is_refused() -> None:
    with pytest.raises(CompileError):
        bcc.member_offsets(Path("/"), ["task_struct comm); } int evil(void *u"])


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["offsets", "--headers", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "holds no kernel headers" in shown.err


# ---- the output ------------------------------------------------------------------------------------------------------


def pack(extents: list[Extent], truncated: int = 0) -> bytes:
    """An output as ``inject.h`` writes it."""
    body = b"".join(
        EXTENT_HEAD.pack(address, len(data), 4096) + data + bytes(-len(data) % 8) for address, data in extents
    )
    return OUTPUT_HEAD.pack(len(body), 3, 0x1000, truncated) + body


EXTENTS = st.lists(st.builds(Extent, st.integers(0, (1 << 64) - 1), st.binary(max_size=40)))


@given(EXTENTS, st.sampled_from([(0, None), (1, "the output is full"), (2, "a loop reached its bound")]))
def test_extents_arrive_in_order(extents: list[Extent], why: tuple[int, str | None]) -> None:
    found = parse_output(pack(extents, why[0]))
    assert isinstance(found, Extents)
    assert (list(found), found.faults, found.fault_at, found.truncated) == (extents, 3, 0x1000, why[1])


@given(EXTENTS, st.data())
def test_an_output_cut_anywhere_is_an_error(extents: list[Extent], data: st.DataObject) -> None:
    whole = pack(extents)
    with pytest.raises(LinkError):
        parse_output(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_output_are_an_error(junk: bytes) -> None:
    try:
        parse_output(junk)
    except LinkError:
        return
    assert OUTPUT_HEAD.unpack_from(junk)[0] == len(junk) - OUTPUT_HEAD.size


# ---- bundles ---------------------------------------------------------------------------------------------------------

WIDE = bytes([0x18, 0x11, 0, 0, 1, 0x76, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
RETURN_0 = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
BUNDLE = Bundle("6.1.0-1-amd64", "GPL", [INPUT, OUTPUT], [(0, 0)], WIDE + RETURN_0)


def test_a_bundle_comes_back_as_it_was() -> None:
    assert Bundle.parse(BUNDLE.pack()) == BUNDLE


@pytest.mark.parametrize(
    ("maps", "patches", "instructions", "word"),
    [
        ([INPUT], [(0, 1)], WIDE + RETURN_0, "map 1"),
        ([INPUT], [(1, 0)], WIDE + RETURN_0, "instruction 1"),
        ([INPUT], [(-1, 0)], WIDE + RETURN_0, "instruction -1"),
        ([INPUT], [(99, 0)], WIDE + RETURN_0, "instruction 99"),
        ([INPUT], [], RETURN_0[:-1], "cut short"),
        ([INPUT], [], b"", "cut short"),
        ([MapDefinition("input", 2, 4, -1, 1, 0)], [], RETURN_0, "size outside"),
        ([MapDefinition("input", 2, 4, 8, 1, 0, True)], [], RETURN_0, "pinned"),
    ],
)
def test_a_bundle_that_makes_no_sense_is_refused(
    maps: list[MapDefinition], patches: list[tuple[int, int]], instructions: bytes, word: str
) -> None:
    with pytest.raises(BundleError, match=word):
        Bundle.parse(Bundle("6.1", "GPL", maps, patches, instructions).pack())


@given(st.binary(max_size=100))
def test_junk_is_refused_as_a_bundle(junk: bytes) -> None:
    with pytest.raises(BundleError):
        Bundle.parse(MAGIC + junk)


# ---- what an agent accepts -------------------------------------------------------------------------------------------


def refusal(data: bytes, *, allowed: bool = True, name: str = "test") -> str:
    with pytest.raises((InjectionError, LoadError)) as refused:
        Injections(partial(load, cpus=2) if allowed else None).add(b"session", name, data)
    return str(refused.value)


def test_off_by_default() -> None:
    assert "agent.pyz serve --allow-injection" in refusal(BUNDLE.pack(), allowed=False)


def test_limits_are_named() -> None:
    assert f"at most {SIZE_MAX}" in refusal(b"\x7fELF" + bytes(SIZE_MAX))
    big = Bundle("6.1", "GPL", [INPUT, MapDefinition.array("output", MAPS_MAX)], [], RETURN_0)
    assert f"at most {MAPS_MAX}" in refusal(big.pack())
    assert "1 to 64 printable" in refusal(BUNDLE.pack(), name="x" * 65)
    assert "1 to 64 printable" in refusal(BUNDLE.pack(), name="")


@pytest.mark.parametrize(
    ("programs", "maps", "word"),
    [
        ([("run", "kprobe/x")], [INPUT, OUTPUT], "section 'kprobe/x'"),
        ([("main", "syscall")], [INPUT, OUTPUT], "program 'main'"),
        ([("run", "syscall"), ("too", "syscall")], [INPUT, OUTPUT], "program 'too'"),
        ([], [INPUT, OUTPUT], "no program"),
        ([("run", "syscall")], [INPUT], "no map 'output'"),
        ([("run", "syscall")], [INPUT, MapDefinition("output", 2, 4, 4096, 1, 0)], "no map 'output'"),
        ([("run", "syscall")], [INPUT, OUTPUT, MapDefinition("ring", 27, 0, 0, 4096, 0)], "type 27"),
        ([("run", "syscall")], [INPUT, OUTPUT, MapDefinition("kept", 1, 4, 4, 1, 0, True)], "pinned"),
    ],
)
def test_the_contract(programs: list[tuple[str, str]], maps: list[MapDefinition], word: str) -> None:
    with pytest.raises(InjectionError, match=re.escape(word)):
        check_contents(Contents(programs, maps), 1)


def test_values_for_each_cpu_count_for_each() -> None:
    maps = [INPUT, OUTPUT, MapDefinition("mine", 6, 4, 800, 10, 0)]
    taken = [check_contents(Contents([("run", "syscall")], maps), cpus) for cpus in (1, 3)]
    assert taken[1] - taken[0] == 2 * 800 * 10


def call(source: int, number: int) -> bytes:
    return struct.pack("<BBhi", 0x85, source << 4, 0, number)


def test_only_helpers_that_read_may_be_called() -> None:
    check_helpers(call(0, 113) + call(1, 7) + call(0, 181) + WIDE)
    for code, word in ((call(0, 166), "helper 166"), (call(0, 36), "helper 36"), (call(2, 4711), "kfunc")):
        with pytest.raises(InjectionError, match=word):
            check_helpers(call(0, 113) + code)


def test_junk_is_neither() -> None:
    assert "neither an eBPF object (ELF) nor" in refusal(b"int run(void)")


def test_an_unloaded_program_belongs_to_no_session() -> None:
    injections = Injections(partial(load, cpus=1))
    assert injections.listing(b"session") == []
    with pytest.raises(InjectionError, match="no program 1 in this session"):
        injections.run(b"session", 1, b"")
    with pytest.raises(InjectionError, match="no program 1 in this session"):
        injections.eject(b"session", 1)


def test_an_agent_answers_with_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    injections = Injections(partial(load, cpus=1))
    agent = Agent(None, injections)  # type: ignore[arg-type]
    reply = decode(agent.answer(b"session", encode(Inject("test", b"junk"))))
    assert isinstance(reply, Failure)
    assert reply.code == "injection"

    def rejected(*_: object) -> int:
        raise LoadError("the kernel refused it", LOG_6_1)

    monkeypatch.setattr(injections, "add", rejected)
    reply = decode(agent.answer(b"session", encode(Inject("test", b"junk"))))
    assert reply == Rejected(explain(LoadError("", LOG_6_1)), LOG_6_1.encode())
    for request in (Run(3, b""), Eject(3)):
        gone = decode(agent.answer(b"session", encode(request)))
        assert isinstance(gone, Failure)
        assert gone.code == "no-program"
    assert decode(agent.answer(b"session", encode(Injected()))) == decode(b"\x41\x04\0\0\0[[]]")


def test_bytes_without_a_guest_say_so() -> None:
    class RamFile:
        name, agent = "vm1", None

    with pytest.raises(InjectError, match="vm1 has no agent, and only an agent can run a program"):
        inject(RamFile(), BUNDLE.pack())  # type: ignore[arg-type]
    with pytest.raises(InjectError, match="not an eBPF object; pass C source as a string"):
        inject(RamFile(), b"int run")  # type: ignore[arg-type]
    assert issubclass(InjectError, LibvmiError)


# ---- logs ------------------------------------------------------------------------------------------------------------

LOG_6_1 = """\
libbpf: prog 'run': BPF program load failed: Permission denied
libbpf: prog 'run': -- BEGIN PROG LOAD LOG --
; walk.at = *(void *volatile *)8;
14: (b7) r1 = 8                       ; R1_w=8
15: (79) r1 = *(u64 *)(r1 +0)
R1 invalid mem access 'scalar'
processed 16 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 1
-- END PROG LOAD LOG --
libbpf: prog 'run': failed to load: -13
libbpf: failed to load object ''
"""
LOG_6_18 = LOG_6_1.replace("*)8;\n", "*)8; @ program.bpf.c:35\n")


def test_the_verdict_is_the_last_word_and_its_line() -> None:
    assert verdict(LOG_6_1) == " `walk.at = *(void *volatile *)8;`: R1 invalid mem access 'scalar'"
    assert verdict(LOG_6_18) == (
        " at program.bpf.c:35 `walk.at = *(void *volatile *)8;`: R1 invalid mem access 'scalar'"
    )
    assert verdict("libbpf: something else") == ""


def test_bare_bytecode_has_a_verdict_too() -> None:
    assert verdict("0: (b7) r0 = 0\nR1 !read_ok\nprocessed 1 insns (limit 1000000)\n") == ": R1 !read_ok"


def test_an_unknown_member_is_named() -> None:
    log = "21: <invalid>\nfailed to resolve CO-RE relocation <byte_off> [3] struct net.x (0:0 @ offset 8)"
    assert explain(LoadError("", log)) == "this kernel has no struct net.x in its BTF"


def test_a_missing_btf_says_what_to_do() -> None:
    log = "libbpf: kernel BTF is missing at '/sys/kernel/btf/vmlinux', was CONFIG_DEBUG_INFO_BTF enabled?"
    assert "headers=" in explain(LoadError("", log))


def test_a_long_log_keeps_its_end() -> None:
    sent = cut("x" * (1 << 20) + "the end")
    assert sent.endswith(b"the end")
    assert b"were cut" in sent[:60]
    assert len(sent) < 600_000
    assert cut("short") == b"short"
