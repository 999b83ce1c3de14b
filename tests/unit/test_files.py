"""Files that say whom to trust: refused if another user could have written them; and none is written through a link."""

from __future__ import annotations

import os
import pwd
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import launch
from lab.cache import locked
from vmishim import cli, files
from vmishim.bundle import bundle
from vmishim.errors import LibvmiError, LinkError
from vmishim.guests import domains, ramfile
from vmishim.kernel.offsets import Offsets
from vmishim.wire.keys import PermittedKeys, generate, load_private, load_public, save_private

MALLORY = 4242
KEY = generate()
READERS: dict[str, Callable[[Path], object]] = {
    "private key": load_private,
    "public key": load_public,
    "permitted": PermittedKeys,
    "domains.toml": domains.load,
    "offsets": Offsets.read,
    "symbols": ramfile._map,
}
"""Every file that decides whom, or what, to trust."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return READERS[request.param]


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file as it should be, of the kind that ``read`` reads."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    kind = request.node.callspec.params["read"]
    if kind == "private key":
        save_private(path, KEY)
    else:
        texts = {"offsets": '{"release": "6.1.0", "members": {}}', "domains.toml": "", "symbols": "1000 T _text\n"}
        path.write_text(texts.get(kind, KEY.public.text + "\n"))
        path.chmod(0o644)
    return path


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises((LinkError, LibvmiError)) as caught:
        read(path)
    return str(caught.value)


def test_a_file_of_ours_is_read(read: Callable[[Path], object], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(file)
    (file.parent / "link").symlink_to("file")
    read(file.parent / "link")
    monkeypatch.chdir(file.parent)
    read(Path("../folder/./link"))


@as_root
def test_a_file_of_another_user_is_refused(read: Callable[[Path], object], file: Path) -> None:
    os.chown(file, MALLORY, MALLORY)
    assert f"{file} belongs to user {MALLORY}" in refused(read, file)


@as_root
def test_a_link_of_another_user_is_refused(read: Callable[[Path], object], file: Path) -> None:
    """Also in a folder like /tmp, where anyone may make one."""
    public = file.parent.parent / "public"
    public.mkdir()
    public.chmod(0o1777)
    link = public / "link"
    link.symlink_to(file)
    read(link)
    os.lchown(link, MALLORY, MALLORY)
    assert f"{link} belongs to user {MALLORY}" in refused(read, link)


@as_root
def test_a_folder_of_another_user_is_refused(read: Callable[[Path], object], file: Path) -> None:
    os.chown(file.parent, MALLORY, MALLORY)
    assert f"{file.parent} belongs to user {MALLORY}" in refused(read, file)
    (file.parent.parent / "link").symlink_to("folder/file")
    assert f"{file.parent} belongs to user {MALLORY}" in refused(read, file.parent.parent / "link")


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_file_that_others_can_replace_is_refused(read: Callable[[Path], object], file: Path, mode: int) -> None:
    file.parent.chmod(mode)
    assert f"run: chmod go-w {file.parent}" in refused(read, file)
    # In a sticky folder only a file's owner can.
    file.parent.chmod(mode | 0o1000)
    read(file)


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664])
def test_a_file_that_others_can_write_is_refused(read: Callable[[Path], object], file: Path, mode: int) -> None:
    file.chmod(mode)
    assert re.search(f"run: chmod (go-w|600) {file}", refused(read, file))


@as_root
def test_a_folder_of_a_group_is_refused_if_the_group_has_others(read: Callable[[Path], object], file: Path) -> None:
    file.parent.chmod(0o775)
    os.chown(file.parent, 0, 0)
    read(file)  # root's own group, as users have one on Debian and Ubuntu
    for group in (MALLORY, pwd.getpwnam("nobody").pw_gid):  # one that nobody knows, one that is a user's own
        os.chown(file.parent, 0, group)
        assert f"run: chmod go-w {file.parent}" in refused(read, file)


@as_root
def test_a_folder_whose_acl_names_another_user_is_refused(read: Callable[[Path], object], file: Path) -> None:
    """The group's place in its mode is then the list's mask (acl(5))."""
    owner, user, group, mask, other, none = 1, 2, 4, 16, 32, 0xFFFFFFFF  # include/uapi/linux/posix_acl.h
    entries = [(owner, 7, none), (user, 7, MALLORY), (group, 5, none), (mask, 7, none), (other, 5, none)]
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(file.parent, "system.posix_acl_access", listed)
    except OSError as error:
        pytest.skip(f"this file system has no ACLs: {error}")
    assert file.parent.stat().st_mode & 0o777 == 0o775
    assert f"run: chmod go-w {file.parent}" in refused(read, file)


def test_links_that_lead_in_a_circle_are_an_error(read: Callable[[Path], object], file: Path) -> None:
    (file.parent / "one").symlink_to("two")
    (file.parent / "two").symlink_to("one")
    assert "Too many levels of symbolic links" in refused(read, file.parent / "one")


@pytest.fixture
def seen_by_all() -> Iterator[Path]:
    """A folder that every user can look into; pytest's are for one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@as_root
def test_a_user_trusts_its_own_files_and_those_of_root(seen_by_all: Path) -> None:
    path = seen_by_all / "permitted"
    path.write_text("")
    path.chmod(0o644)
    assert in_child(MALLORY, path) == "trusted"
    os.chown(path, MALLORY, MALLORY)
    assert in_child(MALLORY, path) == "trusted"
    assert f"belongs to user {MALLORY}" in in_child(MALLORY + 1, path)


def in_child(uid: int, path: Path) -> str:
    """What a process of another user says about a file."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            try:
                files.read_trusted(path)
                said = "trusted"
            except OSError as error:
                said = str(error.strerror)
            os.write(writes, said.encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@as_root
def test_the_list_of_permitted_keys_is_still_roots_after_the_agent_became_another_user(seen_by_all: Path) -> None:
    path = seen_by_all / "permitted"
    path.write_text(KEY.public.text + "\n")
    path.chmod(0o644)
    permitted = PermittedKeys(path)
    other = generate().public
    try:
        os.seteuid(MALLORY)
        assert KEY.public in permitted
    finally:
        os.seteuid(0)
    path.write_text(other.text + "\n")
    try:
        os.seteuid(MALLORY)
        assert KEY.public not in permitted
        assert other in permitted
    finally:
        os.seteuid(0)
    os.chown(path, MALLORY, MALLORY)
    assert other not in permitted
    assert f"belongs to user {MALLORY}" in permitted.problems[0]


WRITERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: files.write(path, b"ours"),
    "agent": lambda path: bundle(path),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return WRITERS[request.param]


def test_nothing_is_written_through_a_link(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmishim.bundle.object_bytes", lambda name: b"object")
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="is a link and is not replaced"):
        write(tmp_path / "link")
    assert target.read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    os.link(tmp_path / "file", tmp_path / "other name")
    files.write(tmp_path / "file", b"after", 0o640)
    assert (tmp_path / "file").read_text() == "after"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "other name").read_text() == "before"
    with pytest.raises(OSError, match="is a folder"):
        files.write(tmp_path, b"")


@pytest.mark.parametrize("suffix", ["json", "html"])
def test_compare_writes_no_report_through_a_link(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so before it compares anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").touch()
    (tmp_path / f"compare.{suffix}").symlink_to(tmp_path / "target")
    assert cli.main(["compare", "script.py", "web-1"]) == 2
    assert f"compare.{suffix} is a link and is not replaced" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_the_lab_locks_no_file_that_another_user_could_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, target = tmp_path / "public", tmp_path / "target"
    public.mkdir()
    public.chmod(0o1777)
    target.write_text("theirs")
    (public / f"vmishim-lab.{os.getuid()}.lock").symlink_to(target)
    monkeypatch.setattr("tempfile.tempdir", str(public))
    monkeypatch.setenv("VMISHIM_CACHE", str(tmp_path / "cache"))
    folder, lock = launch.make_run_folder(1)
    launch.remove(folder)
    lock.close()
    assert target.read_text() == "theirs"
    with pytest.raises(OSError, match="symbolic links"), locked(public / f"vmishim-lab.{os.getuid()}.lock"):
        pass
