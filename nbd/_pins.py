# SPDX-License-Identifier: LGPL-2.0-or-later
"""The caller's memory in C: which is pinned, and which is copied.

A buffer is pinned by the cdata that ffi.from_buffer makes: as long as that lives, CPython does not
resize the object.  For a call that waits, the method's own frame holds it; for a command in flight,
the registry of nbd._callbacks does.

On PyPy that cdata lives until the next garbage collection; until PyPy 8 the object is resized all
the same, and the memory that libnbd was given is gone; from then on it cannot be resized for too
long.  So there libnbd works on a copy, which the completion brings back (BOUNCES), unless the
buffer is bytes or an nbd.Buffer with memory of its own, which are never resized.

To pin takes a while, too: on CPython a small read that waits goes to scratch memory, which is
pinned for good, and what it read is copied out.
"""

from __future__ import annotations

import sys

from nbd._ffi import ffi
from nbd.buffer import Buffer
from nbd.error import Error
from nbd.memory import (
    Shared,
    allocate,
    contiguous_size,
    free,
    new_bytearray,
    room_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from nbd.memory import Room

    # A bytearray and the address of its memory, which lasts as long as that lives.
    Pinned = tuple[bytearray, Any]
else:
    from _collections import deque  # which takes a fraction of the time of collections

BOUNCES = sys.implementation.name == "pypy"

#: More than any libnbd reads in one request: not even allocated.
_TOO_LARGE = 2**27
_LINE = 64
_SIZE_MAX = 2 ** (8 * ffi.sizeof("size_t")) - 1

#: The memory of a bytes-like object, pinned.
from_buffer = ffi.from_buffer
#: Let a bytearray be resized again whose memory from_buffer gave: on PyPy, too.
unpin = ffi.release

#: From this size on a read goes into its bytearray at once: to fill that with zeroes first takes no
#: longer than to copy the result.  On PyPy every one does.
SCRATCH = 0 if BOUNCES else 32 * 1024

# As many as there are reads at once, in threads and in debug callbacks; a few are kept.  One is put
# back after a read that succeeded, no other: nobody else is to have what libnbd may still write.
_scratches: deque[Pinned] = deque(maxlen=16)
take_scratch = _scratches.pop
put_back = _scratches.append


def new_scratch() -> Pinned:
    """Memory for one small read at a time, where take_scratch has none."""
    # At a cache line, not 16 bytes into a page: to copy to there takes AMD's Zen three times as
    # long.
    scratch = bytearray(SCRATCH + _LINE)
    start = -int(ffi.cast("uintptr_t", from_buffer(scratch))) % _LINE
    del scratch[:start]
    return scratch, from_buffer(scratch)


def new_result(size: int) -> Pinned:
    """A new bytearray for what is read, and its memory.

    Where the memory may outlive the call, on PyPy or in a callback's hands, end it with unpin.
    """
    _check_count(size)
    result, _ = new_bytearray(size)
    return result, from_buffer(result)


def _check_count(size: int) -> None:
    if size < 0:
        raise ValueError(f"count: {size} is negative")
    if size > _SIZE_MAX:
        raise OverflowError(f"count: {size} is not between 0 and {_SIZE_MAX}")
    if size > _TOO_LARGE:
        import errno

        raise Error(
            f"count: {size} is more than libnbd reads at once (64 MiB); read it in pieces",
            errno.ERANGE,
        )


def readable(name: str, buffer: Any) -> Room:
    """The memory of a bytes-like object or nbd.Buffer that libnbd reads.

    Bytes on CPython, whose address cffi passes on by itself, need not come here.
    """
    if isinstance(buffer, Buffer):
        buffer._fill()
        memory = buffer._memory
        if memory.__class__ is not Shared:
            return memory.room
        buffer = memory.storage
    try:
        if BOUNCES and not isinstance(buffer, bytes):
            size = contiguous_size(buffer)
            copy = allocate(size)
            ffi.memmove(copy, buffer, size)
            return copy, size, copy
        return room_of(buffer)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def held_room(name: str, buffer: Any) -> tuple[Room, bool]:
    """The memory of a writable object or nbd.Buffer that a command in flight writes.

    The second value says that it holds bytes which must not be seen: the shim overwrites them.  A
    bytearray on CPython, which takes no more than from_buffer, need not come here.
    """
    if isinstance(buffer, Buffer):
        memory = buffer._memory
        if memory.__class__ is not Shared:
            is_stale = not buffer._is_written
            buffer._is_written = True
            return memory.room, is_stale
        buffer = memory.storage
    try:
        if BOUNCES:
            size = contiguous_size(buffer, writable=True)
            copy = allocate(size, clear=True)
            return (copy, size, copy), False
        return room_of(buffer, True), False
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def disclaim(buffer: Any, is_stale: bool) -> None:
    """Undo held_room: the shim was not called."""
    if is_stale:
        buffer._is_written = False


def _unusable(name: str, buffer: Any, reason: Exception) -> Exception:
    """The exception for an object whose memory cannot be had: TypeError or BufferError."""
    try:
        view = memoryview(buffer)
    except TypeError:
        return TypeError(
            f"{name}: a bytes-like object or nbd.Buffer is needed, not {type(buffer).__name__}"
        )
    if not view.c_contiguous:
        return BufferError(f"{name}: the buffer is not contiguous; pass a copy, bytes(...)")
    if view.readonly:
        return BufferError(f"{name}: the buffer is read-only; pass a bytearray or nbd.Buffer")
    return BufferError(f"{name}: {reason}")


def _has_own(buffer: Any) -> bool:
    """Whether libnbd works on the buffer's own memory even on PyPy, and not on a copy."""
    return isinstance(buffer, Buffer) and buffer._memory.__class__ is not Shared


def copy_back(buffer: Any, room: Room) -> None:
    """Bring what a command read into a copy to the caller's object, and free the copy."""
    if _has_own(buffer):
        return
    if isinstance(buffer, Buffer):
        buffer = buffer._memory.storage
    pointer, size, _ = room
    if contiguous_size(buffer, writable=True) != size:
        raise BufferError(
            "the buffer was resized while a command was reading into it: what it read is lost"
        )
    ffi.memmove(buffer, pointer, size)
    free(pointer, size)


def part(buffer: Any, room: Room, start: int, count: int) -> memoryview:
    """A read-only view of the count bytes at start of a command's buffer.

    A room without a pin is the bytearray's own, of a call that waits.
    """
    pointer, size, pin = room
    if BOUNCES and pin is not None:
        if not _has_own(buffer):  # the copy is freed, and the callback may keep the view
            return memoryview(ffi.buffer(pointer + start, count)[:])
        buffer = ffi.buffer(pointer, size)
    elif isinstance(buffer, Buffer):
        buffer = buffer._exposed()
    view = memoryview(buffer)
    if buffer.__class__ is not bytearray:
        view = view.cast("B")
    if count != size:
        view = view[start : start + count]
    return view.toreadonly()
