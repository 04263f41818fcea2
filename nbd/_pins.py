# SPDX-License-Identifier: LGPL-2.0-or-later
"""The caller's memory in C: which is pinned, and which is copied.

A buffer is pinned by the cdata that ffi.from_buffer makes: as long as that lives, CPython does not
resize the object.  For a call that waits, the method's own frame holds it; for a command in flight,
the registry of nbd._callbacks does.

PyPy resizes an object although it is pinned, and the memory that libnbd was given is then gone.  So
there a command in flight works on a copy, which the completion brings back (BOUNCES), unless the
buffer is an nbd.Buffer or bytes, which are never resized.
"""

from __future__ import annotations

import errno
import sys
from operator import index

from nbd._ffi import ffi
from nbd.buffer import Buffer
from nbd.error import Error
from nbd.memory import CHARS, LARGE, allocate_uncleared, new_bytearray, room_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nbd.memory import Room

BOUNCES = sys.implementation.name == "pypy"

#: More than any libnbd reads in one request: not even allocated.
_TOO_LARGE = 2**30
_SIZE_MAX = 2 ** (8 * ffi.sizeof("size_t")) - 1

_from_buffer = ffi.from_buffer


def read_into(count: int) -> tuple[bytearray | None, Any, int]:
    """A new bytearray for a read of count bytes, its memory and its size.

    On PyPy only memory: there it is faster to copy that into a bytearray afterwards (copy_out).
    """
    size = index(count)
    if 0 <= size < LARGE and not BOUNCES:
        small = bytearray(size)
        return small, _from_buffer(small), size
    if size < 0:
        raise ValueError(f"count: {size} is negative")
    if size > _SIZE_MAX:
        raise OverflowError(f"count: {size} is not between 0 and {_SIZE_MAX}")
    if size > _TOO_LARGE:
        raise Error(
            f"count: {size} is more than libnbd reads at once (64 MiB); read it in pieces",
            errno.ERANGE,
        )
    if BOUNCES:
        return None, allocate_uncleared("char[]", size), size
    large, _ = new_bytearray(size)
    return large, _from_buffer(large), size


def copy_out(pointer: Any, size: int) -> bytearray:
    """What was read, in a new bytearray."""
    return bytearray(ffi.buffer(pointer, size))


def readable(name: str, buffer: Any) -> Room:
    """The memory of a bytes-like object or nbd.Buffer that a call reads while it waits."""
    if isinstance(buffer, Buffer):
        buffer._fill()
        return buffer._memory.room
    try:
        return room_of(buffer)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def held_data(name: str, buffer: Any) -> Room:
    """The same for a command in flight."""
    room = readable(name, buffer)
    if BOUNCES and not isinstance(buffer, (Buffer, bytes)):
        pointer, size, _ = room
        copy = ffi.new("char[]", size)
        ffi.memmove(copy, pointer, size)
        return copy, size, copy
    return room


def held_room(name: str, buffer: Any) -> tuple[Room, bool]:
    """The memory of a writable object or nbd.Buffer that a command in flight writes.

    The second value says that it holds bytes which must not be seen: the shim overwrites them.
    """
    if buffer.__class__ is bytearray and not BOUNCES:
        pin = _from_buffer(CHARS, buffer)
        return (pin, len(pin), pin), False
    if isinstance(buffer, Buffer):
        memory = buffer._memory
        if not buffer._is_private and memoryview(memory.storage).readonly:
            raise _unusable(name, memory.storage, BufferError())
        is_stale = not buffer._is_written
        buffer._is_written = True
        return memory.room, is_stale
    try:
        room = room_of(buffer, True)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None
    if BOUNCES:
        copy = ffi.new("char[]", room[1])
        return (copy, room[1], copy), False
    return room, False


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


def copy_back(buffer: Any, room: Room) -> None:
    """Bring what a command read into a copy to the caller's object."""
    if not isinstance(buffer, Buffer):
        try:
            memoryview(buffer).cast("B")[:] = ffi.buffer(*room[:2])
        except ValueError:
            raise BufferError(
                "the buffer was resized while a command was reading into it: what it read is lost"
            ) from None


def part(buffer: Any, room: Room, start: Any, count: int) -> memoryview:
    """A read-only view of the count bytes at start, which is inside the room."""
    pointer, size, _ = room
    offset = ffi.cast("char *", start) - ffi.cast("char *", pointer)
    if BOUNCES:
        buffer = ffi.buffer(pointer, size)
    elif isinstance(buffer, Buffer):
        buffer = buffer._exposed()
    return memoryview(buffer).cast("B")[offset : offset + count].toreadonly()
