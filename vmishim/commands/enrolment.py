"""``vmishim keygen``, ``enroll`` and ``domains``: whom we are, and whom we know."""

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
from vmishim.guests import domains as known
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import reach
from vmishim.output import dump, show
from vmishim.wire.keys import PublicKey, generate, load_private, load_public, save_private


def default_key() -> Path:
    """Where our private key is unless it is said otherwise: beside ``domains.toml``."""
    return known.path().with_name("key")


def keygen(options: argparse.Namespace) -> int:
    """Make a private key and print the public one.

    :raises LinkError: it can't be written, or what is there is no private key of ours alone
    """
    path = (options.path or default_key()).expanduser()
    if path.exists():
        key = load_private(path)
        print(f"{path} exists already and is kept; its public key is", file=sys.stderr)
    else:
        _make_folder(path.parent)
        key = generate()
        save_private(path, key)
        print(f"made {path}; add this line to /etc/vmishim/permitted in the guest:", file=sys.stderr)
    print(key.public.text)
    return 0


def enroll(options: argparse.Namespace) -> int:
    """Write a domain's entry, then try it.

    :raises CommandError: the entry would be wrong, or exists
    :raises LinkError: a key is none
    """
    key = (options.key or default_key()).expanduser()
    if not key.exists():
        made = f"vmishim keygen{'' if options.key is None else f' {key}'}"
        raise CommandError(f"there is no private key {key}; make one by `{made}`")
    load_private(key)
    public = _public(options.agent_key)
    entry = {"agent": options.endpoint, "agent_key": public.text, "key": _short(key.absolute())}
    if options.kernel_key:
        entry["kernel_key"] = _public(options.kernel_key).text
    file = write(options.name, entry, options.replace)
    print(f"{options.name} is written down in {file}")
    if options.no_check:
        return 0
    domain = known.find(options.name)
    try:
        target = reach(domain)
    except LinkError as error:
        raise CommandError(f"{options.name} can't be used yet: {error}") from None
    try:
        guest = target.profile
        print(f"{options.name} answers: Linux {guest.release}, {guest.vcpus} CPUs, {guest.memory_size >> 20:,} MiB")
    finally:
        target.close()
    return 0


def domains(options: argparse.Namespace) -> int:
    """List what is enrolled. :raises LibvmiError: the file is wrong"""
    found = known.load()
    if options.names:
        for name in found:
            print(name)
    elif options.json:
        shown = ("name", "id", "agent", "ramfile", "key")
        dump([{setting: getattr(domain, setting) for setting in shown} for domain in found.values()])
    elif found:
        rows = ((each.name, each.agent or f"memory in {each.ramfile}", _named(each)) for each in found.values())
        show(("DOMAIN", "REACHED AT", "ITS KEY"), rows)
    else:
        print(f"no domain is known yet; `vmishim enroll` adds one to {known.path()}", file=sys.stderr)
    return 0


def write(name: str, entry: dict[str, str], replace: bool = False) -> Path:
    """Put one entry into ``domains.toml``, leaving every other line as it is; the file changes at once or not at all.

    :raises CommandError: there is such an entry and ``replace`` is false, or it would be wrong
    :raises LibvmiError: the file is wrong already
    """
    if not name or not name.isprintable():
        raise CommandError(f"a domain's name is printable text, not {name!r}")
    file = known.path()
    before = known.load(file)
    if name in before and not replace:
        raise CommandError(f"{file} has an entry {name} already; --replace replaces it")
    text = file.read_text(encoding="utf-8") if before or file.exists() else ""
    if name in before:
        text = _without(text, name)
    lines = [f"[{_key(name)}]", *(f"{setting} = {_quoted(value)}" for setting, value in entry.items())]
    text = "\n\n".join(filter(None, (text.rstrip("\n"), "\n".join(lines)))) + "\n"
    if {other: value for other, value in tomllib.loads(text).items() if other != name} != {
        other: value for other, value in _entries(file).items() if other != name
    }:
        raise CommandError(f"{file}: the entry of {name} can't be told from its neighbours; edit the file yourself")
    _make_folder(file.parent)
    # The file a link leads to is replaced, not the link.
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
    """The lines of the file but for one entry's. A comment above the next entry stays with that."""
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
        return f"wrong: {error}"
    return f"{key.fingerprint} {key.name}".rstrip()


def _short(path: Path) -> str:
    """With ``~`` where that says the same, so that the file can move between machines."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
