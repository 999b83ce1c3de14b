"""``vmishim keygen``, ``enroll``, ``forget`` and ``domains``: your key, and the guests you know."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path

from vmishim import files
from vmishim.commands import CommandError
from vmishim.errors import LibvmiError, LinkError
from vmishim.foreign import printable
from vmishim.guests import domains as known
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.link import UnresolvedError, WrongKeyError
from vmishim.output import dump, show
from vmishim.wire.keys import PublicKey, generate, load_private, load_public, save_private
from vmishim.wire.session import Reason, RefusedError

NAME_MAX = 100
"""Characters of a domain's name."""


def default_key() -> Path:
    """The default place of your private key: beside ``domains.toml``."""
    return known.path().with_name("key")


def keygen(options: argparse.Namespace) -> int:
    """Make a private key and print the public one.

    :raises LinkError: it can't be written, or the existing file is not a private key with mode 0600
    """
    path = (options.path or default_key()).expanduser()
    if path.exists():
        key = load_private(path)
        print(f"{path} already exists and is kept; its public key is", file=sys.stderr)
    else:
        _make_folder(path.parent)
        key = generate()
        save_private(path, key)
        print(f"made {path}; add this line to /etc/vmishim/permitted in the guest:", file=sys.stderr)
    print(key.public.text)
    return 0


def enroll(options: argparse.Namespace) -> int:
    """Connect to a guest, then write its entry. An entry that cannot work is not written; one whose agent does not
    answer yet is.

    :raises CommandError: the entry would be invalid, exists already, or its agent can't be reached
    :raises LinkError: a key is not valid
    """
    if wrong := _wrong_name(options.name):
        raise CommandError(f"{options.name!r} cannot be a domain's name: {wrong}")
    key = (options.key or default_key()).expanduser()
    if not key.exists():
        made = f"vmishim keygen{'' if options.key is None else f' {key}'}"
        raise CommandError(f"there is no private key {key}; make one with `{made}`")
    load_private(key)
    public = _public(options.agent_key)
    entry = {"agent": options.endpoint, "agent_key": public.text, "key": _short(key.absolute())}
    if options.kernel_key:
        entry["kernel_key"] = _public(options.kernel_key).text
    file = known.path()
    text = _with(file, options.name, entry, options.replace)
    if options.no_check:
        _save(file, text)
        print(f"added {options.name} to {file}")
        return 0
    try:
        # As it will be read: replacing an entry keeps its [NAME.attestation].
        target = reach(known.checked(options.name, tomllib.loads(text)[options.name], file))
    except LinkError as error:
        refused = isinstance(error, RefusedError) and error.reason is Reason.MALFORMED
        if refused or isinstance(error, WrongKeyError | UnresolvedError):
            raise CommandError(f"{options.name} was not added (--no-check adds it): {error}") from None
        _save(file, text)
        raise CommandError(f"{options.name} was added, but can't be reached yet: {error}") from None
    try:
        _save(file, text)
        print(f"added {options.name} to {file}")
        guest = target.profile
        release = printable(guest.release)
        print(f"{options.name} answers: Linux {release}, {guest.vcpus} CPUs, {guest.memory_size >> 20:,} MiB")
    finally:
        target.close()
    return 0


def _wrong_name(name: str) -> str:
    """Why a domain cannot have this name; empty if it can."""
    if not name or not name.isprintable():
        return "it must be printable text"
    if name != name.strip() or name.startswith("-"):
        return "it must not begin or end with a space, nor begin with a dash"
    if any(char in name for char in "*?["):
        return "* ? [ are for patterns, as in --domains 'web-*'"
    if len(name) > NAME_MAX:
        return f"it has more than {NAME_MAX} characters"
    return ""


def forget(options: argparse.Namespace) -> int:
    """Remove guests from ``domains.toml``, also if their entries are wrong.

    :raises CommandError: there is no such entry
    :raises LibvmiError: the file can't be read
    """
    file = known.path()
    before = _entries(file)
    for name in options.names:
        if name not in before:
            named = f"known are {', '.join(before)}" if before else "it has none"
            raise CommandError(f"{file} has no entry {name!r}; {named}")
    text = file.read_text(encoding="utf-8")
    for name in options.names:
        text = _without(text, name, tables=True)
    kept = {name: entry for name, entry in before.items() if name not in options.names}
    if tomllib.loads(text) != kept:
        raise CommandError(
            f"{file}: cannot find where the entry {', '.join(options.names)} begins and ends; edit the file yourself"
        )
    _save(file, text.rstrip("\n") + "\n" if text.strip() else "")
    print(f"removed {', '.join(map(printable, options.names))} from {file}")
    return 0


def domains(options: argparse.Namespace) -> int:
    """List the enrolled guests. :raises LibvmiError: the file is not valid"""
    found = known.load()
    if options.names:
        for name in found:
            print(printable(name))
    elif options.json:
        shown = ("name", "id", "agent", "ramfile", "key")
        dump([{setting: getattr(domain, setting) for setting in shown} for domain in found.values()])
    elif found:
        rows = ((each.name, each.agent or f"memory in {each.ramfile}", _named(each)) for each in found.values())
        show(("DOMAIN", "REACHED AT", "ITS KEY"), rows)
    else:
        print(f"no guest is enrolled yet; add one to {known.path()} with `vmishim enroll`", file=sys.stderr)
    return 0


def write(name: str, entry: dict[str, str], replace: bool = False) -> Path:
    """Write one entry to ``domains.toml`` and keep every other line; the file changes atomically.

    :raises CommandError: the entry exists and ``replace`` is false, or it would be invalid
    :raises LibvmiError: the existing file is not valid
    """
    file = known.path()
    _save(file, _with(file, name, entry, replace))
    return file


def _with(file: Path, name: str, entry: dict[str, str], replace: bool) -> str:
    """The file's text with one more entry, or another in its place; raises as `write`."""
    if not name or not name.isprintable():
        raise CommandError(f"a domain's name must be printable text, not {name!r}")
    before = known.load(file)
    if name in before and not replace:
        raise CommandError(f"{file} already has an entry {name}; give --replace to replace it")
    text = file.read_text(encoding="utf-8") if before or file.exists() else ""
    if name in before:
        text = _without(text, name)
    lines = [f"[{_key(name)}]", *(f"{setting} = {_quoted(value)}" for setting, value in entry.items())]
    text = "\n\n".join(filter(None, (text.rstrip("\n"), "\n".join(lines)))) + "\n"
    found = tomllib.loads(text)
    if {other: value for other, value in found.items() if other != name} != {
        other: value for other, value in _entries(file).items() if other != name
    }:
        raise CommandError(f"{file}: cannot find where the entry {name} begins and ends; edit the file yourself")
    try:
        known.checked(name, found[name], file)
    except LibvmiError as error:
        raise CommandError(str(error).removeprefix("NO_CONFIG: ")) from None
    return text


def _save(file: Path, text: str) -> None:
    """Replace the file, all of it or nothing."""
    _make_folder(file.parent)
    # Replace the file that a link points to, not the link.
    whole = file.resolve()
    descriptor, fresh = tempfile.mkstemp(dir=whole.parent, prefix=".domains-")
    try:
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(fresh, whole.stat().st_mode & 0o777 if whole.exists() else 0o600)
        os.replace(fresh, whole)
    except BaseException:
        os.unlink(fresh)
        raise


def _entries(file: Path) -> dict[str, object]:
    """The file's entries as TOML has them, none if there is no file. :raises LibvmiError: it can't be read"""
    try:
        return tomllib.loads(files.read_trusted(file).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise LibvmiError(f"NO_CONFIG: {file} cannot be read: {told}") from None


def _without(text: str, name: str, tables: bool = False) -> str:
    """The lines of the file without one entry. A comment above the next entry is kept.

    :param tables: also without the tables within the entry, such as ``[web-1.attestation]``
    """
    kept: list[str] = []
    gone: list[str] = []
    inside = False
    for line in text.splitlines():
        if re.match(r"\s*\[", line):
            if inside:
                kept += _tail(gone)
            try:
                header = tomllib.loads(line)
                inside = header == {name: {}} or (tables and list(header) == [name])
            except tomllib.TOMLDecodeError:
                inside = False
            gone = []
        (gone if inside else kept).append(line)
    return "\n".join(kept)


def _tail(lines: list[str]) -> list[str]:
    """The comments and empty lines at the end."""
    end = len(lines)
    while end and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return lines[end:]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(value: str) -> str:
    # A TOML basic string of printable text is a JSON string.
    return json.dumps(value, ensure_ascii=False)


def _public(words: list[str]) -> PublicKey:
    text = " ".join(words)
    if "vmishim-" not in text and os.path.exists(text):
        return load_public(text)
    return PublicKey.from_text(text)


def _named(domain: Domain) -> str:
    if not domain.agent_key:
        return ""
    try:
        key = PublicKey.from_text(domain.agent_key)
    except LinkError as error:
        return f"invalid: {error}"
    return f"{key.fingerprint} {key.name}".rstrip()


def _short(path: Path) -> str:
    """With ``~`` for the home folder, so that the file can move between machines."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
