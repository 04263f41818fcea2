# SPDX-License-Identifier: LGPL-2.0-or-later
"""Reading around what a source cannot read.

A range that could not be read is read again in parts, and each part that fails in smaller ones,
down to the source's minimum block size.  The ranges that fail then are bad.  They are reported to
the caller of the copy, who decides whether the copy continues with zeroes instead of them.
"""

from __future__ import annotations

from mmap import mmap
from time import monotonic

from nbd._disks.queue import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbd._disks.endpoints import Bad, Endpoint

#: A range is cut into at most this many parts, which are read at once.
MAX_PARTS = 16
#: The size of the smallest part, in bytes.  No disk has smaller sectors, so smaller parts would
#: take time and find nothing more.
MIN_PART = 512
#: How many seconds a copy that is about to fail searches for the exact range.
_MAX_SEARCH = 1.0


def rescued(source: Endpoint, offset: int, length: int, errnum: int) -> memoryview:
    """Read a range that could not be read at once.  The bad ranges in it are added to `bad` of
    the copy's settings.

    Args:
        source: The endpoint, which has offsets.
        offset, length: The range, in bytes.
        errnum: The errno with which reading it has failed.

    Returns:
        The bytes, with zeroes where they are bad.

    Raises:
        nbd.Error: The copy shall not continue: on_error of its settings is None, or returned false.
    """
    settings = source.settings
    on_error = settings.on_error
    deadline = None if on_error is not None else monotonic() + _MAX_SEARCH
    view = memoryview(mmap(-1, length))  # aligned to pages, as O_DIRECT needs it
    bad = merged(source.read_parts(view, offset, deadline))
    if on_error is None:
        raise source.failure(READ, *(bad[0] if bad else (offset, length, errnum)))
    for start, count, number in bad:
        view[start - offset : start - offset + count] = bytes(count)
        error = source.failure(READ, start, count, number)
        if not on_error(start, count, error):
            raise error
        settings.bad.append((start, count))
    return view


def parts(ranges: list[tuple[int, int]], block: int) -> Iterator[tuple[int, int]]:
    """Cut ranges into parts that begin at multiples of a block size."""
    for start, stop in ranges:
        step = max(1, -(-(stop - start) // (MAX_PARTS * block))) * block
        while start < stop:
            end = min(start - start % block + step, stop)
            yield start, end
            start = end


def is_past(deadline: float | None) -> bool:
    """Whether a time.monotonic() has passed; None never does."""
    return deadline is not None and monotonic() >= deadline


def merged(bad: list[Bad]) -> list[Bad]:
    """Sort bad ranges, and join those that touch and have the same errno."""
    merged: list[Bad] = []
    for start, length, errnum in sorted(bad):
        if merged and (sum(merged[-1][:2]), merged[-1][2]) == (start, errnum):
            merged[-1] = merged[-1][0], merged[-1][1] + length, errnum
        else:
            merged.append((start, length, errnum))
    return merged
