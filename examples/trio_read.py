# SPDX-License-Identifier: LGPL-2.0-or-later
"""Read a disk in trio, with the two things that any event loop needs: a descriptor and a step.

The connection is made in a thread.  Then one task waits until the descriptor of the queue is
readable, calls step, and wakes the tasks whose requests are done.  (pip install trio)

    python trio_read.py                       # a disk of nbdkit
    python trio_read.py nbd://localhost
"""

from __future__ import annotations

import sys

import trio

import nbd

SERVER = ["nbdkit", "-s", "--exit-with-parent", "pattern", "16M"]
BLOCK = 256 * 1024  # bytes read at once
DEPTH = 16  # reads in flight


class Disk:
    """A disk with awaitable reads."""

    def __init__(self, h: nbd.NBD) -> None:
        self.size = h.get_size()
        self._queue = nbd.queue.Queue(h, depth=DEPTH)
        self._waiting: dict[nbd.queue.Request, trio.Event] = {}

    async def serve(self) -> None:
        """Send and receive; this has to run while other tasks read."""
        while True:
            await trio.lowlevel.wait_readable(self._queue)
            for request in self._queue.step():
                event = self._waiting.pop(request, None)
                if event is not None:
                    event.set()

    async def read(self, count: int, offset: int) -> nbd.Buffer:
        """Read bytes.  If the task is cancelled, the request continues, and keeps its buffer."""
        buffer = nbd.Buffer(count)
        request = self._queue.read(buffer, offset)
        event = self._waiting[request] = trio.Event()
        try:
            await event.wait()
        finally:
            self._waiting.pop(request, None)
        if request.error is not None:
            raise request.error
        return buffer

    def close(self) -> None:
        """Close the queue, and drop requests that are in flight."""
        self._queue.close()


async def count_zeroes(disk: Disk) -> int:
    """Count the zero bytes of the disk."""
    counts: list[int] = []
    offsets = iter(range(0, disk.size, BLOCK))

    async def worker() -> None:
        for offset in offsets:
            data = await disk.read(min(BLOCK, disk.size - offset), offset)
            counts.append(bytes(data).count(0))

    async with trio.open_nursery() as nursery:
        for _ in range(DEPTH):
            nursery.start_soon(worker)
    return sum(counts)


async def main() -> None:
    """Read the disk at the URI in the argument, or a disk of nbdkit."""
    where = sys.argv[1] if len(sys.argv) > 1 else SERVER
    with await trio.to_thread.run_sync(nbd.connect, where) as h:
        disk = Disk(h)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.serve)
            print(f"{await count_zeroes(disk)} of {disk.size} bytes are zero")
            nursery.cancel_scope.cancel()
        disk.close()


if __name__ == "__main__":
    try:
        trio.run(main)
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
