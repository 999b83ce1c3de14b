"""LibVMI's configuration: its grammar, its places, and who wins."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trials.configs.compared import ours, ours_of_profile
from vmishim.errors import LibvmiError
from vmishim.kernel.profile import Member
from vmishim.libvmi.config import Config, export_entry, parse, read, search_path
from vmishim.libvmi.constants import VMIConfig
from vmishim.libvmi.profiles import ConfiguredProfile, JsonProfile, SystemMap

ENTRY = """
# the web server
web-1 {
    ostype = "Linux";
    sysmap = "/boot/System.map-6.1";  # a copy
    linux_tasks = 0x890; linux_pid = 2416;
    linux_mm = 0x8e0;;
}
db.2{ostype="Linux";linux_name=02460;}
"""


class Guest:
    """What a guest says about itself."""

    release = "6.1.0"
    hostname = boot_id = ""
    page_offset = 0xFFFF_8880_0000_0000
    kaslr_offset = 0x200_0000
    memory_size = 1 << 30
    vcpus = 1
    levels = 4
    symbols = {"init_task": 0xFFFF_FFFF_8480_0000, "linux_banner": 0xFFFF_FFFF_8410_0000}
    offsets = {"tasks": 0x890, "mm": 0x8E0, "pid": 0x970, "comm": 0xBA0, "pgd": 0x48}

    def symbol(self, name: str) -> int:
        return self.symbols[name]

    def symbol_at(self, address: int) -> str:
        return {value: name for name, value in self.symbols.items()}[address]

    def member(self, struct: str, member: str) -> Member:
        return Member(self.offsets[member], 8)

    def size(self, struct: str) -> int:
        return {"task_struct": 9728}[struct]

    def forget(self) -> None:
        """No guest was asked."""


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No libvmi.conf but those that a test writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SUDO_USER", raising=False)


def test_grammar() -> None:
    found = parse(ENTRY, "libvmi.conf")
    assert found["web-1"].numbers == {"linux_tasks": 0x890, "linux_pid": 2416, "linux_mm": 0x8E0}
    assert found["web-1"].strings == {"ostype": "Linux", "sysmap": "/boot/System.map-6.1"}
    assert found["db.2"].numbers == {"linux_name": 0o2460}


def test_the_last_entry_of_a_domain_counts() -> None:
    assert parse("vm {linux_pid = 1;} vm {linux_mm = 2;}", "x")["vm"].numbers == {"linux_mm": 2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("vm {\n linux_tasks = 0x890\n}", r"x:3: expected ;, found }"),
        ("vm {\n linux_taks = 1;\n}", r"x:2: expected a setting of LibVMI, or }, found linux_taks"),
        ('vm {ostype = "Linux";', r"x:1: expected a setting of LibVMI, or }, found the end"),
        ("vm {sysmap = /System.map;}", r'expected "'),
        ('vm {sysmap = "System.map";}', r"expected a path with a slash, such as ./System.map, found System.map"),
        ('vm {ostype = "sysmap";}', r"expected a word of two or more letters, found sysmap"),
        ('vm {linux_tasks = "0x890";}', r'expected a number such as 0x450, found "'),
        ("vm {linux_tasks = many;}", r"expected a number such as 0x450, found many"),
        ("12 {}", r"expected the name of a domain .* found 12"),
        ("v {}", r"expected the name of a domain .* found v"),
        ("sysmap {}", r"expected the name of a domain .* found sysmap"),
        ('vm {sysmap = "/' + 1023 * "x" + '";}', r"a word of more than 1023 bytes"),
        ("vm", r"expected {"),
    ],
)
def test_errors_name_line_and_cause(text: str, complaint: str) -> None:
    with pytest.raises(LibvmiError, match="^NO_CONFIG: .*" + complaint):
        parse(text, "x")


RECORDED = json.loads((Path(__file__).parent / "data" / "configs.json").read_text())
"""Configurations, and how LibVMI reads each: ``python -m trials.configs --runs 400 --seed 7 --record FOLDER``."""


def test_every_configuration_is_read_as_by_libvmi() -> None:
    assert sum(theirs is not None for _, theirs in RECORDED) > len(RECORDED) // 4
    different = [text for text, theirs in RECORDED if ours(text.encode("latin-1")) != theirs]
    assert different == []


@pytest.mark.parametrize("beside", ["\ufeff", "\0", "\f", "\v", "[", ", ", "\udc80", "'", "~"])
@pytest.mark.parametrize(
    "form", ["{0}vm {{linux_pid = 1;}}", "vm {{{0}linux_pid = 1;}}\n{0}", "vm{{linux_pid = {0} 1;{0}}}"]
)
def test_characters_of_no_meaning_are_passed_over(form: str, beside: str) -> None:
    assert parse(form.format(beside), "x")["vm"].numbers == {"linux_pid": 1}


def test_a_comment_needs_no_end_of_line() -> None:
    assert parse("vm {linux_pid = 1;}\n# the end }", "x")["vm"].numbers == {"linux_pid": 1}


def test_a_string_ends_at_its_first_nul() -> None:
    found = read(VMIConfig.STRING, "{linux_pid = 1;}\0 {", "web-1")
    assert found is not None
    assert found.numbers == {"linux_pid": 1}


@given(st.text(alphabet='ab12{}"=;# \n.', max_size=60))
def test_anything_else_is_an_error_of_ours(text: str) -> None:
    try:
        parse(text, "x")
    except LibvmiError as error:
        assert str(error).startswith("NO_CONFIG: x:")  # noqa: PT017


def test_nothing_is_needed() -> None:
    assert read(VMIConfig.GLOBAL_FILE_ENTRY, None, "web-1") is None


def test_search_path_is_that_of_libvmi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUDO_USER", "root")
    here, sudo, home, system = search_path()
    assert here == tmp_path / "libvmi.conf"
    assert sudo.parts[-2:] == home.parts[-2:] == ("etc", "libvmi.conf")
    assert home.is_relative_to(tmp_path / "home")
    assert system == Path("/etc/libvmi.conf")


def test_the_first_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "home" / "etc").mkdir(parents=True)
    (tmp_path / "home" / "etc" / "libvmi.conf").write_text(ENTRY)
    found = read(VMIConfig.GLOBAL_FILE_ENTRY, None, "web-1")
    assert found is not None
    assert found.numbers["linux_tasks"] == 0x890
    assert read(VMIConfig.GLOBAL_FILE_ENTRY, None, "/some/where/web-1") == found
    assert read(VMIConfig.GLOBAL_FILE_ENTRY, None, "other") is None
    (tmp_path / "libvmi.conf").write_text("")
    assert read(VMIConfig.GLOBAL_FILE_ENTRY, None, "web-1") is None


def test_other_forms(tmp_path: Path) -> None:
    file = tmp_path / "given.conf"
    file.write_text(ENTRY)
    for mode, config in (
        (VMIConfig.FILE_PATH, str(file)),
        (VMIConfig.STRING, "{linux_tasks = 0x890; linux_pid = 2416; linux_mm = 0x8e0;}"),
        (VMIConfig.DICT, {"linux_tasks": 0x890, "linux_pid": 2416, "linux_mm": 0x8E0, "os_type": "Linux"}),
    ):
        found = read(mode, config, "web-1")
        assert found is not None
        assert found.numbers == {"linux_tasks": 0x890, "linux_pid": 2416, "linux_mm": 0x8E0}
    found = read(VMIConfig.JSON_PATH, "profile.json", "web-1")
    assert found is not None
    assert found.strings == {"volatility_ist": "profile.json"}


@pytest.mark.parametrize(
    ("mode", "config", "error", "complaint"),
    [
        (VMIConfig.FILE_PATH, "missing", LibvmiError, "NO_CONFIG: missing cannot be read"),
        (VMIConfig.FILE_PATH, None, LibvmiError, r"NO_CONFIG: .* string, not NoneType"),
        (VMIConfig.STRING, "", LibvmiError, r"NO_CONFIG: .* expected {"),
        (VMIConfig.DICT, "text", LibvmiError, r"NO_CONFIG: .* dictionary, not str"),
        (VMIConfig.DICT, {"linux_tasks": 1.5}, RuntimeError, "Invalid value 1.5"),
    ],
)
def test_wrong_forms(mode: VMIConfig, config: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        read(mode, config, "web-1")


def test_a_named_file_must_know_the_domain(tmp_path: Path) -> None:
    (tmp_path / "given.conf").write_text(ENTRY)
    with pytest.raises(LibvmiError, match=r"NO_CONFIG_ENTRY: .* no entry for 'other'"):
        read(VMIConfig.FILE_PATH, "given.conf", "other")


def test_unknown_keys_of_a_dictionary_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="linux_taks"):
        read(VMIConfig.DICT, {"linux_taks": 1}, "web-1")


def test_what_agrees_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = ConfiguredProfile(Config("x", {"linux_tasks": 0x890}), Guest())
        assert profile.member("task_struct", "tasks") == Member(0x890, 8)
        assert profile.member("task_struct", "pid").offset == 0x970


def test_what_disagrees_wins_and_is_warned_about_once() -> None:
    profile = ConfiguredProfile(Config("libvmi.conf, entry web-1", {"linux_tasks": 0x111, "linux_pid": 0x222}), Guest())
    with pytest.warns(UserWarning, match="linux_tasks is 0x111, but the running guest says 0x890"):
        assert profile.member("task_struct", "tasks").offset == 0x111
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile.member("task_struct", "pid").offset == 0x222
        assert profile.member("task_struct", "tasks").offset == 0x111


def test_another_system_is_refused() -> None:
    with pytest.raises(LibvmiError, match=r"^OS: x says ostype 'Windows', but the guest runs Linux 6.1.0"):
        ConfiguredProfile(Config("x", strings={"ostype": "Windows"}), Guest())


def test_a_symbol_map_without_kaslr_is_moved(tmp_path: Path) -> None:
    sysmap = tmp_path / "System.map"
    sysmap.write_text(
        "ffffffff82800000 D init_task\nffffffff82100000 D linux_banner\n0000000001000000 A phys_startup_64\n"
    )
    profile = ConfiguredProfile(Config("x", strings={"sysmap": str(sysmap)}), Guest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile.kaslr_offset == 0x200_0000
        assert profile.symbol("linux_banner") == 0xFFFF_FFFF_8410_0000
        assert profile.symbol_at(0xFFFF_FFFF_8410_0000) == "linux_banner"
        assert profile.symbol("phys_startup_64") == 0x300_0000
    with pytest.raises(KeyError):
        profile.symbol("no_such_symbol")
    with pytest.raises(LibvmiError, match=r"^OS: symbol map .*missing cannot be read"):
        ConfiguredProfile(Config("x", strings={"sysmap": "missing"}), Guest())


KALLSYMS = [
    "ffffffff82800000 D init_task",
    "ffffffff82100000 D linux_banner",
    "ffffffff82100000 D same_place",
    "ffffffff82200000 t twice",
    "ffffffff82300000 t twice",
]


def test_a_modules_symbol_never_hides_the_kernels_own(tmp_path: Path) -> None:
    sysmap = tmp_path / "map"
    ours = "ffffffffc0000000 t linux_banner\t[rootkit]", "ffffffffc0000100 t init_module\t[rootkit]"
    for lines in ([*ours, *KALLSYMS], [*KALLSYMS, *ours]):
        sysmap.write_text("\n".join(lines))
        found = SystemMap(str(sysmap))
        assert found.symbol("linux_banner") == 0xFFFF_FFFF_8210_0000
        assert found.symbol("init_module") == 0xFFFF_FFFF_C000_0100
        assert found.symbol_at(0xFFFF_FFFF_8210_0000) == "linux_banner"
        assert found.symbol("twice") == 0xFFFF_FFFF_8220_0000  # the first, as in LibVMI


@pytest.mark.parametrize("beside", ["", "0000000001000000 A phys_startup_64\n"])
def test_a_symbol_map_without_addresses_is_refused(tmp_path: Path, beside: str) -> None:
    """What ``cp /proc/kallsyms`` gives a user who may not see addresses."""
    sysmap = tmp_path / "map"
    sysmap.write_text(beside + "".join(f"{0:016x}{line[16:]}\n" for line in KALLSYMS))
    with pytest.raises(
        LibvmiError, match=r"^OS: symbol map .*map .*: 5 of its . addresses are zero: .*kptr_restrict.* as root"
    ):
        ConfiguredProfile(Config("x", strings={"sysmap": str(sysmap)}), Guest())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no symbols"),
        ("no map\n", "has no symbols"),
        ("not a map\n", "there is no address in 'not a map"),
        ("-1 T a\n", "there is no address in"),
        ("1_0 T a\n", "there is no address in"),
        ("(nil) T a\n", "there is no address in"),
        ("1ffffffff82800000 T a\n", "there is no address in"),
    ],
)
def test_other_files_are_no_symbol_map(tmp_path: Path, text: str, complaint: str) -> None:
    sysmap = tmp_path / "map"
    sysmap.write_text(text)
    with pytest.raises(LibvmiError, match=f"^OS: .*{re.escape(complaint)}"):
        SystemMap(str(sysmap))


def isf(**fields: Any) -> str:
    """A profile with a structure ``t`` that has these fields."""
    return json.dumps({"user_types": {"t": {"size": 8, "fields": fields}}, "symbols": {"a": {"address": 1}}})


POINTER = {"kind": "pointer"}
ITSELF = {"offset": 0, "anonymous": True, "type": {"kind": "struct", "name": "t"}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"symbols": null}', "has neither 'user_types' (Volatility 3) nor '$STRUCTS' (Rekall)"),
        ('{"user_types": {}, "symbols": null}', "symbols is null, not an object"),
        ('{"user_types": {}, "symbols": []}', "symbols is a list, not an object"),
        ('{"user_types": null}', "user_types is null, not an object"),
        ('{"user_types": {}, "symbols": {"a": {}}}', "symbol a: it has no address"),
        ('{"user_types": {}, "symbols": {"a": null}}', "symbol a: null is not an object"),
        ('{"user_types": {}, "symbols": {"a": {"address": "0x1"}}}', 'symbol a: address is "0x1", not a whole number'),
        ('{"user_types": {}, "symbols": {"a": {"address": 1.5}}}', "symbol a: address is 1.5, not a whole number"),
        ('{"user_types": {}, "symbols": {"a": {"address": true}}}', "symbol a: address is true, not a whole number"),
        ('{"user_types": {}, "symbols": {"a": {"address": 18446744073709551616}}}', "out of range"),
        ('{"$STRUCTS": [], "$CONSTANTS": {}}', "$STRUCTS is a list, not an object"),
        ('{"$STRUCTS": {}, "$CONSTANTS": {"a": "1"}}', 'symbol a: a is "1", not a whole number'),
        ('{"$STRUCTS": {"t": null}}', "t: null is not a list of size and members"),
        ('{"$STRUCTS": {"t": [8, {"m": []}]}}', "t.m: a list is not a list of offset and type"),
        ('{"$STRUCTS": {"t": [8, {"m": [null]}]}}', "t.m: offset is null, not a whole number"),
        ('{"user_types": {"t": null}}', "t.m: null is not an object"),
        ('{"user_types": {"t": {"size": 8}}}', "t.m: it has no fields"),
        (isf(m=None), "t.m: null is not an object"),
        (isf(m={"type": POINTER}), "t.m: it has no offset"),
        (isf(m={"offset": -8, "type": POINTER}), "t.m: offset is -8, which is out of range"),
        (isf(m={"offset": 0}), "t.m: it has no type"),
        (isf(m={"offset": 0, "type": {"kind": "array", "count": 2}}), "t.m: it has no subtype"),
        (isf(u=ITSELF), "t.m: the structure contains itself"),
    ],
)
def test_a_damaged_profile_is_one_error_with_the_reason(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(LibvmiError, match=f"^OS: .*{re.escape(complaint)}"):
        JsonProfile(str(file)).member("t", "m")


ISF = {
    "user_types": {
        "task_struct": {
            "size": 9000,
            "fields": {
                "tasks": {"offset": 100, "type": {"kind": "struct", "name": "list_head"}},
                "comm": {
                    "offset": 200,
                    "type": {"kind": "array", "count": 16, "subtype": {"kind": "base", "name": "char"}},
                },
                "unnamed_1": {"offset": 300, "anonymous": True, "type": {"kind": "union", "name": "unnamed_u"}},
                "flag": {"offset": 8, "type": {"kind": "bitfield", "type": {"kind": "base", "name": "int"}}},
            },
        },
        "list_head": {"size": 16, "fields": {"next": {"offset": 0, "type": {"kind": "pointer"}}}},
        "unnamed_u": {"size": 4, "fields": {"inner": {"offset": 0, "type": {"kind": "enum", "name": "state"}}}},
    },
    "base_types": {"char": {"size": 1}, "int": {"size": 4}},
    "enums": {"state": {"size": 4}},
    "symbols": {"init_task": {"address": 0xFFFF_FFFF_8280_0000}},
}


def test_volatility_profile(tmp_path: Path) -> None:
    file = tmp_path / "isf.json"
    file.write_text(json.dumps(ISF))
    profile = JsonProfile(str(file))
    assert profile.member("task_struct", "tasks.next") == Member(100, 8)
    assert profile.member("task_struct", "comm") == Member(200, 16)
    assert profile.member("task_struct", "inner") == Member(300, 4)
    assert profile.member("task_struct", "flag") == Member(8, 4)
    assert profile.size("task_struct") == 9000
    assert profile.symbol("init_task") == 0xFFFF_FFFF_8280_0000
    assert profile.symbol_at(0xFFFF_FFFF_8280_0000) == "init_task"
    for name in ("nonsense", "tasks.nonsense"):
        with pytest.raises(KeyError):
            profile.member("task_struct", name)


def test_the_offset_of_a_member_of_unknown_type_is_known(tmp_path: Path) -> None:
    file = tmp_path / "isf.json"
    types: list[dict[str, Any]] = [{"kind": "base", "name": "int"}, {"kind": "struct", "name": []}, {"kind": []}, {}]
    for of_type in types:
        file.write_text(isf(m={"offset": 4, "type": of_type}))
        assert JsonProfile(str(file)).member("t", "m") == Member(4, 0)


def test_every_profile_is_read_as_by_libvmi() -> None:
    recorded = json.loads((Path(__file__).parent / "data" / "profiles.json").read_text())
    assert sum(map(len, (theirs for _, theirs in recorded))) > 10 * len(recorded)
    different = [text for text, theirs in recorded if ours_of_profile(text.encode()) != theirs]
    assert different == []


def test_a_profile_wins_where_it_says_something(tmp_path: Path) -> None:
    file = tmp_path / "isf.json"
    file.write_text(json.dumps(ISF))
    profile = ConfiguredProfile(Config("x", strings={"volatility_ist": str(file)}), Guest())
    with pytest.warns(UserWarning, match="linux_tasks"):
        assert profile.member("task_struct", "tasks").offset == 100
    assert profile.member("task_struct", "pid").offset == 0x970
    assert profile.size("task_struct") == 9000
    assert profile.kaslr_offset == 0x200_0000
    assert profile.profile_path == str(file)


def test_rekall_profile(tmp_path: Path) -> None:
    file = tmp_path / "rekall.json"
    file.write_text(
        json.dumps({"$STRUCTS": {"task_struct": [9000, {"pid": [50, ["int"]]}]}, "$CONSTANTS": {"a": -4096}})
    )
    profile = JsonProfile(str(file))
    assert profile.member("task_struct", "pid").offset == 50
    assert profile.size("task_struct") == 9000
    assert profile.symbol("a") == 0xFFFF_FFFF_FFFF_F000


@pytest.mark.parametrize("text", ["[]", "{}", "no json"])
def test_other_json_is_no_profile(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(LibvmiError, match=r"^OS: "):
        JsonProfile(str(file))


def test_an_exported_entry_reads_back() -> None:
    found = parse(export_entry(Guest(), "web-1"), "x")["web-1"]
    assert found.numbers == {
        "linux_tasks": 0x890,
        "linux_mm": 0x8E0,
        "linux_pid": 0x970,
        "linux_name": 0xBA0,
        "linux_pgd": 0x48,
    }
    assert found.strings == {"ostype": "Linux", "sysmap": "/boot/System.map-6.1.0"}


@pytest.mark.parametrize("name", ["x", "12", "web 1", "web/1", "sysmap", ""])
def test_a_name_that_libvmi_cannot_read_is_not_exported(name: str) -> None:
    with pytest.raises(ValueError, match=r"libvmi\.conf cannot hold"):
        export_entry(Guest(), name)
