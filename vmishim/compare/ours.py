"""Runs a script on one of vmishim's own backends: its argument is the task's file. See `recorder`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from vmishim.compare.recorder import Recording
from vmishim.guests.domains import Domain
from vmishim.guests.resolver import Resolver, reach
from vmishim.guests.target import Target
from vmishim.libvmi import Libvmi
from vmishim.script import Inherited, execute


def main() -> int:
    """Run the script, and return its exit status.

    The task has ``script``, ``arguments``, ``record`` and ``output`` as in `recorder`; ``entry``, the guest's entry in
    ``domains.toml``, which stands for every domain's name; ``strategy``, how to read through an agent.
    """
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    entry, recording = Domain(**task["entry"]), Recording()
    targets: list[Target] = []

    def counted(domain: Domain) -> Target:
        # Not ``domain``, of which the script may have changed the endpoint: one guest is compared with itself.
        target = reach(replace(entry, name=domain.name), task["strategy"])
        targets.append(target)
        return target

    resolver = Resolver(find=lambda name, _: replace(entry, name=name), reach=counted)

    begun = time.perf_counter()
    try:
        with recording.of(Libvmi, task["record"]):
            begun = time.perf_counter()
            return execute(task["script"], task["arguments"], resolver, Inherited(task["strategy"], task["entry"]))
    finally:
        seconds = time.perf_counter() - begun
        links = [target.agent.link for target in targets if target.agent is not None]
        recording.write(
            task["output"],
            seconds=seconds,
            requests=sum(link.requests for link in links) if links else None,
            carried=sum(link.bytes_sent + link.bytes_received for link in links) if links else None,
        )


if __name__ == "__main__":
    sys.exit(main())
