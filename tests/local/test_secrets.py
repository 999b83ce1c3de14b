"""Keys are in their files and nowhere else: not in what is printed, logged or written, nor in what ``ps`` shows."""

from __future__ import annotations

import base64
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmishim import cli
from vmishim.guests import local
from vmishim.wire import keys, noise

SCRIPT = """\
import sys
from libvmi import Libvmi
with Libvmi(sys.argv[1]) as vmi:
    print(vmi.read_ksym("linux_banner", 64))
    if sys.argv[2:]:
        print(vmi, vmi.vmi, vmi.vmi.__dict__)
        vmi.read_64_va(0x1000, 0)
"""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """Every private key that this process makes or reads, and every key that it derives: those of sessions, which the
    agent has too."""
    found: set[bytes] = set()
    derive: Callable[..., tuple[bytes, bytes]] = noise._hkdf
    made: Callable[[keys.PrivateKey], None] = keys.PrivateKey.__post_init__

    def derived(*material: bytes) -> tuple[bytes, bytes]:
        both = derive(*material)
        found.update(both)
        return both

    def known(key: keys.PrivateKey) -> None:
        found.add(key.raw)
        made(key)

    monkeypatch.setattr(noise, "_hkdf", derived)
    monkeypatch.setattr(keys.PrivateKey, "__post_init__", known)
    return found


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything is written: where the agent, which becomes another user, can look for its list of keys."""
    with tempfile.TemporaryDirectory(prefix="vmishim-") as folder:
        Path(folder).chmod(0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("VMISHIM_CONFIG", f"{folder}/domains.toml")
        monkeypatch.setenv("HOME", folder)
        monkeypatch.chdir(folder)
        yield Path(folder)
        monkeypatch.undo()


def shapes(secret: bytes) -> set[bytes]:
    """A key as bytes, as people write bytes, and as Python shows them."""
    plain = {secret, *(form(secret).rstrip(b"=") for form in (base64.b64encode, base64.urlsafe_b64encode))}
    return plain | {secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()}


def shown(text: bytes, secrets: set[bytes]) -> set[bytes]:
    """Those of the secrets that a text has."""
    return {secret for secret in secrets if any(shape in text for shape in shapes(secret))}


def seen_by_ps() -> Iterator[tuple[str, bytes]]:
    """Arguments and environment of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                yield f"{folder}/{name}", (folder / name).read_bytes()
            except OSError:  # it has gone
                continue


def test_keys_are_in_their_files_only(home: Path, secrets: set[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    (home / "script.py").write_text(SCRIPT)
    handler = logging.FileHandler(home / "host.log")
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with local.agent("--verbose") as entry:
            endpoint, key, public = entry.agent, Path(entry.key), entry.agent_key
            for arguments in (
                ("enroll", "here", endpoint, public, "--key", str(key)),
                *((command, "here", "--stats") for command in ("ps", "lsmod", "ss")),
                ("ps", "here", "--json", "--strategy", "scalar"),
                ("doctor", "here", "--json"),
                ("config", "--export", "here"),
                ("domains", "--json"),
                (
                    "compare",
                    "--runs",
                    "1",
                    "--only",
                    "agent-scalar,agent-batch",
                    "--domain",
                    "here",
                    "script.py",
                    "here",
                ),
                ("keygen", str(home / "other")),
            ):
                # 3: a process of this machine ended while it was read.
                assert cli.main(arguments) in ((0, 3) if arguments[0] in ("ps", "lsmod", "ss") else (0,)), arguments
            private = (home / "other").read_text().strip()
            stranger = keys.generate().public.text
            for arguments in (
                ("run", "script.py", "here", "show all, and fail"),
                ("enroll", "there", endpoint, private, "--key", str(key)),
                ("enroll", "there", endpoint, public, "--key", str(home / "other")),
                ("enroll", "there", endpoint, stranger, "--key", str(key), "--replace"),
            ):
                assert cli.main(arguments) == 1, arguments
            (home / "broken").touch(0o600)
            for text in (private[:-3], f"{private}\n{private}", private.replace("v1", "v2"), private.split()[1]):
                (home / "broken").write_text(text)
                assert cli.main(("enroll", "no", endpoint, public, "--key", str(home / "broken"))) == 1, text
            (home / "broken").unlink()
            # The agent says what is wrong with its list, and goes on.
            key.with_name("permitted").write_text(f"{private}\n{keys.load_private(key).public.text}\n")
            assert cli.main(("ps", "here")) == 0
            keys.load_private(key.with_name("agent.key"))
            seen = dict(seen_by_ps())
            written = {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        handler.close()
    said = capfd.readouterr()
    assert shown((said.out + said.err).encode(), secrets) == set()
    assert {place for place, text in seen.items() if shown(text, secrets)} == set()
    assert {Path(place).name for place, text in written.items() if shown(text, secrets)} == {
        "key", "agent.key", "other", "permitted",
    }  # fmt: skip
