"""Ask the machine's security processor for a report that vouches for the agent's key: once, at set-up.

Linux 6.7 and later hand reports out by configfs (Documentation/ABI/testing/configfs-tsm in the kernel's tree), with
``/dev/sev-guest`` (Documentation/virt/coco/sev-guest.rst) being the older way.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from vmishim.wire.attestation import CERTIFICATES_MAX, REPORT_SIZE, report_data
from vmishim.wire.keys import PublicKey
from vmishim.wire.messages import Evidence

TSM = Path("/sys/kernel/config/tsm/report")
DEVICE = Path("/dev/sev-guest")


# include/uapi/linux/sev-guest.h


class ReportRequest(ctypes.Structure):
    """``struct snp_report_req``."""

    _fields_ = [("user_data", ctypes.c_uint8 * 64), ("vmpl", ctypes.c_uint32), ("rsvd", ctypes.c_uint8 * 28)]


class ExtendedReportRequest(ctypes.Structure):
    """``struct snp_ext_report_req``."""

    _fields_ = [("data", ReportRequest), ("certs_address", ctypes.c_uint64), ("certs_len", ctypes.c_uint32)]


class GuestRequest(ctypes.Structure):
    """``struct snp_guest_request_ioctl``. Of ``exitinfo2`` the upper half is the hypervisor's error."""

    _fields_ = [
        ("msg_version", ctypes.c_uint8),
        ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64),
        ("exitinfo2", ctypes.c_uint64),
    ]


class ReportResponse(ctypes.Structure):
    """``struct snp_report_resp``, whose 4000 bytes are a MSG_REPORT_RSP (56860, revision 1.55, table 24)."""

    _fields_ = [
        ("status", ctypes.c_uint32),
        ("report_size", ctypes.c_uint32),
        ("rsvd", ctypes.c_uint8 * 24),
        ("report", ctypes.c_uint8 * (4000 - 32)),
    ]


SNP_GET_EXT_REPORT = 0xC0205302
"""``_IOWR('S', 0x2, struct snp_guest_request_ioctl)``"""


class _AbsentError(Exception):
    """There is no report by this way. The text says why."""


def evidence(
    key: PublicKey,
    tsm: Path = TSM,
    device: Path = DEVICE,
    ioctl: Callable[[int, int, ctypes.Structure], object] = fcntl.ioctl,
) -> Evidence:
    """A report for ``key``, with the certificates that the host has for it.

    Needs root's access to one of the two ways, so it is asked before privileges are dropped. Where there is no report,
    the text says why, for each way; that is no error, as most machines are none of AMD's confidential ones.
    """
    data = report_data(key)
    try:
        return _by_configfs(data, tsm)
    except (OSError, _AbsentError) as error:
        why = f"{tsm}: {_line(error)}"
    try:
        return _by_device(data, device, ioctl)
    except (OSError, _AbsentError) as error:
        return Evidence(f"{why}; {device}: {_line(error)}", b"")


def _by_configfs(data: bytes, tsm: Path) -> Evidence:
    entry = tsm / f"vmishim-{os.getpid()}"
    entry.mkdir()  # the kernel fills it
    try:
        provider = (entry / "provider").read_text().strip()
        if provider != "sev_guest":
            raise _AbsentError(f"it reports for {provider}, not for AMD SEV-SNP")
        # Below an SVSM the kernel runs at a privilege level that may not ask for reports of higher ones.
        (entry / "privlevel").write_text((entry / "privlevel_floor").read_text().strip())
        (entry / "inblob").write_bytes(data)
        report = (entry / "outblob").read_bytes()
        certificates = (entry / "auxblob").read_bytes()
        # It counts writes: more than our two, and the report may be somebody else's.
        if (entry / "generation").read_text().strip() != "2":
            raise _AbsentError("somebody else wrote to the entry")
    finally:
        entry.rmdir()
    return _whole(report, certificates, str(tsm))


def _by_device(data: bytes, device: Path, ioctl: Callable[[int, int, ctypes.Structure], object]) -> Evidence:
    certificates = ctypes.create_string_buffer(CERTIFICATES_MAX)
    # VMPL 0: kernels that know of others have configfs.
    asked = ReportRequest(user_data=(ctypes.c_uint8 * 64)(*data))
    request = ExtendedReportRequest(asked, ctypes.addressof(certificates), len(certificates))
    response = ReportResponse()
    call = GuestRequest(1, ctypes.addressof(request), ctypes.addressof(response))
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(descriptor, SNP_GET_EXT_REPORT, call)
    except OSError as error:
        raise _AbsentError(f"{error.strerror}, exitinfo2 {call.exitinfo2:#x}") from None
    finally:
        os.close(descriptor)
    if response.status:
        raise _AbsentError(f"the security processor refused with status {response.status:#x}")
    return _whole(bytes(response.report)[: response.report_size], certificates.raw, str(device))


def _whole(report: bytes, certificates: bytes, source: str) -> Evidence:
    if len(report) != REPORT_SIZE:
        raise _AbsentError(f"the report has {len(report)} bytes, not {REPORT_SIZE}")
    # A host that has no certificates leaves the pages as they were.
    return Evidence(source, report + (certificates if any(certificates) else b""))


def _line(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
