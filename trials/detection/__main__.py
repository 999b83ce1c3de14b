"""Plant every attack, and what only looks like one, in the lab VM of each kernel; write the table of docs/scan.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from lab.agent import install
from lab.kernels import kernels as known
from lab.vm import LabVM
from trials.detection.scenes import Attacks, Found, found, plant_benign
from vmishim.inspection.checks import CHECKS
from vmishim.inspection.scan import Scan, Scanned

PAGE = Path(__file__).parents[2] / "docs" / "scan.md"
BEGIN, END = "<!-- written by python -m trials.detection -->\n", "<!-- end -->\n"


def tried(kernel: str) -> dict[str, str]:
    """What each check did on one kernel, in a word or two: by check."""
    with LabVM.boot(kernel) as vm, closing(install(vm).connect()) as target:
        scan = Scan(target)
        clean = scan.look()
        plant_benign(vm)
        benign = scan.look()
        attacks = Attacks(vm, target.direct)
        attacked, expected = scan.look(), attacks.expected
        attacks.hide_module()
        hidden = scan.look()
        return {
            check.name: _word(check.name, [clean, benign], [(attacked, expected), (hidden, attacks.expected)])
            for check in CHECKS
        }


def _word(check: str, honest: Sequence[Scanned], attacked: Sequence[tuple[Scanned, Mapping[str, Found]]]) -> str:
    """What a check did with looks at an honest guest, and at an attacked one, with what must be found."""
    if any(check == name for seen in honest for name, _ in seen.unchecked):
        return "not checked"
    if any(check in found(seen.findings) for seen in honest):
        return "false finding"
    pairs = [(found(seen.findings).get(check, set()), expected.get(check, set())) for seen, expected in attacked]
    if not any(expected for _, expected in pairs):
        return "not tried"
    return "found, nothing else" if all(seen == expected for seen, expected in pairs) else "missed, or more"


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """The table, by kernel and check."""
    titles = "check", "planted", "looks like it, and is not found", *(f"Linux {kernel}" for kernel in results)
    lines = [
        f"| {' | '.join(titles)} |",
        "|---" * (3 + len(results)) + "|",
    ]
    for check in CHECKS:
        words = " | ".join(result[check.name] for result in results.values())
        lines.append(f"| `{check.name}` | {check.planted} | {check.benign} | {words} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it. Returns 1 if any check did anything but find what was planted."""
    parser = argparse.ArgumentParser(prog="python -m trials.detection", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(known()), help="only this; writes no table")
    kernels = parser.parse_args().kernel
    results = {kernel: tried(kernel) for kernel in kernels or known()}
    written = table(results)
    print(written, end="")
    if not kernels:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{written}\n{END}{rest.partition(END)[2]}")
    return 0 if {word for result in results.values() for word in result.values()} == {"found, nothing else"} else 1


if __name__ == "__main__":
    sys.exit(main())
