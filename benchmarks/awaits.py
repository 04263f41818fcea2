# SPDX-License-Identifier: LGPL-2.0-or-later
"""Reads that are awaited in asyncio's event loop.

For libnbd's own module, Callbacks is the client that its users would write by its manual: each
command has an nbd.Buffer and a future, which its completion callback resolves, and the event loop
watches the descriptor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import nbd


class Callbacks:
    """A client for libnbd's module, with the event loop watching its socket."""

    def __init__(self, uri: str) -> None:
        self._h = nbd.NBD()
        self._h.connect_uri(uri)
        self._loop = asyncio.get_running_loop()
        self._fd = self._h.aio_get_fd()
        self._is_writing = False
        self._loop.add_reader(self._fd, self._read)

    async def pread(self, count: int, offset: int) -> nbd.Buffer:
        buffer = nbd.Buffer(count)
        future: asyncio.Future[None] = self._loop.create_future()

        def completion(error: Any) -> int:
            if error.value:
                future.set_exception(OSError(error.value, "the command failed"))
            else:
                future.set_result(None)
            return 1

        self._h.aio_pread(buffer, offset, completion)
        self._look()
        await future
        return buffer

    async def close(self) -> None:
        self._loop.remove_reader(self._fd)
        del self._h  # older modules have no close()

    def _read(self) -> None:
        self._h.aio_notify_read()
        self._look()

    def _write(self) -> None:
        self._h.aio_notify_write()
        self._look()

    def _look(self) -> None:
        """Watch for writing only while libnbd has something to write."""
        is_writing = bool(self._h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE)
        if is_writing != self._is_writing:
            self._is_writing = is_writing
            if is_writing:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)


async def _read_all(disk: Any, offsets: Iterator[int], size: int) -> None:
    for offset in offsets:
        await disk.pread(size, offset)


async def _main(uri: str, offsets: Sequence[int], size: int, depth: int) -> None:
    disk: Any = await nbd.aio.connect(uri, depth=depth) if hasattr(nbd, "aio") else Callbacks(uri)
    todo = iter(offsets)
    await asyncio.gather(*(_read_all(disk, todo, size) for _ in range(depth)))
    await disk.close()


def read_all(uri: str, offsets: Sequence[int], size: int, depth: int) -> None:
    """Read at each offset, with ``depth`` tasks that each await one read at a time."""
    asyncio.run(_main(uri, offsets, size, depth))
