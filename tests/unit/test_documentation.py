"""The pages name files and folders that exist, and link to what is there. README.md's first screen stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("vmishim", "guest_agent", "bpf", "compat", "lab", "bench", "trials", "tests", "ci", "docs")
_PATH = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w|(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/(?![\w*])")
_LINK = re.compile(r"\]\((?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
MADE = {"bpf/.output", "docs/api"}
"""What is named and only there once it is made."""


def paths(text: str) -> set[str]:
    """Files and folders of the repository that a page names."""
    return {path.rstrip("/") for path in _PATH.findall(text)}


def anchors(text: str) -> set[str]:
    """A page's headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def named(page: Path) -> set[str]:
    return {path for path in paths(page.read_text()) if path not in MADE}


def exists(path: str) -> bool:
    return (ROOT / path).exists() or any(ROOT.glob(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert not {path for path in named(page) if not exists(path)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = set()
    for link in _LINK.finditer(_FENCE.sub("", page.read_text())):
        if "://" in link["target"]:
            continue
        target = page.parent / link["target"] if link["target"] else page
        if not target.exists() or (link["anchor"] and link["anchor"] not in anchors(target.read_text())):
            broken.add(link[0])
    assert not broken


def test_the_folders_of_the_architecture_are_those_of_the_repository() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for folder in (ROOT / "vmishim").iterdir():
        if (folder / "__init__.py").exists():
            assert f"{folder.name}/" in page, f"docs/architecture.md does not name vmishim/{folder.name}/"


def test_every_make_target_that_is_named_exists() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    texts = [page.read_text() for page in PAGES] + [workflow, (ROOT / ".ci" / "run").read_text()]
    named = {target for text in texts for target in re.findall(r"(?:`|\$ |run: |-E |true )make (\w+)", text)}
    listed = re.search(r"target: \[(.*)\]", workflow)
    assert listed
    named |= {target.strip() for target in listed[1].split(",")}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "docs", "unit", "kernels"} <= named
    assert named <= targets


def test_the_first_screen_of_the_readme_has_at_most_60_lines() -> None:
    first, *_ = (ROOT / "README.md").read_text().split("\n## ")
    lines = first.splitlines()
    assert len(lines) <= 60
    text = "\n".join(lines)
    for part in ("make demo", "make test", "benchmark.svg", "What it protects against", "What it does not"):
        assert part in text


def test_a_path_that_is_not_there_is_noticed() -> None:
    assert paths("see `vmishim/libvmi/` and `vmishim/nothing.py`, not /usr/lib/vmishim/agent.pyz or ~/.cache/ci/x") == {
        "vmishim/libvmi",
        "vmishim/nothing.py",
    }
    assert not exists("vmishim/nothing.py")
