"""What ``domains.toml`` requires of a guest's hardware."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vmishim.attestation import Requirements
from vmishim.errors import LibvmiError
from vmishim.guests import domains
from vmishim.wire.keys import generate

AGENT = generate().public
HEX = "ab" * 48


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("", "needs measurement"),
        ("measurement = []", "needs measurement"),
        (f"measurement = '{HEX}'", "measurement must be a list of strings"),
        ("measurement = ['abcd']", "measurement must be 48 bytes in hex, not 'abcd'"),
        (f"measurement = ['{HEX}']\nmesurement = ['{HEX}']", "unknown setting 'mesurement'; known are allow, chain"),
        (f"measurement = ['{HEX}']\nallow = ['debugging']", "allow can name smt, migration, debug, cxl"),
        (f"measurement = ['{HEX}']\nvmpl = 4", "vmpl must be a number from 0 to 3, not 4"),
        (f"measurement = ['{HEX}']\nvmpl = true", "vmpl must be a number from 0 to 3, not True"),
        (f"measurement = ['{HEX}']\nhost_data = 7", "host_data must be 32 bytes in hex, not 7"),
        (
            f"measurement = ['{HEX}']\nminimum_tcb = {{ ucode = 3 }}",
            "minimum_tcb must give numbers up to 255 for bootloader, fmc",
        ),
        (f"measurement = ['{HEX}']\nminimum_tcb = {{ snp = 256 }}", "minimum_tcb must give numbers"),
        (f"measurement = ['{HEX}']\nminimum_tcb = 'newest'", "or be 'current', not 'newest'"),
        (f"measurement = ['{HEX}']\nrequire_platform = ['smt', 'x']", "require_platform can name smt, tsme"),
        (f"measurement = ['{HEX}']\nforbid_platform = ['x']", "forbid_platform can name smt, tsme"),
        (f"measurement = ['{HEX}']\nforbid_platform = ['alias_check_complete']", "both name alias_check_complete"),
        (f"measurement = ['{HEX}']\nroots = ['{HEX}']", "roots must be 32 bytes in hex"),
    ],
)
def test_requirements_that_make_no_sense_are_refused(tmp_path: Path, table: str, told: str) -> None:
    file = tmp_path / "domains.toml"
    text = f'agent = "tcp://h:1"\nagent_key = "{AGENT.text}"\nkey = "k"\n'
    file.write_text(f"[web-1]\n{text}[web-1.attestation]\n{table}\n")
    with pytest.raises(LibvmiError, match=r"\[web-1.attestation\] ") as caught:
        domains.load(file)
    assert told in str(caught.value)


def test_requirements_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "domains.toml"
    file.write_text(f"""
        [web-1]
        agent = "tcp://h:1"
        agent_key = "{AGENT.text}"
        key = "k"
        [web-1.attestation]
        measurement = ["{HEX}", "{HEX.upper().replace("AB", "CD")}"]
        minimum_tcb = {{ snp = 23, microcode = 84 }}
        allow = ["smt"]
        vmpl = 2
        host_data = "{"01" * 32}"
        require_platform = ["ecc", "tio"]
        forbid_platform = ["smt"]
        chain = ["/etc/milan.pem", "~/vcek.der"]
        roots = ["{"EF" * 32}"]
    """)
    expected = Requirements(
        frozenset({b"\xab" * 48, b"\xcd" * 48}),
        {"snp": 23, "microcode": 84},
        frozenset({"smt"}),
        2,
        b"\1" * 32,
        (Path("/etc/milan.pem"), Path.home() / "vcek.der"),
        frozenset({"ef" * 32}),
        frozenset({"ecc", "tio"}),
        frozenset({"smt"}),
    )
    found = domains.load(file)["web-1"].attestation
    assert found == expected
    assert pickle.loads(pickle.dumps(found)) == expected  # a fleet's workers are sent it


def test_numbers_may_have_their_least_and_greatest_value() -> None:
    for least in (0, 255):
        assert Requirements.from_table(
            {"measurement": [HEX], "minimum_tcb": {"snp": least}, "vmpl": min(least, 3)}
        ).minimum_tcb == {"snp": least}
    whole = {"minimum_tcb": dict.fromkeys(("fmc", "bootloader", "tee", "snp", "microcode"), 1)}
    assert Requirements.from_table({"measurement": [HEX], **whole}).minimum_tcb == whole["minimum_tcb"]
    for setting in ({"minimum_tcb": {"snp": 256}}, {"minimum_tcb": {"snp": -1}}, {"vmpl": 4}, {"vmpl": -1}):
        with pytest.raises(ValueError, match="must"):
            Requirements.from_table({"measurement": [HEX], **setting})


@pytest.mark.parametrize(
    ("setting", "warned"),
    [("", True), ("minimum_tcb = {}", True), ("minimum_tcb = 'current'", False), ("minimum_tcb = {snp = 1}", False)],
)
def test_an_entry_that_accepts_any_firmware_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str, warned: bool
) -> None:
    file = tmp_path / "domains.toml"
    agent = f"agent = 'tcp://h:1'\nagent_key = '{AGENT.text}'\nkey = 'k'\n"
    file.write_text(f"[web-1]\n{agent}[web-1.attestation]\nmeasurement = ['{HEX}']\n{setting}\n[web-2]\n{agent}")
    monkeypatch.setenv("VMISHIM_CONFIG", str(file))
    domains.find("web-2")
    assert caplog.text == ""
    domains.find("web-1")
    assert (f"{file}: [web-1.attestation] minimum_tcb is not set" in caplog.text) == warned == bool(caplog.text)


def test_a_ram_file_can_attest_nothing(tmp_path: Path) -> None:
    file = tmp_path / "domains.toml"
    file.write_text(f"[lab]\nramfile = '/x'\n[lab.attestation]\nmeasurement = ['{HEX}']\n")
    with pytest.raises(LibvmiError, match="has attestation, but no agent"):
        domains.load(file)
