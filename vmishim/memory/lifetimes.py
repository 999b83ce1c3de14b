"""How long bytes that were read stay valid."""

from __future__ import annotations

STALE = 1.0
"""Seconds after which bytes are forgotten outside a hold; LibVMI's KVM driver keeps pages as long (the age limit of its
page cache, libvmi/cache.c)."""
COMPANION_STALE = 0.1
"""Seconds after which a single read that came along with a listing is no longer used: a read that comes later is
probably not part of that listing."""
PID_STALE = 1.0
"""Seconds after which the page tables of a pid are looked up again outside a hold: pids are used again."""
