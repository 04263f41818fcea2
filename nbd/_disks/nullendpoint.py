# SPDX-License-Identifier: LGPL-2.0-or-later
"""The endpoint that discards what is written to it: with it, a copy only reads its source."""

from __future__ import annotations

from nbd._disks.endpoints import Endpoint, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbd._disks.endpoints import Data
    from nbd._disks.queue import ShimQueue


class Null(Endpoint):
    """A target of any size that keeps nothing."""

    name = "nothing"
    discards = True
    max_workers = 2**31

    def writer(self) -> Writer:
        """Begin to write from the beginning."""
        return _NullWriter()

    def add_to(self, queue: ShimQueue, side: int, worker: int, workers: int) -> None:
        """Have a queue discard what it reads."""
        queue.add_null()

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """Nothing is known about what was written."""
        yield from ()

    def write_at(self, data: memoryview, offset: int) -> None:
        """Discard the bytes."""

    def zero_at(self, offset: int, length: int) -> bool:
        """Discard the zeroes."""
        return True

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _NullWriter(Writer):
    def write(self, data: Data) -> None:
        """Discard the bytes."""
