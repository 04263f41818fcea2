"""Files that nbd.open returns, and how tests read them."""

from __future__ import annotations

from typing import Any

#: Values of `buffering`: no buffer, a small one, and the default.
BUFFERINGS = [0, 1000, -1]


def raw_of(disk: Any) -> Any:
    """Return the unbuffered file below a buffer, or the file itself if it has no buffer."""
    return getattr(disk, "raw", disk)


def read_fully(disk: Any, count: int) -> bytes:
    """Read count bytes, or up to the end: an unbuffered file may need more than one read."""
    data = b""
    while len(data) < count:
        more = disk.read(count - len(data))
        if not more:
            break
        data += more
    return data
