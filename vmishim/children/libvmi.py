"""What a child process of a script imports as ``libvmi``: ours, which opens guests as ``vmishim run`` does.

A child that is a new Python process, by multiprocessing's methods *spawn* and *forkserver* or by ``subprocess``, has
nothing of its parent's memory. `vmishim.script` puts this folder on the paths that it inherits.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def load() -> None:
    """Put our package in this module's place."""
    if importlib.util.find_spec("vmishim") is None:  # a checkout that is not installed
        sys.path.append(str(PACKAGE.parent))
    from vmishim.script import COMPAT, inherit

    inherit()
    folder = COMPAT / "libvmi"
    spec = importlib.util.spec_from_file_location(
        "libvmi", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["libvmi"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "libvmi":
    load()
