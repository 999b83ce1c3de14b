"""Static X25519 keys: values, their one-line text form, their files, and an agent's list of permitted keys.

A key is one line, so that you can paste, mail and compare it::

    vmishim-private-v1 BASE64
    vmishim-public-v1 BASE64 name of the machine

Any problem with a key or its file is a ``LinkError`` whose text says what to do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vmishim import files
from vmishim.errors import LinkError

KEY_SIZE = 32
"""Bytes of an X25519 key, private or public (RFC 7748, section 5)."""
_PRIVATE = "vmishim-private-v1"
_PUBLIC = "vmishim-public-v1"
_LARGEST_FILE = 1 << 20
_CLOCK_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class PublicKey:
    """An X25519 public key. Keys with equal bytes are equal; ``name`` is only for people.

    :raises LinkError: ``raw`` is not 32 bytes, or ``name`` is not one line of printable text
    """

    raw: bytes
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_SIZE:
            raise LinkError(f"a public key must have {KEY_SIZE} bytes, not {len(self.raw)}")
        if not self.name.isprintable() or self.name != self.name.strip():
            raise LinkError(f"a key's name must be one line of printable text, not {self.name!r}")

    @property
    def fingerprint(self) -> str:
        """``SHA256:`` and 96 bits in base64: enough to tell keys apart by eye; the code compares whole keys."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.raw).digest()).decode()[:16]

    @property
    def text(self) -> str:
        """The key's line in a public key file and in a list of permitted keys, without the newline."""
        return f"{_PUBLIC} {base64.b64encode(self.raw).decode()} {self.name}".rstrip()

    @classmethod
    def from_text(cls, line: str) -> PublicKey:
        """Parse the line that ``text`` returns. :raises LinkError: it is not a public key line."""
        kind, _, rest = line.strip().partition(" ")
        if kind == _PRIVATE:
            raise LinkError("this is a private key; give the public key (a private key must not leave its machine)")
        if kind != _PUBLIC:
            raise LinkError(f"not a public key: the line must start with {_PUBLIC}")
        encoded, _, name = rest.strip().partition(" ")
        return cls(_decode(encoded), name.strip())

    def __repr__(self) -> str:
        return f"PublicKey({self.fingerprint}{', ' + self.name if self.name else ''})"


@dataclass(frozen=True)
class PrivateKey:
    """An X25519 private key. It is never shown: ``repr`` and error texts give the public key's fingerprint.

    :raises LinkError: ``raw`` is not 32 bytes
    """

    raw: bytes
    public: PublicKey = field(init=False, compare=False)
    _key: X25519PrivateKey = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_SIZE:
            raise LinkError(f"a private key must have {KEY_SIZE} bytes, not {len(self.raw)}")
        key = X25519PrivateKey.from_private_bytes(self.raw)
        # A frozen dataclass allows no plain assignment; parsing the key here saves doing it at every handshake.
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "public", PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)))

    def exchange(self, public: PublicKey) -> bytes:
        """The shared secret with ``public``: Noise's ``DH(key_pair, public_key)`` (section 4.1), 32 bytes.

        :raises LinkError: the output is all zero, that is ``public`` is a point of low order (RFC 7748, section 6.1).
            Noise leaves the choice open; we refuse, since such a "secret" is public.
        """
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(public.raw))
        except ValueError:  # OpenSSL's report of an all-zero output
            shared = bytes(KEY_SIZE)
        if not any(shared):
            raise LinkError("the peer's public key is a point of low order: it gives no secret, so do not use it")
        return shared

    def __repr__(self) -> str:
        return f"PrivateKey({self.public.fingerprint})"


def generate() -> PrivateKey:
    """A new private key from the operating system's random source."""
    return PrivateKey(os.urandom(KEY_SIZE))


def load_private(path: str | os.PathLike[str]) -> PrivateKey:
    """Read a private key file.

    :raises LinkError: it cannot be read, is not a private key, its group or others have access to it, or another user
        could have put it there
    """
    text, status = _read(path)
    if status.st_mode & 0o077:
        raise LinkError(f"{os.fspath(path)}: other users can access this private key; run: chmod 600 {os.fspath(path)}")
    line = _only_line(text, path)
    kind, _, encoded = line.partition(" ")
    if kind != _PRIVATE:
        raise LinkError(f"{os.fspath(path)} is not a private key: it must start with {_PRIVATE}")
    try:
        return PrivateKey(_decode(encoded.strip()))
    except LinkError as error:
        raise LinkError(f"{os.fspath(path)}: {error}") from None


def load_public(path: str | os.PathLike[str]) -> PublicKey:
    """Read a public key file. :raises LinkError: it cannot be read, or is not a public key."""
    text, status = _read(path)
    try:
        files.check_mode(path, status)
        return PublicKey.from_text(_only_line(text, path))
    except files.UntrustedError as error:
        raise LinkError(f"{os.fspath(path)}: {error.strerror}") from None
    except LinkError as error:
        raise LinkError(f"{os.fspath(path)}: {error}") from None


def save_private(path: str | os.PathLike[str], key: PrivateKey, *, overwrite: bool = False) -> None:
    """Write a private key file of mode 0600. Never writes through a symbolic link.

    :raises LinkError: ``path`` exists and ``overwrite`` is false, or it cannot be written
    """
    _write(path, f"{_PRIVATE} {base64.b64encode(key.raw).decode()}\n", 0o600, overwrite)


def save_public(path: str | os.PathLike[str], key: PublicKey, *, overwrite: bool = False) -> None:
    """Write a public key file of mode 0644; otherwise as ``save_private``."""
    _write(path, key.text + "\n", 0o644, overwrite)


class PermittedKeys:
    """The public keys that may open a session: a file of public key lines; ``#`` starts a comment line.

    The file is read again when it changes, so removing a line ends that key's sessions at their next request. It fails
    closed: an invalid line permits no key, and a file that becomes unreadable, or that another user can write or
    replace, permits no key at all. ``problems`` lists what was wrong at the last reading. The file may belong to root
    or to the user that this process had at construction.

    A process that may no longer open files (``guest_agent.sandbox``) still sees changes to the file through the
    descriptor that was opened at construction. It cannot open a file that replaced it: then ``replaced`` is true and no
    key is permitted.

    :raises LinkError: at construction, if the file cannot be used at all
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._name = os.fspath(path)
        self.problems: tuple[str, ...] = ()
        self.replaced = False
        # An agent opens the list as root and reads it again as another user.
        self._trusted = files.owners()
        self._file = _open(path, self._trusted)
        self._keys: dict[bytes, PublicKey] = {}
        self._stamp: tuple[int, ...] | None = None
        self._reread()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, PublicKey) and self.find(key) is not None

    def __iter__(self) -> Iterator[PublicKey]:
        """The keys, as of the last reading."""
        return iter(self._keys.values())

    def find(self, key: PublicKey) -> PublicKey | None:
        """The permitted key equal to ``key``, with its name in the file, or None."""
        self._refresh()
        return self._keys.get(key.raw)

    def refresh(self) -> None:
        """Read the file again if it has changed. :raises LinkError: it cannot be used, so no key is permitted."""
        if not self._refresh():
            raise LinkError(self.problems[0])

    def _refresh(self) -> bool:
        """Read the file again if it has changed. False: it cannot be used."""
        try:
            status = os.stat(self._name)
            if self._stamp is None or self._stamp != _stamp(status):
                self._hold(status)
                self._reread()
        except (OSError, LinkError) as error:
            self._keys, self._stamp, self.problems = {}, None, (f"{self.path}: no key is permitted: {error}",)
            return False
        return True

    def _hold(self, status: os.stat_result) -> None:
        """Open the file that now has the name, unless it is already open."""
        self.replaced = not os.path.samestat(status, os.fstat(self._file.fileno()))
        if self.replaced:
            fresh = _open(self.path, self._trusted)
            self._file.close()
            self._file, self.replaced = fresh, False

    def _reread(self) -> None:
        text, status = _text(self._file, self.path)
        try:
            files.check_owner(self.path, status, self._trusted)
        except files.UntrustedError as error:
            raise LinkError(str(error.strerror)) from None
        if status.st_mode & 0o022:
            raise LinkError(f"{self.path}: other users can change who may connect; run: chmod go-w {self.path}")
        keys, problems = {}, []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                key = PublicKey.from_text(line)
                keys[key.raw] = key
            except LinkError as error:
                problems.append(f"{self.path}:{number}: {error}")
        self._keys, self.problems = keys, tuple(problems)
        # A second change within one tick of the file system's clock would not change the stamp, so a file that was just
        # written is read again until it is older than any tick.
        unchanging = time.time_ns() - status.st_mtime_ns > _CLOCK_TICK_NS
        self._stamp = _stamp(status) if unchanging else None

    def __repr__(self) -> str:
        return f"PermittedKeys({str(self.path)!r}, {len(self._keys)} keys)"


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev, status.st_mode


def _decode(encoded: str) -> bytes:
    try:
        raw = base64.b64decode(encoded.encode(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    # The last check allows one spelling per key: base64 has spare bits in its last character.
    if len(raw) != KEY_SIZE or base64.b64encode(raw).decode() != encoded:
        raise LinkError(
            f"a key is {KEY_SIZE} bytes in base64, 44 characters, and this is not: was it cut short when copied?"
        )
    return raw


def _only_line(text: str, path: str | os.PathLike[str]) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) != 1:
        raise LinkError(f"{os.fspath(path)} holds {len(lines)} keys; a key file must hold exactly one")
    return lines[0]


def _read(path: str | os.PathLike[str]) -> tuple[str, os.stat_result]:
    """A file's text and its ``stat``."""
    with _open(path) as file:
        return _text(file, path)


def _open(path: str | os.PathLike[str], trusted: Collection[int] | None = None) -> FileIO:
    """Open a regular file. :raises LinkError: it is not one, cannot be opened, or another user could have put it
    there"""
    try:
        return files.open_trusted(path, trusted)
    except OSError as error:
        raise LinkError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def _text(file: FileIO, path: str | os.PathLike[str]) -> tuple[str, os.stat_result]:
    """An open file's text and its ``stat``, both through the descriptor, so that the file cannot be swapped in between.

    :raises LinkError: it cannot be read, or is not text"""
    try:
        status = os.fstat(file.fileno())
        return os.pread(file.fileno(), _LARGEST_FILE, 0).decode(), status
    except OSError as error:
        raise LinkError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise LinkError(f"{os.fspath(path)} is not a text file") from None


def _write(path: str | os.PathLike[str], text: str, mode: int, overwrite: bool) -> None:
    """Create the file completely or not at all. An existing name, even a dangling link, is never opened."""
    name = os.fspath(path)
    fresh = f"{name}.{os.urandom(6).hex()}" if overwrite else name
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            try:
                os.fchmod(file.fileno(), mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                if overwrite:
                    os.replace(fresh, name)
            except BaseException:
                os.unlink(fresh)
                raise
    except FileExistsError:
        raise LinkError(f"{name} already exists and is not overwritten: delete it, or choose another name") from None
    except OSError as error:
        raise LinkError(f"cannot write {name}: {error.strerror}") from error
