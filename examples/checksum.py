# SPDX-License-Identifier: LGPL-2.0-or-later
"""Print the SHA-256 checksum of a disk, and read ahead while the last block is being digested.

Several reads are in flight, so that the server never waits for the program.

    python checksum.py                        # a disk that nbdkit makes up
    python checksum.py nbd://localhost
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque

import nbd

SERVER = ["nbdkit", "-s", "--exit-with-parent", "pattern", "64M"]
BLOCK = 1024 * 1024  # bytes read at once
DEPTH = 8  # reads that are in flight


def checksum(h: nbd.NBD) -> str:
    """Return the checksum of the whole disk as hexadecimal digits."""
    digest = hashlib.sha256()
    offsets = iter(range(0, h.get_size(), BLOCK))
    in_flight: deque[tuple[int, bytearray]] = deque()
    while True:
        while len(in_flight) < DEPTH and (offset := next(offsets, None)) is not None:
            buffer = bytearray(min(BLOCK, h.get_size() - offset))
            in_flight.append((h.aio_pread(buffer, offset), buffer))
        if not in_flight:
            return digest.hexdigest()
        # Replies come in any order, but only the oldest block can be digested next.
        cookie, buffer = in_flight.popleft()
        while not h.aio_command_completed(cookie):
            h.poll(-1)
        digest.update(buffer)


def main() -> None:
    """Check the disk at the URI in the argument, or one that is made for it."""
    with nbd.NBD() as h:
        if len(sys.argv) > 1:
            h.connect_uri(sys.argv[1])
        else:
            h.connect_command(SERVER)
        print(f"{checksum(h)}  {h.get_size()} bytes")
        h.shutdown()


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
