"""Ask the machine's security processor, once at set-up, for a report that vouches for the agent's keys.

Linux 6.7 and later provide reports through configfs (Documentation/ABI/testing/configfs-tsm in the kernel's tree),
older kernels through ``/dev/sev-guest`` (Documentation/virt/coco/sev-guest.rst).
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
    """``struct snp_guest_request_ioctl``. The upper half of ``exitinfo2`` is the hypervisor's error."""

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


class _NoReportError(Exception):
    """This interface gave no report. The text says why."""


def evidence(
    key: PublicKey,
    tsm: Path = TSM,
    device: Path = DEVICE,
    ioctl: Callable[[int, int, ctypes.Structure], object] = fcntl.ioctl,
    *,
    kernel_key: PublicKey | None = None,
) -> Evidence:
    """A report for ``key``, with the certificates that the host has for it.

    :param kernel_key: if the kernel encrypts, the key that vouches for the kernel's keys; the report vouches for it too

    Both interfaces need root, so call this before privileges are dropped. Without a report, ``bulk`` is empty and the
    text says why, for each interface; that is not an error, since most machines are not confidential VMs.
    """
    data = report_data(key, kernel_key)
    try:
        return _from_configfs(data, tsm)
    except (OSError, _NoReportError) as error:
        why = f"{tsm}: {_one_line(error)}"
    try:
        return _from_device(data, device, ioctl)
    except (OSError, _NoReportError) as error:
        return Evidence(f"{why}; {device}: {_one_line(error)}", b"")


def _from_configfs(data: bytes, tsm: Path) -> Evidence:
    entry = tsm / f"vmishim-{os.getpid()}"
    entry.mkdir()  # the kernel creates its files
    try:
        provider = (entry / "provider").read_text().strip()
        if provider != "sev_guest":
            raise _NoReportError(f"the provider is {provider}, not AMD SEV-SNP's sev_guest")
        # Under an SVSM the kernel runs at a privilege level that may not request reports for more privileged levels.
        (entry / "privlevel").write_text((entry / "privlevel_floor").read_text().strip())
        (entry / "inblob").write_bytes(data)
        report = (entry / "outblob").read_bytes()
        certificates = (entry / "auxblob").read_bytes()
        # The kernel counts writes here: more than our two, and the report may be for another process's data.
        if (entry / "generation").read_text().strip() != "2":
            raise _NoReportError("another process wrote to the entry")
    finally:
        entry.rmdir()
    return _checked(report, certificates, str(tsm))


def _from_device(data: bytes, device: Path, ioctl: Callable[[int, int, ctypes.Structure], object]) -> Evidence:
    certificates = ctypes.create_string_buffer(CERTIFICATES_MAX)
    # VMPL 0: kernels that support other levels have configfs.
    asked = ReportRequest(user_data=(ctypes.c_uint8 * 64)(*data))
    request = ExtendedReportRequest(asked, ctypes.addressof(certificates), len(certificates))
    response = ReportResponse()
    call = GuestRequest(1, ctypes.addressof(request), ctypes.addressof(response))
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(descriptor, SNP_GET_EXT_REPORT, call)
    except OSError as error:
        raise _NoReportError(f"{error.strerror}, exitinfo2 {call.exitinfo2:#x}") from None
    finally:
        os.close(descriptor)
    if response.status:
        raise _NoReportError(f"the security processor refused with status {response.status:#x}")
    return _checked(bytes(response.report)[: response.report_size], certificates.raw, str(device))


def _checked(report: bytes, certificates: bytes, source: str) -> Evidence:
    if len(report) != REPORT_SIZE:
        raise _NoReportError(f"the report has {len(report)} bytes, not {REPORT_SIZE}")
    # A host without certificates leaves the pages as they were.
    return Evidence(source, report + (certificates if any(certificates) else b""))


def _one_line(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
