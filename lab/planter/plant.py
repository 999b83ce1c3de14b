"""Hold kernel memory and fill it as told: runs where the kernel is, in the guest or here, with the agent's own loader.

    plant.py PACKAGE OBJECT [INPUT OUTPUT]

PACKAGE is a folder or zip to import ``guest_agent`` from, OBJECT the compiled ``planter.bpf.c``. Orders come from
standard input, or from the named pipe INPUT: a line of JSON, then as many bytes as its ``size`` says. Each is answered
by a line of JSON on standard output or OUTPUT; the first answer, before any order, is the ground's address and size.

    {"do": "write", "at": A, "size": N}     N bytes of zlib follow, which go to A
    {"do": "stir", "rounds": [[[A, V], ..], ..]}   store V (u64) at A, and so on: round after round, again and again
    {"do": "rest"}                          end that; answered by the number of rounds
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import zlib
from pathlib import Path
from typing import IO, Any


class Stir:
    """Stores words over and over, in a thread, until it is told to rest."""

    def __init__(self, words: Any, rounds: list[list[list[int]]]) -> None:
        self.count = 0
        self._words = words
        self._rounds = [[(at // 8, value) for at, value in stores] for stores in rounds]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        words, rounds, stopped = self._words, self._rounds, self._stop.is_set
        while not stopped():
            for stores in rounds:
                for at, value in stores:
                    words[at] = value  # one store of eight bytes: no reader sees half a pointer
                self.count += 1

    def rest(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.count


def main(package: str, data: str, source: str = "/dev/stdin", target: str = "/dev/stdout") -> None:
    sys.path.insert(0, package)
    from guest_agent.programs import Programs

    programs = Programs(Path(data).read_bytes())
    if programs.run("survey"):
        raise SystemExit("the map has no first page")
    ground = programs.map("ground")
    words = memoryview(ground).cast("Q")
    address = int.from_bytes(programs.map("where")[:8], "little")
    stir: Stir | None = None
    with _opened(source, os.O_RDONLY, "rb") as orders, _opened(target, os.O_WRONLY, "wb") as answers:
        _say(answers, {"address": address, "size": len(ground)})
        for line in orders:
            order = json.loads(line)
            answer = 0
            match order["do"]:
                case "write":
                    content = zlib.decompress(orders.read(order["size"]))
                    ground[order["at"] : order["at"] + len(content)] = content
                case "stir":
                    stir = Stir(words, order["rounds"])
                case "rest":
                    assert stir is not None
                    answer = stir.rest()
            _say(answers, answer)


def _opened(path: str, way: int, mode: str) -> IO[bytes]:
    # Hold both ends of the named pipe open, so that it stays when a process that wrote an order exits.
    return open(os.open(path, os.O_RDWR if stat.S_ISFIFO(os.stat(path).st_mode) and path[:5] != "/dev/" else way), mode)


def _say(answers: IO[bytes], answer: Any) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
