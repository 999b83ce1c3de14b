"""MkDocs hooks: the pages that are not files of docs/, and links that work on a forge and on the site.

The pages at the top of the repository (README.md and the like) become pages of the site, and each package of vmishim
gets a reference page from its docstrings. A link to a file of the repository that is not a page becomes a link to the
repository (``repo_url``).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
BRANCH = "main"
TOP = {
    "README.md": "index.md",
    "SECURITY.md": "reporting.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages at the top of the repository, and their names on the site."""
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<after>#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def packages() -> dict[str, list[str]]:
    """Names of modules by reference page: one for each package of vmishim, and one for the modules at its top."""
    pages: dict[str, list[str]] = {"vmishim": []}
    for path in sorted((ROOT / "vmishim").rglob("*.py")):
        inside = path.relative_to(ROOT).with_suffix("").parts
        if "compat" in inside or path.name == "__main__.py":
            continue
        name = ".".join(inside).removesuffix(".__init__")
        page = inside[1] if len(inside) > 2 else "vmishim"
        pages.setdefault(page, []).append(name)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's Reference, and add pages of docs/ that it does not name to Contribute."""
    nav = {title: pages for section in config.nav or [] for title, pages in section.items()}
    nav["Reference"] += [{_title(page): f"api/{page}.md"} for page in packages()]
    entries = [page for pages in nav.values() for page in pages]
    known = {name for page in entries for name in (page.values() if isinstance(page, dict) else [page])}
    nav["Contribute"] += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in known]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, modules in packages().items():
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{page}.md", content=f"# {_title(page)}\n\n{blocks}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link of a page at a page of the site, or else at the repository.

    :raises PluginError: a link leads to nothing
    """
    source = _source(page.file.src_uri)
    parts = _CODE.split(markdown)
    for at in range(0, len(parts), 2):  # between the pieces of code
        parts[at] = _LINK.sub(lambda link: _resolved(link, source, page, config, files), parts[at])
    return "".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Keep the theme from asking the repository's host for stars and forks when a page is read."""
    return output.replace(' data-md-component="source"', "")


def _resolved(link: re.Match[str], source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    target, anchor = link["target"], link["after"] or ""
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    name = TOP.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(name) is not None and (path in TOP or path.startswith("docs/")):
        return f"{link['before']}{posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}{anchor}"
    if not (ROOT / path).exists():
        raise PluginError(f"{source}: a link leads to {path}, which is not there")
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{link['before']}{(config.repo_url or '').rstrip('/')}/{kind}/{BRANCH}/{path}{anchor}"


def _source(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return next((source for source, name in TOP.items() if name == page), f"docs/{page}")


def _title(page: str) -> str:
    return "vmishim" if page == "vmishim" else f"vmishim.{page}"
