"""The lab's image is of one Debian release, whatever the host's is; a mirror that fails is one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import debian, image
from lab.kernels import Kernel
from lab.steps import ImageError

KERNEL = Kernel("6.1", "linux-image-cloud-amd64")
UNREACHABLE = """\
echo run >>{folder}/runs
echo 'Err:1 http://127.0.0.1:1/debian bookworm InRelease'
echo 'E: Failed to fetch http://127.0.0.1:1/debian/dists/bookworm/InRelease  Could not connect to 127.0.0.1:1'
echo 'E: Some index files failed to download. They have been ignored, or old ones used instead.'
exit 25
"""
# As mmdebstrap calls a hook: with its own configuration of apt under another name.
HOOKED = """\
for word; do case $word in --customize-hook=*) hook=${{word#--customize-hook=}};; esac; done
unset APT_CONFIG
MMDEBSTRAP_APT_CONFIG=/the/suites exec sh -c "$hook"
"""
APT = """\
echo "$1 $APT_CONFIG" >>{folder}/asked
[ "$1" != depends ] || echo "  Depends: linux-image-6.12.118-cloud-amd64"
case $1 in download) mkdir -p package/boot && touch package/boot/vmlinuz-6.12.118 linux-image-6.12.118.deb;; esac
"""

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a shell script on the PATH, before all others."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("VMISHIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VMISHIM_DEBIAN_MIRROR", raising=False)

    def make(name: str, script: str) -> None:
        (folder / name).write_text("#!/bin/sh\n" + script.format(folder=tmp_path))
        (folder / name).chmod(0o755)

    return make


def test_an_unreachable_mirror_is_one_sentence_and_is_not_tried_again(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("mmdebstrap", UNREACHABLE)
    monkeypatch.setattr(image, "_check_host", lambda: None)
    monkeypatch.setattr(image, "_failed", {})
    for _ in range(3):
        with pytest.raises(ImageError) as caught:
            image.image(progress=lambda line: None)
        assert str(caught.value) == (
            "cannot get Debian bookworm's packages: Failed to fetch http://127.0.0.1:1/debian/dists/bookworm/InRelease "
            "Could not connect to 127.0.0.1:1. Name a mirror that serves debian and debian-security side by side, such "
            "as VMISHIM_DEBIAN_MIRROR=http://deb.debian.org/debian"
        )
    assert (tmp_path / "runs").read_text() == "run\n"


def test_packages_come_from_the_suite_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMISHIM_DEBIAN_MIRROR", raising=False)
    assert debian.sources() == [
        "deb http://deb.debian.org/debian bookworm main",
        "deb http://deb.debian.org/debian bookworm-updates main",
        "deb http://deb.debian.org/debian-security bookworm-security main",
    ]
    monkeypatch.setenv("VMISHIM_DEBIAN_MIRROR", "http://mirror/debian/")
    assert (
        debian.sources("[trusted=yes]")[2] == "deb [trusted=yes] http://mirror/debian-security bookworm-security main"
    )


def test_the_kernel_comes_from_the_suite_and_one_of_another_series_is_refused(tool: Tool, tmp_path: Path) -> None:
    """A host of another release has kernels of its own, under the same name."""
    tool("mmdebstrap", HOOKED)
    tool("apt-cache", APT)
    tool("apt-get", APT)
    tool("dpkg-deb", 'cp -r "$(dirname "$2")/package" "$3"\n')
    work = tmp_path / "work"
    (work / "result").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"linux-image-cloud-amd64 of Debian bookworm is Linux 6\.12\.118, not 6\.1: "):
        debian.unpack_kernel(KERNEL, work, work / "root", work / "result")
    assert (tmp_path / "asked").read_text() == "depends /the/suites\ndownload /the/suites\n"
