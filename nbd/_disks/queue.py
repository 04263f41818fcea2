# SPDX-License-Identifier: LGPL-2.0-or-later
"""Many commands in flight: ShimQueue wraps the shim's queue, and nbd.queue.Queue wraps ShimQueue.

csrc/queue.h is the manual of the shim's queue.
"""

from __future__ import annotations

import os
from _thread import TIMEOUT_MAX, RLock
from collections import deque
from contextlib import suppress
from errno import ENOMEM, ETIMEDOUT
from math import isnan
from sys import is_finalizing
from time import monotonic

from nbd._binding.buffer import readable, writable
from nbd._binding.callbacks import forget, next_token, registry
from nbd._binding.convert import as_number
from nbd._binding.errors import (
    Error,
    Timeout,
    failure_of,
    pending,
    raise_pending,
    report_pending,
)
from nbd._binding.finalize import is_owned, owned
from nbd._binding.memory import BOUNCES, NEVER_STALE, copy_back, free, from_buffer, is_unowned
from nbd._binding.methods import NBD
from nbd._binding.shim import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Any, Protocol, TypeVar

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._binding.buffer import Buffer
    from nbd._binding.handle import Handle

    Self = TypeVar("Self", bound="Queue")

    class Moving(Protocol):
        """What an IdleTimer watches."""

        def last_moved(self) -> float:
            """Return when a byte last moved, by time.monotonic(); 0.0 if none has yet."""


TARGET, SOURCE = lib.NBDQUEUE_TARGET, lib.NBDQUEUE_SOURCE
READ, WRITE, ZERO = lib.NBDQUEUE_READ, lib.NBDQUEUE_WRITE, lib.NBDQUEUE_ZERO
TRIM, CACHE, FLUSH = lib.NBDQUEUE_TRIM, lib.NBDQUEUE_CACHE, lib.NBDQUEUE_FLUSH
COPY = lib.NBDQUEUE_COPY

#: The size of the largest command in bytes, unless the caller asks for another.
PIECE = 256 * 1024
#: The maximum number of handles on one side of a queue, and so of connections to a disk.
MAX_CONNECTIONS: int = lib.NBDQUEUE_MAX_HANDLES
#: The maximum number of commands in flight.
MAX_DEPTH = 4096
#: The maximum size of a command: NBD's specification asks every server to accept this much.
MAX_PIECE = 32 * 1024 * 1024
#: The size of a target that takes everything.
_MAX_SIZE = 2**63 - 1
_MAX_OFFSET = 2**64 - 1
_MAX_INT = 2**31 - 1
#: The maximum number of requests that one call of the shim reports.
_MAX_REPORTED = 256
_NAMES = {
    READ: "reading",
    WRITE: "writing",
    ZERO: "zeroing",
    TRIM: "trimming",
    CACHE: "caching",
    FLUSH: "flushing",
}

nbdqueue_submit = lib.nbdqueue_submit
nbdqueue_wait = lib.nbdqueue_wait
nbdqueue_step = lib.nbdqueue_step
nbdqueue_take = lib.nbdqueue_take


class ShimQueue:
    """The shim's queue, with the buffers of its requests and its exceptions.

    Attributes:
        q: The struct nbdqueue of C; NULL when it is closed.
        is_dropped: Whether `drop` or `close` was called.
        kept: The pins that keep buffers in place, by the token of each request.  The dictionary
            lives until no command can use a buffer any more, even if the ShimQueue is gone.
    """

    q: Any = ffi.NULL
    is_dropped: bool = False

    def __init__(self, depth: int, piece: int) -> None:
        depth = as_count("depth", depth, MAX_DEPTH)
        piece = as_count("piece", piece, MAX_PIECE)
        token = next_token()
        self.kept: dict[int, Any] = {}
        made = ffi.new("struct nbdqueue *[1]")
        try:
            registry[token] = self.kept
            _check_made(lib.nbdqueue_make(made, depth, piece, token))
            self.q = owned(made[0], lib.nbdqueue_destroy)
        except BaseException:
            if made[0] and not is_owned(made[0]):  # a signal handler raised between the two calls
                lib.nbdqueue_destroy(made[0])
            forget(token, None)
            raise
        self._handles: list[Handle] = []
        # Unused arrays for `wait` and `step`.  Each call takes one for itself, because a signal
        # handler may call `wait` while another call is running.
        self._arrays: list[Any] = []

    def add(self, side: int, handle: Handle) -> None:
        """Add a connected handle to one side, SOURCE or TARGET.

        A handle may join at any time, also while another thread waits.

        Raises:
            nbd.Error: The handle is not connected, or its export is too large.
            ValueError: The queue is closed, is full, or has this handle already; or the handle is
                connected to another export than the other handles.
        """
        if handle in self._handles:
            raise ValueError("handles: the same handle is given twice")
        result = lib.nbdqueue_add(self.q, side, handle._h)
        if result == lib.NBDSHIM_TOO_MANY:
            raise ValueError(f"handles: a queue takes at most {MAX_CONNECTIONS} of them")
        if result == lib.NBDSHIM_OTHER_EXPORT:
            raise ValueError(
                "handles: the size or the block sizes of its export differ from those of the "
                "others; all handles have to be connected to the same export"
            )
        if result == lib.NBDSHIM_CLOSED and not lib.nbdshim_check(handle._h):
            raise self.refused(result)
        if result < 0:
            raise failure_of(handle._h, result, "get_size")
        if pending:
            raise_pending(handle._h)
        self._handles.append(handle)

    def add_file(self, side: int, fd: int, base: int, size: int) -> None:
        """Make a file one side: `size` bytes of it, starting at `base`."""
        lib.nbdqueue_add_file(self.q, side, fd, base, size)

    def add_null(self) -> None:
        """Make nothing the target: what is written there is discarded."""
        lib.nbdqueue_add_null(self.q, _MAX_SIZE)

    def set_sparse(self, block: int, target_is_zero: bool) -> None:
        """Have copies find zeroes in blocks of `block` bytes; 0 is off.  See csrc/queue.h."""
        lib.nbdqueue_set_sparse(self.q, block, target_is_zero)

    def set_reconnect(self, side: int, bound: int) -> None:
        """Let the connections of a side be replaced when they are lost; see csrc/queue.h."""
        result = lib.nbdqueue_set_reconnect(self.q, side, bound)
        if result < 0:
            raise self.refused(result)

    def has(self, handle: Handle) -> bool:
        """Return whether a handle was added, and was not forgotten."""
        return handle in self._handles

    def forget(self, handle: Handle) -> None:
        """Drop the reference to a lost handle, whose place another one has taken."""
        with suppress(ValueError):  # it was dropped before
            self._handles.remove(handle)

    def losses(self) -> int:
        """Return how many connections that can be replaced were lost so far."""
        return int(lib.nbdqueue_losses(self.q))

    def answers(self, side: int) -> int:
        """Return how many commands of a side a server has answered so far."""
        return int(lib.nbdqueue_answers(self.q, side))

    def give_up(self, side: int, errnum: int) -> None:
        """Have all commands of a side fail with an errno: its connections were not replaced."""
        lib.nbdqueue_give_up(self.q, side, errnum)

    def submit(
        self, operation: int, token: int, pointer: Any, length: int, offset: int, flags: int
    ) -> None:
        """Submit a request; its pin has to be in `kept` already."""
        result = lib.nbdqueue_submit(self.q, operation, token, pointer, length, offset, flags)
        if result < 0:
            raise self.refused(result)

    def wait(self, least: int, timeout: float) -> tuple[Any, int]:
        """Wait with nbdqueue_wait until `least` requests are done.

        Returns:
            An array of struct nbdqueue_done, and how many of its elements are valid, at most
            _MAX_REPORTED.  Pass both to `take`: until then the same requests are reported again.
        """
        done = self._array()
        least = least if least < _MAX_INT else _MAX_INT
        count = nbdqueue_wait(self.q, done, _MAX_REPORTED, least, timeout)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._raise_pending()
        return done, count

    def fileno(self) -> int:
        """Return a descriptor that is readable when `step` has work; the queue closes it."""
        result: int = lib.nbdqueue_fd(self.q)
        if result == -1:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if result < 0:
            raise self.refused(result)
        return result

    def step(self) -> tuple[Any, int]:
        """Do what can be done without waiting; returns what `wait` returns."""
        done = self._array()
        count = nbdqueue_step(self.q, done, _MAX_REPORTED)
        if count < 0:
            raise self.refused(count)
        if pending:
            self._raise_pending()
        return done, count

    def error_of(self, handle: Handle) -> int:
        """Return the errno with which the connection of a handle ended, or 0 if it is alive."""
        return int(lib.nbdqueue_error(self.q, handle._h))

    def cancel(self, token: int) -> None:
        """Send no further commands for a request."""
        lib.nbdqueue_cancel(self.q, token)

    def take(self, done: Any, count: int) -> None:
        """Acknowledge the requests that `wait` or `step` reported, and reuse their array."""
        if count:
            nbdqueue_take(self.q, done, count)
        self._arrays.append(done)

    def last_moved(self) -> float:
        """Return when a byte last moved, by time.monotonic(); 0.0 if none has yet."""
        return float(lib.nbdqueue_last_moved(self.q))

    def _array(self) -> Any:
        """Return an array for reported requests that no other call uses."""
        try:
            return self._arrays.pop()
        except IndexError:
            return ffi.new("struct nbdqueue_done[]", _MAX_REPORTED)

    def wake(self) -> None:
        """End the wait of another thread, or the next wait if none is running."""
        lib.nbdqueue_wake(self.q)

    def drop(self) -> None:
        """Drop all requests without waiting for the server.

        Only the buffers of commands that were sent and have no reply yet are still kept.
        """
        self.is_dropped = True
        lib.nbdqueue_drop(self.q)
        for token in list(self.kept):
            if not lib.nbdqueue_uses(self.q, token):
                self.kept.pop(token, None)
        if pending:
            report_pending(self._handles[0]._h if self._handles else None)

    def close(self) -> None:
        """Drop the queue and free it; no other method may be called afterwards."""
        self.drop()
        self.q = ffi.NULL

    def __del__(self) -> None:
        if lib is None:  # see Handle.__del__
            return
        if is_finalizing():  # the interpreter is shutting down and can run no upcall
            lib.nbdshim_end_upcalls()
        if self.q:
            self.drop()

    def refused(self, result: int) -> BaseException:
        """Return the exception for a negative result of the shim, or raise a pending one."""
        if result == lib.NBDSHIM_CLOSED:
            return ValueError("the queue is closed, or is the parent process's; make a new one")
        if result == lib.NBDSHIM_NO_MEMORY:
            return MemoryError("no memory for a request")
        self._raise_pending(1)
        return failure_of(self._handles[0]._h if self._handles else None, result, "queue")

    def _raise_pending(self, first: int = 0) -> None:
        """Raise the exception of a signal handler or of a callback of one of the handles."""
        for handle in self._handles[first:]:
            raise_pending(handle._h)


class IdleTimer:
    """Measures how long nothing has moved, and compares that with a timeout.

    A process that was suspended for longer than the timeout does not time out for that reason:
    `ShimQueue.wait` checks the connections once more before it returns.

    Args:
        moving: What is watched.
        timeout: In seconds; None is for ever.
    """

    def __init__(self, moving: Moving, timeout: float | None) -> None:
        self._moving = moving
        self._timeout = timeout
        self.restart()

    def restart(self) -> None:
        """Start measuring now, as the caller starts to wait."""
        self._since = monotonic()

    def remaining(self, at_most: float | None = None) -> float:
        """Return how many seconds to wait, at most `at_most`; -1.0 is for ever."""
        if self._timeout is None:
            return -1.0 if at_most is None else at_most
        seconds = max(0.0, self._since_last_move() + self._timeout - monotonic())
        return seconds if at_most is None else min(seconds, at_most)

    def is_over(self) -> bool:
        """Return whether nothing has moved for the whole timeout."""
        return self._timeout is not None and not self.remaining()

    def _since_last_move(self) -> float:
        return max(self._since, self._moving.last_moved())


def timeout_error(
    what: str, seconds: float | None, advice: str = "try again, or allow more time"
) -> Timeout:
    """Return the exception for a wait that exceeded its timeout: "what 5 seconds; advice"."""
    return Timeout(f"{what} {seconds or 0:g} seconds; {advice}", ETIMEDOUT)


def _check_made(errnum: int) -> None:
    """Raise if a queue could not be made, for lack of memory or of a descriptor."""
    if errnum == ENOMEM:
        raise MemoryError("no memory for a queue")
    if errnum:
        raise OSError(errnum, f"{os.strerror(errnum)}: a queue needs a descriptor")


def as_timeout(timeout: float | None) -> float:
    """Convert a timeout for nbdqueue_wait: it takes seconds, and a negative number for ever.

    Raises:
        ValueError: The timeout is NaN.
    """
    if timeout is None:
        return -1.0
    seconds = float(timeout)
    if isnan(seconds):
        raise ValueError("timeout: nan is not a number of seconds; None is for ever")
    return max(0.0, seconds)


def as_count(name: str, value: object, largest: int | None = None) -> int:
    """Convert a number that has to be at least 1, and at most `largest` if that is given.

    Raises:
        TypeError: The value is not an int.
        ValueError: The number is out of range.
    """
    number = as_number(name, value)
    if largest is not None and not 1 <= number <= largest:
        raise ValueError(f"{name}: {number} is not between 1 and {largest}")
    if number < 1:
        raise ValueError(f"{name}: {number} is not at least 1")
    return number


def as_request(count: int, offset: int, flags: int) -> tuple[int, int, int]:
    """Convert the numbers of a request to exact ints, and check them.

    Raises:
        TypeError: One of them is not an int.
        ValueError: They are not a range of a disk, or not flags.
    """
    if not (type(count) is type(offset) is type(flags) is int):
        count, offset = as_number("count", count), as_number("offset", offset)
        flags = as_number("flags", flags)
    if not 0 <= offset <= _MAX_OFFSET or not 0 <= count <= _MAX_OFFSET - offset:
        raise ValueError(f"{count} bytes at offset {offset} are not a range of a disk")
    if not 0 <= flags < 2**32:
        raise ValueError(f"flags: {flags} is not between 0 and {2**32 - 1}")
    return count, offset, flags


def failure(operation: int, length: int, offset: int, errnum: int, at: int | None = None) -> Error:
    """Return the exception for a failed request; `at` is the offset of the piece that failed."""
    what = _NAMES[operation]
    where = "" if operation == FLUSH else f" {length} bytes at offset {offset}"
    place = "" if at is None or at == offset or operation == FLUSH else f" at offset {at}"
    return Error(f"{what}{where} failed{place}: {os.strerror(errnum)}", errnum)


class Request:
    """A request that was submitted to a queue.

    Attributes:
        offset: Where the range starts, in bytes from the start of the export.
        length: The size of the range in bytes.
        is_done: Whether the queue has reported the request.  From then on the caller may change
            and free the buffer.
        error: The nbd.Error with which the request failed, or None.
    """

    __module__ = "nbd.queue"
    __slots__ = (
        *("_is_new", "_operation", "_pin", "_target"),
        *("error", "is_done", "length", "offset"),
    )

    def __init__(self, operation: int, length: int, offset: int, pin: Any, target: Any) -> None:
        self._operation = operation
        self._pin = pin
        self._target = target
        self._is_new = True  # what was read was not copied to the caller's object (PyPy)
        self.length = length
        self.offset = offset
        self.is_done = False
        self.error: Error | None = None

    def __repr__(self) -> str:
        state = "in flight" if not self.is_done else "done" if self.error is None else "failed"
        return f"<nbd.queue.Request of {self.length} bytes at offset {self.offset}: {state}>"

    def _finish(self, errnum: int, offset: int) -> None:
        """Store the result and release the buffer.

        An exception may interrupt this at any bytecode; it is then called again.  A signal handler
        that waits on the same queue calls it in the midst of another call.
        """
        if errnum:
            self.error = failure(self._operation, self.length, self.offset, errnum, offset)
        if BOUNCES and self._pin is not None and self._target is not None:
            self._bring_back()
        self._pin = self._target = None
        self.is_done = True

    def _bring_back(self) -> None:
        """Copy what was read from the bounce buffer to the caller's object (PyPy).

        Copying can be repeated.  Only the call that began first frees the bounce buffer, as a later
        one may run in its midst; if an exception ends that call, the garbage collector frees it.
        """
        is_first = self._is_new
        self._is_new = False
        pin, target = self._pin, self._target
        if pin is None or target is None:  # a signal handler's call has done it
            return
        try:
            copy_back(target, pin)
        except BufferError:  # the object was resized: it can never be copied
            self._pin = self._target = None
            raise
        self._pin = self._target = None
        if is_first:
            free(pin)


class Queue:
    """Many commands in flight, over one handle or several handles of the same export.

    A request covers any range of the export: the queue cuts it into commands that fit the server's
    block size constraints.  An unaligned read is widened; an unaligned write is read, merged and
    written.  Only `wait` waits; it returns the requests that are done, in any order.

    Requests are not ordered: a read may be answered before a write that was submitted earlier.
    Where the order matters, wait in between.

    Args:
        handles: A connected nbd.NBD, or several that are connected to the same export.  Use
            several only if the server allows it (nbd.NBD.can_multi_conn).
        depth: The maximum number of commands in flight, from 1 to 4096.
        piece: The size of the largest command in bytes, from 1 to 32 MiB.

    Raises:
        nbd.Error: A handle is not connected.
        ValueError: depth or piece is out of range; no handle is given, or one is given twice.

    Example:
        >>> with nbd.queue.Queue(h, depth=8) as queue:
        ...     buffers = [bytearray(4096) for _ in range(8)]
        ...     requests = [queue.read(b, 4096 * i) for i, b in enumerate(buffers)]
        ...     while not all(request.is_done for request in requests):
        ...         for request in queue.wait():
        ...             if request.error:
        ...                 raise request.error

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_aio_trim, nbd_aio_cache, nbd_aio_flush.
    """

    __module__ = "nbd.queue"

    _shim_queue: ShimQueue

    def __init__(
        self, handles: NBD | Iterable[NBD], *, depth: int = 16, piece: int = PIECE
    ) -> None:
        several = [handles] if isinstance(handles, NBD) else list(handles)
        for handle in several:
            if not isinstance(handle, NBD):
                raise TypeError(f"handles: nbd.NBD is needed, not {type(handle).__name__}")
        if not several:
            raise ValueError("handles: at least one handle is needed")
        queue = ShimQueue(depth, piece)
        for handle in several:
            queue.add(TARGET, handle)
        self._shim_queue = queue
        # Threads that wait take turns.  Reentrant: a signal handler may call `wait` as well.
        self._lock = RLock()
        #: Requests that are done and that `wait` or `step` has not returned yet.
        self._finished: deque[Request] = deque()

    @property
    def size(self) -> int:
        """The size of the export in bytes."""
        return int(lib.nbdqueue_size(self._shim_queue.q, TARGET))

    @property
    def minimum(self) -> int:
        """The server's minimum block size in bytes; 1 if it does not say."""
        return int(lib.nbdqueue_minimum(self._shim_queue.q, TARGET))

    def __len__(self) -> int:
        """The number of requests that `wait` and `step` have not reported as done yet."""
        return int(lib.nbdqueue_length(self._shim_queue.q))

    def __bool__(self) -> bool:
        return True

    def read(self, buf: WriteableBuffer | Buffer, offset: int) -> Request:
        """Submit a read.

        Args:
            buf: Writable contiguous bytes-like object or nbd.Buffer, which is filled completely.
                The queue keeps it in place until the request is done.  On PyPy pass an nbd.Buffer.
            offset: Where to start, in bytes from the start of the export.

        Returns:
            The request, which `wait` returns when it is done.  A range past the end fails with
            EINVAL.

        Raises:
            BufferError: buf is read-only, not contiguous, or a memoryview without an owner.
            ValueError: The queue is closed, or offset is out of range.

        C: nbd_aio_pread.
        """
        if type(buf) is bytearray and not BOUNCES:
            pointer = pin = from_buffer(buf)
            size, state, target = len(pin), NEVER_STALE, buf
        else:
            if is_unowned(buf):
                raise BufferError(
                    "buf: nothing owns the memory of this memoryview; read into a bytearray or "
                    "nbd.Buffer, and copy it"
                )
            pointer, size, pin, state, target = writable("buf", buf)
        if state[0]:
            lib.nbdshim_clear_stale(state, pin, size)
        return self._submit(READ, size, offset, 0, pointer, pin, target)

    def write(self, buf: ReadableBuffer | Buffer, offset: int, flags: int = 0) -> Request:
        """Submit a write.

        Args:
            buf: Contiguous bytes-like object or nbd.Buffer.  It must not change until the request
                is done.
            offset: Where to start, in bytes from the start of the export.
            flags: As for nbd.NBD.pwrite.

        Returns:
            The request, which `wait` returns when it is done.  A range past the end fails with
            ENOSPC, and nothing is written.

        Raises:
            ValueError: The queue is closed, or a number is out of range.

        C: nbd_aio_pwrite; nbd_aio_pread too where a block has to be merged.
        """
        pointer, size, pin = readable("buf", buf)
        return self._submit(WRITE, size, offset, flags, pointer, pin, None)

    def zero(self, count: int, offset: int, flags: int = 0) -> Request:
        """Submit a write of zeroes; if the server has no command for that, zeroes are sent.

        Args:
            count: The number of bytes.
            offset, flags: As for nbd.NBD.zero.

        Returns:
            The request, which `wait` returns when it is done.

        C: nbd_aio_zero, or nbd_aio_pwrite.
        """
        return self._submit(ZERO, count, offset, flags)

    def trim(self, count: int, offset: int, flags: int = 0) -> Request:
        """Tell the server that the whole blocks of a range are not needed any more.

        Args:
            count: The number of bytes.
            offset, flags: As for nbd.NBD.trim.

        Returns:
            The request, which `wait` returns when it is done.

        C: nbd_aio_trim.
        """
        return self._submit(TRIM, count, offset, flags)

    def cache(self, count: int, offset: int) -> Request:
        """Ask the server to load a range into its cache.

        Args:
            count: The number of bytes.
            offset: Where to start, in bytes from the start of the export.

        Returns:
            The request, which `wait` returns when it is done.

        C: nbd_aio_cache.
        """
        return self._submit(CACHE, count, offset, 0)

    def flush(self) -> Request:
        """Submit a flush, which puts the writes that are done already on stable storage.

        Returns:
            The request, which `wait` returns when it is done.

        C: nbd_aio_flush.
        """
        return self._submit(FLUSH, 0, 0, 0)

    def wait(self, least: int = 1, timeout: float | None = None) -> list[Request]:
        """Wait until requests are done.

        Ctrl-C ends the wait, and so does any signal whose handler raises; the commands in flight
        continue.

        Args:
            least: How many requests to wait for.  If fewer are in flight, it waits for all of them.
            timeout: Return after this many seconds at the latest.  0 does not wait; None waits for
                ever.

        Returns:
            The requests that were done since the last call.  They may be fewer than `least`, or
            none, if the timeout is over or `wake` was called.

        Raises:
            ValueError: The queue is closed.

        C: nbd_aio_notify_read, nbd_aio_notify_write, nbd_aio_command_completed.
        """
        least, seconds, until = as_number("least", least), -1.0, 0.0
        if timeout is None:
            self._lock.acquire()
        else:
            seconds = as_timeout(timeout)
            until = monotonic() + seconds
            if not self._lock.acquire(timeout=seconds if seconds <= TIMEOUT_MAX else -1):
                return []
        try:
            if timeout is not None:
                seconds = max(0.0, until - monotonic())
            while self._finish(*self._shim_queue.wait(least, seconds)) == _MAX_REPORTED:
                least, seconds = 1, 0.0  # the array was full: there may be more
            return self._take_finished()
        finally:
            self._lock.release()

    def fileno(self) -> int:
        """Return a descriptor for an event loop, which is readable when `step` has work.

        It covers all handles of the queue.  It stays the same until the queue is closed, which
        closes it as well.  Only watch it; do not read or write it.

        Raises:
            OSError: The process has no descriptor left.
            ValueError: The queue is closed.

        Example:
            >>> queue = nbd.queue.Queue(h)
            >>> request = queue.read(bytearray(4096), 0)
            >>> while not request.is_done:
            ...     ready = select.select([queue], [], [])
            ...     requests = queue.step()
        """
        return self._shim_queue.fileno()

    def step(self) -> list[Request]:
        """Do what can be done without waiting.  Event loops call this instead of `wait`.

        It sends and receives for at most a millisecond.  If work remains, the descriptor of
        `fileno` is readable at once.

        Returns:
            The requests that were done since the last call, in any order.  While another thread is
            in `wait`, that call returns them, and this one returns none.

        Raises:
            ValueError: The queue is closed.

        C: nbd_aio_notify_read, nbd_aio_notify_write, nbd_aio_command_completed.
        """
        if not self._lock.acquire(blocking=False):
            return []
        try:
            while self._finish(*self._shim_queue.step()) == _MAX_REPORTED:
                pass
            return self._take_finished()
        finally:
            self._lock.release()

    def wake(self) -> None:
        """End the wait of another thread; if no thread waits, the next wait returns at once."""
        self._shim_queue.wake()

    def close(self) -> None:
        """Drop all requests without waiting for the server.  The handles stay open.

        Commands that were sent may still be executed.  Their buffers are kept until the server has
        replied, or the handles are closed.  A second close does nothing.
        """
        self._shim_queue.drop()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self,
        operation: int,
        length: int,
        offset: int,
        flags: int,
        pointer: Any = ffi.NULL,
        pin: Any = None,
        target: Any = None,
    ) -> Request:
        length, offset, flags = as_request(length, offset, flags)
        queue = self._shim_queue
        token = next_token()
        # This is stored before C gets the buffer.  If a signal handler raises after the submission,
        # the request stays in flight, and its buffer is kept all the same.
        queue.kept[token] = request = Request(operation, length, offset, pin, target)
        result = nbdqueue_submit(queue.q, operation, token, pointer, length, offset, flags)
        if result < 0:
            queue.kept.pop(token, None)  # another thread's `close` may have removed it
            raise queue.refused(result)
        return request

    def _finish(self, done: Any, count: int) -> int:
        """Finish the requests that the shim's queue reported; returns their number.

        A signal handler may run between any two bytecodes.  It may raise, or call `wait` itself,
        which reports the same requests.  So each step here can be repeated, and the call that
        removes a request from `kept` is the one that returns it.
        """
        queue = self._shim_queue
        kept, finished = queue.kept, self._finished
        for i in range(count):
            one = done[i]
            token = one.token
            request = kept.get(token)
            if request is not None:
                request._finish(one.error, one.offset)
                if kept.pop(token, None) is not None:
                    finished.append(request)
        queue.take(done, count)
        return count

    def _take_finished(self) -> list[Request]:
        """Return all requests that are done and were not returned yet.

        They are removed one by one, because a signal handler's call may remove others in between.
        """
        finished = self._finished
        taken: list[Request] = []
        try:
            while finished:
                taken.append(finished.popleft())
        except IndexError:  # a signal handler's call has removed the last one
            pass
        except BaseException:
            finished.extendleft(reversed(taken))
            raise
        return taken
