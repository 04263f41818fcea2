# SPDX-License-Identifier: LGPL-2.0-or-later
"""DiskFile: a disk as an unbuffered binary file, over the shim's queue.

It is thin: it returns what it has, and leaves buffering to io.  Nothing runs beside the program:
commands in flight make progress only while a call waits, as far as the sockets take what comes.

Without a buffer, every read asks the server.  Under a buffer of io's, reads in order read ahead,
and a seek forgets that: io seeks here only where its own buffer does not have the place.

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
import sys
import warnings
from _thread import RLock
from contextlib import suppress

from nbd._binding.convert import as_number
from nbd._binding.errors import DiskError, Timeout
from nbd._binding.memory import BOUNCES, as_bytes, is_unowned
from nbd._disks.buffering import SECTOR, ReadAhead, WriteBehind, new_memory
from nbd._disks.queue import READ, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, NoReturn

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._disks.buffering import Piece
    from nbd._disks.connections import Connections
    from nbd._disks.queue import Request

#: A read of this many bytes goes straight into the caller's memory.
_LARGE = 1024 * 1024
#: This many bytes are read to fill io's buffer where the reader has jumped to.
_AFTER_JUMP = 32 * 1024
#: How many contexts of an exception are followed; a program may have made a ring of them.
_MAX_CONTEXTS = 100


class _Turns:
    """A lock for one call at a time, which no exception leaves locked.

    Only `run` acquires it, and never twice in one thread.  So if the current thread owns it, then a
    call of this thread is running, and the code that asks is a signal handler that interrupted it.
    """

    def __init__(self) -> None:
        self._lock: Any = RLock()  # Any: typeshed does not know _is_owned

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call something when no other thread has its turn."""
        lock = self._lock
        try:
            with lock:
                return work(*arguments)
        except BaseException:
            # A signal handler may have raised in the `with` statement, just before it releases.
            while lock._is_owned():
                lock.release()
            raise

    def is_mine(self) -> bool:
        """Return whether a call of the current thread is running."""
        return bool(self._lock._is_owned())

    def is_others(self) -> bool:
        """Return whether a call of another thread is running."""
        lock = self._lock
        if lock._is_owned():
            return False
        try:
            if not lock.acquire(blocking=False):
                return True
            lock.release()
            return False
        except BaseException:
            while lock._is_owned():
                lock.release()
            raise


class DiskFile(io.RawIOBase):
    """A disk as an unbuffered binary file; nbd.open makes it.

    A call that Ctrl-C or a timeout has stopped can be made again.  A write that was stopped may
    have happened, wholly or in part.  A large read that was stopped may still change its buffer
    until the next call returns.

    Where a part of the disk cannot be read, a read returns what is good before that part.

    Threads take turns.  A signal handler cannot use the file while a call of the same thread runs:
    it gets a RuntimeError, as with the files of io.

    Attributes:
        name: What was opened: the URI, or the repr of a command line or a handle.
        mode: The mode it was opened with.
        is_inherited: Whether a parent process has opened it: then it can only be closed.
        has_given_up: Whether it is being closed without being flushed.
        closing: The lock of the thread that closes it.
    """

    __module__ = "nbd"

    def __init__(
        self,
        connections: Connections,
        source: object,
        mode: str,
        readable: bool,
        writable: bool,
        buffering: int,
    ) -> None:
        queue = connections.queue
        self.name = source if isinstance(source, str) else repr(source)
        self.mode = mode
        self.is_inherited = False
        self.has_given_up = False
        self._readable = readable
        self._writable = writable
        self._buffering = buffering
        self._reads_ahead = buffering > 0
        self._turns = _Turns()
        self.closing: Any = RLock()
        self._size = queue.size
        self._sector = max(SECTOR, queue.minimum)
        self._ahead = ReadAhead(queue, self._size)
        self._behind = WriteBehind(connections)
        self._at = 0
        self._read_to = -1  # where the last read has ended
        # Each call that moves the position has a list, in which it notes where it has begun.
        self._last_move: list[int] = []
        self._is_stopped = False  # perhaps: an exception has stopped the last call
        # The id of the exception that has stopped the last call, if it is no error of the disk.
        self._stopped_by = 0
        self._is_dirty = False  # it was written to, and not flushed since
        # None when it is closed.
        self._connections: Connections | None = connections

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
        if self._connections is None or self.is_inherited:  # a buffer asks before each small read
            self._check_ours()
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position, also past the end; returns the new one."""
        self._check_ours()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        if whence not in origins:
            raise ValueError(f"whence: {whence} is not os.SEEK_SET, SEEK_CUR or SEEK_END")
        position = origins[whence] + as_number("offset", offset)
        if position < 0:
            raise DiskError(f"seeking to {position}, before the start of the disk", errno.EINVAL)
        if whence != os.SEEK_CUR or position != self._at:  # else it only asks for the position
            self._read_to = -1  # what was read ahead may be old
        self._at = position
        return position

    def truncate(self, size: int | None = None, /) -> NoReturn:
        """Refused: a disk has a fixed size."""
        self._check_open()
        raise io.UnsupportedOperation("truncate: a disk has a fixed size")

    # In the calls that move the position an exception may come at any bytecode, also behind the
    # last line.  Then the caller gets no result, and the position has to be the old one.

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes, with at most one wait; without a size, all to the end."""
        count = -1 if size is None else as_number("size", size)
        self._check_read()
        move: list[int] = []
        try:
            return self._in_turn(move, self._read_new, count)  # type: ignore[no-any-return]
        except BaseException:
            self._undo(move)
            raise

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into writable memory what can be had with at most one wait; 0 is the end."""
        self._check_read()
        move: list[int] = []
        try:
            return self._in_turn(move, self._read_into, buffer)  # type: ignore[no-any-return]
        except BaseException:
            self._undo(move)
            raise

    def readall(self) -> bytes:
        """Everything from the position to the end."""
        return self.read(-1)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read to the end of the line, byte by byte; a buffer does it faster."""
        start = self.tell()
        try:
            return super().readline(size)
        except BaseException:
            self._at = start
            raise

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of the data; returns its size.  Does not wait for the server, if it can."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("write: the disk was opened for reading; use mode 'r+b'")
        self._check_entry()
        move: list[int] = []
        try:
            return self._in_turn(move, self._write, data)  # type: ignore[no-any-return]
        except BaseException:
            self._undo(move)
            raise

    def flush(self) -> None:
        """Wait for all writes, and have the server put them on its disk.

        Raises:
            nbd.DiskError: A write has failed; it is raised once.
        """
        self._check_open()
        if not self._writable or self.is_inherited or self.has_given_up:
            return
        self._check_entry()
        try:
            self._in_turn([], self._flush_at, None)
        except BaseException:
            self._undo([])
            raise

    def close(self) -> None:
        """Flush, and close whatever happens; a handle that nbd.open was given stays open.

        While a program handles the exception that has stopped the last wait, nothing is flushed.
        """
        self.close_after(self.reason_to_hurry())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close_after(exc_value)

    def close_after(self, error: BaseException | None) -> None:
        """Close the file while an exception is on its way, or none.

        Raises:
            RuntimeError: A call of the same thread runs: this is its signal handler.
        """
        if self._connections is None:
            return
        self.check_not_in_call()
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        with self.closing:
            self._turns.run(self._close_in_turn, error)

    def _close_in_turn(self, error: BaseException | None) -> None:
        if self._connections is None:  # another thread has closed it
            return
        self.prepare_to_close(error)
        try:
            if self._writable and not self.is_inherited:
                self._flush_at_last(error)
        finally:
            self._release()

    def reason_to_hurry(self) -> BaseException | None:
        """The exception that the program handles, if it follows the one that stopped the last call.

        An exception that is older than the call says nothing: the program may read and close files
        in its handler.
        """
        handled = error = sys.exc_info()[1]
        for _ in range(_MAX_CONTEXTS):
            if error is None:
                break
            if id(error) == self._stopped_by:
                return handled
            error = error.__context__
        return None

    def check_room(self, at: int, data: ReadableBuffer) -> None:
        """Refuse to write past the end of the disk."""
        with memoryview(data) as view:
            count = view.nbytes
        if count > max(0, self._size - at):
            text = f"writing {count} bytes at offset {at}: the disk ends at {self._size}"
            raise DiskError(text, errno.ENOSPC)

    def prepare_to_close(self, error: BaseException | None) -> None:
        """Decide how long to wait for the server while the file is closed, and whether to flush.

        One Ctrl-C is enough to leave a file whose server hangs.
        """
        connections = self._connections
        if connections is None:
            return
        if connections.is_stalled:
            connections.hurry()
            self.has_given_up |= error is not None
        elif isinstance(error, KeyboardInterrupt) or (error is not None and self._stopped_by):
            connections.hurry()

    def give_up(self, failed: BaseException, error: BaseException | None) -> bool:
        """Note that it cannot be flushed while it is closed.

        Args:
            failed: Why.
            error: The exception that was on its way before, or None.

        Returns:
            Whether `failed` is less than that exception.
        """
        return self._give_up(failed, error, lambda: self._turns.run(self._flush_others))

    def _give_up(
        self, failed: BaseException, error: BaseException | None, flush_others: Callable[[], object]
    ) -> bool:
        connections = self._connections
        try:
            if isinstance(failed, DiskError):
                flush_others()
        finally:
            self.has_given_up = True
        is_hurried = connections is not None and connections.is_hurried
        return error is not None and is_hurried and isinstance(failed, Timeout)

    def detached(self) -> None:
        """Note that there is no buffer over it any more."""
        self._buffering = 0
        self._reads_ahead = False
        if self._connections is not None:
            self._connections.keep(None)

    def become_inherited(self) -> None:
        """Note that this process is the child of a fork: the connections are the parent's.

        Threads of the parent may have had its locks, and they are not here to release them.
        """
        self.is_inherited = True
        self._turns, self.closing = _Turns(), RLock()

    def is_idle(self) -> bool:
        """Whether no call of it runs in another thread."""
        return not self._turns.is_others()

    def __repr__(self) -> str:
        if "_connections" not in self.__dict__:
            return "<nbd.DiskFile without a disk>"
        state = "closed" if self._connections is None else f"at {self._at}"
        return f"<nbd.DiskFile of {self.name!r}, mode {self.mode!r}, {state}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a file on a connection cannot be copied or pickled; open it again")

    def __del__(self) -> None:
        if self.__dict__.get("_connections") is not None:  # it may have been made only in part
            try:
                self._dealloc_warn(self)
            finally:
                self.close_after(None)

    def _dealloc_warn(self, source: object) -> None:
        """Warn of a file that is dropped without being closed; the buffers of io call this.

        What was written is finished, but the program does not wait for long.
        """
        if self._connections is None or self.is_inherited:
            return
        self._connections.hurry()
        warnings.warn(f"unclosed disk {self.name!r}", ResourceWarning, stacklevel=2, source=source)

    @property
    def _ours(self) -> list[Any]:
        """The handles that are closed with it."""
        return self._opened().ours

    @property
    def _can_flush(self) -> bool:
        """Whether the server has a flush."""
        return self._opened().can_flush

    def _opened(self) -> Connections:
        """The connections of a file that is open."""
        if self._connections is None:
            raise ValueError("I/O operation on closed file")
        return self._connections

    def _check_open(self) -> None:
        if self._connections is None:
            raise ValueError("I/O operation on closed file")

    def _check_ours(self) -> None:
        self._check_open()
        if self.is_inherited:
            raise ValueError("the disk belongs to the parent process; open it again after a fork")

    def _check_read(self) -> None:
        self._check_open()
        if not self._readable:
            raise io.UnsupportedOperation("read: the disk was opened for writing; use mode 'r+b'")
        self._check_entry()

    def _check_entry(self) -> None:
        self._check_ours()
        self.check_not_in_call()

    def check_not_in_call(self) -> None:
        """Refuse a call by a signal handler that has interrupted another one."""
        if self._turns.is_mine():
            raise RuntimeError("the disk is in use: a signal handler has interrupted a call of it")

    def _in_turn(
        self, move: list[int], work: Callable[[Any, int], tuple[Any, int]], argument: Any
    ) -> Any:
        """Do something at the position, which it moves; returns its result."""
        return self._turns.run(self._at_position, move, work, argument)

    def _at_position(
        self, move: list[int], work: Callable[[Any, int], tuple[Any, int]], argument: Any
    ) -> Any:
        at = self._begin()
        result, end = work(argument, at)
        move.append(at)
        self._last_move = move
        self._at = end
        self._stopped_by = 0
        return result

    def _begin(self) -> int:
        """Begin a call, which has its turn; returns the position.

        If an exception has stopped the last call, wait for everything in flight.
        """
        connections = self._opened()
        connections.let_join()
        if self._is_stopped:
            queue = connections.queue
            connections.wait_until(lambda: not len(queue))
            self._is_stopped = False
        return self._at

    def _undo(self, move: list[int]) -> None:
        """Go back to where a call has begun, if it was the last one to move the position."""
        error = sys.exc_info()[1]
        is_plain = isinstance(error, (DiskError, TypeError, ValueError))
        is_stalled = self._connections is not None and self._connections.is_stalled
        self._stopped_by = 0 if is_plain and not is_stalled else id(error)
        if move and self._last_move is move:
            self._at = move[0]

    def _flush_at(self, nothing: None, at: int) -> tuple[None, int]:
        self._flush()
        return None, at

    def _flush(self) -> None:
        if not self._is_dirty:
            return
        self._behind.finish(0, self._size)
        self._behind.raise_failure()
        connections = self._opened()
        if connections.can_flush:
            self._finish(connections.queue.flush())
        self._is_dirty = False

    def _flush_others(self) -> None:
        """Flush although a write has failed: others may have been written."""
        with suppress(DiskError, Timeout):
            self._flush()

    def _flush_at_last(self, error: BaseException | None) -> None:
        """Flush before the file is closed."""
        if self.has_given_up:
            return
        try:
            self._begin()
            self._flush()
        except BaseException as failed:
            if not self._give_up(failed, error, self._flush_others):
                raise

    def _release(self) -> None:
        """Let go of the connections and of all memory."""
        connections = self._opened()
        self.has_given_up = True  # super would flush
        try:
            if not self.is_inherited:
                connections.close()
        finally:
            try:
                super().close()
            finally:
                connections.abandon()
                self._ahead = self._behind = self._connections = None  # type: ignore[assignment]

    def _write(self, data: ReadableBuffer, at: int) -> tuple[int, int]:
        with as_bytes(data) as view:
            self._write_all(view, at)
            return len(view), at + len(view)

    def _write_all(self, view: memoryview, at: int) -> None:
        """Write a view, which may not end on the disk."""
        count = len(view)
        self._behind.finish(at, at + count)
        self._behind.raise_failure()
        self.check_room(at, view)
        self._ahead.forget(at, at + count)
        self._is_stopped = self._is_dirty = True
        self._behind.add(view, at)
        self._is_stopped = False

    def _read_new(self, count: int, at: int) -> tuple[bytes, int]:
        """Read into new memory; all to the end if count is negative."""
        rest = max(0, self._size - at)
        memory = bytearray(rest if count < 0 else min(count, rest))
        with memoryview(memory) as view:
            filled = self._read_all(view, at) if count < 0 else self._read(view, at)
        del memory[filled:]
        return bytes(memory), at + filled

    def _read_into(self, buffer: WriteableBuffer, at: int) -> tuple[int, int]:
        with as_bytes(buffer) as view, view[: max(0, self._size - at)] as room:
            count = self._read(room, at)
            return count, at + count

    def _read_all(self, view: memoryview, at: int) -> int:
        """Fill a view, which ends on the disk."""
        filled = 0
        while filled < len(view):
            with view[filled:] as rest:
                filled += self._read(rest, at + filled)
        return filled

    def _read(self, view: memoryview, at: int) -> int:
        """Read into a view, which ends on the disk; at least one byte, if it has room.

        What the program has asked for may be less than the view, which may be io's buffer.  And
        more may have been read ahead.  So if that fails, the start of it is read by itself.
        """
        if not view:
            return 0
        is_next = self._reads_ahead and at == self._read_to
        if not is_next:
            self._ahead.stop()
        end_of_sector = at - at % self._sector + self._sector
        try:
            count = self._read_ahead(view, at) if is_next else self._read_there(view, at)
        except DiskError:
            if not is_next and at + len(view) <= end_of_sector:
                raise  # it has been read by itself
            count = 0
        if not count:
            self._ahead.stop()
            count = self._read_good(view, at, end_of_sector - at)
        if not is_next or not self._ahead.in_order:
            self._ahead.in_order = count
        self._read_to = at + count
        return count

    def _read_there(self, view: memoryview, at: int) -> int:
        """Read what is wanted, and no more: the reader has jumped, or reads without a buffer."""
        count = len(view)
        if count >= _LARGE and not BOUNCES and not is_unowned(view):
            self._read_direct(view, at)
            return count
        count = min(count, _AFTER_JUMP if count <= self._buffering else _LARGE)
        with view[:count] as part:
            self._read_exactly(part, at)
        return count

    def _read_direct(self, view: memoryview, at: int) -> None:
        """Read into the caller's memory."""
        self._behind.finish(at, at + len(view))
        self._is_stopped = True
        request = self._opened().queue.read(_whole(view), at)
        self._opened().wait_for(request)
        self._is_stopped = False
        _raise_error(request)

    def _read_exactly(self, view: memoryview, at: int) -> None:
        """Read into memory of our own, and copy it."""
        self._behind.finish(at, at + len(view))
        memory, whole = new_memory(len(view))
        self._finish(self._opened().queue.read(memory, at))
        view[:] = whole

    def _read_good(self, view: memoryview, at: int, count: int) -> int:
        """Read what is good before a bad place: `count` bytes, and then more of them each time.

        Under a buffer only the first bytes: more may not be wanted, and a disk may take long to
        find that it cannot read.
        """
        filled = 0
        while filled < len(view):
            with view[filled : filled + count] as part:
                try:
                    self._read_exactly(part, at + filled)
                except DiskError as reason:
                    if filled:
                        break
                    wanted = len(part) if self._buffering else len(view)
                    text = failure(READ, wanted, at, reason.errnum).args
                    raise DiskError(*text) from None
                filled += len(part)
            if self._buffering:
                break
            count *= 2
        return filled

    def _read_ahead(self, view: memoryview, at: int) -> int:
        """Read on from the window: what has arrived, after a wait if that is nothing."""
        ahead = self._ahead
        if len(view) >= _LARGE and not ahead.covers(at) and not BOUNCES and not is_unowned(view):
            ahead.in_order += len(view)
            self._read_direct(view, at)
            return len(view)
        self._behind.finish(at, ahead.reach(at))
        filled = 0
        while filled < len(view):
            piece = ahead.piece_at(at + filled)
            if not piece.request.is_done and not filled:
                ahead.grow(at)
                self._opened().wait_for(piece.request)
            if filled and not _has_arrived(piece):
                break
            _raise_error(piece.request)
            with view[filled:] as rest:
                filled += ahead.take(piece, rest, at + filled)
        return filled

    def _finish(self, request: Request) -> None:
        """Wait for a request, and raise its error."""
        self._opened().wait_for(request)
        _raise_error(request)


def _whole(view: memoryview) -> Any:
    """The object under a view of all of it, else the view.

    Until CPython 3.12.7 the garbage collector may clear a memoryview that is pinned, and crash
    (gh-77894), if an exception comes while it is being pinned.
    """
    owner = view.obj
    return owner if type(owner) is bytearray and len(owner) == len(view) else view


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise DiskError(*request.error.args)


def _has_arrived(piece: Piece) -> bool:
    return piece.request.is_done and piece.request.error is None
