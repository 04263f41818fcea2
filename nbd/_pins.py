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
from nbd.memory import new_bytearray

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BOUNCES = sys.implementation.name == "pypy"

#: More than any libnbd reads in one request: not even allocated.
_TOO_LARGE = 2**30
_SIZE_MAX = 2 ** (8 * ffi.sizeof("size_t")) - 1

_from_buffer = ffi.from_buffer


def read_into(count: int) -> tuple[bytearray, Any]:
    """A new bytearray for a read of count bytes, and its memory."""
    size = index(count)
    if size < 0:
        raise ValueError(f"count: {size} is negative")
    if size > _SIZE_MAX:
        raise OverflowError(f"count: {size} is not between 0 and {_SIZE_MAX}")
    if size > _TOO_LARGE:
        raise Error(
            f"count: {size} is more than libnbd reads at once (64 MiB); read it in pieces",
            errno.ERANGE,
        )
    fresh, _ = new_bytearray(size)
    return fresh, _from_buffer(fresh)


def readable(name: str, buffer: Any) -> Any:
    """The memory of a bytes-like object or nbd.Buffer that a call reads while it waits."""
    if isinstance(buffer, Buffer):
        buffer._fill()
        return buffer._pointer
    try:
        return _from_buffer(buffer)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def held_data(name: str, buffer: Any) -> Any:
    """The same for a command in flight."""
    memory = readable(name, buffer)
    if BOUNCES and not isinstance(buffer, (Buffer, bytes)):
        return ffi.new("char[]", ffi.buffer(memory)[:])
    return memory


def held_room(name: str, buffer: Any, handle: Any) -> Any:
    """The memory of a writable object or nbd.Buffer that a command in flight writes."""
    if isinstance(buffer, Buffer):
        if buffer._is_readonly:
            raise _unusable(name, buffer._storage, BufferError())
        return buffer._claim(handle)
    try:
        memory = _from_buffer(buffer, require_writable=True)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None
    return ffi.new("char[]", len(memory)) if BOUNCES else memory


def disclaim(buffer: Any) -> None:
    """Undo held_room: libnbd was not called."""
    if isinstance(buffer, Buffer):
        buffer._disclaim()


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


def copy_back(buffer: Any, memory: Any) -> None:
    """Bring what a command read into a copy to the caller's object."""
    if not isinstance(buffer, Buffer):
        try:
            memoryview(buffer).cast("B")[:] = ffi.buffer(memory)
        except ValueError:
            raise BufferError(
                "the buffer was resized while a command was reading into it: what it read is lost"
            ) from None


def part(buffer: Any, memory: Any, start: Any, count: int) -> memoryview:
    """A read-only view of the count bytes at start, which is inside memory."""
    offset = ffi.cast("char *", start) - ffi.cast("char *", memory)
    whole = memoryview(ffi.buffer(memory) if BOUNCES else _exporter(buffer)).cast("B")
    return whole[offset : offset + count].toreadonly()


def _exporter(buffer: Any) -> Any:
    """The object whose memory it is."""
    return buffer._storage if isinstance(buffer, Buffer) else buffer
