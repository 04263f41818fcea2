# SPDX-License-Identifier: LGPL-2.0-or-later
"""Many commands in flight, over one handle or several: nbd.queue.Queue."""

from __future__ import annotations

from _thread import TIMEOUT_MAX, RLock
from collections import deque
from time import monotonic

from nbd._binding.buffer import readable, writable
from nbd._binding.callbacks import next_token
from nbd._binding.convert import as_number
from nbd._binding.memory import BOUNCES, NEVER_STALE, copy_back, free, from_buffer, is_unowned
from nbd._binding.methods import NBD
from nbd._binding.shim import ffi, lib
from nbd._disks.engine import (
    CACHE,
    FLUSH,
    READ,
    ROOM,
    TARGET,
    TRIM,
    WRITE,
    ZERO,
    Engine,
    as_request,
    as_timeout,
    failure,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Any, TypeVar

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._binding.buffer import Buffer
    from nbd._binding.errors import Error

    Self = TypeVar("Self", bound="Queue")

nbdqueue_submit = lib.nbdqueue_submit


class Request:
    """What a queue was asked for.

    Attributes:
        offset: Where it starts, in bytes from the start of the export.
        length: Its size in bytes.
        is_done: Whether the queue has reported it.  From then on its buffer is the caller's again.
        error: None, or the nbd.Error with which it has failed.
    """

    __module__ = "nbd.queue"
    __slots__ = ("_operation", "_pin", "_target", "error", "is_done", "length", "offset")

    def __init__(self, operation: int, length: int, offset: int, pin: Any, target: Any) -> None:
        self._operation = operation
        self._pin = pin
        self._target = target
        self.length = length
        self.offset = offset
        self.is_done = False
        self.error: Error | None = None

    def __repr__(self) -> str:
        state = "in flight" if not self.is_done else "done" if self.error is None else "failed"
        return f"<nbd.queue.Request of {self.length} bytes at offset {self.offset}: {state}>"

    def _end(self, errnum: int, offset: int) -> None:
        """Note its result, and let its buffer go.  It may be done again, after an interruption."""
        if errnum:
            self.error = failure(self._operation, self.length, self.offset, errnum, offset)
        pin = self._pin
        if BOUNCES and pin is not None and self._target is not None:
            try:
                copy_back(self._target, pin)
            finally:
                self._pin = None
                free(pin)
        self._pin = self._target = None
        self.is_done = True


class Queue:
    """Many commands in flight, over one handle or several of the same export.

    A request is any range of the export: the queue cuts it into commands, as the server's block
    size constraints ask for.  What is not aligned is read wider, or read, merged and written.
    Nothing waits but `wait`.  It tells of the requests that are done, in any order.

    Requests are not ordered: a read may be answered before a write that was asked for earlier.
    Where the order matters, wait in between.

    Args:
        handles: A connected nbd.NBD, or several that are connected to the same export.  Several
            need a server that allows them (nbd.NBD.can_multi_conn).
        depth: How many commands may be in flight at once.
        piece: The size of the largest command, in bytes.

    Raises:
        nbd.Error: A handle is not connected.
        ValueError: depth or piece is out of range; no handle is given, or one twice.

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

    _engine: Engine

    def __init__(
        self, handles: NBD | Iterable[NBD], *, depth: int = 16, piece: int = 256 * 1024
    ) -> None:
        several = [handles] if isinstance(handles, NBD) else list(handles)
        for handle in several:
            if not isinstance(handle, NBD):
                raise TypeError(f"handles: nbd.NBD is needed, not {type(handle).__name__}")
        if not several:
            raise ValueError("handles: at least one is needed")
        engine = Engine(as_number("depth", depth), as_number("piece", piece))
        for handle in several:
            engine.add(TARGET, handle)
        self._engine = engine
        # Threads that wait take turns.  It is one that a signal handler can take again.
        self._lock = RLock()
        #: Requests that are done and were not returned by `wait` or `step` yet.
        self._finished: deque[Request] = deque()

    @property
    def size(self) -> int:
        """The size of the export in bytes."""
        return int(lib.nbdqueue_size(self._engine.q, TARGET))

    @property
    def minimum(self) -> int:
        """The server's minimum block size in bytes; 1 if it has none."""
        return int(lib.nbdqueue_minimum(self._engine.q, TARGET))

    def __len__(self) -> int:
        """How many requests `wait` has not told of."""
        return int(lib.nbdqueue_length(self._engine.q))

    def __bool__(self) -> bool:
        return True

    def read(self, buf: WriteableBuffer | Buffer, offset: int) -> Request:
        """Ask for bytes of the export.

        Args:
            buf: Writable contiguous bytes-like object or nbd.Buffer; all of it is filled.  It is
                kept in place until the request is done.  On PyPy pass an nbd.Buffer.
            offset: Where to start, in bytes from the start of the export.

        Returns:
            The request, which `wait` will tell of.  A range past the end fails with EINVAL.

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
                    "buf: nothing keeps the memory of this memoryview; read into a bytearray or "
                    "nbd.Buffer, and copy"
                )
            pointer, size, pin, state, target = writable("buf", buf)
        if state[0]:
            lib.nbdshim_clear_stale(state, pin, size)
        return self._submit(READ, size, offset, 0, pointer, pin, target)

    def write(self, buf: ReadableBuffer | Buffer, offset: int, flags: int = 0) -> Request:
        """Ask for bytes to be written.

        Args:
            buf: Contiguous bytes-like object or nbd.Buffer.  It must not change until the request
                is done.
            offset: Where to start, in bytes from the start of the export.
            flags: 0, or nbd.CMD_FLAG_FUA: done means that it is on the disk.

        Returns:
            The request, which `wait` will tell of.  A range past the end fails with ENOSPC, and
            nothing of it is written.

        Raises:
            ValueError: The queue is closed, or a number is out of range.

        C: nbd_aio_pwrite; nbd_aio_pread too where a block has to be merged.
        """
        pointer, size, pin = readable("buf", buf)
        return self._submit(WRITE, size, offset, flags, pointer, pin, None)

    def zero(self, count: int, offset: int, flags: int = 0) -> Request:
        """Ask for zeroes; where the server has no command for that, they are written.

        Args:
            count: How many bytes.
            offset: Where to start, in bytes from the start of the export.
            flags: 0, or nbd.CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_FAST_ZERO.

        Returns:
            The request, which `wait` will tell of.

        C: nbd_aio_zero, or nbd_aio_pwrite.
        """
        return self._submit(ZERO, count, offset, flags)

    def trim(self, count: int, offset: int, flags: int = 0) -> Request:
        """Tell the server that whole blocks of a range are not needed any more.

        Args:
            count: How many bytes.
            offset: Where to start, in bytes from the start of the export.
            flags: 0, or nbd.CMD_FLAG_FUA.

        Returns:
            The request, which `wait` will tell of.

        C: nbd_aio_trim.
        """
        return self._submit(TRIM, count, offset, flags)

    def cache(self, count: int, offset: int) -> Request:
        """Ask the server to have a range ready.

        Args:
            count: How many bytes.
            offset: Where to start, in bytes from the start of the export.

        Returns:
            The request, which `wait` will tell of.

        C: nbd_aio_cache.
        """
        return self._submit(CACHE, count, offset, 0)

    def flush(self) -> Request:
        """Ask for what was written to be on the disk: of the writes that are done already.

        Returns:
            The request, which `wait` will tell of.

        C: nbd_aio_flush.
        """
        return self._submit(FLUSH, 0, 0, 0)

    def wait(self, least: int = 1, timeout: float | None = None) -> list[Request]:
        """Wait for requests.

        Ctrl-C ends it, and so does any signal whose handler raises; what is in flight goes on.

        Args:
            least: Return when so many are done, or when none is left to wait for.
            timeout: Return after so many seconds at the latest.  0 does not wait; None, the
                default, waits for ever.

        Returns:
            The requests that were done since the last call; perhaps fewer than `least`, or none, if
            the time is over, or if `wake` was called.

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
            while self._finish(*self._engine.wait(least, seconds)) == ROOM:
                least, seconds = 1, 0.0  # there may be more than one call reports
            return self._take_finished()
        finally:
            self._lock.release()

    def fileno(self) -> int:
        """A descriptor for an event loop: it can be read when `step` has something to do.

        It stands for all handles of the queue, and stays the same until the queue is closed, which
        closes it.  Only watch it: never read or write it.

        Raises:
            OSError: There is no descriptor left.
            ValueError: The queue is closed.

        Example:
            >>> queue = nbd.queue.Queue(h)
            >>> request = queue.read(bytearray(4096), 0)
            >>> while not request.is_done:
            ...     ready = select.select([queue], [], [])
            ...     requests = queue.step()
        """
        return self._engine.fileno()

    def step(self) -> list[Request]:
        """Do what can be done without waiting: for event loops, instead of `wait`.

        It sends and receives for at most a millisecond.  If there is more to do, the descriptor of
        `fileno` can be read at once.

        Returns:
            The requests that were done since the last call, in any order; none while another thread
            is in `wait`, which returns them.

        Raises:
            ValueError: The queue is closed.

        C: nbd_aio_notify_read, nbd_aio_notify_write, nbd_aio_command_completed.
        """
        if not self._lock.acquire(blocking=False):
            return []
        try:
            while self._finish(*self._engine.step()) == ROOM:
                pass
            return self._take_finished()
        finally:
            self._lock.release()

    def wake(self) -> None:
        """End the wait of another thread; if none waits, the next wait returns at once."""
        self._engine.wake()

    def close(self) -> None:
        """Drop all requests, without waiting for the server; close no handle.

        Commands that were sent may still happen.  They keep their buffers until the server has
        answered, or the handles are closed.  A second close does nothing.
        """
        self._engine.drop()

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
        engine = self._engine
        token = next_token()
        # Before C gets the buffer: from now on a signal handler may raise, and the request goes on.
        engine.kept[token] = request = Request(operation, length, offset, pin, target)
        result = nbdqueue_submit(engine.q, operation, token, pointer, length, offset, flags)
        if result < 0:
            del engine.kept[token]
            raise engine.refused(result)
        return request

    def _finish(self, done: Any, count: int) -> int:
        """End the requests that the engine has reported; returns how many it has reported.

        A signal handler may run between any two bytecodes.  It may raise, or call `wait` itself,
        which reports the same requests.  So each step can be made again, and `kept` decides who
        has ended a request.
        """
        engine = self._engine
        kept, finished = engine.kept, self._finished
        for i in range(count):
            one = done[i]
            token = one.token
            request = kept.get(token)
            if request is not None:
                request._end(one.error, one.offset)
                if kept.pop(token, None) is not None:
                    finished.append(request)
        engine.take(done, count)
        return count

    def _take_finished(self) -> list[Request]:
        """All requests that were not returned yet.

        Each is taken by one operation: a signal handler's call may take others in between.
        """
        finished = self._finished
        taken: list[Request] = []
        try:
            while finished:
                taken.append(finished.popleft())
        except IndexError:  # a signal handler's call has taken the last one
            pass
        except BaseException:
            finished.extendleft(reversed(taken))
            raise
        return taken
