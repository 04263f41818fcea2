# SPDX-License-Identifier: LGPL-2.0-or-later
"""Writing behind: the writes of a file that the server has not answered, and their first error."""

from __future__ import annotations

from nbd._core.errors import DiskError
from nbd._core.memory import BOUNCES
from nbd._core.readahead import PIECE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nbd._core.errors import Error
    from nbd._core.queue import Queue, Request

#: So many writes are in flight at the most: 8 MiB.
DEPTH = 32


class _Write:
    """A write in flight, and the memory it is written from."""

    __slots__ = ("memory", "request")

    def __init__(self, request: Request, memory: Any) -> None:
        self.request = request
        self.memory = memory


class WriteBehind:
    """The writes in flight of one file.

    Args:
        queue: The queue of the file.
        wait: Waits until the server has done something.
    """

    def __init__(self, queue: Queue, wait: Callable[[], None]) -> None:
        self._queue = queue
        self._wait = wait
        self._flying: list[_Write] = []
        self._free: list[bytearray] = []
        self._failure: Error | None = None  # the first that was not raised yet

    def add(self, data: memoryview, at: int) -> None:
        """Copy at most PIECE bytes and send them; waits while too many writes are in flight."""
        while len(self._flying) >= DEPTH:
            self._reap()
            if len(self._flying) >= DEPTH:
                self._wait()
        if BOUNCES:
            memory: Any = bytes(data)
            source: Any = memory
        else:
            memory = self._free.pop() if self._free else bytearray(PIECE)
            source = memoryview(memory)[: len(data)]
            source[:] = data
        self._flying.append(_Write(self._queue.write(source, at), memory))

    def finish(self, start: int, end: int) -> None:
        """Wait for the writes to a range: NBD does not order commands."""
        for write in self._flying:
            request = write.request
            if request.offset < end and start < request.offset + request.length:
                while not request.is_done:
                    self._wait()
        self._reap()

    def raise_failure(self) -> None:
        """Raise the first error of the writes that are done, once."""
        self._reap()
        failure = self._failure
        if failure is None:
            return
        try:
            raise DiskError(*failure.args)
        except DiskError:
            self._failure = None
            raise

    def _reap(self) -> None:
        """Forget the writes that are done, and note the first error."""
        for write in [one for one in self._flying if one.request.is_done]:
            if self._failure is None:
                self._failure = write.request.error
            # In this order: memory that is in both lists would be given to two writes.
            self._flying.remove(write)
            if not BOUNCES:
                self._free.append(write.memory)
