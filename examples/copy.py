# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copy a disk from one server to another, with many commands in flight on both sides.

One thread drives both connections.  What the source knows to be zeroes is not sent: the
destination is told to zero it.  On a terminal a bar shows how far the copy is.

    python copy.py                            # from one nbdkit to another
    python copy.py nbd://here/disk nbd://there/disk
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from typing import Any

import nbd

SOURCE = ["nbdkit", "-s", "--exit-with-parent", "sparse-random", "256M", "seed=1"]
DESTINATION = ["nbdkit", "-s", "--exit-with-parent", "memory", "256M"]
BLOCK = 256 * 1024  # bytes read and written at once
DEPTH = 32  # how many blocks are on their way
ASK = 2**30  # bytes of the disk whose extents are asked for at once
READ, WRITE = nbd.AIO_DIRECTION_READ, nbd.AIO_DIRECTION_WRITE


def extents(h: nbd.NBD) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, length, flags) from the start of the disk to its end."""
    position, size = 0, h.get_size()
    entries: list[int] = []
    while position < size:
        entries.clear()
        h.block_status(min(ASK, size - position), position, lambda *a: entries.extend(a[2]))
        if not any(entries[::2]):
            sys.exit(f"the server has nothing to say about what is at {position}")
        for length, flags in zip(entries[::2], entries[1::2]):
            yield position, min(length, size - position), flags
            position += length


def pieces(source: nbd.NBD, destination: nbd.NBD) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, whether it is zero) from start to end, cut at whole blocks."""
    size, done = source.get_size(), 0
    can_skip = source.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) and destination.can_zero()
    for offset, length, flags in extents(source) if can_skip else [(0, size, 0)]:
        is_zero, end = bool(flags & nbd.STATE_ZERO), offset + length
        if is_zero and end < size:
            end -= end % BLOCK
        while done < end:
            step = min(ASK, end - done) if is_zero else min(BLOCK, size - done)
            yield done, step, is_zero
            done += step


def wait(*handles: nbd.NBD) -> None:
    """Wait until a connection can go on, and let it."""
    readers = {h.aio_get_fd(): h for h in handles if h.aio_get_direction() & READ}
    writers = {h.aio_get_fd(): h for h in handles if h.aio_get_direction() & WRITE}
    readable, writable, _ = select.select(readers, writers, [])
    for fd in readable:
        readers[fd].aio_notify_read()
    for fd in set(writable).difference(readable):
        writers[fd].aio_notify_write()


def completed(h: nbd.NBD, commands: dict[int, Any]) -> Iterator[Any]:
    """Retire what is done, and yield what was noted for it; nbd.Error if it failed."""
    while commands and (cookie := h.aio_peek_command_completed()):
        h.aio_command_completed(cookie)
        yield commands.pop(cookie)


def copy(source: nbd.NBD, destination: nbd.NBD) -> None:
    """Copy all of the source; the destination is at least as large."""
    size, done = source.get_size(), 0
    todo = pieces(source, destination)
    reads: dict[int, tuple[int, nbd.Buffer]] = {}
    writes: dict[int, tuple[int, nbd.Buffer | None]] = {}
    spare: list[nbd.Buffer] = []
    while done < size:
        while len(reads) + len(writes) < DEPTH and (piece := next(todo, None)):
            offset, length, is_zero = piece
            if is_zero:
                writes[destination.aio_zero(length, offset)] = length, None
            else:
                buffer = spare.pop() if spare and length == BLOCK else nbd.Buffer(length)
                reads[source.aio_pread(buffer, offset)] = offset, buffer
        wait(*([source] if reads else []), *([destination] if writes else []))
        for offset, buffer in completed(source, reads):
            writes[destination.aio_pwrite(buffer, offset)] = len(buffer), buffer
        for length, used in completed(destination, writes):
            spare += [used] if used and length == BLOCK else []
            done += length
            if sys.stderr.isatty():
                print(f"\r{done / size:4.0%} {'#' * (64 * done // size)}", end="", file=sys.stderr)
    if destination.can_flush():
        destination.flush()


def main() -> None:
    """Copy between the URIs in the arguments, or between two servers that are started for it."""
    with nbd.NBD() as source, nbd.NBD() as destination:
        source.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        source.set_pread_initialize(False)  # the buffer of a read that failed is not looked at
        if len(sys.argv) > 2:
            source.connect_uri(sys.argv[1])
            destination.connect_uri(sys.argv[2])
        else:
            source.connect_command(SOURCE)
            destination.connect_command(DESTINATION)
        if source.get_size() > destination.get_size():
            sys.exit("the destination is smaller than the source")
        copy(source, destination)
        print("\n" * sys.stderr.isatty() + f"copied {source.get_size()} bytes")
        source.shutdown()
        destination.shutdown()


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
