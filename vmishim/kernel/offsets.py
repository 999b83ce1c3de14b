"""Offsets of structure members in a kernel without BTF: generated from its headers, and kept in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vmishim import files
from vmishim.errors import LibvmiError


@dataclass(frozen=True)
class Offsets:
    """Members of one kernel's structures.

    :ivar release: that kernel's ``uname -r``
    :ivar members: ``"task_struct comm"`` -> [offset, size] in bytes; a structure alone -> [0, its size]
    """

    release: str
    members: dict[str, list[int]]

    def to_json(self) -> str:
        """The text that `read` takes."""
        return json.dumps({"release": self.release, "members": self.members}, indent=2)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The offsets in a file. :raises LibvmiError: it cannot be read, another user can write or replace it, or
        it does not hold offsets"""
        try:
            found = json.loads(files.read_trusted(path))
            for name, place in found["members"].items():
                if len(place) != 2 or not all(type(number) is int and 0 <= number < 1 << 32 for number in place):
                    raise ValueError(f"{name!r} is not [offset, size]")
            return cls(str(found["release"]), found["members"])
        except OSError as error:
            raise LibvmiError(f"cannot read the offsets in {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LibvmiError(f"{path} holds no offsets as `vmishim offsets` writes them: {error}") from None
