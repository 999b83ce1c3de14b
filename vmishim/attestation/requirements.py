"""What an IDS requires of a guest's report before it reads the guest: ``[NAME.attestation]`` in ``domains.toml``.

::

    [web-1.attestation]
    measurement = ["7a1e..."]                   # accepted launch measurements
    minimum_tcb = "current"                     # lowest TCB: AMD's published fixes (floors.toml), or numbers of your
                                                # own: { snp = 27, microcode = 86 }, named as in AMD's bulletins
    allow = ["smt"]                             # what its policy may allow: smt, migration, debug, cxl; default none
    require_platform = ["alias_check_complete"] # bits of PLATFORM_INFO that must be set; this one by default
    forbid_platform = ["smt"]                   # bits that must not be set; default none
    vmpl = 0                                    # the privilege level at which the report was requested
    host_data = "00..."                         # optional
    chain = ["~/milan.pem"]                     # files of certificates, besides those that come with the report
    roots = ["9f05..."]                         # trusted root keys, besides AMD's known ones; optional
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vmishim.attestation.errors import (
    HostDataError,
    MeasurementError,
    PlatformError,
    PolicyError,
    TcbError,
    VmplError,
)
from vmishim.attestation.floors import floor
from vmishim.attestation.report import PERMISSIONS, PLATFORM, Report, Tcb

_PARTS = {part.name for part in fields(Tcb)}
CURRENT = "current"
"""``minimum_tcb``: what `vmishim.attestation.floors` has for the report's processor."""
REQUIRED_PLATFORM = frozenset({"alias_check_complete"})
"""Required unless the entry says otherwise: without this check a host with tampered memory modules reads and writes the
guest's memory, and forges its measurement (BadRAM, CVE-2024-21944, AMD-SB-3015)."""
_SIZES = {"measurement": 48, "host_data": 32, "roots": 32}


@dataclass(frozen=True)
class Requirements:
    """The settings of the table in this module's docstring."""

    measurement: frozenset[bytes]
    minimum_tcb: Mapping[str, int] | str = field(default_factory=dict)
    allow: frozenset[str] = frozenset()
    vmpl: int = 0
    host_data: bytes | None = None
    chain: tuple[Path, ...] = ()
    roots: frozenset[str] = frozenset()
    require_platform: frozenset[str] = REQUIRED_PLATFORM
    forbid_platform: frozenset[str] = frozenset()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Requirements:
        """:raises ValueError: a setting is unknown or has an invalid value; the text says which"""
        known = {each.name for each in fields(cls)}
        unknown = sorted(table.keys() - known)
        if unknown:
            raise ValueError(f"has an unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
        minimum, vmpl, host_data = table.get("minimum_tcb", {}), table.get("vmpl", 0), table.get("host_data")
        if minimum != CURRENT and (
            type(minimum) is not dict or not minimum.keys() <= _PARTS or not _numbers(minimum.values(), 255)
        ):
            raise ValueError(
                f"minimum_tcb must give numbers up to 255 for {', '.join(sorted(_PARTS))}, or be {CURRENT!r}, not "
                f"{minimum!r}"
            )
        if not _numbers([vmpl], 3):
            raise ValueError(f"vmpl must be a number from 0 to 3, not {vmpl!r}")
        allow = _named(table, "allow", PERMISSIONS)
        required = _named(table, "require_platform", PLATFORM, REQUIRED_PLATFORM)
        forbidden = _named(table, "forbid_platform", PLATFORM)
        if required & forbidden:
            raise ValueError(f"require_platform and forbid_platform both name {', '.join(required & forbidden)}")
        measurement = frozenset(_hex("measurement", text) for text in _texts(table, "measurement"))
        if not measurement:
            raise ValueError("needs measurement: without it any guest on any AMD machine would be accepted")
        return cls(
            measurement,
            minimum,
            allow,
            vmpl,
            None if host_data is None else _hex("host_data", host_data),
            tuple(Path(text).expanduser() for text in _texts(table, "chain")),
            frozenset(_hex("roots", text).hex() for text in _texts(table, "roots")),
            required,
            forbidden,
        )

    @property
    def warning(self) -> str:
        """What these settings leave open; empty if nothing."""
        if self.minimum_tcb:
            return ""
        return f'minimum_tcb is not set, so firmware with known flaws is accepted: set minimum_tcb = "{CURRENT}"'

    def minimum(self, report: Report) -> Mapping[str, int]:
        """The lowest TCB parts that these settings accept from the report's processor.

        :raises TcbError: ``minimum_tcb`` is ``current``, and nothing is known of the processor
        """
        if not isinstance(self.minimum_tcb, str):
            return self.minimum_tcb
        found = floor(report.cpuid)
        if not found:
            raise TcbError(
                f'minimum_tcb = "{CURRENT}" has no numbers for the processor of this report '
                f"({'family {:#x}, model {:#x}, stepping {}'.format(*report.cpuid) if report.cpuid else 'not named'}): "
                "set numbers in the domain's entry"
            )
        return found

    def check(self, report: Report) -> None:
        """Check a genuine report against the requirements.

        :raises AttestationError: it does not meet one; the class and the text say which
        """
        if report.measurement not in self.measurement:
            raise MeasurementError(
                f"the guest was not launched from the required image: its measurement is {report.measurement.hex()}"
            )
        more = [name for name in report.allowed if name not in self.allow]
        if more:
            raise PolicyError(f"the guest's policy allows {', '.join(more)}, which is not in `allow`")
        old = outdated(report, self.minimum(report))
        if old:
            raise TcbError(old)
        lacking = sorted(self.require_platform - set(report.platform))
        if lacking:
            raise PlatformError(
                f"the platform does not report {', '.join(lacking)}: update its firmware and BIOS settings, or name "
                "what you require in `require_platform`"
            )
        has = sorted(self.forbid_platform & set(report.platform))
        if has:
            raise PlatformError(f"the platform reports {', '.join(has)}, which `forbid_platform` rules out")
        if report.vmpl != self.vmpl:
            raise VmplError(f"the report was requested at VMPL {report.vmpl}, not {self.vmpl}")
        if self.host_data is not None and report.host_data != self.host_data:
            raise HostDataError(f"the guest's HOST_DATA is not the required one: {report.host_data.hex()}")


def outdated(report: Report, minimum: Mapping[str, int]) -> str:
    """Which parts of the platform are below the minimum, now or at launch; empty if none."""
    for name, tcb in (("reported", report.reported_tcb), ("launch", report.launch_tcb)):
        old = {part: getattr(tcb, part) for part, least in minimum.items() if getattr(tcb, part) < least}
        if old:
            parts = ", ".join(f"{part} {value} (minimum {minimum[part]})" for part, value in old.items())
            return f"the platform's {name} TCB is too old: {parts}"
    return ""


def _named(
    table: Mapping[str, Any], name: str, known: Mapping[str, int], default: frozenset[str] = frozenset()
) -> frozenset[str]:
    """A setting that names bits."""
    if name not in table:
        return default
    given = frozenset(_texts(table, name))
    if not given <= known.keys():
        raise ValueError(f"{name} can name {', '.join(known)}, not {', '.join(sorted(given - known.keys()))}")
    return given


def _texts(table: Mapping[str, Any], name: str) -> list[str]:
    value = table.get(name, [])
    if type(value) is not list or not all(type(each) is str for each in value):
        raise ValueError(f"{name} must be a list of strings, not {value!r}")
    return value


def _numbers(values: Iterable[Any], most: int) -> bool:
    return all(type(value) is int and 0 <= value <= most for value in values)


def _hex(name: str, text: Any) -> bytes:
    try:
        value = bytes.fromhex(text)
    except (TypeError, ValueError):
        value = b""
    if len(value) != _SIZES[name]:
        raise ValueError(f"{name} must be {_SIZES[name]} bytes in hex, not {text!r}")
    return value
