"""drgn on a guest: `program` opens one as a ``drgn.Program`` (docs/drgn.md). Needs ``vmishim[drgn]``."""

from __future__ import annotations

from vmishim.drgn.guest import close, held, program, refresh

__all__ = ["close", "held", "program", "refresh"]
