# SPDX-License-Identifier: LGPL-2.0-or-later
"""Drive several connections from an event loop, which can watch other descriptors: here select().

The loop asks each handle for its descriptor and for the events to wait for, and notifies the handle
of them.  Any loop that can watch a descriptor works: poll, epoll, or that of a GUI.

    python event_loop.py                      # two disks of nbdkit
    python event_loop.py nbd://localhost/one nbd://localhost/two
"""

from __future__ import annotations

import select
import sys
from contextlib import ExitStack

import nbd

SERVERS = [["nbdkit", "-s", "--exit-with-parent", "pattern", size] for size in ("1M", "4M")]
BLOCK = 64 * 1024  # bytes read at once
DEPTH = 8  # reads in flight for each disk
READ, WRITE = nbd.AIO_DIRECTION_READ, nbd.AIO_DIRECTION_WRITE


class Reader:
    """Reads a disk from start to end; step() is called after every event."""

    def __init__(self, name: str, h: nbd.NBD) -> None:
        self.name, self.h = name, h
        self.position = self.size = self.done = 0
        self.cookies: list[int] = []

    def step(self) -> bool:
        """Retire completed reads, start others, and return whether any are in flight."""
        if self.h.aio_is_connecting():
            return True
        if not self.size:
            self.size = self.h.get_size()
            print(f"{self.name}: connected, {self.size} bytes")
        self.cookies = [one for one in self.cookies if not self.h.aio_command_completed(one)]
        while self.position < self.size and len(self.cookies) < DEPTH:
            count = min(BLOCK, self.size - self.position)
            self.cookies.append(self.h.aio_pread(nbd.Buffer(count), self.position))
            self.position += count
        if not self.cookies:
            print(f"{self.name}: read all of it")
        return bool(self.cookies)


def run(readers: list[Reader]) -> None:
    """Wait for all connections at once, until every reader is done."""
    while readers := [reader for reader in readers if reader.step()]:
        handles = {reader.h.aio_get_fd(): reader.h for reader in readers}
        inputs = [fd for fd, h in handles.items() if h.aio_get_direction() & READ]
        outputs = [fd for fd, h in handles.items() if h.aio_get_direction() & WRITE]
        # A program would add its other descriptors here, and pass the time to its next timer.
        readable, writable, _ = select.select(inputs, outputs, [])
        for fd in readable:
            handles[fd].aio_notify_read()
        # Reading may have changed the events that the handle waits for.
        for fd in set(writable).difference(readable):
            handles[fd].aio_notify_write()


def main() -> None:
    """Read the disks at the URIs in the arguments, or two disks of nbdkit."""
    with ExitStack() as stack:
        readers = []
        for number, where in enumerate(sys.argv[1:] or SERVERS, 1):
            h = stack.enter_context(nbd.NBD())
            if isinstance(where, str):
                h.aio_connect_uri(where)
            else:
                h.aio_connect_command(where)
            readers.append(Reader(f"disk {number}", h))
        run(readers)


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
