"""``vmishim dump``: acquire a guest's memory into a file, go on with that, and check the file."""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vmishim import files
from vmishim.acquire import acquisition, manifest, signing
from vmishim.acquire.acquisition import Pace, acquire
from vmishim.acquire.journal import Plan
from vmishim.acquire.output import Output, UnfinishedError, beside, unused
from vmishim.acquire.pieces import CHUNK, Piece, runs, total
from vmishim.acquire.shapes import SHAPES, Described
from vmishim.acquire.signing import SignatureError, Signer
from vmishim.attestation import ask
from vmishim.commands import CommandError
from vmishim.commands.enrolment import default_key
from vmishim.errors import LibvmiError
from vmishim.foreign import printable
from vmishim.guests import domains
from vmishim.guests.agent import connect
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.guests.target import Target, direct
from vmishim.memory.reader import ScatterReader
from vmishim.wire.keys import PrivateKey, load_private

FREEZE_S = 5.0
"""Seconds after which a container goes on that ``--freeze`` stopped, if the link is lost and the entry says nothing."""
SHOWN_MAX = 20
"""Differences that ``--verify`` prints."""


class _StoppedError(CommandError):
    """Acquisition stopped; what there is, is kept."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _TerminatedError(BaseException):
    """SIGTERM came."""


def dump(options: argparse.Namespace) -> int:
    """Acquire a guest's memory, or do what an option says instead.

    :raises CommandError: it cannot be done, or stopped; the text says what is there, and how to go on
    """
    if options.signer_line:
        print(signing.signer(_key(options)).text)
        return 0
    if options.verify:
        return _verify(options.verify, options)
    if options.finish:
        return _finish_what_there_is(options)
    if not options.output:
        raise CommandError("name the file to write: -o FILE")
    if options.output.is_dir():
        raise CommandError(f"{options.output} is a folder; name the file to write")
    _check_unused(options)
    with _guest(options) as (domain, target, readers), _terminable():
        private = _key(options, domain)
        with _output(options, domain, target) as output:
            plan = output.plan
            if not options.quiet:
                size, release = _mib(total(plan.ranges)), plan.guest["release"]
                _say(f"reading {size} of {plan.name}, Linux {release}, into {output.path}")
            begun = time.monotonic()
            already = sum(piece.size for piece in output.record.pieces)
            try:
                with _progress(options, "reading", total(plan.ranges), _read_before(output)) as progress:
                    acquire(readers, output, bool(options.freeze), Pace(options.rate * (1 << 20)), progress)
            except (KeyboardInterrupt, _TerminatedError, LibvmiError, OSError) as error:
                _stop(output, error, options)
            taken = time.monotonic() - begun
            read = sum(piece.size for piece in output.record.pieces) - already
            _finish(output, private, options)
    if not options.quiet:
        _tell(output, read, taken)
    return 0


def _check_unused(options: argparse.Namespace) -> None:
    if options.resume:
        return
    try:
        unused(options.output)
    except UnfinishedError:
        raise CommandError(
            f"{options.output} is an unfinished dump: --resume goes on with it, and `vmishim dump --finish "
            f"{options.output}` makes a dump of what there is; or delete it and {options.output}.journal"
        ) from None


@contextmanager
def _guest(options: argparse.Namespace) -> Iterator[tuple[Domain | None, Target, list[ScatterReader]]]:
    """The guest that is named, and a reader for each connection to it."""
    with ExitStack() as stack:
        if options.local:
            from vmishim.guests import local

            domain = stack.enter_context(local.agent())
        else:
            domain = domains.find(options.domain)
        if not domain.agent:
            if options.freeze:
                raise CommandError(f"{domain.name} is read from a file, which nothing can freeze: leave out --freeze")
            memory = stack.enter_context(closing(reach(domain, "scalar")))
            yield domain, memory, [direct(memory)]
            return
        # Where the guest or the network is slow, a reply waits for those of the other connections.
        domain = replace(domain, timeout=domain.timeout * options.connections)
        freeze = (domain.freeze or FREEZE_S) if options.freeze else 0.0
        guest = stack.enter_context(closing(connect(replace(domain, freeze=freeze), "scalar")))
        readers: list[ScatterReader] = [guest.remote]
        for _ in range(options.connections - 1):
            other = stack.enter_context(closing(connect(replace(domain, freeze=0.0), "scalar")))
            if other.profile.boot_id != guest.profile.boot_id:
                raise CommandError(f"{domain.name} was booted again right now: try again")
            readers.append(other.remote)
        if options.freeze:
            guest.hold()
        yield (None if options.local else domain), guest, readers


@contextmanager
def _output(options: argparse.Namespace, domain: Domain | None, target: Target) -> Iterator[Output]:
    """The files to write: new ones, or those of the unfinished dump to go on with."""
    if options.resume:
        output = _resume(options, target)
    else:
        plan = acquisition.plan(target, target.name, options.format or "elf", options.kernel_only)
        output = Output.create(options.output, replace(plan, attestation=_attestation(target)))
    with closing(output):
        yield output


def _resume(options: argparse.Namespace, target: Target) -> Output:
    path = options.output

    def check(plan: Plan) -> None:
        now = replace(plan, guest=acquisition.facts(target)).identity
        if now != plan.identity:
            raise CommandError(
                f"{path} was begun on another boot of {plan.name}, or on another guest, so its parts would not fit: "
                f"`vmishim dump --finish {path}` makes a dump of what there is; or write another file"
            )
        if options.format not in (None, plan.format) or (options.kernel_only and not plan.kernel_only):
            kind = f"--format {plan.format}{' --kernel-only' if plan.kernel_only else ''}"
            raise CommandError(f"{path} was begun as {kind}, and goes on so: leave these options out")

    return _opened(path, check, options)


def _opened(path: Path, check: Callable[[Plan], None], options: argparse.Namespace) -> Output:
    """An unfinished dump."""
    try:
        with _progress(options, "comparing") as progress:
            return Output.resume(path, check, progress)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        if missing == path or not path.exists():
            raise CommandError(f"there is no unfinished dump {path}: {missing} does not exist") from None
        raise CommandError(f"{path} is no unfinished dump: it has no journal, {missing}") from None
    except ValueError as error:
        raise CommandError(f"{path}.journal cannot be used: {error}") from None


def _attestation(target: Target) -> dict[str, str]:
    """The report of the guest's hardware, or why there is none."""
    if target.agent is None:
        return {"none": "the memory was read from a file"}
    try:
        return {"report": base64.b64encode(ask(target.agent.link.exchange)).decode()}
    except LibvmiError as error:
        return {"none": str(error)}


def _stop(output: Output, error: BaseException, options: argparse.Namespace) -> NoReturn:
    """Say what there is, and how to go on."""
    done = sum(piece.size for piece in output.record.pieces)
    guest = "--local" if options.local else options.domain
    match error:
        case KeyboardInterrupt():
            why, status = "interrupted", 130
        case _TerminatedError():
            why, status = "ended by SIGTERM", 128 + signal.SIGTERM
        case OSError():
            why, status = f"{output.path}: {error.strerror}", 1
        case _:
            why, status = str(error), 1
    path = output.path
    raise _StoppedError(
        f"{why}. {_mib(done)} of {_mib(total(output.plan.ranges))} are in {path}, an unfinished dump: "
        f"`vmishim dump {guest} -o {path} --resume` goes on with it",
        status,
    ) from None


def _finish_what_there_is(options: argparse.Namespace) -> int:
    """Make a dump of an unfinished one, whose guest may be gone."""
    path = options.finish
    with closing(_opened(path, lambda plan: None, options)) as output, _terminable():
        if not output.record.pieces:
            raise CommandError(f"nothing was read into {path} yet: delete it and {path}.journal")
        _finish(output, _key(options), options)
        if not options.quiet:
            _tell(output)
    return 0


def _finish(output: Output, private: PrivateKey, options: argparse.Namespace) -> None:
    """Write headers, manifest and signature."""
    plan, record, path = output.plan, output.record, output.path
    if not record.pieces:
        raise CommandError(f"none of the guest's memory can be read; delete {path} and {path}.journal")
    described = Described(plan.guest["page_offset"], plan.image, plan.vmcoreinfo.encode(), manifest.note(plan, record))
    joined = runs(record.pieces)
    try:
        with _progress(options, "hashing", joined[-1].offset + joined[-1].end - joined[-1].address) as progress:
            size, sha256 = output.finish(SHAPES[plan.format].headers(joined, described), progress)
        signer = signing.signer(private)
        text = manifest.manifest(plan, record, path.name, size, sha256, signer.text, private.public.text)
        files.write(beside(path, manifest.SUFFIX), text, 0o600)
        files.write(beside(path, manifest.SIGNATURE_SUFFIX), f"{signing.sign(private, text)}\n".encode(), 0o600)
    except ValueError as error:
        raise CommandError(f"{path} cannot be finished: {error}") from None
    except (KeyboardInterrupt, _TerminatedError, OSError) as error:
        output.unfinish()
        _stop(output, error, options)
    output.forget_journal()


def _tell(output: Output, read: int = 0, taken: float = 0.0) -> None:
    """What was written."""
    plan, record, path = output.plan, output.record, output.path
    stored = sum(piece.size for piece in record.pieces)
    speed = f" ({_mib(read)} in {taken:.1f} s, {read / taken / (1 << 30) * 60:.2f} GiB/min)" if read and taken else ""
    print(f"wrote {path}: {_mib(stored)} of memory{speed}")
    if record.unreadable:
        count = total(record.unreadable)
        print(f"{count} bytes could not be read, and are missing in it; its manifest has their addresses")
    if lacking := manifest.missing(plan, record):
        print(f"{_mib(total(lacking))} were not read before the acquisition ended; its manifest has their addresses")
    print(f"{manifest.consistency(plan, record)}")
    print(f"wrote {beside(path, manifest.SUFFIX)} and its signature; check with: vmishim dump --verify {path}")


# ---- verify ----------------------------------------------------------------------------------------------------------


def _verify(path: Path, options: argparse.Namespace) -> int:
    """Check a dump against its manifest, and that against its signature. :returns: 0, or 1 if something does not fit"""
    name = beside(path, manifest.SUFFIX)
    text = files.read(name, manifest.SIZE_MAX)
    problems: list[str] = []
    by = _check_signature(name, text, options, problems)
    try:
        expected = manifest.parse(text)
    except ValueError as error:
        raise CommandError(f"{name} cannot be read: {error}") from None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            problems.append(f"it has {size} bytes, not {expected.size}")
        whole = hashlib.sha256()
        with _progress(options, "checking", expected.size) as progress:
            for piece, data in _parts(file.fileno(), expected.pieces, expected.size):
                whole.update(data)
                progress(len(data))
                if piece and hashlib.sha256(data).hexdigest() != piece.sha256:
                    problems.append(
                        f"the memory from {piece.address:#x} to {piece.end:#x}, at offset {piece.offset}, was changed"
                    )
    if whole.hexdigest() != expected.sha256 and len(problems) == (not by):
        problems.append("something else than memory was changed: its headers or notes")
    for problem in problems[:SHOWN_MAX]:
        print(f"{path}: {printable(problem)}")
    if len(problems) > SHOWN_MAX:
        print(f"{path}: and {len(problems) - SHOWN_MAX} more differences")
    if problems:
        return 1
    if not options.quiet:
        said = expected.said
        print(f"{path} is as it was written: {len(expected.pieces)} chunks, SHA-256 {expected.sha256}")
        print(printable(f"of {said['guest']['name']}, Linux {said['guest']['release']}; {said['consistency']}"))
        print(f"signed by {by.text if by else ''}")
    return 0


def _check_signature(name: Path, text: bytes, options: argparse.Namespace, problems: list[str]) -> Signer | None:
    """Who signed the manifest; None, and a problem, if it is not the one that should have."""
    line = files.read(name.with_name(name.name.removesuffix(manifest.SUFFIX) + manifest.SIGNATURE_SUFFIX), 4096)
    try:
        wanted = Signer.from_text(options.signer) if options.signer else signing.signer(_key(options))
    except SignatureError as error:
        raise CommandError(f"--signer: {error}") from None
    try:
        by = signing.signed_by(text, line.decode(errors="replace"))
    except SignatureError as error:
        problems.append(str(error))
        return None
    if by != wanted:
        whose = "the one that --signer names" if options.signer else "yours; name another with --signer"
        problems.append(f"its manifest is signed by {by.text}, which is not {whose}")
        return None
    return by


def _parts(file: int, pieces: list[Piece], size: int) -> Iterator[tuple[Piece | None, bytes]]:
    """All of a file in its order: pieces, and what is between them. It may be shorter than ``size``."""
    at = 0
    for piece in (*pieces, None):
        until = piece.offset if piece else size
        while at < until:
            data = os.pread(file, min(CHUNK, until - at), at)
            if not data:
                break
            yield None, data
            at += len(data)
        if piece:
            yield piece, os.pread(file, piece.size, piece.offset)
            at = piece.offset + piece.size


# ---- parts -----------------------------------------------------------------------------------------------------------


def _key(options: argparse.Namespace, domain: Domain | None = None) -> PrivateKey:
    """The key that signs, or whose signature is expected. :raises CommandError: there is none"""
    named = options.key or (Path(domain.key) if domain and domain.key else None) or default_key()
    path = named.expanduser()
    if not path.exists():
        raise CommandError(f"there is no private key {path}, with which manifests are signed; make one: vmishim keygen")
    return load_private(path)


def _read_before(output: Output) -> int:
    done = output.record.done
    return sum(min(each.end, done) - each.start for each in output.plan.ranges if each.start < done)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is an exception within the block."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(
    options: argparse.Namespace, what: str, all_: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, if standard error is a terminal."""
    if options.quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=all_, completed=done)
        yield lambda count: bar.advance(task, count)


def _say(text: str) -> None:
    print(f"vmishim: {text}", file=sys.stderr)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
