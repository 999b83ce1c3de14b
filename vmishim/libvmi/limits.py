"""How much is read at most where a hostile guest could make a call last: each is more than any real guest needs."""

STRING_LIMIT = 16 << 20
"""Bytes after which a string without an end is refused. LibVMI reads on; a hostile guest could make that last."""
COUNT_LIMIT = 1 << 36
"""Bytes of one read that no host could hold; refused with ``MemoryError``, as the genuine bindings do."""
TASK_LIMIT = 1 << 22
"""Tasks that Linux can have (``PID_MAX_LIMIT``): a longer list is a loop."""
PAGES_LIMIT = 1 << 22
"""Pages that ``get_va_pages`` lists, 16 GiB of the smallest: a hostile guest's tables can loop."""
HELD_PAGES = 1 << 18
"""Translations that are remembered within a hold: 1 GiB of the smallest pages."""
