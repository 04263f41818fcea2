# SPDX-License-Identifier: LGPL-2.0-or-later
"""Check that disks can be read, all of them concurrently in one event loop, and show the progress.

Holes are not read.  A range that cannot be read is reported, and the check continues after it.

    python asyncio_check.py                   # three disks of nbdkit
    python asyncio_check.py nbd://server/one nbd://server/two
"""

from __future__ import annotations

import asyncio
import sys

import nbd

SERVERS = [["nbdkit", "-s", "--exit-with-parent", "pattern", size] for size in ("4M", "8M", "16M")]
BLOCK = 256 * 1024  # bytes read at once
DEPTH = 8  # reads in flight for each disk


class Check:
    """The check of one disk.

    Attributes:
        done, total: Bytes.
        bad: The offset and length of each block that cannot be read.
    """

    def __init__(self, where: str | list[str]) -> None:
        self.where = where
        self.done = self.total = 0
        self.bad: list[tuple[int, int]] = []

    async def run(self) -> None:
        """Read all data of the disk."""
        async with nbd.aio.connect(self.where, depth=DEPTH, timeout=60) as disk:
            self.total = disk.get_size()
            extents = [(0, self.total, 0)]
            if disk.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
                extents = [tuple(extent) async for extent in disk.extents()]
            for offset, length, flags in extents:
                if flags & nbd.STATE_HOLE:
                    self.done += length
                else:
                    await self.read(disk, offset, offset + length)

    async def read(self, disk: nbd.aio.Client, start: int, end: int) -> None:
        """Read a range with several tasks, each of which takes the next block."""
        offsets = iter(range(start, end, BLOCK))

        async def worker() -> None:
            buffer = nbd.Buffer(BLOCK)
            for offset in offsets:
                count = min(BLOCK, end - offset)
                try:
                    await disk.pread_into(buffer if count == BLOCK else nbd.Buffer(count), offset)
                except nbd.Error:
                    self.bad.append((offset, count))
                self.done += count

        await asyncio.gather(*(worker() for _ in range(DEPTH)))


async def show_progress(checks: list[Check]) -> None:
    """Show the total progress, in one line of a terminal."""
    try:
        while sys.stderr.isatty():
            done, total = sum(check.done for check in checks), sum(check.total for check in checks)
            print(f"\r{done} of {total} bytes\033[K", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.1)
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


async def main() -> int:
    """Check the disks at the URIs in the arguments; returns the exit status."""
    checks = [Check(where) for where in sys.argv[1:] or SERVERS]
    progress = asyncio.create_task(show_progress(checks))
    outcomes = await asyncio.gather(*(check.run() for check in checks), return_exceptions=True)
    progress.cancel()
    await asyncio.wait([progress])
    for number, (check, outcome) in enumerate(zip(checks, outcomes), 1):
        print(f"disk {number}: {outcome or f'{check.total} bytes, {len(check.bad)} bad'}")
        for offset, length in sorted(check.bad):
            print(f"    cannot read {length} bytes at offset {offset}")
    return int(any(outcomes) or any(check.bad for check in checks))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
