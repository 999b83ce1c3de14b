"""What words point to, according to the guest's BTF: only where a structure is can a read be one of its members."""

from __future__ import annotations

from vmishim.client import Remote
from vmishim.readahead.catalogue import KernelList
from vmishim.readahead.fields import WORD, Column, Path
from vmishim.readahead.snapshot import Snapshot

ARRAY, UNTYPED = 4096, 256
"""Bytes above a pointer within which a read counts as one of what it points to: for a pointer to pointers, and for
one to void or characters. What any other points to is as large as its type says."""


class Pointees:
    """Types of what columns point to, asked of the agent as needed and remembered."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._pointees: dict[str, list[int] | None] = {}

    def ask(self, kernel_list: KernelList, snapshot: Snapshot) -> None:
        """Learn about all columns of a snapshot that are not known yet."""
        if not kernel_list.struct:
            return
        while True:  # a column has a type once what leads to it has one
            asked = [self._question(kernel_list, path, offset) for path, offset, _ in snapshot.candidates]
            unknown = sorted({question for question in asked if question and question not in self._pointees})
            if not unknown:
                return
            self._pointees.update(zip(unknown, self._remote.pointees(unknown), strict=True))

    def reach(self, kernel_list: KernelList, column: Column) -> int:
        """Bytes above where a column points to that belong to what is there; 0 when its words are no pointers."""
        path, offset, _ = column
        question = self._question(kernel_list, path, offset)
        if not question:
            return UNTYPED
        pointee = self._pointees.get(question)
        if pointee is None:
            return 0
        size = pointee[1]
        return size if size > WORD else ARRAY if size == WORD else UNTYPED

    def _question(self, kernel_list: KernelList, path: Path, offset: int) -> str:
        """How to ask for the word at ``offset`` of what ``path`` leads to; empty when its type is not known, as
        behind a ``void *``."""
        of_type = kernel_list.struct
        if not of_type:
            return ""
        for at, hop in enumerate(path):
            ring = next((inner.struct for inner in kernel_list.inner if inner.root == path[: at + 1]), None)
            if ring is not None:
                of_type = ring
                continue
            pointee = self._pointees.get(f"{of_type} {hop.offset}")
            if pointee is None or pointee[1] <= 1:
                return ""
            of_type = f"#{pointee[0]}"
        return f"{of_type} {offset}"
