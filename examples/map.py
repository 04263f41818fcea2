# SPDX-License-Identifier: LGPL-2.0-or-later
"""Show which parts of a disk hold data: as a strip on a terminal, as lines of text elsewhere.

A server tells holes from data if the connection negotiated the meta context base:allocation.

    python map.py                             # a disk that nbdkit makes up
    python map.py nbd://localhost
    python map.py nbd://localhost | grep data
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator

import nbd

SERVER = ["nbdkit", "-s", "--exit-with-parent", "data", "size=64M"]
CONTENT = "data=0xff*8388608 @0x1000000 0xff*3000000 @0x2800000 0xff*98304 @0x3800000 0xff*7000000"
ASK = 2**31  # bytes of the disk to ask about at once; 4 GiB is too much for some servers
STATES = {0: "data", nbd.STATE_HOLE: "hole", nbd.STATE_ZERO: "zero"}
SHADES = "·░▒▓█" if sys.stdout.encoding.lower().startswith("utf") else " .-+#"


def extents(h: nbd.NBD) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, length, flags) from the start of the disk to its end."""
    position, size = 0, h.get_size()
    entries: list[int] = []
    while position < size:
        entries.clear()
        h.block_status(min(ASK, size - position), position, lambda *a: entries.extend(a[2]))
        if not any(entries[::2]):
            sys.exit(f"the server has nothing to say about what is at {position}")
        for length, flags in zip(entries[::2], entries[1::2]):
            yield position, min(length, size - position), flags
            position += length


def strip(found: list[tuple[int, int, int]], size: int, columns: int) -> str:
    """Draw the disk in one line: the more data there is in a column's bytes, the darker it is."""
    data = [0.0] * columns
    for offset, length, flags in found:
        column = offset * columns // size
        while not flags & nbd.STATE_ZERO and column * size < (offset + length) * columns:
            start, end = column * size / columns, (column + 1) * size / columns
            data[column] += (min(end, offset + length) - max(start, offset)) / (end - start)
            column += 1
    return "".join(SHADES[min(math.ceil(share * 4), 4)] for share in data)


def main() -> None:
    """Map the disk at the URI in the argument, or one that is made for it."""
    with nbd.NBD() as h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if len(sys.argv) > 1:
            h.connect_uri(sys.argv[1])
        else:
            h.connect_command([*SERVER, CONTENT])
        found, size = list(extents(h)), h.get_size()
    if sys.stdout.isatty() and size:
        zero = sum(length for _, length, flags in found if flags & nbd.STATE_ZERO)
        print(strip(found, size, shutil.get_terminal_size().columns))
        print(f"{size} bytes in {len(found)} extents, {(size - zero) / size:.0%} of them data")
    else:
        for offset, length, flags in found:
            print(f"{offset:>14} {length:>14} {STATES.get(flags & 3, 'hole,zero')}")


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
