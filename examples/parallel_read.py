# SPDX-License-Identifier: LGPL-2.0-or-later
"""Count the zero bytes of a disk over several connections, with a thread for each.

Several connections are consistent if the server promises it (can_multi_conn): data that was written
and flushed over one is then visible to all.  While one thread waits for the server, the others run.

    python parallel_read.py                   # a disk that nbdkit generates
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
    """Connect, and let the stack close the connections, the first one last."""
    if len(sys.argv) > 1:
        uri, first = sys.argv[1], stack.enter_context(nbd.connect(sys.argv[1]))
    else:
        first = stack.enter_context(nbd.NBD())
        first.connect_systemd_socket_activation(SERVER)
        uri = first.get_uri()
    count = CONNECTIONS if first.can_multi_conn() else 1
    return [first, *(stack.enter_context(nbd.connect(uri)) for _ in range(count - 1))]


def count_zeroes(h: nbd.NBD, start: int, end: int) -> int:
    """Count the zero bytes from start to end."""
    offsets = range(start, end, BLOCK)
    return sum(h.pread(min(BLOCK, end - offset), offset).count(0) for offset in offsets)


def main() -> None:
    """Divide the disk equally among the connections."""
    with ExitStack() as stack:
        handles = connect_all(stack)
        size = handles[0].get_size()
        # Whole sectors, because a server may refuse smaller reads.
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
