# SPDX-License-Identifier: LGPL-2.0-or-later
"""DiskFile: a disk as an unbuffered binary file, over the shim's queue.

It is thin: it returns what it has, and leaves buffering to io.  Nothing runs beside the program:
commands in flight go on only while a call waits, as far as the sockets take what comes.

A call that an exception has stopped (Ctrl-C, a timeout) leaves commands in flight.  Those of the
window and of the writes are known.  A call that sends others notes that before, in _is_stopped, and
takes the note back at its end.  The next call that finds the note waits for everything first.

Every view of the caller's memory is released at once: memory that has one cannot be resized.

The memory that io's buffers read into has no owner who could keep it: it may be gone when a late
answer comes.  So the server's answers only go to memory with an owner, else to memory of our own.
"""

from __future__ import annotations

import errno
import io
import os
from _thread import RLock
from time import monotonic

from nbd._core.convert import as_number
from nbd._core.errors import DiskError, Error, Timeout
from nbd._core.memory import BOUNCES, as_bytes, is_unowned
from nbd._core.queue import Queue
from nbd._core.readahead import PIECE, ReadAhead, new_memory
from nbd._core.writes import DEPTH, WriteBehind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._core.methods import NBD
    from nbd._core.queue import Request
    from nbd._core.readahead import Piece

#: A read of so many bytes goes straight into the caller's memory.
_LARGE = 1024 * 1024
#: So much is read to fill io's buffer where the reader has jumped to.
_AFTER_JUMP = 32 * 1024
#: For so many seconds close waits, at the most, for answers, and for each connection to end.
_GOODBYE = 1.0


class DiskFile(io.RawIOBase):
    """A disk as an unbuffered binary file; nbd.open makes it.

    A call that Ctrl-C or a timeout has stopped can be made again.  A write that was stopped may
    have happened, wholly or in part.  A large read that was stopped may still change its buffer
    until the next call returns.

    Threads take turns.  A signal handler cannot use the file while a call of the same thread runs:
    it gets a RuntimeError, as with the files of io.

    Attributes:
        name: What was opened: the URI, or the repr of a command line or a handle.
        mode: The mode it was opened with.
        is_inherited: Whether a parent process has opened it: then it can only be closed.
    """

    __module__ = "nbd"

    def __init__(
        self,
        handles: list[NBD],
        source: object,
        mode: str,
        readable: bool,
        writable: bool,
        timeout: float | None,
        buffering: int,
    ) -> None:
        if writable and handles[0].is_read_only():
            raise DiskError("the export is read-only; open it with mode 'rb'", errno.EROFS)
        self.name = source if isinstance(source, str) else repr(source)
        self.mode = mode
        self._readable = readable
        self._writable = writable
        self._timeout = timeout
        self._buffering = buffering
        self._ours = [] if source in handles else handles
        self._can_flush = handles[0].can_flush()
        # Any: typeshed does not know _is_owned.
        self._lock: Any = RLock()
        self._queue = Queue(handles, depth=DEPTH, piece=PIECE)
        self._size = self._queue.size
        self._ahead = ReadAhead(self._queue, self._size)
        self._behind = WriteBehind(self._queue, self._wait)
        self._at = 0
        self._read_to = -1  # where the last read has ended
        self._is_stopped = False  # perhaps: an exception has stopped the last call
        self._is_dirty = False  # it was written to, and not flushed since
        self.is_inherited = False

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._readable

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._writable

    def seekable(self) -> bool:
        """True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """The position, in bytes from the start of the disk."""
        self._check_open()
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position, also past the end; returns the new one."""
        self._check_open()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        if whence not in origins:
            raise ValueError(f"whence: {whence} is not os.SEEK_SET, SEEK_CUR or SEEK_END")
        position = origins[whence] + as_number("offset", offset)
        if position < 0:
            raise DiskError(f"seeking to {position}, before the start of the disk", errno.EINVAL)
        self._at = position
        return position

    def truncate(self, size: int | None = None, /) -> NoReturn:
        """Refused: a disk has a fixed size."""
        self._check_open()
        raise io.UnsupportedOperation("truncate: a disk has a fixed size")

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most so many bytes, with one wait at the most; without a size, all to the end."""
        count = -1 if size is None else as_number("size", size)
        if count < 0:
            return self.readall()
        self._check_read()
        with self._lock:
            self._settle()
            at = self._at
            memory = bytearray(max(0, min(count, self._size - at)))
            with memoryview(memory) as view:
                filled = self._read(view, at)
            del memory[filled:]
            data = bytes(memory)
            # At last: what a signal handler stops before can be read again.
            self._at = self._read_to = at + filled
            return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into writable memory what can be had with one wait at the most; 0 is the end."""
        self._check_read()
        with self._lock, as_bytes(buffer) as view:
            self._settle()
            at = self._at
            with view[: max(0, self._size - at)] as room:
                count = self._read(room, at)
            self._at = self._read_to = at + count
            return count

    def readall(self) -> bytes:
        """Everything from the position to the end."""
        start = self.tell()
        with memoryview(bytearray(max(1, self._size - start))) as whole:
            try:
                filled = count = self.readinto(whole)
                while count and filled < len(whole):
                    count = self.readinto(whole[filled:])
                    filled += count
            except BaseException:
                self._at = start
                raise
            return bytes(whole[:filled])

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of the data; returns its size.  Does not wait for the server, if it can."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("write: the disk was opened for reading; use mode 'r+b'")
        self._check_entry()
        with self._lock, as_bytes(data) as view:
            self._settle()
            at, count = self._at, len(view)
            self._behind.finish(at, at + count)
            self._behind.raise_failure()
            if count > max(0, self._size - at):
                text = f"writing {count} bytes at offset {at}: the disk ends at {self._size}"
                raise DiskError(text, errno.ENOSPC)
            self._ahead.forget(at, at + count)
            self._is_stopped = self._is_dirty = True
            for start in range(0, count, PIECE):
                with view[start : start + PIECE] as piece:
                    self._behind.add(piece, at + start)
            self._is_stopped = False
            self._at = at + count
            return count

    def flush(self) -> None:
        """Wait for all writes, and have the server put them on its disk.

        Raises:
            nbd.DiskError: A write has failed; it is raised once.
        """
        self._check_open()
        if not self._writable or self.is_inherited:
            return
        self._check_entry()
        with self._lock:
            self._settle()
            self._behind.finish(0, self._size)
            self._behind.raise_failure()
            if self._is_dirty and self._can_flush:
                self._finish(self._queue.flush())
            self._is_dirty = False

    def close(self) -> None:
        """Flush, and close whatever happens; a handle that nbd.open was given stays open."""
        if self.closed:
            return
        is_flushed = False
        try:
            super().close()  # flushes
            is_flushed = True
        finally:
            if "_behind" in self.__dict__:
                self._release(is_flushed)

    def is_idle(self) -> bool:
        """Whether no call of it runs in another thread."""
        if not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        return True

    def __repr__(self) -> str:
        if "_behind" not in self.__dict__:
            return "<nbd.DiskFile without a disk>"
        state = "closed" if self.closed else f"at {self._at}"
        return f"<nbd.DiskFile of {self.name!r}, mode {self.mode!r}, {state}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a file on a connection cannot be copied or pickled; open it again")

    def __del__(self) -> None:
        if "_behind" in self.__dict__ and not self.closed:
            self._dealloc_warn(self)
            self.close()

    def _dealloc_warn(self, source: object) -> None:
        """Warn of a file that is dropped without being closed; the buffers of io call this."""
        import warnings

        warnings.warn(f"unclosed disk {self.name!r}", ResourceWarning, stacklevel=2, source=source)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _check_read(self) -> None:
        self._check_open()
        if not self._readable:
            raise io.UnsupportedOperation("read: the disk was opened for writing; use mode 'r+b'")
        self._check_entry()

    def _check_entry(self) -> None:
        if self.is_inherited:
            raise ValueError("the disk belongs to the parent process; open it again after a fork")
        if self._lock._is_owned():
            raise RuntimeError("the disk is in use: a signal handler has stopped a call of it")

    def _release(self, is_flushed: bool) -> None:
        """Let go of the connections."""
        patience = min(_GOODBYE, self._timeout or _GOODBYE)
        is_orderly = is_flushed and not self.is_inherited
        try:
            if is_orderly:
                # Let the answers to reads come: nbdkit 1.32 can abort if they cannot be sent.
                self._queue.wait(len(self._queue), patience)
        finally:
            self._queue.close()
            for handle in self._ours:
                _end(handle, patience if is_orderly else None)

    def _read(self, view: memoryview, at: int) -> int:
        """Read into view, which ends on the disk; at least one byte, if it has room."""
        if not view:
            return 0
        is_next = at == self._read_to or self._ahead.covers(at)
        if not is_next:
            self._ahead.stop()
        # What is read ahead may be what is being written.
        start, end = (0, self._size) if is_next else (at, at + len(view))
        self._behind.finish(start, end)
        has_owner = not BOUNCES and not is_unowned(view)
        if has_owner and len(view) >= _LARGE and not self._ahead.covers(at):
            return self._read_straight(view, at)
        return self._read_on(view, at) if is_next else self._read_once(view, at)

    def _read_straight(self, view: memoryview, at: int) -> int:
        """Read into the caller's memory."""
        self._ahead.stop()
        self._is_stopped = True
        request = self._queue.read(view, at)
        self._wait_for(request)
        self._is_stopped = False
        _raise_error(request)
        return len(view)

    def _read_once(self, view: memoryview, at: int) -> int:
        """Read where the reader has jumped to, without reading ahead."""
        count = min(len(view), _LARGE)
        if count <= self._buffering:
            count = min(count, _AFTER_JUMP)
        memory, whole = new_memory(count)
        self._finish(self._queue.read(memory, at))
        view[:count] = whole
        return count

    def _read_on(self, view: memoryview, at: int) -> int:
        """Read on from the window: what has arrived, after a wait if that is nothing."""
        filled = 0
        while filled < len(view):
            piece = self._ahead.piece_at(at + filled)
            if not piece.request.is_done and not filled:
                self._ahead.grow()
                self._wait_for(piece.request)
            if filled and not _has_arrived(piece):
                break
            if piece.request.error is not None:
                self._ahead.stop()
                _raise_error(piece.request)
            with view[filled:] as rest:
                filled += self._ahead.take(piece, rest, at + filled)
        return filled

    def _settle(self) -> None:
        """Wait for everything in flight, if an exception has stopped the last call."""
        if self._is_stopped:
            while len(self._queue):
                self._wait()
            self._is_stopped = False

    def _finish(self, request: Request) -> None:
        """Wait for a request, and raise its error."""
        self._wait_for(request)
        _raise_error(request)

    def _wait_for(self, request: Request) -> None:
        while not request.is_done:
            self._wait()

    def _wait(self) -> None:
        """Wait until the server has done something."""
        began, patience = monotonic(), self._timeout
        if self._queue.wait(1, patience) or patience is None or not len(self._queue):
            return
        # After an exception in a wait, the next one can return early with nothing.
        if monotonic() - began >= patience:
            text = f"the server has done nothing for {patience:g} seconds; "
            text += "try again, or open the disk with a longer timeout"
            raise Timeout(text, errno.ETIMEDOUT)


def _end(handle: NBD, patience: float | None) -> None:
    """Close a handle; with patience, end its connection in order before."""
    try:
        if patience is not None:
            handle.settimeout(patience)
            handle.shutdown()
    except Error:  # nothing is lost: all is written and flushed
        pass
    finally:
        handle.__exit__(None, None, None)


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise DiskError(*request.error.args)


def _has_arrived(piece: Piece) -> bool:
    return piece.request.is_done and piece.request.error is None
