# SPDX-License-Identifier: LGPL-2.0-or-later
"""Show which parts of a disk hold data: as a strip on a terminal, and as lines of text elsewhere.

A server reports holes and data if the connection has negotiated the meta context base:allocation.
nbd.connect does that by default.

    python map.py                             # a disk that nbdkit generates
    python map.py nbd://localhost
    python map.py nbd://localhost | grep data
"""

from __future__ import annotations

import math
import shutil
import sys

import nbd

SERVER = ["nbdkit", "-s", "--exit-with-parent", "data", "size=64M"]
CONTENT = "data=0xff*8388608 @0x1000000 0xff*3000000 @0x2800000 0xff*98304 @0x3800000 0xff*7000000"
STATES = {0: "data", nbd.STATE_HOLE: "hole", nbd.STATE_ZERO: "zero"}
SHADES = "·░▒▓█" if sys.stdout.encoding.lower().startswith("utf") else " .-+#"


def strip(found: list[nbd.Extent], size: int, columns: int) -> str:
    """Draw the disk in one line; a column is the darker, the more of its bytes are data."""
    data = [0.0] * columns
    for offset, length, flags in found:
        column = offset * columns // size
        while not flags & nbd.STATE_ZERO and column * size < (offset + length) * columns:
            start, end = column * size / columns, (column + 1) * size / columns
            data[column] += (min(end, offset + length) - max(start, offset)) / (end - start)
            column += 1
    return "".join(SHADES[min(math.ceil(share * 4), 4)] for share in data)


def main() -> None:
    """Map the disk at the URI in the argument, or a disk of nbdkit."""
    with nbd.connect(sys.argv[1] if len(sys.argv) > 1 else [*SERVER, CONTENT]) as h:
        found, size = list(nbd.extents(h)), h.get_size()
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
