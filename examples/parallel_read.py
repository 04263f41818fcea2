# SPDX-License-Identifier: LGPL-2.0-or-later
"""Read a disk over several connections at a time, one thread for each: count its zero bytes.

More than one connection is safe where the server says so, with can_multi_conn: what was written and
flushed over one is then seen by all.  While a thread waits for the server the others run.

    python parallel_read.py                   # a disk that nbdkit makes up
    python parallel_read.py nbd://localhost
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import nbd

SERVER = ["nbdkit", "--exit-with-parent", "pattern", "64M"]
CONNECTIONS = 4
BLOCK = 4 * 1024 * 1024  # bytes read at once


def connect_all(stack: ExitStack) -> list[nbd.NBD]:
    """Return the connections; the stack closes them, the first one last."""
    if len(sys.argv) > 1:
        uri, first = sys.argv[1], stack.enter_context(nbd.connect(sys.argv[1]))
    else:
        first = stack.enter_context(nbd.NBD())
        first.connect_systemd_socket_activation(SERVER)
        uri = first.get_uri()
    count = CONNECTIONS if first.can_multi_conn() else 1
    return [first, *(stack.enter_context(nbd.connect(uri)) for _ in range(count - 1))]


def count_zeroes(h: nbd.NBD, start: int, end: int) -> int:
    """Return how many bytes from start to end are zero."""
    offsets = range(start, end, BLOCK)
    return sum(h.pread(min(BLOCK, end - offset), offset).count(0) for offset in offsets)


def main() -> None:
    """Give each connection an equal share of the disk."""
    with ExitStack() as stack:
        handles = connect_all(stack)
        size = handles[0].get_size()
        # Whole sectors: a server may refuse to read less.
        cuts = [size * i // len(handles) // 4096 * 4096 for i in range(len(handles))] + [size]
        with ThreadPoolExecutor(len(handles)) as pool:
            counts = list(pool.map(count_zeroes, handles, cuts[:-1], cuts[1:]))
        print(f"{sum(counts)} of {size} bytes are zero ({len(handles)} connections)")
        for h in handles:
            h.shutdown()


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
