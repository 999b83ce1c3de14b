"""Compare our reading of many generated configurations and profiles with that of LibVMI's own code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.environment import MissingError
from trials.configs.compared import generated, generated_profiles, genuine, ours, ours_of_profile

KINDS: dict[str, tuple[Callable[[int, int], list[bytes]], Callable[[bytes], Any]]] = {
    "configs": (generated, ours),
    "profiles": (generated_profiles, ours_of_profile),
}


def main() -> int:
    """Compare. Returns 1 if any file is read differently."""
    parser = argparse.ArgumentParser(prog="python -m trials.configs", description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000, metavar="N", help="files of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="which ones (%(default)s)")
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="write them, and what LibVMI reads, to a file of each kind there"
    )
    options = parser.parse_args()
    failed = 0
    for kind, (made, read) in KINDS.items():
        texts = made(options.runs, options.seed)
        try:
            cases = list(zip(texts, genuine(texts, kind), strict=True))
        except MissingError as error:
            print(f"configs: {error}", file=sys.stderr)
            return 2
        different = [(text, theirs) for text, theirs in cases if read(text) != theirs]
        for text, theirs in different:
            print(f"{text!r}\n  LibVMI: {theirs}\n  ours:   {read(text)}")
        valid = sum(theirs is not None for _, theirs in cases)
        print(f"{kind}: {len(cases):,} files, {valid:,} of them valid; {len(different):,} read differently")
        failed += len(different)
        if options.record:
            lines = (json.dumps([text.decode("latin-1"), theirs]) for text, theirs in cases)
            (options.record / f"{kind}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
