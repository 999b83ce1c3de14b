"""``vmishim keygen``, ``enroll`` and ``domains``: your key, and the guests you know."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path

from vmishim.commands import CommandError
from vmishim.errors import LibvmiError, LinkError
from vmishim.foreign import printable
from vmishim.guests import domains as known
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.output import dump, show
from vmishim.wire.keys import PublicKey, generate, load_private, load_public, save_private


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
    """Write a domain's entry, then try to connect.

    :raises CommandError: the entry would be invalid, or exists already
    :raises LinkError: a key is not valid
    """
    key = (options.key or default_key()).expanduser()
    if not key.exists():
        made = f"vmishim keygen{'' if options.key is None else f' {key}'}"
        raise CommandError(f"there is no private key {key}; make one with `{made}`")
    load_private(key)
    public = _public(options.agent_key)
    entry = {"agent": options.endpoint, "agent_key": public.text, "key": _short(key.absolute())}
    if options.kernel_key:
        entry["kernel_key"] = _public(options.kernel_key).text
    file = write(options.name, entry, options.replace)
    print(f"added {options.name} to {file}")
    if options.no_check:
        return 0
    domain = known.find(options.name)
    try:
        target = reach(domain)
    except LinkError as error:
        raise CommandError(f"{options.name} was added but can't be reached yet: {error}") from None
    try:
        guest = target.profile
        release = printable(guest.release)
        print(f"{options.name} answers: Linux {release}, {guest.vcpus} CPUs, {guest.memory_size >> 20:,} MiB")
    finally:
        target.close()
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
    if not name or not name.isprintable():
        raise CommandError(f"a domain's name must be printable text, not {name!r}")
    file = known.path()
    before = known.load(file)
    if name in before and not replace:
        raise CommandError(f"{file} already has an entry {name}; give --replace to replace it")
    text = file.read_text(encoding="utf-8") if before or file.exists() else ""
    if name in before:
        text = _without(text, name)
    lines = [f"[{_key(name)}]", *(f"{setting} = {_quoted(value)}" for setting, value in entry.items())]
    text = "\n\n".join(filter(None, (text.rstrip("\n"), "\n".join(lines)))) + "\n"
    if {other: value for other, value in tomllib.loads(text).items() if other != name} != {
        other: value for other, value in _entries(file).items() if other != name
    }:
        raise CommandError(f"{file}: cannot find where the entry {name} begins and ends; edit the file yourself")
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
        known.load(Path(fresh))
        os.replace(fresh, whole)
    except LibvmiError as error:
        os.unlink(fresh)
        raise CommandError(str(error).replace(fresh, str(file)).removeprefix("NO_CONFIG: ")) from None
    except BaseException:
        os.unlink(fresh)
        raise
    return file


def _entries(file: Path) -> dict[str, object]:
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _without(text: str, name: str) -> str:
    """The lines of the file without one entry. A comment above the next entry is kept."""
    kept: list[str] = []
    gone: list[str] = []
    inside = False
    for line in text.splitlines():
        if re.match(r"\s*\[", line):
            if inside:
                kept += _tail(gone)
            try:
                inside = tomllib.loads(line) == {name: {}}
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
