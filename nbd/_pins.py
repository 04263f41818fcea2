# SPDX-License-Identifier: LGPL-2.0-or-later
"""The caller's memory in C: which is pinned, and which is copied.

A buffer is pinned by the cdata that ffi.from_buffer makes: as long as that lives, CPython does not
resize the object.  Its address and its size are taken together, so both are of the same moment.
For a call that waits, the method's own frame holds the pin; for a command in flight, the registry
of nbd._callbacks does.

On PyPy that cdata lives until the next garbage collection; until PyPy 8 the object is resized all
the same, and the memory that libnbd was given is gone; from then on it cannot be resized for too
long.  So there libnbd works on a bounce buffer (BOUNCES), whose bytes are brought back when they
have come, unless the buffer is bytes or an nbd.Buffer with memory of its own, which are never
resized.  To look at an object, and to copy from or to it, is one operation of a memoryview: no
other thread can resize it in between.

To pin takes a while, too: on CPython a small read that waits goes to scratch memory, which is
pinned for good, and what it read is copied out.
"""

from __future__ import annotations

import sys

from nbd._callbacks import keep, registry
from nbd._ffi import ffi
from nbd.buffer import Buffer
from nbd.error import Error
from nbd.memory import (
    NEVER_STALE,
    Shared,
    allocate,
    as_bytes,
    free,
    from_buffer,
    new_bytearray,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    # A bytearray and its pin.
    Pinned = tuple[bytearray, Any]
else:
    from _collections import deque  # which takes a fraction of the time of collections

BOUNCES = sys.implementation.name == "pypy"

#: More than any libnbd reads in one request: not even allocated.
_TOO_LARGE = 2**27
_LINE = 64
_SIZE_MAX = 2 ** (8 * ffi.sizeof("size_t")) - 1
_CHARS = ffi.typeof("char[]")

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
    """A new bytearray for what is read, and its pin.

    Where the memory may outlive the call, on PyPy or in a callback's hands, end it with unpin.
    """
    _check_count(size)
    result, _ = new_bytearray(size)
    return result, from_buffer(result)


def new_shown_result(size: int) -> Pinned:
    """The same for a read whose callback sees the bytes: on PyPy it could resize the bytearray."""
    if not BOUNCES:
        return new_result(size)
    _check_count(size)
    return bytearray(size), allocate(size, clear=True)


def shown_result(result: bytearray, pin: Any) -> bytearray:
    """What was read with new_shown_result, in the bytearray that the callback saw."""
    if not BOUNCES:
        unpin(pin)
        return result
    if len(result) != len(pin):  # the callback has resized it
        result = bytearray(len(pin))
    _copy_back(result, pin)
    free(pin, len(pin))
    return result


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


def readable(name: str, buffer: Any) -> tuple[Any, int, Any]:
    """The memory of a bytes-like object or nbd.Buffer that libnbd reads: address, size and pin.

    Bytes on CPython, whose address cffi passes on by itself, need not come here.
    """
    if issubclass(type(buffer), Buffer):
        memory = buffer._clean()
        if type(memory) is not Shared:
            return memory.pin, memory.size, memory.pin
        buffer = memory.storage
    try:
        if BOUNCES and type(buffer) is not bytes:
            buffer = _copy(buffer)
        return _pinned(buffer, False)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def writable(name: str, buffer: Any) -> tuple[Any, int, Any, Any, Any]:
    """The memory of a writable object or nbd.Buffer that a command in flight writes.

    A bytearray on CPython, which takes no more than from_buffer, need not come here.

    Returns:
        Its address, size, pin and state (enum nbdshim_state), and what has the caller's bytes.
        On PyPy the last is None where that is the pin itself.
    """
    state = NEVER_STALE
    if issubclass(type(buffer), Buffer):
        memory = buffer._memory
        if type(memory) is not Shared:
            pin = memory.pin
            return pin, len(pin), pin, memory.state, None if BOUNCES else memory.storage
        buffer = memory.storage
    try:
        if BOUNCES:
            size = _writable_size(buffer)
            pin = allocate(size, clear=True)
            return pin, size, pin, state, buffer
        return *_pinned(buffer, True), state, buffer
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def _pinned(buffer: Any, is_written: bool) -> tuple[Any, int, Any]:
    """The address, the size and the pin of an object; what cffi raises if it cannot be had.

    Of a memoryview the object behind it is pinned: until CPython 3.12.7 the garbage collector may
    clear a memoryview that is pinned, and crash (gh-77894).
    """
    view = from_buffer(_CHARS, buffer, is_written)
    if BOUNCES or not isinstance(buffer, memoryview):
        return view, len(view), view
    try:
        pin = from_buffer(buffer.obj)
    except (TypeError, ValueError, BufferError):
        pin = view
    return ffi.cast("char *", view), len(view), pin


def _copy(buffer: Any) -> bytes:
    with memoryview(buffer) as view:
        if not view.c_contiguous:
            raise BufferError
        return view.tobytes()


def _writable_size(buffer: Any) -> int:
    with memoryview(buffer) as view:
        if view.readonly or not view.c_contiguous:
            raise BufferError
        return view.nbytes


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


def bring_back(token: int) -> None:
    """Bring what a command read into its bounce buffer to the caller's object, and free the former.

    It can be done again where a signal handler's exception ends it.
    """
    callback, handle, target, pin = registry[token]
    try:
        _copy_back(target, pin)
    except BufferError as resized:
        keep(resized, token)
    registry[token] = (callback, handle, None, None)
    free(pin, len(pin))


def _copy_back(target: Any, pin: Any) -> None:
    with as_bytes(target) as whole:
        try:
            whole[:] = ffi.buffer(pin)[:]
        except ValueError:
            raise BufferError(
                "the buffer was resized while a command was reading into it: what it read is lost"
            ) from None


def part(target: Any, pin: Any, start: int, count: int) -> memoryview:
    """A read-only view of the count bytes at start of the caller's buffer."""
    if target is None:
        return memoryview(ffi.buffer(pin))[start : start + count].toreadonly()
    try:
        view = as_bytes(target)
    except ValueError:  # numpy has types that memoryview does not take; the pin holds the bytes
        view = memoryview(ffi.buffer(pin))
    if count != len(view):
        view = view[start : start + count]
    if BOUNCES:
        arrived = ffi.buffer(pin + start, count)[:]
        try:
            view[:] = arrived
        except ValueError:  # resized meanwhile: bring_back says so
            return memoryview(arrived)
    return view.toreadonly()
