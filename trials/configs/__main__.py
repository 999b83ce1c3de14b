"""Compare our reading of many generated configurations with that of LibVMI's own grammar."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lab.environment import MissingError
from trials.configs.compared import Case, generated, genuine, ours


def main() -> int:
    """Compare. Returns 1 if any configuration is read differently."""
    parser = argparse.ArgumentParser(prog="python -m trials.configs", description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000, metavar="N", help="configurations (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="which ones (%(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write them, and what LibVMI reads, to this file")
    options = parser.parse_args()
    texts = generated(options.runs, options.seed)
    try:
        cases = [Case(text, theirs) for text, theirs in zip(texts, genuine(texts), strict=True)]
    except MissingError as error:
        print(f"configs: {error}", file=sys.stderr)
        return 2
    different = [case for case in cases if ours(case.text) != case.theirs]
    for case in different:
        print(f"{case.text!r}\n  LibVMI: {case.theirs}\n  ours:   {ours(case.text)}")
    valid = sum(case.theirs is not None for case in cases)
    print(f"configs: {len(cases):,} configurations, {valid:,} of them valid; {len(different):,} read differently")
    if options.record:
        lines = (json.dumps([case.text.decode("latin-1"), case.theirs]) for case in cases)
        options.record.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
