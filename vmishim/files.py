"""Files that say whom to trust: read only if no other user could have written them. And files written without following
links that another user left in their place."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Collection
from io import FileIO

LARGEST = 64 << 20
"""Bytes of the largest file that is read."""
_LINKS_MAX = 40
"""Links on one path, as in the kernel (MAXSYMLINKS)."""

Path = str | os.PathLike[str]


class UntrustedError(PermissionError):
    """Another user than root and the reader could have written the file. ``strerror`` says how, and what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EACCES, why, os.fspath(path))


def owners() -> frozenset[int]:
    """The users whose files this process trusts: root and its own."""
    return frozenset((0, os.geteuid()))


def open_trusted(path: Path, trusted: Collection[int] | None = None) -> FileIO:
    """Open a file for reading that nobody but trusted users can replace: each folder and link on its path, and the file
    itself, belongs to one of them, and nobody else can write to a folder. In a sticky one (``/tmp``) that is enough.

    The file's own mode is not checked: see `check_mode`.

    :param trusted: user ids (default: root and this process's)
    :raises UntrustedError: another user can replace it
    :raises OSError: it cannot be opened, or is not a regular file
    """
    trusted = owners() if trusted is None else trusted
    _check_path(path, trusted)
    # Non-blocking: a named pipe must be an error, not a wait.
    file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        check_owner(path, status, trusted)
    except OSError:
        file.close()
        raise
    return file


def read_trusted(path: Path) -> bytes:
    """The contents of a file that only root and this process's user can write or replace.

    :raises UntrustedError: another user can
    :raises OSError: it cannot be read, or is larger than `LARGEST`
    """
    with open_trusted(path) as file:
        check_mode(path, os.fstat(file.fileno()))
        data = bytearray()
        while part := file.read(LARGEST + 1 - len(data)):
            data += part
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB", os.fspath(path))
    return bytes(data)


def read(path: Path, most: int = LARGEST) -> bytes:
    """The contents of a file whose owner does not matter, because what it says is checked.

    :param most: bytes of the longest file that is read: any path may lead to a device without end, or to a huge file
    :raises OSError: it cannot be read, or is longer
    """
    data = bytearray()
    with open(path, "rb") as file:
        while part := file.read(min(most + 1 - len(data), 1 << 24)):
            data += part
    if len(data) > most:
        raise OSError(errno.EFBIG, f"longer than the limit of {most} bytes", os.fspath(path))
    return bytes(data)


def check_owner(path: Path, status: os.stat_result, trusted: Collection[int]) -> None:
    """:raises UntrustedError: the file belongs to another user"""
    if status.st_uid not in trusted:
        name = os.fspath(path)
        raise UntrustedError(path, f"{name} belongs to {_user(status.st_uid)}: it must be yours or root's; run: chown")


def check_mode(path: Path, status: os.stat_result) -> None:
    """:raises UntrustedError: its group or others may write to the file"""
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedError(path, f"other users can change it; run: chmod go-w {os.fspath(path)}")


def write(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file, all of it or nothing. A regular file of this name is replaced; a link is never followed.

    :param mode: the file's mode (default: as the umask allows)
    :raises OSError: it cannot be written, or the name is that of a link, a folder or a device
    """
    name = os.fspath(path)
    refuse_other_than_file(path)
    fresh = f"{name}.{os.urandom(6).hex()}.part"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            try:
                file.write(data)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                os.replace(fresh, name)
            except BaseException:
                os.unlink(fresh)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def refuse_other_than_file(path: Path) -> None:
    """:raises OSError: something has this name that is not a regular file, such as a link"""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise OSError(
            errno.EEXIST, f"is {what} and is not replaced: delete it, or choose another name", os.fspath(path)
        )


def _check_path(path: Path, trusted: Collection[int]) -> None:
    """Check each step to the file, links resolved as the kernel does."""
    name = os.fspath(path)
    waiting = list(reversed(os.path.join(os.getcwd(), name).split("/")))
    at, links = "/", 0
    _check_folder(path, at, os.lstat(at), trusted)
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = os.path.dirname(at)
            continue
        step = os.path.join(at, part)
        status = os.lstat(step)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
            check_owner(step, status, trusted)
            target = os.readlink(step)
            waiting += reversed(target.split("/"))
            at = "/" if target.startswith("/") else at
            continue
        _check_folder(path, step, status, trusted)
        at = step


def _check_folder(path: Path, place: str, status: os.stat_result, trusted: Collection[int]) -> None:
    check_owner(place, status, trusted)
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return
    shared = status.st_mode & stat.S_IWGRP and _has_others(place, status.st_gid, trusted)
    if status.st_mode & stat.S_IWOTH or shared:
        raise UntrustedError(path, f"other users can replace it, by the folder {place}; run: chmod go-w {place}")


def _has_others(place: str, group: int, trusted: Collection[int]) -> bool:
    """Whether a folder's group, or the list of its ACL that has the group's place in the mode, names anybody else.

    Debian and Ubuntu give each user a group of their own, and a umask that lets it write.
    """
    try:
        if "system.posix_acl_access" in os.listxattr(place):
            return True
        members = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(group).gr_mem}
    except (OSError, KeyError):
        return True
    members |= {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == group}
    return not members <= set(trusted)


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"
