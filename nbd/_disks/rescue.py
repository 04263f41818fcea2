# SPDX-License-Identifier: LGPL-2.0-or-later
"""Reading around what a source cannot read.

A range of which a read has failed is read again in parts, and the parts that fail again in smaller
ones, down to the source's minimum block size.  What then is known to be bad is reported, and
becomes zeroes if the caller of the copy wants to continue.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from mmap import mmap
from time import monotonic

from nbd._binding.errors import DiskError, Error
from nbd._disks.diskendpoint import QUIET, TICK, Disk, late
from nbd._disks.queue import READ, ZERO, IdleTimer, Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nbd._disks.copy import Settings
    from nbd._disks.endpoints import File
    from nbd._disks.queue import Request

    # Where something cannot be read: offset, length and errno.
    Bad = tuple[int, int, int]

#: Into how many parts a range is cut, and how many of them are read at once.
_PARTS = 16
#: No disk has smaller sectors: smaller parts would cost time, and save nothing.
_MIN_PART = 512
#: What suits every descriptor with O_DIRECT.
_MIN_DIRECT = 4096
#: How many seconds a copy that fails looks for the exact place.
_MAX_SEARCH = 1.0


def rescued(
    source: Disk | File, offset: int, length: int, settings: Settings, errnum: int
) -> memoryview:
    """The bytes of a range that could not be read at once, with zeroes where they are bad.

    The bad ranges are added to `settings.bad`.

    Args:
        source: The side of the copy.
        offset, length: The range, in bytes.
        settings: Those of the copy; its `on_error` decides whether to continue.
        errnum: The errno with which the range could not be read.

    Raises:
        nbd.Error: The copy is not to continue.
    """
    on_error = settings.on_error
    until = None if on_error is not None else monotonic() + _MAX_SEARCH
    view = memoryview(mmap(-1, length))  # aligned to pages, as O_DIRECT needs it
    read = _read_disk if isinstance(source, Disk) else _read_file
    bad = _merged(read(source, offset, view, settings, until))
    if on_error is None:
        raise failure(READ, source, *(bad[0] if bad else (offset, length, errnum)))
    for start, count, number in bad:
        view[start - offset : start - offset + count] = bytes(count)
        error = failure(READ, source, start, count, number)
        if not on_error(start, count, error):
            raise error
        settings.bad.append((start, count))
    return view


def failure(operation: int, side: Any, offset: int, length: int, errnum: int) -> Error:
    """The exception for a command that has failed: READ was on the source, others on the target."""
    texts = {READ: "reading the source", ZERO: "zeroing the target"}
    what = texts.get(operation, "writing to the target")
    text = (
        f"nbd.copy: {what} failed at offset {offset}: {os.strerror(errnum)} "
        f"({length} bytes of {side.name})"
    )
    return Error(text, errnum) if isinstance(side, Disk) else DiskError(text, errnum)


@contextmanager
def short_queue(side: Disk, depth: int = 1) -> Iterator[Queue]:
    """A queue on the first connection of a disk.  If it fails, replies may come for a moment."""
    queue = Queue(side.handles[:1], depth=depth)
    try:
        yield queue
    finally:
        try:
            if len(queue):
                queue.wait(len(queue), QUIET)
        finally:
            queue.close()


def await_some(queue: Queue, settings: Settings) -> list[Request]:
    """Wait for requests of a queue, within the limits of the copy.

    Raises:
        nbd.Timeout: Nothing has moved for too long.
    """
    timer = IdleTimer(queue._shim_queue, settings.timeout)
    while True:
        settings.check()
        done = queue.wait(1, timer.remaining(TICK))
        if done:
            return done
        if timer.is_over():
            raise late(settings.timeout)


def _read_disk(
    source: Any, offset: int, view: memoryview, settings: Settings, until: float | None
) -> list[Bad]:
    """Read all that can be read; returns what cannot."""
    bad: list[Bad] = []
    with short_queue(source, _PARTS) as queue:
        block = max(_MIN_PART, queue.minimum)
        todo = [(offset, offset + len(view))]
        flying: dict[Request, tuple[int, int]] = {}
        while todo or flying:
            for start, stop in _parts(todo, block):
                request = queue.read(view[start - offset : stop - offset], start)
                flying[request] = start, stop
            todo = []
            for request in await_some(queue, settings):
                start, stop = flying.pop(request)
                if request.error is None:
                    continue
                if source.is_lost(queue._shim_queue):
                    raise failure(READ, source, start, stop - start, request.error.errnum)
                if stop - start <= block or _is_past(until):
                    bad.append((start, stop - start, request.error.errnum))
                else:
                    todo.append((start, stop))
    return bad


def _read_file(
    source: Any, offset: int, view: memoryview, settings: Settings, until: float | None
) -> list[Bad]:
    """The same for a file."""
    bad: list[Bad] = []
    is_direct = fcntl.fcntl(source.fd, fcntl.F_GETFL) & os.O_DIRECT
    block = _MIN_DIRECT if is_direct else _MIN_PART
    source.check_size(offset + len(view))
    todo = list(_parts([(offset, offset + len(view))], block))
    while todo:
        settings.check()
        start, stop = todo.pop()
        try:
            source.read_into(view[start - offset : stop - offset], start)
        except OSError as reason:
            if stop - start <= block or _is_past(until):
                bad.append((start, stop - start, reason.errno or 0))
            else:
                todo += _parts([(start, stop)], block)
    return bad


def _is_past(until: float | None) -> bool:
    return until is not None and monotonic() >= until


def _parts(ranges: list[tuple[int, int]], block: int) -> Iterator[tuple[int, int]]:
    """Ranges cut into parts that begin at blocks."""
    for start, stop in ranges:
        step = max(1, -(-(stop - start) // (_PARTS * block))) * block
        while start < stop:
            end = min(start - start % block + step, stop)
            yield start, end
            start = end


def _merged(bad: list[Bad]) -> list[Bad]:
    """The same in order, with those that touch and have one errno in one."""
    merged: list[Bad] = []
    for start, length, errnum in sorted(bad):
        if merged and (sum(merged[-1][:2]), merged[-1][2]) == (start, errnum):
            merged[-1] = merged[-1][0], merged[-1][1] + length, errnum
        else:
            merged.append((start, length, errnum))
    return merged
