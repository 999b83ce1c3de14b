"""Images of memory as programs in the guest write them, by the formats' descriptions.

Source: LiME's ``doc/README.md``; AVML's ``src/image.rs``.
"""

from __future__ import annotations

import struct


def lime(ranges: dict[int, bytes]) -> bytes:
    """An image of LiME of these ranges, by physical address."""
    return b"".join(
        struct.pack("<4sIQQ8x", b"EMiL", 1, start, start + len(data) - 1) + data for start, data in ranges.items()
    )


def avml(ranges: dict[int, bytes]) -> bytes:
    """The same as ``avml --compress`` writes it."""
    import cramjam

    image = b""
    for start, data in ranges.items():
        frames = bytes(cramjam.snappy.compress(data))
        image += struct.pack("<4sIQQ8x", b"AVML", 2, start, start + len(data) - 1) + frames
        image += struct.pack("<Q", len(frames))
    return image
