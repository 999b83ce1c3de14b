"""Key files: one line, mode 0600, never overwritten, never shown; and the list of keys that may connect."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmishim.errors import LinkError
from vmishim.wire.keys import (
    PermittedKeys,
    PrivateKey,
    PublicKey,
    generate,
    load_private,
    load_public,
    save_private,
    save_public,
)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def old(path: Path, seconds: int) -> None:
    """Give the file an old time stamp, as if it had not just been written."""
    os.utime(path, (seconds, seconds))


def test_a_saved_key_loads_again(tmp_path: Path) -> None:
    key = generate()
    save_private(tmp_path / "key", key)
    save_public(tmp_path / "key.pub", PublicKey(key.public.raw, "ids on host seven"))
    assert load_private(tmp_path / "key") == key
    assert load_private(tmp_path / "key").public == key.public
    assert load_public(tmp_path / "key.pub") == key.public
    assert load_public(tmp_path / "key.pub").name == "ids on host seven"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key.pub").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "key").read_text().startswith("vmishim-private-v1 ")


@pytest.mark.parametrize("mask", [0, 0o077, 0o777])
def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_private(tmp_path / "key", generate())
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    one, two = generate(), generate()
    save_private(tmp_path / "key", one)
    with pytest.raises(LinkError, match="already exists"):
        save_private(tmp_path / "key", two)
    assert load_private(tmp_path / "key") == one
    save_private(tmp_path / "key", two, overwrite=True)
    assert load_private(tmp_path / "key") == two
    assert os.listdir(tmp_path) == ["key"]


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "key").symlink_to(target)
    with pytest.raises(LinkError, match="already exists"):
        save_private(tmp_path / "key", generate())
    save_private(tmp_path / "key", generate(), overwrite=True)
    assert not target.exists()
    assert not (tmp_path / "key").is_symlink()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_private_key_that_others_can_access_is_refused(tmp_path: Path, mode: int) -> None:
    save_private(tmp_path / "key", generate())
    (tmp_path / "key").chmod(mode)
    with pytest.raises(LinkError, match=f"chmod 600 {tmp_path}/key"):
        load_private(tmp_path / "key")


GOOD = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="  # fixed, since test names contain it


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds 0 keys"),
        (f"vmishim-private-v1 {GOOD}\n" * 2, "holds 2 keys"),
        (f"vmishim-public-v1 {GOOD}\n", "not a private key"),
        (f"vmishim-private-v1 {GOOD[:-4]}\n", "cut short"),
        (f"vmishim-private-v1 {GOOD} extra\n", "cut short"),
        (f"vmishim-private-v1 {GOOD[:-2]}{'B' if GOOD[-2] != 'B' else 'C'}=\n", "cut short"),
        ("vmishim-private-v1 ä\n", "cut short"),
        ("\0\1\2", "not a private key"),
    ],
)
def test_a_file_that_is_not_a_private_key_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(LinkError, match=complaint) as caught:
        load_private(write(tmp_path / "key", text))
    assert GOOD not in str(caught.value)


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"cannot read .*No such file"):
        load_private(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(LinkError, match="not a regular file"):
        load_private(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(LinkError, match="not a text file"):
        load_public(tmp_path / "binary")


def test_a_private_key_in_a_public_place_is_named(tmp_path: Path) -> None:
    save_private(tmp_path / "key", generate())
    with pytest.raises(LinkError, match="must not leave its machine"):
        load_public(tmp_path / "key")


def test_secrets_do_not_show_and_names_do() -> None:
    key = generate()
    public = PublicKey(key.public.raw, "ids")
    assert repr(key) == f"PrivateKey({key.public.fingerprint})"
    assert repr(public) == f"PublicKey({key.public.fingerprint}, ids)"
    assert public.fingerprint.startswith("SHA256:")
    assert len(public.fingerprint) == 23
    assert public == key.public
    assert hash(public) == hash(key.public)
    with pytest.raises(AttributeError):
        key.raw = bytes(32)  # type: ignore[misc]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_has_32_bytes(size: int) -> None:
    with pytest.raises(LinkError, match="32 bytes"):
        PublicKey(bytes(size))
    with pytest.raises(LinkError, match="32 bytes"):
        PrivateKey(bytes(size))


@pytest.mark.parametrize("name", ["two\nlines", " blank", "\x1b[31m"])
def test_a_name_must_be_printable(name: str) -> None:
    with pytest.raises(LinkError, match="printable"):
        PublicKey(bytes(32), name)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_public_key_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "agent.pub"
    save_public(path, generate().public)
    load_public(path)
    path.chmod(mode)
    with pytest.raises(LinkError, match=f"{path}: other users can change it; run: chmod go-w {path}"):
        load_public(path)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_list_of_keys_that_others_can_change_is_refused_at_once(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "permitted", generate().public.text, mode)
    with pytest.raises(LinkError, match=f"{path}: other users can change who may connect; run: chmod go-w {path}"):
        PermittedKeys(path)


def test_a_key_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for overwrite in (False, True):
        with pytest.raises(LinkError, match=f"cannot write {tmp_path}/key: No space left on device"):
            save_private(tmp_path / "key", generate(), overwrite=overwrite)
    assert not list(tmp_path.iterdir())


def test_permitted_keys_are_those_of_the_file(tmp_path: Path) -> None:
    one, two = generate().public, generate().public
    text = f"# who may connect\n\n{one.text} ids seven\nnonsense\n{two.text}\n"
    permitted = PermittedKeys(write(tmp_path / "permitted", text, 0o644))
    assert one in permitted
    assert two in permitted
    assert generate().public not in permitted
    found = permitted.find(one)
    assert found is not None
    assert found.name == "ids seven"
    assert len(permitted.problems) == 1
    assert permitted.problems[0].startswith(f"{tmp_path}/permitted:4: not a public key")


@pytest.mark.parametrize("age", [0, 3600])
def test_a_change_takes_effect_at_once(tmp_path: Path, age: int) -> None:
    """For a file that was just written, and for one whose change shows only in its time stamp."""
    one, two = generate().public, generate().public
    path = write(tmp_path / "permitted", one.text + "\n")
    if age:
        old(path, 1_000_000)
    permitted = PermittedKeys(path)
    assert one in permitted
    write(path, two.text + "\n")
    if age:
        old(path, 1_000_100)
    assert one not in permitted
    assert two in permitted


def test_a_file_that_takes_the_place_of_the_old_one_counts_at_once(tmp_path: Path) -> None:
    one, two = generate().public, generate().public
    path = write(tmp_path / "permitted", one.text + "\n", 0o644)
    permitted = PermittedKeys(path)
    assert one in permitted
    write(tmp_path / "new", two.text + "\n", 0o644).replace(path)
    assert two in permitted
    assert one not in permitted
    path.unlink()
    with pytest.raises(LinkError, match="no key is permitted"):
        permitted.refresh()
    assert two not in permitted


def test_permitted_keys_fail_closed(tmp_path: Path) -> None:
    key = generate().public
    path = write(tmp_path / "permitted", key.text)
    permitted = PermittedKeys(path)
    path.chmod(0o620)
    assert key not in permitted
    assert "chmod go-w" in permitted.problems[0]
    path.chmod(0o600)
    assert key in permitted
    assert not permitted.problems
    path.unlink()
    assert key not in permitted
    assert "no key is permitted" in permitted.problems[0]
    with pytest.raises(LinkError, match="cannot read"):
        PermittedKeys(path)
