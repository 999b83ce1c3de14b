"""The files of a dump: the dump itself, and its journal while it is unfinished.

The dump has its name from the start, and says that it is unfinished until its headers are written. No file is followed
through a link or replaced, and only you can read what is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vmishim import files
from vmishim.acquire import journal
from vmishim.acquire.journal import Plan, Record
from vmishim.acquire.manifest import SIGNATURE_SUFFIX, SUFFIX
from vmishim.acquire.pieces import CHUNK, Piece
from vmishim.guests.formats import UNFINISHED
from vmishim.guests.layout import Range
from vmishim.memory.reader import PAGE_SIZE

JOURNAL_SUFFIX = ".journal"
JOURNAL_MAX = 1 << 30
"""Bytes of the longest journal that is read, of a dump of 8 TiB."""
_ZEROS = bytes(CHUNK)
_ZERO_PAGE = bytes(PAGE_SIZE)


class UnfinishedError(OSError):
    """There is an unfinished dump of this name already. :raises: by `Output.create`"""


def beside(path: Path, suffix: str) -> Path:
    """The name of a file that belongs to a dump."""
    return path.with_name(path.name + suffix)


class Output:
    """A dump that is being written, and its journal.

    :ivar plan: what is to be read
    :ivar record: what was read
    """

    def __init__(self, path: Path, plan: Plan, record: Record, file: int, log: int) -> None:
        self.path, self.plan, self.record = path, plan, record
        self._file, self._log = file, log

    @classmethod
    def create(cls, path: Path, plan: Plan) -> Output:
        """Begin a dump.

        :raises FileExistsError: one of its files exists; `unused` says so before
        :raises OSError: it cannot be written
        """
        file = _open(path, os.O_CREAT | os.O_EXCL)
        try:
            os.pwrite(file, UNFINISHED, 0)
            log = _open(beside(path, JOURNAL_SUFFIX), os.O_CREAT | os.O_EXCL | os.O_APPEND)
        except BaseException:
            os.close(file)
            os.unlink(path)
            raise
        made = cls(path, plan, Record(), file, log)
        try:
            made._append(journal.line_of_plan(plan))
        except BaseException:
            made.close()
            for each in (path, beside(path, JOURNAL_SUFFIX)):
                os.unlink(each)
            raise
        return made

    @classmethod
    def resume(cls, path: Path, check: Callable[[Plan], None], progress: Callable[[int], None]) -> Output:
        """Go on with a dump. What the file has of it is compared with the journal; from the first piece on that does
        not fit, all is read again.

        :param check: raises if this plan must not be followed
        :param progress: told of bytes that were compared
        :raises ValueError: the journal is malformed
        :raises OSError: there is no unfinished dump, its files cannot be read, or another user could have changed them
        """
        name = beside(path, JOURNAL_SUFFIX)
        plan, record = journal.parse(_journal(name))
        check(plan)
        file = _open(path, 0)
        try:
            files.check_owner(path, os.fstat(file), files.owners())
            files.check_mode(path, os.fstat(file))
            record = record.without(_fitting(file, record.pieces, progress))
            # What comes after was not recorded. Cut off, so that where zeros are not written, there are zeros.
            end = record.pieces[-1].offset + record.pieces[-1].size if record.pieces else len(UNFINISHED)
            os.ftruncate(file, end)
            os.pwrite(file, UNFINISHED, 0)
            files.write(name, journal.lines(plan, record).encode(), 0o600)
            log = _open(name, os.O_APPEND)
        except BaseException:
            os.close(file)
            raise
        return cls(path, plan, record, file, log)

    def begin(self, session: dict[str, object]) -> None:
        """Record that reading begins, or goes on."""
        self._append(journal.line(session))
        self.record.sessions.append(dict(session))

    def end(self, ended: str) -> None:
        """Record that reading ended."""
        self._append(journal.line({"ended": ended}))
        self.record.sessions[-1]["ended"] = ended

    def add(self, address: int, data: bytes, offset: int) -> None:
        """Write memory and record it. Pages of zeros become holes of the file.

        :raises OSError: the disk is full, or cannot be written
        """
        sha256 = hashlib.sha256(data).hexdigest()
        for start, end in stored(data):
            part = memoryview(data)[start:end]
            at = offset + start
            while part:
                written = os.pwrite(self._file, part, at)
                part, at = part[written:], at + written
        piece = Piece(address, len(data), offset, sha256)
        self._append(journal.line(piece))
        self.record.pieces.append(piece)

    def add_unreadable(self, hole: Range) -> None:
        """Record that memory cannot be read."""
        self._append(journal.line(hole))
        self.record.unreadable.append(hole)

    def finish(self, headers: Iterator[tuple[int, bytes]], progress: Callable[[int], None]) -> tuple[int, str]:
        """Write the headers: the dump is finished, but for its manifest.

        :param progress: told of bytes that were hashed
        :returns: (bytes of the file, its SHA-256)
        """
        # The first bytes come last: before, the file says that it is unfinished.
        written = sorted(headers, reverse=True)
        pieces = self.record.pieces
        size = max([pieces[-1].offset + pieces[-1].size] + [at + len(data) for at, data in written])
        os.ftruncate(self._file, size)
        for at, data in written:
            os.pwrite(self._file, data, at)
        whole = hashlib.sha256()
        at = 0
        while part := os.pread(self._file, CHUNK, at):
            whole.update(part)
            at += len(part)
            progress(len(part))
        os.fsync(self._file)
        return size, whole.hexdigest()

    def unfinish(self) -> None:
        """Say again that the dump is unfinished."""
        os.pwrite(self._file, UNFINISHED, 0)

    def forget_journal(self) -> None:
        """Remove the journal of a finished dump."""
        os.unlink(beside(self.path, JOURNAL_SUFFIX))

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._file)
        os.close(self._log)

    def _append(self, line: str) -> None:
        raw = line.encode()
        while raw:
            raw = raw[os.write(self._log, raw) :]


def unused(path: Path) -> None:
    """Check that a new dump can have this name.

    :raises UnfinishedError: an unfinished dump has it
    :raises OSError: one of its files exists
    """
    if os.path.lexists(beside(path, JOURNAL_SUFFIX)):
        raise UnfinishedError(errno.EEXIST, "an unfinished dump has this name", os.fspath(path))
    for each in (path, beside(path, SUFFIX), beside(path, SIGNATURE_SUFFIX)):
        files.refuse_other_than_file(each)
        if os.path.lexists(each):
            raise FileExistsError(
                errno.EEXIST, "exists already and is not replaced: delete it, or choose another name", os.fspath(each)
            )


def stored(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of ``data`` that are not whole pages of zeros."""
    if data == _ZEROS[: len(data)]:
        return
    begun = -1
    memory = memoryview(data)
    for at in range(0, len(data), PAGE_SIZE):
        part = memory[at : at + PAGE_SIZE]
        if part == _ZERO_PAGE[: len(part)]:
            if begun >= 0:
                yield begun, at
                begun = -1
        elif begun < 0:
            begun = at
    if begun >= 0:
        yield begun, len(data)


def _fitting(file: int, pieces: list[Piece], progress: Callable[[int], None]) -> int:
    """How many pieces from the first on the file has as they were recorded."""
    for number, piece in enumerate(pieces):
        if hashlib.sha256(os.pread(file, piece.size, piece.offset)).hexdigest() != piece.sha256:
            return number
        progress(piece.size)
    return len(pieces)


def _journal(path: Path) -> str:
    """:raises OSError: there is none, or another user could have written it"""
    with files.open_trusted(path) as file:
        files.check_mode(path, os.fstat(file.fileno()))
        size = os.fstat(file.fileno()).st_size
        if size > JOURNAL_MAX:
            raise OSError(errno.EFBIG, f"longer than the limit of {JOURNAL_MAX} bytes", os.fspath(path))
        data = bytearray()
        while part := file.read(size + 1 - len(data)):
            data += part
    return data.decode(errors="replace")


def _open(path: Path, flags: int) -> int:
    """Open for reading and writing a file that is not a link; a new one is readable by you only."""
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
