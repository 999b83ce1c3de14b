"""Attestation: reports of real machines are accepted, and refused if a single bit differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.authority import (
    CHIP,
    REPORT,
    SIZE,
    TURIN_TCB,
    Authority,
    authority,
    chip,
    evidence,
    fill,
    issue,
    sign,
    table,
)
from tests.unit.test_link import AGENT, Served
from vmishim.attestation import Requirements, attest, verify
from vmishim.attestation.chain import ROOTS, fingerprint, read
from vmishim.attestation.errors import (
    AttestationError,
    BindingError,
    ChainError,
    EndorsementError,
    FormatError,
    HostDataError,
    MeasurementError,
    NoReportError,
    PlatformError,
    PolicyError,
    SignatureError,
    TcbError,
    VmplError,
)
from vmishim.attestation.report import Report, Tcb
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests.agent import connect
from vmishim.guests.domains import Domain
from vmishim.link import Link
from vmishim.wire.attestation import report_data
from vmishim.wire.keys import PublicKey, generate
from vmishim.wire.messages import Answer, Attest, Evidence, Failure, Hello, Message, Symbols, decode, encode, expect

DATA = Path(__file__).parent / "data" / "attestation"
WHEN = datetime(2025, 6, 1, tzinfo=UTC)
REAL = {
    "milan-v2": ("milan-v2.vcek.der", "milan.pem", "Milan", "VCEK", ("smt",), Tcb(3, 0, 8, 115)),
    "milan-debug": ("milan-debug.vcek.der", "milan.pem", "Milan", "VCEK", ("smt", "debug"), Tcb(2, 0, 5, 68)),
    "milan-vlek": ("milan-vlek.vlek.der", "milan-vlek.pem", "Milan", "VLEK", ("smt",), Tcb(4, 0, 24, 217)),
    "genoa-v3": ("genoa-v3.vcek.pem", "genoa.pem", "Genoa", "VCEK", ("smt",), Tcb(10, 0, 23, 84)),
}
"""Certificates, and what is known of the machines."""
REQUIRED = Requirements(frozenset({b"\x4d" * 48}), {"snp": 8, "microcode": 100}, host_data=b"\x48" * 32)

trusting = partial(verify, roots=[authority().root], now=WHEN)


def real(name: str) -> tuple[bytes, list[Path]]:
    return (DATA / f"{name}.bin").read_bytes(), [DATA / file for file in REAL[name][:2]]


# Real machines


@pytest.mark.parametrize("name", REAL)
def test_a_real_report_is_genuine(name: str) -> None:
    raw, chain = real(name)
    _, _, product, kind, allowed, tcb = REAL[name]
    found = verify(raw, chain=chain, now=WHEN)
    assert (found.endorsement.product, found.endorsement.kind) == (product, kind)
    assert (found.report.allowed, found.report.reported_tcb) == (allowed, tcb)
    assert found.report.version == int.from_bytes(raw[:4], "little")
    assert found.report.measurement == raw[0x90:0xC0]
    assert found.report.chip_id == raw[0x1A0:0x1E0]
    assert found.report.cpuid == (tuple(raw[0x188:0x18B]) if raw[0] > 2 else None)


def test_certificates_may_come_with_the_report() -> None:
    raw, (leaf, chain) = real("milan-v2")
    ask, ark = read(chain.read_bytes())
    whole = raw + table(VCEK=leaf.read_bytes(), ASK=ask, ARK=ark)
    assert verify(whole, now=WHEN) == verify(raw, chain=[leaf, chain], now=WHEN)
    # As the ioctl gives it: whole pages, zeros to the end.
    assert verify(whole.ljust(SIZE + 0x4000, b"\0"), now=WHEN) == verify(whole, now=WHEN)


def test_the_roots_are_those_of_amds_certificates() -> None:
    found = {fingerprint(read((DATA / f"{name.lower()}.pem").read_bytes())[1]): name for name in ROOTS.values()}
    assert found == ROOTS


def test_another_chips_certificate_is_refused() -> None:
    raw, (_, chain) = real("milan-v2")
    with pytest.raises(SignatureError):
        verify(raw, chain=[DATA / "milan-debug.vcek.der", chain], now=WHEN)
    with pytest.raises(SignatureError):
        verify(raw, chain=[DATA / "turin.vcek.der", DATA / "turin.pem"], now=WHEN)


def test_certificates_are_refused_once_they_are_expired() -> None:
    raw, chain = real("milan-vlek")
    with pytest.raises(ChainError, match=r"SEV-VLEK is only valid from 2024-12-10 .* to 2025-12-10"):
        verify(raw, chain=chain, now=datetime(2025, 12, 11, tzinfo=UTC))
    with pytest.raises(ChainError, match="is only valid from"):
        verify(raw, chain=chain, now=datetime(2024, 12, 10, tzinfo=UTC))


def test_certificates_are_valid_on_the_first_and_the_last_second() -> None:
    for at in (datetime(2020, 1, 1, tzinfo=UTC), datetime(2045, 1, 1, tzinfo=UTC)):
        verify(evidence(), roots=[authority().root], now=at)
    for at in (datetime(2019, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2045, 1, 1, 0, 0, 1, tzinfo=UTC)):
        with pytest.raises(ChainError, match="is only valid from"):
            verify(evidence(), roots=[authority().root], now=at)


def test_a_guest_that_can_be_debugged_is_refused() -> None:
    raw, chain = real("milan-debug")
    report = verify(raw, chain=chain, now=WHEN).report
    # Its firmware is too old to report on aliases.
    required = Requirements(frozenset({report.measurement}), allow=frozenset({"smt"}), require_platform=frozenset())
    with pytest.raises(PolicyError, match="allows debug"):
        required.check(report)
    replace(required, allow=frozenset({"smt", "debug"})).check(report)


# The fields of a report, one by one. All reports are signed.


def test_a_report_that_meets_all_requirements_is_accepted() -> None:
    REQUIRED.check(trusting(evidence()).report)


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"version": 1}, FormatError, "version 1"),
        ({"version": 6}, FormatError, "version 6"),
        ({"signature_algo": 2}, FormatError, "algorithm 2"),
        ({"flags": 7 << 2}, FormatError, "SIGNING_KEY is 7"),
        ({"flags": 1 << 2}, EndorsementError, "names a VLEK as its signer; the certificate is for a VCEK"),
        ({"chip_id": CHIP[:-1] + b"\0"}, EndorsementError, "is for chip"),
        ({"chip_id": bytes(64)}, EndorsementError, "masked by its host"),
        ({"reported_tcb": bytes([2, 0, 0, 0, 0, 0, 8, 115])}, EndorsementError, "the report has TCB bootloader 2"),
        ({"reported_tcb": bytes([3, 1, 0, 0, 0, 0, 8, 115])}, EndorsementError, "tee 1"),
        ({"reported_tcb": bytes([3, 0, 0, 0, 0, 0, 9, 115])}, EndorsementError, "snp 9"),
        ({"reported_tcb": bytes([3, 0, 0, 0, 0, 0, 8, 114])}, EndorsementError, "microcode 114"),
        ({"report_data": report_data(generate().public)}, BindingError, "vouches for another key than the agent's"),
        ({"report_data": hashlib.sha512(AGENT.public.raw).digest()}, BindingError, "vouches for another key"),
        ({"measurement": b"\x4d" * 47 + b"\0"}, MeasurementError, "4d4d00"),
        ({"policy": 0x3_001F}, PolicyError, "allows smt"),
        ({"policy": 0x6_001F}, PolicyError, "allows migration"),
        ({"policy": 0xA_001F}, PolicyError, "allows debug"),
        ({"policy": 0x22_001F}, PolicyError, "allows cxl"),
        ({"launch_tcb": bytes([3, 0, 0, 0, 0, 0, 7, 115])}, TcbError, "launch TCB is too old: snp 7 \\(minimum 8\\)"),
        ({"vmpl": 1}, VmplError, "VMPL 1, not 0"),
        ({"platform_info": 0x05}, PlatformError, "does not report alias_check_complete"),
        ({"host_data": bytes(32)}, HostDataError, "HOST_DATA"),
    ],
)
def test_each_wrong_field_is_refused_by_itself(fields: dict[str, Any], error: type[Exception], told: str) -> None:
    mine = {"report_data": report_data(AGENT.public)}
    REQUIRED.check(trusting(evidence(**mine), AGENT.public).report)
    with pytest.raises(AttestationError, match=told) as caught:
        REQUIRED.check(trusting(evidence(**mine | fields), AGENT.public).report)
    assert type(caught.value) is error


def test_a_platform_that_is_too_old_is_refused() -> None:
    with pytest.raises(TcbError, match="reported TCB is too old: microcode 115 \\(minimum 116\\)"):
        replace(REQUIRED, minimum_tcb={"microcode": 116}).check(trusting(evidence()).report)


PLATFORM_BITS = {
    0: "smt", 1: "tsme", 2: "ecc", 3: "rapl_disabled", 4: "ciphertext_hiding", 5: "alias_check_complete",
    6: "iommu_write_safe", 7: "tio",
}  # fmt: skip
"""Bits of PLATFORM_INFO, once more."""


@pytest.mark.parametrize("bit", range(64))
def test_each_bit_of_the_platform_is_told_and_judged(bit: int) -> None:
    name = PLATFORM_BITS.get(bit)
    alone = trusting(evidence(platform_info=1 << bit))
    others = trusting(evidence(platform_info=(1 << 64) - 1 - (1 << bit)))
    assert alone.report.platform == (name or f"bit {bit}",)
    assert alone.facts["platform"] == (name or f"bit {bit}")
    assert len(others.report.platform) == 63
    assert alone.report.platform[0] not in others.report.platform
    if name is None:
        return
    required = replace(REQUIRED, require_platform=frozenset({name}))
    required.check(alone.report)
    with pytest.raises(PlatformError, match=f"does not report {name}: "):
        required.check(others.report)
    forbidden = replace(REQUIRED, require_platform=frozenset(), forbid_platform=frozenset({name}))
    forbidden.check(others.report)
    with pytest.raises(PlatformError, match=f"reports {name}, which"):
        forbidden.check(alone.report)


def test_aliases_must_have_been_looked_for_unless_the_entry_says_otherwise() -> None:
    entry = {"measurement": ["4d" * 48]}
    unchecked, checked = (trusting(evidence(platform_info=info)).report for info in (1, 1 << 5))
    required = Requirements.from_table(entry)
    required.check(checked)
    with pytest.raises(PlatformError, match="does not report alias_check_complete"):
        required.check(unchecked)
    Requirements.from_table(entry | {"require_platform": []}).check(unchecked)
    assert [
        trusting(real("genoa-v3")[0], chain=real("genoa-v3")[1], roots=[]).report.platform,
        trusting(real("milan-vlek")[0], chain=real("milan-vlek")[1], roots=[]).report.platform,
    ] == [("ecc", "alias_check_complete"), ("smt", "tsme", "ecc", "alias_check_complete")]


FLOORS = {
    (0x19, 0x01, 1): {"snp": 27, "microcode": 219},
    (0x19, 0x01, 2): {"snp": 27},
    (0x19, 0x00, 0): {"snp": 27},
    (0x19, 0x0F, 0): {"snp": 27},
    (0x19, 0x10, 0): {"snp": 27},
    (0x19, 0x11, 1): {"snp": 27, "microcode": 86},
    (0x19, 0x11, 2): {"snp": 27, "microcode": 81},
    (0x19, 0x1F, 0): {"snp": 27},
    (0x19, 0x20, 0): {},
    (0x19, 0xA0, 2): {"snp": 27},
    (0x19, 0xB0, 2): {},
    (0x1A, 0x02, 1): {"snp": 4, "microcode": 81},
    (0x1A, 0x11, 0): {"snp": 4},
    (0x1A, 0x12, 0): {},
    (0x18, 0x01, 1): {},
}
"""What AMD's bulletins 3019, 3020, 3023 and 3027 require, by processor."""


@pytest.mark.parametrize("cpuid", FLOORS)
def test_the_current_minimum_is_that_of_the_reports_processor(cpuid: tuple[int, int, int]) -> None:
    required = Requirements(frozenset({b"\x4d" * 48}), "current")
    report = trusting(evidence()).report
    good = replace(report, cpuid=cpuid, reported_tcb=Tcb(0, 0, 27, 219), launch_tcb=Tcb(0, 0, 27, 219))
    if not FLOORS[cpuid]:
        with pytest.raises(TcbError, match=f"no numbers for the processor of this report .family {cpuid[0]:#x}, "):
            required.check(good)
        return
    required.check(good)
    least = Tcb(0, 0, FLOORS[cpuid]["snp"], FLOORS[cpuid].get("microcode", 0))
    required.check(replace(good, reported_tcb=least, launch_tcb=least))
    for part, value in FLOORS[cpuid].items():
        older = replace(least, **{part: value - 1})
        for when, report in (
            ("reported", replace(good, reported_tcb=older)),
            ("launch", replace(good, launch_tcb=older)),
        ):
            with pytest.raises(TcbError, match=f"{when} TCB is too old: {part} {value - 1} .minimum {value}"):
                required.check(report)


def test_no_minimum_is_known_of_a_report_that_does_not_name_its_processor() -> None:
    with pytest.raises(TcbError, match=r"no numbers for the processor of this report \(not named\)"):
        Requirements(frozenset({b"\x4d" * 48}), "current").check(trusting(evidence(version=2)).report)


def test_turin_numbers_its_parts_in_another_order() -> None:
    key, certificate = authority().endorse(TURIN_TCB, CHIP[:8])
    tcb = bytes([1, 2, 3, 4, 0, 0, 0, 72])
    fields: dict[str, Any] = {
        "cpuid": bytes([0x1A, 2, 1]),
        "reported_tcb": tcb,
        "launch_tcb": tcb,
        "version": 5,
        "chip_id": CHIP[:8],
    }
    raw = fill(REPORT, **fields, launch_mit_vector=5, current_mit_vector=7)
    certificates = table(VCEK=certificate, ASK=authority().ask, ARK=authority().ark)
    report = trusting(sign(raw, key) + certificates).report
    assert report.reported_tcb == Tcb(fmc=1, bootloader=2, tee=3, snp=4, microcode=72)
    assert (report.launch_mit_vector, report.current_mit_vector) == (5, 7)
    for place in (0, 1, 2, 3, 7):
        other = bytearray(tcb)
        other[place] += 1
        with pytest.raises(EndorsementError, match="the signing key is for TCB"):
            trusting(sign(fill(raw, reported_tcb=bytes(other)), key) + certificates)
    with pytest.raises(EndorsementError, match="is for chip"):
        trusting(sign(fill(raw, chip_id=CHIP[:9]), key) + certificates)


# The kernel key

KERNEL = generate().public


@pytest.mark.parametrize(
    ("bound", "pinned", "accepted"),
    [
        (KERNEL, KERNEL, True),
        (None, None, True),
        (generate().public, KERNEL, False),
        (None, KERNEL, False),
        (KERNEL, None, False),
        (AGENT.public, KERNEL, False),
    ],
    ids=["same", "neither", "another kernel's", "none where one is pinned", "one where none is pinned", "the agent's"],
)
def test_a_report_vouches_for_the_pinned_kernel_key_or_for_none(
    bound: PublicKey | None, pinned: PublicKey | None, accepted: bool
) -> None:
    raw = evidence(report_data=report_data(AGENT.public, bound))
    if accepted:
        trusting(raw, AGENT.public, kernel_key=pinned)
        return
    with pytest.raises(BindingError, match="kernel key"):
        trusting(raw, AGENT.public, kernel_key=pinned)


def test_what_a_report_vouches_for_cannot_be_read_in_two_ways() -> None:
    label, agent, kernel = b"vmishim agent and kernel key v2\0", AGENT.public.raw, KERNEL.raw
    assert report_data(AGENT.public) == hashlib.sha512(label + agent + b"\0").digest()
    assert report_data(AGENT.public, KERNEL) == hashlib.sha512(label + agent + b"\1" + kernel).digest()
    # In the form of version 1, which said nothing of a kernel's key.
    old = hashlib.sha512(b"vmishim agent key v1\0" + agent).digest()
    for pinned in (None, KERNEL):
        with pytest.raises(BindingError):
            trusting(evidence(report_data=old), AGENT.public, kernel_key=pinned)


@pytest.mark.parametrize("bound", [None, generate().public, KERNEL])
def test_a_guest_whose_report_names_another_kernel_key_is_asked_nothing(
    tmp_path: Path, bound: PublicKey | None
) -> None:
    answer = Answering(Evidence("test", evidence(report_data=report_data(AGENT.public, bound))))
    required = replace(REQUIRED, roots=frozenset({authority().root}))
    domain = Domain(
        "web-1", agent=f"ipc://{tmp_path}/agent", agent_key=AGENT.public.text, kernel_key=KERNEL.text,
        attestation=required,
    )  # fmt: skip
    with Served(domain.agent, answer) as agent:
        with pytest.raises(LinkError) as caught:
            connect(domain, private=agent.link()._static)
        assert isinstance(caught.value, BindingError) == (bound != KERNEL)
    # The genuine one is greeted next; as the agent of this test has no facts to tell, that ends there.
    assert [type(each) for each in answer.asked] == ([Attest, Hello] if bound == KERNEL else [Attest])


# Certificates


def forged(change: Callable[[Authority], dict[str, Any]]) -> bytes:
    """Evidence with the parts of the chain that ``change`` returns; the rest is correct."""
    key, certificate = chip()
    whole = {"VCEK": certificate, "ASK": authority().ask, "ARK": authority().ark} | change(authority())
    return sign(REPORT, whole.pop("key", key)) + table(**{kind: each for kind, each in whole.items() if each})


def strangers(**names: Any) -> dict[str, Any]:
    """An authority with the names of ours, but other keys."""
    other = Authority()
    key, certificate = other.endorse()
    return {"VCEK": certificate, "key": key, "ASK": other.ask, "ARK": other.ark} | names


def sub_authority(ours: Authority, **more: Any) -> dict[str, Any]:
    """Our ASK's name and key, certified in another way."""
    return {"ASK": issue("SEV-Test", ours.ask_key.public_key(), "ARK-Test", ours.ark_key, **more)}


def leaf(ours: Authority, *arguments: Any, **more: Any) -> dict[str, Any]:
    key, certificate = ours.endorse(*arguments, **more)
    return {"key": key, "VCEK": certificate}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda ours: {"VCEK": None}, ChainError, "no VCEK or VLEK certificate"),
        (lambda ours: {"ASK": None}, ChainError, "the issuer of the certificate of SEV-VCEK is missing: CN=SEV-Test"),
        (lambda ours: {"ARK": None}, ChainError, "the issuer of the certificate of SEV-Test is missing: CN=ARK-Test"),
        (lambda ours: strangers(), ChainError, "lead to ARK-Test, which is not a trusted root"),
        (lambda ours: strangers(ARK=ours.ark), ChainError, "SEV-Test is not signed by its issuer, ARK-Test"),
        (lambda ours: strangers(ARK=ours.ark, ASK=ours.ask), ChainError, "VCEK is not signed by its issuer, SEV-Test"),
        (lambda ours: sub_authority(ours, authority=False), ChainError, "VCEK is not signed by its issuer, SEV-Test"),
        (lambda ours: sub_authority(ours, until=2021), ChainError, "SEV-Test is only valid from"),
        (lambda ours: {"ARK": issue("ARK-Test", ours.ark_key.public_key(), "ARK-Test", ours.ask_key, until=2099)},
         ChainError, "ARK-Test is not signed by its issuer, ARK-Test"),
        (lambda ours: leaf(ours, until=2021), ChainError, "SEV-VCEK is only valid from"),
        (lambda ours: leaf(ours, provider="cloud"), EndorsementError, "the certificate is for neither"),
        (lambda ours: leaf(ours, chip=None), EndorsementError, "the certificate is for neither"),
        (lambda ours: leaf(ours, chip=None, provider="cloud"), EndorsementError, "the certificate is for a VLEK"),
        (lambda ours: {"VCEK": b"\x30\x03\x02\x01\x00"}, ChainError, "not a valid certificate"),
        (lambda ours: {"key": ec.generate_private_key(ec.SECP384R1())}, SignatureError, "signature does not match"),
    ],
)  # fmt: skip
def test_a_forged_chain_is_refused(
    change: Callable[[Authority], dict[str, Any]], error: type[Exception], told: str
) -> None:
    with pytest.raises(AttestationError, match=told) as caught:
        trusting(forged(change))
    assert type(caught.value) is error


def test_an_authority_without_an_rsa_key_signs_nothing() -> None:
    """As a key of AMD's would: any signature scheme but theirs is none."""
    named = issue("SEV-Test", ec.generate_private_key(ec.SECP384R1()).public_key(), "ARK-Test", authority().ark_key)
    with pytest.raises(ChainError, match="VCEK is not signed by its issuer, SEV-Test"):
        trusting(forged(lambda ours: {"ASK": named}))


@pytest.mark.parametrize("number", [b"\2\1", b"\2\0", b"\4\1\3", b"\2\2\3", b"\2\3\0\0\3", b"\2\1\3\0", b""])
def test_a_tcb_that_is_no_one_byte_number_is_refused(number: bytes) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    said = {"3.1": number, "3.2": b"\2\1\0", "3.3": b"\2\1\10", "3.8": b"\2\1\x73", "4": CHIP}
    made = issue("SEV-VCEK", key.public_key(), "SEV-Test", authority().ask_key, authority=False, extensions=said)
    with pytest.raises(EndorsementError, match="the certificate's TCB is not a one-byte number"):
        trusting(forged(lambda ours: {"VCEK": made, "key": key}))


def test_your_own_root_must_be_configured() -> None:
    trusting(evidence())
    with pytest.raises(ChainError, match="not a trusted root"):
        verify(evidence(), now=WHEN)


def test_an_outdated_certificate_beside_the_right_one_is_ignored(tmp_path: Path) -> None:
    _, stale = authority().endorse()
    (tmp_path / "stale.der").write_bytes(stale.public_bytes(Encoding.DER))
    assert trusting(evidence(), chain=[tmp_path / "stale.der"]) == trusting(evidence())


def test_a_table_may_hold_other_things_and_is_never_read_beyond_its_end() -> None:
    _, certificate = chip()
    ours = {"VCEK": certificate, "ASK": authority().ask, "ARK": authority().ark}
    raw = evidence()[:SIZE]
    # Revocation lists have their own kind.
    trusting(raw + table(**ours, **{"92f81bc3-5811-4d3d-97ff-d19f88dc67ea": b"no certificate"}))
    whole = table(**ours)
    for size in range(0, len(whole), 7):
        with pytest.raises(ChainError):
            trusting(raw + whole[:size])


@pytest.mark.parametrize("size", [0, 1, SIZE - 1])
def test_a_report_that_is_too_short_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"not {size}"):
        verify(evidence()[:size])


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_report_of_another_size_is_not_parsed(size: int) -> None:
    with pytest.raises(FormatError, match=f"must have {SIZE} bytes, not {size}"):
        Report.parse(REPORT.ljust(SIZE + 1, b"\0")[:size])


def test_too_many_certificates_are_refused_unparsed() -> None:
    whole = evidence().ljust(SIZE + 0x4000, b"\0")
    trusting(whole)
    with pytest.raises(FormatError, match="16385 bytes of certificates came with the report; the limit is 16384"):
        trusting(whole + b"\0")


def test_many_pem_headers_do_not_hang_the_parser() -> None:
    with pytest.raises(ChainError):
        read(b"-----BEGIN CERTIFICATE-----" * (1 << 16))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"cannot read the certificates in .*/absent: No such file"):
        trusting(evidence(), chain=[tmp_path / "absent"])


# In a session


class Answering:
    """An agent's answers, and the requests it got."""

    def __init__(self, evidence: Message) -> None:
        self.evidence = evidence
        self.asked: list[Message] = []

    def __call__(self, session: bytes, request: bytes) -> bytes:
        self.asked.append(decode(request))
        return encode(self.evidence if isinstance(self.asked[-1], Attest) else Answer([]))


def attested(agent: Served) -> Link:
    roots = frozenset({authority().root})
    return Link(
        agent.endpoint, agent.link()._static, AGENT.public, 5.0, [partial(attest, replace(REQUIRED, roots=roots))]
    )


def good() -> Evidence:
    return Evidence("test", evidence(report_data=report_data(AGENT.public)))


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/agent"


QUESTION = encode(Symbols([]))


def test_a_session_is_attested_before_it_carries_anything(endpoint: str) -> None:
    answer = Answering(good())
    with Served(endpoint, answer) as agent, attested(agent) as link:
        for _ in range(2):
            assert expect(link.exchange(QUESTION), Answer) == Answer([])
    assert answer.asked == [Attest(), Symbols([]), Symbols([])]


@pytest.mark.parametrize(
    ("evidence", "error", "told"),
    [
        (
            Evidence("/dev/sev-guest: No such file or directory", b""),
            NoReportError,
            "the agent's machine gives no attestation report",
        ),
        (
            Evidence("test", evidence(report_data=report_data(generate().public))),
            BindingError,
            "vouches for another key",
        ),
        (Evidence("test", evidence()[:-1]), ChainError, "cut short"),
        (
            Evidence("test", evidence(report_data=report_data(AGENT.public), measurement=bytes(48))),
            MeasurementError,
            "not launched from the required image",
        ),
        (Failure("malformed", "what is that"), LibvmiError, "refused .malformed.: what is that"),
    ],
)
def test_a_guest_that_does_not_attest_is_asked_nothing(
    endpoint: str, evidence: Message, error: type[Exception], told: str
) -> None:
    answer = Answering(evidence)
    with Served(endpoint, answer) as agent, attested(agent) as link:
        for _ in range(2):
            with pytest.raises(error, match=told):
                link.exchange(QUESTION)
    assert answer.asked == [Attest(), Attest()]


def test_a_restarted_agent_attests_again(endpoint: str) -> None:
    with Served(endpoint, Answering(good())) as agent:
        link = attested(agent)
        link.exchange(QUESTION)
    answer = Answering(Evidence("nowhere", b""))
    with Served(endpoint, answer), pytest.raises(NoReportError):
        link.exchange(QUESTION)
    link.close()
    assert answer.asked == [Attest()]
