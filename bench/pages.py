"""Write the pages about measurements again, from the records of the last measured runs: nothing is measured.

    python -m bench.pages

Needed after a change to what the pages say (`bench.report`, `bench.paper_page`, `bench.plot`).
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import paper_page, report, results, scale

ROOT = Path(__file__).parents[1]


def written() -> dict[Path, str]:
    """Each page, with what its record in docs/ gives."""
    docs, readme = ROOT / "docs", ROOT / "README.md"
    record = json.loads((docs / "benchmark.json").read_text())
    grounds = [results.from_json(ground) for ground in record["grounds"]]
    paper = paper_page.from_json(json.loads((docs / "paper.json").read_text()))
    fleet = json.loads((docs / "fleet.json").read_text())
    return {
        readme: report.marked(readme.read_text(), "bench", report.quote(grounds)),
        docs / "benchmark.md": report.document(grounds, record["command"], fleet),
        docs / "benchmark.svg": report.plotted(grounds),
        docs / "paper.md": paper_page.document(paper),
        docs / "paper.svg": paper_page.drawn(paper),
        docs / "scale.svg": scale.drawn(scale.from_json(json.loads((docs / "scale.json").read_text()))),
    }


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
