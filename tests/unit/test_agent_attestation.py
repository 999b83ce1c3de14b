"""How the agent gets its report: from simulated configfs, from a simulated ioctl, and from this machine."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path, PosixPath

import pytest

from guest_agent import attestation
from guest_agent.attestation import SNP_GET_EXT_REPORT
from tests.authority import SIGNED, authority, chip, evidence, table
from vmishim.attestation import verify
from vmishim.wire.attestation import CERTIFICATES_MAX, REPORT_SIZE, report_data
from vmishim.wire.keys import generate

KEY = generate().public


def report(data: bytes) -> bytes:
    return evidence(report_data=data)[:REPORT_SIZE]


def certificates() -> bytes:
    return table(VCEK=chip()[1], ASK=authority().ask, ARK=authority().ark)


class Configfs(PosixPath):
    """``/sys/kernel/config/tsm/report`` of a guest whose kernel has the driver ``sev_guest``.

    Imitates drivers/virt/coco/tsm.c: a new folder has its files at once; each write counts; a report is made when it is
    read, of what has been written last, and only of 64 bytes at a level not above the floor.
    """

    provider, floor, auxiliary, meddle = "sev_guest", 0, b"", False

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        super().mkdir(mode)
        for name, text in (("provider", self.provider), ("privlevel_floor", str(self.floor)), ("generation", "0")):
            PosixPath(self, name).write_text(f"{text}\n")
        for name in ("inblob", "privlevel", "outblob", "auxblob"):
            PosixPath(self, name).touch()

    def rmdir(self) -> None:
        shutil.rmtree(self)

    def write_text(self, data: str, *more: object, **most: object) -> int:
        return self.write_bytes(data.encode())

    def write_bytes(self, data: bytes) -> int:  # type: ignore[override]
        if self.name == "privlevel" and not self.floor <= int(data) <= 3:
            raise OSError(errno.EINVAL, "Invalid argument")
        count = PosixPath(self.parent, "generation")
        count.write_text(f"{int(count.read_text()) + 1}\n")
        return PosixPath(self).write_bytes(data)

    def read_bytes(self) -> bytes:
        asked = PosixPath(self.parent, "inblob").read_bytes()
        if len(asked) != 64:
            raise OSError(errno.EINVAL, "Invalid argument")
        if self.meddle:
            (self.parent / "inblob").write_bytes(asked)
        return report(asked) if self.name == "outblob" else self.auxiliary


def configfs(path: Path, **settings: object) -> Configfs:
    made: type[Configfs] = type("Configfs", (Configfs,), settings)
    return made(path)


def unused(*arguments: object) -> None:
    raise AssertionError("the ioctl was called")


def test_configfs_gives_report_and_certificates(tmp_path: Path) -> None:
    found = attestation.evidence(KEY, configfs(tmp_path, auxiliary=certificates()), tmp_path / "none", unused)
    assert found.text == str(tmp_path)
    assert verify(found.bulk, KEY, roots=[authority().root]).endorsement.kind == "VCEK"
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_key_is_vouched_for_too(tmp_path: Path) -> None:
    kernel = generate().public
    found = attestation.evidence(KEY, configfs(tmp_path), tmp_path / "none", unused, kernel_key=kernel)
    assert found.bulk[:SIGNED] == report(report_data(KEY, kernel))[:SIGNED] != report(report_data(KEY))[:SIGNED]


def test_a_host_may_have_no_certificates(tmp_path: Path) -> None:
    found = attestation.evidence(KEY, configfs(tmp_path), tmp_path / "none", unused)
    assert len(found.bulk) == REPORT_SIZE
    assert found.bulk[:SIGNED] == report(report_data(KEY))[:SIGNED]


def test_below_an_svsm_the_lowest_allowed_level_is_requested(tmp_path: Path) -> None:
    assert attestation.evidence(KEY, configfs(tmp_path, floor=2), tmp_path / "none", unused).bulk


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"provider": "tdx_guest"}, "the provider is tdx_guest, not AMD SEV-SNP's sev_guest"),
        ({"meddle": True}, "another process wrote to the entry"),
    ],
)
def test_a_failure_of_configfs_is_reported(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    found = attestation.evidence(KEY, configfs(tmp_path, **settings), tmp_path / "none", unused)
    assert found.bulk == b""
    assert found.text == f"{tmp_path}: {told}; {tmp_path}/none: No such file or directory"
    assert list(tmp_path.iterdir()) == []


# /dev/sev-guest


def firmware(
    status: int = 0, size: int = REPORT_SIZE, host: bytes = b"", error: int = 0
) -> Callable[[int, int, ctypes.Structure], None]:
    """Does with the call what the kernel's driver does (drivers/virt/coco/sev-guest/sev-guest.c)."""

    def ioctl(descriptor: int, request: int, call: ctypes.Structure) -> None:
        assert request == SNP_GET_EXT_REPORT
        raw = bytes(call)
        version, asked, response = raw[0], *(int.from_bytes(raw[at : at + 8], "little") for at in (8, 16))
        assert version == 1
        request_bytes = ctypes.string_at(asked, 112)
        assert request_bytes[64:96] == bytes(32)  # VMPL 0, and what is reserved
        address, length = (int.from_bytes(request_bytes[at : at + 8], "little") for at in (96, 104))
        assert length == CERTIFICATES_MAX
        if error:
            ctypes.memmove(ctypes.addressof(call) + 24, (1 << 32).to_bytes(8, "little"), 8)
            raise OSError(error, "Input/output error")
        answer = status.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(24) + report(request_bytes[:64])
        ctypes.memmove(response, answer.ljust(4000, b"\0"), 4000)
        ctypes.memmove(address, host.ljust(length, b"\0"), length)

    return ioctl


def by_device(tmp_path: Path, ioctl: Callable[[int, int, ctypes.Structure], None]) -> tuple[str, bytes]:
    (tmp_path / "sev-guest").touch()
    found = attestation.evidence(KEY, tmp_path / "none" / "report", tmp_path / "sev-guest", ioctl)
    return found.text, found.bulk


def test_the_device_gives_report_and_certificates(tmp_path: Path) -> None:
    text, bulk = by_device(tmp_path, firmware(host=certificates()))
    assert text == f"{tmp_path}/sev-guest"
    assert verify(bulk, KEY, roots=[authority().root]).endorsement.kind == "VCEK"


def test_the_device_without_certificates_gives_the_report(tmp_path: Path) -> None:
    text, bulk = by_device(tmp_path, firmware())
    assert (text, len(bulk)) == (f"{tmp_path}/sev-guest", REPORT_SIZE)


@pytest.mark.parametrize(
    ("ioctl", "told"),
    [
        (firmware(status=0x16), "the security processor refused with status 0x16"),
        (firmware(size=1000), "the report has 1000 bytes, not 1184"),
        (firmware(error=errno.EIO), "Input/output error, exitinfo2 0x100000000"),
    ],
)
def test_a_failure_of_the_device_is_reported(
    tmp_path: Path, ioctl: Callable[[int, int, ctypes.Structure], None], told: str
) -> None:
    text, bulk = by_device(tmp_path, ioctl)
    assert bulk == b""
    assert text == f"{tmp_path}/none/report: No such file or directory; {tmp_path}/sev-guest: {told}"


def test_the_structures_match_the_kernels_header(tmp_path: Path) -> None:
    """The compiler compares them with the header."""
    names = {
        "snp_report_req": attestation.ReportRequest,
        "snp_ext_report_req": attestation.ExtendedReportRequest,
        "snp_guest_request_ioctl": attestation.GuestRequest,
    }
    claims = {"SNP_GET_EXT_REPORT": SNP_GET_EXT_REPORT}
    claims["sizeof(struct snp_report_resp)"] = ctypes.sizeof(attestation.ReportResponse)
    for name, structure in names.items():
        claims[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            claims[f"__builtin_offsetof(struct {name}, {field})"] = getattr(structure, field).offset
    source = tmp_path / "claims.c"
    lines = [f'_Static_assert({term} == {value}, "{term}");' for term, value in claims.items()]
    source.write_text("\n".join(["#include <linux/ioctl.h>", "#include <linux/sev-guest.h>", *lines]))
    compiler = shutil.which("clang-16") or shutil.which("clang")
    assert compiler
    done = subprocess.run([compiler, "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_this_machine_reports_what_it_has() -> None:
    found = attestation.evidence(KEY)
    if found.bulk:  # it is a confidential VM: then it must hold
        assert found.bulk[0x50:0x90] == report_data(KEY)
    else:
        assert found.text.startswith("/sys/kernel/config/tsm/report: ")
        assert "; /dev/sev-guest: " in found.text
