"""``vmishim doctor``: what works, what does not, and what to do; the same checks in the same order every time.

docs/deploy.md and other errors send you here, so every finding names the next step.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmishim.errors import FaultError, LibvmiError, LinkError
from vmishim.foreign import printable
from vmishim.guests import domains
from vmishim.guests.resolver import reach
from vmishim.guests.target import Target
from vmishim.output import dump
from vmishim.plural import counted
from vmishim.version import __version__

if TYPE_CHECKING:
    from vmishim.link import Link

Verdict = Literal["ok", "note", "bad"]

# Bits of CapEff in /proc/PID/status (include/uapi/linux/capability.h).
_CAPABILITIES = {"CAP_SYSLOG": 34, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_SYS_ADMIN = 21
_FLOOR = {"pyzmq": (24,), "cryptography": (38,), "rich": (13,)}
KEYS_DIFFER = "run `agent.pyz keygen /etc/vmishim/agent.key` in the guest, compare keys, enroll again with --replace"
_SYMBOLS = ("init_task", "linux_banner", "modules", "tcp_hashinfo", "init_top_pgt", "page_offset_base")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    about: str
    verdict: Verdict
    """"note": it works, but could be better."""
    text: str
    remedy: str = ""
    """What to do; empty if there is nothing to do."""


def doctor(options: argparse.Namespace) -> int:
    """Check everything; 1 if any finding is bad. :raises LibvmiError: ``domains.toml`` has no such domain"""
    if options.domain:
        domains.find(options.domain)  # a wrong name is an error, not a finding
    found = []
    for finding in _look(options):
        found.append(finding)
        if not options.json:
            _say(finding)
    bad = sum(finding.verdict == "bad" for finding in found)
    if options.json:
        dump([asdict(finding) for finding in found])
    else:
        notes = sum(finding.verdict == "note" for finding in found)
        print(f"\n{_verdict(bad, notes)}")
    return 1 if bad else 0


def _look(options: argparse.Namespace) -> Iterator[Finding]:
    yield from host()
    if options.local:
        machine = list(this_machine())
        yield from machine
        if all(finding.verdict != "bad" for finding in machine):
            yield from _local_agent()
    elif options.domain:
        yield from domain(options.domain)
    else:
        yield _objects("note")
        yield _programs()
        yield from enrolled()


def _verdict(bad: int, notes: int) -> str:
    if bad:
        return f"{counted(bad, 'problem')} to fix"
    return f"nothing to fix; {counted(notes, 'note')}" if notes else "all well"


def _say(finding: Finding) -> None:
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    colours = {"ok": "32", "note": "33", "bad": "31;1"}
    mark = marks[finding.verdict]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        mark = f"\x1b[{colours[finding.verdict]}m{mark}\x1b[0m"
    # Wrapped on a terminal only: in a file or a pipe, a finding stays one line.
    room = shutil.get_terminal_size().columns - 20 if sys.stdout.isatty() else 10_000
    for number, line in enumerate(_wrapped(finding.text, room)):
        print(f"{'' if number else mark + '  ' + finding.about:<{20 if number else 20 + len(mark) - 4}}{line}")
    for number, line in enumerate(_wrapped(finding.remedy, room - 3)):
        print(f"{'':20}{'   ' if number else '-> '}{line}")
    sys.stdout.flush()


def _wrapped(text: str, room: int) -> list[str]:
    return textwrap.wrap(printable(text), max(room, 20), break_long_words=False, break_on_hyphens=False)


# Our own side.


def host() -> Iterator[Finding]:
    """Python, and the libraries that everything needs."""
    yield Finding("vmishim", "ok", f"{__version__}, {Path(__file__).parents[1]}")
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    for name, floor in _FLOOR.items():
        wanted = ".".join(map(str, floor))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed", f"pip install '{name}>={wanted}'")
            continue
        enough = tuple(int(part) for part in version.split(".")[: len(floor)] if part.isdigit()) >= floor
        text = version
        if name == "pyzmq":
            from vmishim.link import ZMQ_VERSION

            text = f"{version}, libzmq {ZMQ_VERSION}"
        yield Finding(name, "ok" if enough else "bad", text, "" if enough else f"pip install '{name}>={wanted}'")


def enrolled() -> Iterator[Finding]:
    """The enrolled guests, as far as the file tells."""
    try:
        found = domains.load()
    except LibvmiError as error:
        yield _failed("domains", error, "edit that file, or remove the entry: vmishim forget NAME")
        return
    if not found:
        text = f"none in {domains.path()}"
        yield Finding("domains", "note", text, "`vmishim enroll` adds one; `vmishim ps --local` needs none")
        return
    yield Finding("domains", "ok", f"{', '.join(found)} in {domains.path()}", "`vmishim doctor DOMAIN` checks one")


# This machine as a guest.


def this_machine() -> Iterator[Finding]:
    """What an agent needs of the machine it runs on."""
    release = os.uname().release
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        text = f"{platform.system()} on {platform.machine()}"
        yield Finding("system", "bad", text, "an agent reads Linux on x86_64 only; check a guest instead")
        return
    old = tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < (5, 17)
    remedy = "Linux 5.17 is the oldest supported" if old else ""
    yield Finding("kernel", "bad" if old else "ok", f"Linux {release}", remedy)
    yield _libbpf()
    yield _objects("bad")
    size = Path("/sys/kernel/btf/vmlinux")
    if size.exists():
        yield Finding("BTF", "ok", f"{size}, {size.stat().st_size >> 10:,} KiB")
    else:
        remedy = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y; all of Debian's and Ubuntu's have it"
        yield Finding("BTF", "bad", "this kernel has none", remedy)
    yield _lockdown()
    yield _privilege()
    yield _pointers()


def _libbpf() -> Finding:
    try:
        library = ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        return Finding("libbpf", "bad", f"not installed ({error})", "apt install libbpf1")
    library.libbpf_version_string.restype = ctypes.c_char_p
    return Finding("libbpf", "ok", library.libbpf_version_string().decode().removeprefix("v"))


def _objects(verdict: Verdict) -> Finding:
    """Whether agents can be made here, and run.

    :param verdict: if not
    """
    from vmishim.ebpf_objects import OBJECTS, object_bytes

    try:
        sizes = [len(object_bytes(name)) for name in OBJECTS]
    except LibvmiError as error:
        return Finding("eBPF objects", verdict, *str(error).split("; ", 1))
    return Finding("eBPF objects", "ok", f"{len(sizes)}, {sum(sizes) >> 10} KiB")


def _programs() -> Finding:
    """Whether compiled programs can be run."""
    from vmishim.program import LIBRARY, missing

    if missing():
        return Finding("libvmi.so.0", "note", "not built, so `vmishim run` cannot run compiled programs", missing())
    return Finding("libvmi.so.0", "ok", str(LIBRARY))


def _lockdown() -> Finding:
    try:
        modes = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return Finding("lockdown", "ok", "not supported by this kernel")
    mode = modes[modes.find("[") + 1 : modes.find("]")]
    if mode == "confidentiality":
        remedy = "boot without lockdown=confidentiality, or start the agent before lockdown is raised"
        return Finding("lockdown", "bad", "confidentiality: eBPF programs may not read kernel memory", remedy)
    return Finding("lockdown", "ok", mode)


def _command() -> str:
    """How you started this, in full: sudo has a PATH of its own."""
    return os.path.abspath(sys.argv[0]) if os.path.basename(sys.argv[0]) == "vmishim" else "vmishim"


def _privilege() -> Finding:
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    missing = [name for name, bit in _CAPABILITIES.items() if not held & (1 << bit | 1 << _CAP_SYS_ADMIN)]
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    if missing:
        return Finding(
            "privilege", "bad", f"{who}, without {', '.join(missing)}", f"run it as root: sudo {_command()} ..."
        )
    return Finding("privilege", "ok", f"{who}, with {', '.join(_CAPABILITIES)}")


def _pointers() -> Finding:
    try:
        value = Path("/proc/sys/kernel/kptr_restrict").read_text().strip()
    except OSError as error:
        return Finding("kptr_restrict", "note", f"unknown: {error.strerror}")
    if value == "2":
        return Finding("kptr_restrict", "bad", "2: symbols are hidden from all users", "sysctl kernel.kptr_restrict=1")
    return Finding("kptr_restrict", "ok", value)


def _local_agent() -> Iterator[Finding]:
    from vmishim.guests import local

    try:
        with local.guest() as guest:
            yield Finding("agent", "ok", "runs on this machine, and answers")
            yield from inside(guest)
    except LinkError as error:
        yield _failed("agent", error, "`vmishim-agent check` says more")


# A guest.


def domain(name: str) -> Iterator[Finding]:
    """An enrolled guest: its entry, its agent, its kernel. :raises LibvmiError: no such domain"""
    from vmishim.wire.keys import PublicKey, load_private

    entry = domains.find(name)
    yield Finding("entry", "ok", f"{entry.agent or entry.ramfile} in {domains.path()}")
    if entry.agent:
        try:
            ours = load_private(Path(entry.key).expanduser())
            yield Finding("our key", "ok", f"{entry.key}, {ours.public.fingerprint}")
        except LinkError as error:
            remedy = f"vmishim keygen {entry.key}, or set key in the entry"
            yield _failed("our key", error, remedy)
            return
        try:
            theirs = PublicKey.from_text(entry.agent_key)
            yield Finding("its key", "ok", f"{theirs.fingerprint} {theirs.name}".rstrip())
        except LinkError as error:
            yield _failed("its key", error, "enroll it again, with --replace")
            return
    begun = time.monotonic()
    try:
        target = reach(entry)
    except LibvmiError as error:
        yield _unreached(error, ours.public.text if entry.agent else "")
        return
    try:
        how = "both keys accepted" if entry.agent else "its memory holds a known kernel"
        yield Finding("reached", "ok", f"{how}, {(time.monotonic() - begun) * 1000:.0f} ms")
        yield from inside(target, entry)
        if entry.freeze:
            yield _pause(target)
    except LinkError as error:
        yield Finding("agent", "bad", f"it stopped answering: {_line(error)}", "read its journal, in the guest")
    finally:
        target.close()


def _unreached(error: LibvmiError, ours: str) -> Finding:
    from vmishim.attestation.errors import AttestationError
    from vmishim.link import UnresolvedError, WrongKeyError
    from vmishim.wire.session import Reason, RefusedError

    if isinstance(error, RefusedError):
        if error.reason is Reason.NOT_PERMITTED:
            remedy = f"in the guest, add to /etc/vmishim/permitted: {ours}"
            return Finding("reached", "bad", "an agent answers, but does not permit our key", remedy)
        remedy = "compare versions: vmishim --version here, agent.pyz --version in the guest"
        if error.reason is Reason.MALFORMED:
            remedy = KEYS_DIFFER
        return _failed("reached", error, remedy)
    if isinstance(error, AttestationError):
        return _failed("attestation", error, "`vmishim attest` shows the whole report")
    if isinstance(error, WrongKeyError):
        return _failed("reached", error, KEYS_DIFFER)
    if isinstance(error, UnresolvedError):
        return _failed("reached", error, error.advice)
    return _failed("reached", error, "in the guest: systemctl status vmishim-agent; then check the network")


def inside(target: Target, entry: domains.Domain | None = None) -> Iterator[Finding]:
    """A guest that answers: its hardware, agent and kernel. :raises LinkError: it stopped answering"""
    agent, profile = target.agent, target.profile
    if agent is not None:
        yield _attestation(agent.link, entry)
        yield _versions(agent.version)
    named = f" on {profile.hostname}" if profile.hostname else ""
    yield Finding("kernel", "ok", f"Linux {profile.release}{named}, {profile.vcpus} CPUs")
    if agent is not None:
        yield _encryption(agent.sealed)
        yield _self_check(getattr(profile, "self_check", ""))
    missing = []
    for name in _SYMBOLS:
        try:
            profile.symbol(name)
        except KeyError:
            missing.append(name)
    if "init_task" in missing:
        yield Finding("symbols", "bad", f"no {', '.join(missing)}", "boot a kernel with CONFIG_KALLSYMS_ALL=y")
    elif missing:
        remedy = "what needs them will say so; CONFIG_KALLSYMS_ALL=y provides all"
        yield Finding("symbols", "note", f"init_task found; no {', '.join(missing)}", remedy)
    else:
        yield Finding("symbols", "ok", f"all {len(_SYMBOLS)} found")
    try:
        size = profile.size("task_struct")
        yield Finding("structures", "ok", f"from BTF; task_struct has {size:,} bytes")
    except KeyError:
        yield Finding("structures", "bad", "no BTF in the guest", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y")
    if profile.page_offset:
        yield Finding("direct map", "ok", f"{profile.page_offset:#x}, {profile.memory_size >> 20:,} MiB")
    else:
        remedy = "physical and user memory can't be read; CONFIG_KALLSYMS_ALL=y provides its address"
        yield Finding("direct map", "note", "unknown", remedy)
    yield _one_read(target)


def _versions(theirs: str) -> Finding:
    if theirs == __version__:
        return Finding("version", "ok", f"{theirs} on both sides")
    text = f"ours is {__version__}, the agent's {theirs}"
    return Finding("version", "note", text, "`vmishim bundle` writes an agent of our version")


def _encryption(by_kernel: bool) -> Finding:
    if by_kernel:
        return Finding("encryption", "ok", "by the guest's kernel; the agent cannot read what it carries")
    remedy = "since Linux 6.10 the kernel can encrypt: agent.pyz serve --kernel-key, see docs/security.md"
    return Finding("encryption", "ok", "by the agent, which sees what it sends", remedy)


def _self_check(found: str) -> Finding:
    if found == "ok":
        return Finding("self-check", "ok", "the agent's programs and maps are what it loaded")
    if not found:
        return Finding("self-check", "note", "this agent makes none", "install an agent of this version")
    remedy = "another process in the guest has root's rights, and answers may be forged: investigate the guest"
    return Finding("self-check", "bad", found, remedy)


def _attestation(link: Link, entry: domains.Domain | None) -> Finding:
    from vmishim.attestation import ask, verify
    from vmishim.attestation.errors import NoReportError
    from vmishim.wire.keys import PublicKey

    required = entry.attestation if entry else None
    kernel_key = PublicKey.from_text(entry.kernel_key) if entry and entry.kernel_key else None
    try:
        chain, roots = (required.chain, required.roots) if required else ((), frozenset[str]())
        attested = verify(ask(link.exchange), link.remote, chain, roots, kernel_key=kernel_key)
    except NoReportError as error:
        return Finding("attestation", "note", _line(error), "its key identifies it, but nothing proves what it runs on")
    except LinkError as error:
        return Finding("attestation", "note", f"unknown: {_line(error)}", "`vmishim attest --help`, docs/deploy.md")
    facts = "; ".join(f"{about}: {value}" for about, value in attested.facts.items())
    if required is None:
        return Finding("attestation", "note", f"genuine, but not required. {facts}", "see docs/deploy.md to require it")
    required.check(attested.report)
    if required.warning:
        return Finding("attestation", "note", facts, required.warning)
    return Finding("attestation", "ok", facts)


def _pause(target: Target) -> Finding:
    """Whether ``pause_vm`` can stop the monitored system, as the entry says."""
    begun = time.perf_counter()
    try:
        target.hold()
    except LinkError as error:
        return _failed("pause", error, "see docs/deploy.md to allow it; or remove freeze from the entry")
    target.release()
    taken = (time.perf_counter() - begun) * 1000
    return Finding("pause", "ok", f"the monitored system was stopped and resumed within {taken:.0f} ms")


def _one_read(target: Target) -> Finding:
    """Read something whose content is known: the name of the first task."""
    profile = target.profile
    report = "please report this, with the lines above"
    try:
        address = profile.symbol("init_task") + profile.member("task_struct", "comm").offset
        begun = time.perf_counter()
        comm = target.reader.read(address, 16).split(b"\0")[0].decode(errors="replace")
    except (KeyError, FaultError) as error:
        what = f"no readable memory at {error.address:#x}" if isinstance(error, FaultError) else str(error)
        return Finding("one read", "bad", f"the first task can't be read: {what}", report)
    if not comm.startswith("swapper"):
        return Finding("one read", "bad", f"the first task is {comm!r}, not swapper", report)
    return Finding("one read", "ok", f"the first task is {comm}, {(time.perf_counter() - begun) * 1e6:,.0f} us")


def _failed(about: str, error: Exception, remedy: str) -> Finding:
    """A check that failed with an error. If the error's text says which command to run, that is the one remedy."""
    text, _, command = _line(error).partition("; run: ")
    return Finding(about, "bad", text, command or remedy)


def _line(error: Exception) -> str:
    """The error's text without LibVMI's name for it and, if it has one, without its own advice."""
    text = re.sub(r"^[A-Z_]{2,}: ", "", str(getattr(error, "fact", error)))
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
