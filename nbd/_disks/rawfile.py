# SPDX-License-Identifier: LGPL-2.0-or-later
"""DiskFile: a disk as an unbuffered binary file, over nbd.queue.Queue.

It is a thin layer: it returns what is available, and leaves buffering to io.  No thread runs beside
the program, so commands in flight make progress only while a call waits; in between, the sockets
buffer what arrives.

Without a buffer, every read asks the server.  Under a buffer of io's, sequential reads read ahead.
A seek drops what was read ahead: io passes a seek on only if its own buffer does not contain the
position.

A call that an exception interrupts (Ctrl-C, a timeout) leaves commands in flight.  ReadAhead and
WriteBehind keep track of theirs.  A call that sends other commands sets _is_stopped before, and
clears it at its end.  The next call that finds it set waits until no command is in flight.

Every view of the caller's memory is released at once, as memory with a view cannot be resized.

The memory that io's buffers pass to readinto has no owner that could be kept alive: it may be freed
before a late reply arrives.  So replies go only to memory with an owner, or else to memory of our
own, from which they are copied.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from _thread import RLock
from contextlib import suppress
from operator import index
from time import monotonic

from nbd._binding.convert import as_number
from nbd._binding.errors import DiskError, Timeout
from nbd._binding.memory import BOUNCES, as_bytes, is_unowned
from nbd._disks.buffering import SECTOR, ReadAhead, WriteBehind, new_memory
from nbd._disks.queue import PIECE, READ, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, NoReturn

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._disks.buffering import Piece
    from nbd._disks.connections import Connections
    from nbd._disks.queue import Request

#: A read of at least this many bytes goes directly into the caller's memory.
_MIN_DIRECT = 1024 * 1024
#: The exceptions with which a call fails by itself; others interrupt it.
_OWN_ERRORS = (DiskError, TypeError, ValueError)
#: A program that jumps and asks for less than _SMALL bytes reads small structures, which are often
#: close to each other: then _AFTER_JUMP bytes are read into io's buffer, if it is that large.
_SMALL, _AFTER_JUMP = 4 * 1024, 32 * 1024
#: How many contexts of an exception are followed: a program can make a cycle of them.
_MAX_CONTEXTS = 100


class _Turns:
    """A lock that lets one call run at a time, and that no exception leaves locked.

    Only `run` keeps it, and never twice in one thread.  So if the current thread owns the lock, a
    call of this thread is running, and the code that asks is a signal handler that interrupted it.
    """

    def __init__(self) -> None:
        self._lock: Any = RLock()  # Any: typeshed does not know _is_owned

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call `work` when no other thread is in its turn."""
        lock = self._lock
        try:
            with lock:
                return work(*arguments)
        except BaseException:
            # A signal handler may raise inside the `with` statement, just before it releases.
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
    """A disk as an unbuffered binary file, which nbd.open returns.

    A call that Ctrl-C or a timeout has interrupted can be repeated.  A write that was interrupted
    may have happened, completely or in part.  A large read that was interrupted may still change
    its buffer until the next call returns.

    Where a part of the disk cannot be read, a read returns the bytes before that part.

    Threads take turns.  A signal handler cannot use the file while a call of the same thread is
    running: it gets a RuntimeError, as with the files of io.

    Attributes:
        name: What was opened: the URI, or the repr of the command line or of the handle.
        mode: "rb", "rb+" or "wb", as the built-in open says; "w+b" is "rb+", as it erases nothing.
        is_inherited: Whether a parent process opened it; then it can only be closed.
        has_given_up: Whether it is being closed without being flushed.
        closing: The lock of the thread that closes it.
        asked: The buffer's call that is running: its position, and the size to read or the memory
            to fill.  None if no call is running, or it does not say how much it reads.
        maker: By what connections are made, unless a buffer refers to it.
    """

    __module__ = "nbd"

    def __init__(
        self,
        connections: Connections,
        source: object,
        readable: bool,
        writable: bool,
        buffering: int,
    ) -> None:
        queue = connections.queue
        self.name = source if isinstance(source, str) else repr(source)
        self.mode = ("rb+" if writable else "rb") if readable else "wb"
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
        self._ahead = ReadAhead(queue, self._size, buffering)
        self._behind = WriteBehind(connections)
        self._at = 0
        self._read_to = 0  # where the last read stopped
        self._is_outdated = False  # whether what was read ahead is, since a seek
        # Each call that moves the position has a list, into which it puts the old position.
        self._last_move: list[int] = []
        self._is_stopped = False  # whether commands of an interrupted call may be in flight
        self.asked: tuple[int, Any] | None = None
        self.maker: object = ""
        # The id of the exception that interrupted the last call; 0 if it failed by itself.
        self._interrupted_by = 0
        self._is_dirty = False  # whether it was written to since the last flush
        # None when the file is closed.
        self._connections: Connections | None = connections

    def readable(self) -> bool:
        """Return whether the file was opened for reading."""
        self._check_open()
        return self._readable

    def writable(self) -> bool:
        """Return whether the file was opened for writing."""
        self._check_open()
        return self._writable

    def seekable(self) -> bool:
        """Return True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Return the position, in bytes from the start of the disk."""
        if self._connections is None or self.is_inherited:  # a shortcut: buffers call this often
            self._check_ours()
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position, which may be past the end; returns the new one."""
        self._check_ours()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        if whence not in origins:
            raise ValueError(f"whence: {whence} is not os.SEEK_SET, SEEK_CUR or SEEK_END")
        position = origins[whence] + as_number("offset", offset)
        if position < 0:
            raise DiskError(f"seeking to {position}, before the start of the disk", errno.EINVAL)
        if whence != os.SEEK_CUR or position != self._at:  # else io only asks for the position
            self._is_outdated = True
        self._at = position
        return position

    def fileno(self) -> NoReturn:
        """Refused: a disk has no descriptor of its own."""
        self._check_open()
        raise io.UnsupportedOperation(
            "fileno: a disk has no descriptor; read it with read or readinto, as in "
            "numpy.frombuffer(disk.read(size)) instead of numpy.fromfile, or mmap"
        )

    def truncate(self, size: int | None = None, /) -> int:
        """Return the size of the disk if it is `size`; refused otherwise, as it is fixed.

        Without a size, the position is taken.
        """
        self._check_ours()
        if not self._writable:
            raise io.UnsupportedOperation(
                "truncate: the disk was opened for reading; use mode 'r+b'"
            )
        wanted = self._at if size is None else as_number("size", size)
        if wanted != self._size:
            raise io.UnsupportedOperation(
                f"truncate: a disk has a fixed size, here {self._size} bytes, and cannot have "
                f"{wanted}; overwrite its contents instead"
            )
        return wanted

    # A signal handler can raise at any bytecode of a call that moves the position, even after its
    # last line.  Then the caller gets no result, and the position has to be the old one again.

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes, with at most one wait; without a size, read to the end."""
        count = -1 if size is None else as_number("size", size)
        self._check_read()
        move: list[int] = []
        try:
            return self._in_turn(move, self._read_new, count)  # type: ignore[no-any-return]
        except BaseException:
            self._undo(move)
            raise

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into writable memory, with at most one wait; returns 0 at the end of the disk."""
        self._check_read()
        move: list[int] = []
        try:
            return self._in_turn(move, self._read_into, buffer)  # type: ignore[no-any-return]
        except BaseException:
            self._undo(move)
            raise

    def readall(self) -> bytes:
        """Read from the position to the end."""
        return self.read(-1)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read to the end of the line, byte by byte; buffered files are faster."""
        start = self.tell()
        try:
            return super().readline(size)
        except BaseException:
            self._at = start
            raise

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of the data; returns its size.  It waits for the server only if it has to."""
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
        """Wait for all writes, and have the server put them on stable storage.

        Raises:
            nbd.DiskError: A write failed; each failure is raised once.
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
        """Flush, and close even if that fails.  A handle that was passed to nbd.open stays open.

        Nothing is flushed while the program handles the exception that stopped the last wait.
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
        """Close the file.

        Args:
            error: The exception that the program is handling, or None.

        Raises:
            RuntimeError: A signal handler calls this, and has interrupted a call of the file.
        """
        if self._connections is None:
            return
        self.check_not_in_call()
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        with self.closing:
            self._turns.run(self._close_in_turn, error)

    def _close_in_turn(self, error: BaseException | None) -> None:
        if self._connections is None:  # another thread has closed it meanwhile
            return
        self.prepare_to_close(error)
        try:
            if self._writable and not self.is_inherited:
                self._flush_at_last(error)
        finally:
            self._release()

    def reason_to_hurry(self) -> BaseException | None:
        """Return the exception that the program is handling, if it interrupted the last call.

        An exception that was raised while that one was handled counts too.  One that is older than
        the call does not: a program may read and close files while it handles it.
        """
        handled = error = sys.exc_info()[1]
        for _ in range(_MAX_CONTEXTS):
            if error is None:
                break
            if id(error) == self._interrupted_by:
                return handled
            error = error.__context__
        return None

    def check_fits(self, at: int, data: ReadableBuffer) -> None:
        """Refuse to write past the end of the disk."""
        with memoryview(data) as view:
            count = view.nbytes
        if count > max(0, self._size - at):
            text = f"writing {count} bytes at offset {at}: the disk ends at {self._size}"
            raise DiskError(text, errno.ENOSPC)

    def prepare_to_close(self, error: BaseException | None) -> None:
        """Decide how long closing may wait for the server, and whether it flushes.

        One Ctrl-C is enough to leave a file whose server hangs.
        """
        connections = self._connections
        if connections is None:
            return
        if connections.is_stalled:
            connections.hurry()
            self.has_given_up |= error is not None
        elif isinstance(error, KeyboardInterrupt) or (error is not None and self._interrupted_by):
            connections.hurry()

    def give_up(self, failed: BaseException, error: BaseException | None) -> bool:
        """Close without flushing, because flushing failed.

        Args:
            failed: The exception of the flush.
            error: The exception that the program is handling, or None.

        Returns:
            Whether `failed` need not be raised, because `error` is more important.
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
        """Continue without a buffer, which was detached."""
        self._buffering = 0
        self._reads_ahead = False
        if self._connections is not None:
            self._connections.keep(None)

    def become_inherited(self) -> None:
        """Allow only closing, because this process is the child of a fork.

        The connections are the parent's.  The locks are replaced, as a thread of the parent may
        have held them during the fork, and no thread here would release them.
        """
        self.is_inherited = True
        self._turns, self.closing = _Turns(), RLock()

    def is_idle(self) -> bool:
        """Return whether no call of another thread is running."""
        return not self._turns.is_others()

    def __repr__(self) -> str:
        if "_connections" not in self.__dict__:
            return "<nbd.DiskFile without a disk>"
        state = "closed" if self._connections is None else f"at {self._at}"
        return f"<nbd.DiskFile of {self.name!r}, mode {self.mode!r}, {state}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_pickle()

    def __del__(self) -> None:
        if warnings is None:  # see Handle.__del__
            return
        if self.__dict__.get("_connections") is not None:  # __init__ may have failed
            try:
                self._dealloc_warn(self)
            finally:
                self.close_after(None)

    def _dealloc_warn(self, source: object) -> None:
        """Warn about a file that was not closed; io's buffers call this.

        Closing then finishes the writes, but does not wait for long.
        """
        if self._connections is None or self.is_inherited:
            return
        self._connections.hurry()
        warnings.warn(f"unclosed disk {self.name!r}", ResourceWarning, stacklevel=2, source=source)

    @property
    def _ours(self) -> list[Any]:
        """The handles that are closed with the file."""
        return self._opened().ours

    @property
    def _can_flush(self) -> bool:
        """Whether the server supports flush."""
        return self._opened().can_flush

    def _opened(self) -> Connections:
        """Return the connections of an open file."""
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
        if self._connections is None or self.is_inherited or not self._readable:  # a shortcut
            self._check_open()
            if not self._readable:
                text = "read: the disk was opened for writing; use mode 'r+b'"
                raise io.UnsupportedOperation(text)
            self._check_ours()
        self.check_not_in_call()

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
        """Call `work` with the position, and move the position to where it stopped.

        Args:
            move: Receives the old position, for `_undo`.
            work: Called with `argument` and the position; returns a result and the new position.

        Returns:
            The result of `work`.
        """
        return self._turns.run(self._at_position, move, work, argument)

    def _at_position(
        self, move: list[int], work: Callable[[Any, int], tuple[Any, int]], argument: Any
    ) -> Any:
        at = self._begin()
        if self._connections.failure is not None:  # type: ignore[union-attr]  # _begin has checked
            self._opened().check()
        result, stop = work(argument, at)
        move.append(at)
        self._last_move = move
        self._at = stop
        self._interrupted_by = 0
        return result

    def _begin(self) -> int:
        """Begin a call in its turn; returns the position.

        If an exception interrupted the last call, wait until no command is in flight.
        """
        connections = self._opened()
        connections.let_join()
        if self._is_stopped:
            queue = connections.queue
            connections.wait_until(lambda: not len(queue))
            self._is_stopped = False
        return self._at

    def _undo(self, move: list[int]) -> None:
        """Restore the position after a failed call, if no other call has moved it since."""
        error = sys.exc_info()[1]
        is_own = isinstance(error, _OWN_ERRORS)
        is_stalled = self._connections is not None and self._connections.is_stalled
        self._interrupted_by = 0 if is_own and not is_stalled else id(error)
        if move and self._last_move is move:
            self._at = move[0]

    def _flush_at(self, nothing: None, at: int) -> tuple[None, int]:
        self._flush()
        return None, at

    def _flush(self) -> None:
        if not self._is_dirty:
            return
        self._behind.drain(0, self._size)
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
        """Flush before the file is closed, unless that was given up."""
        if self.has_given_up:
            return
        try:
            self._begin()
            self._flush()
        except BaseException as failed:
            if not self._give_up(failed, error, self._flush_others):
                raise

    def _release(self) -> None:
        """Close the connections, and release all memory."""
        connections = self._opened()
        self.has_given_up = True  # super().close() would flush
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
        """Write a view, unless it is too large for the rest of the disk."""
        count = len(view)
        self._behind.drain(at, at + count)
        self._behind.raise_failure()
        self.check_fits(at, view)
        self._ahead.forget(at, at + count)
        self._is_stopped = self._is_dirty = True
        self._behind.add(view, at)
        self._is_stopped = False

    def _read_new(self, count: int, at: int) -> tuple[bytes, int]:
        """Read into new memory; read to the end if count is negative."""
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
        """Fill a view that is not larger than the rest of the disk."""
        filled = 0
        while filled < len(view):
            with view[filled:] as rest:
                filled += self._read(rest, at + filled)
        return filled

    def _read(self, view: memoryview, at: int) -> int:
        """Read at least one byte into a view that is not larger than the rest of the disk.

        The view may be io's buffer, and so larger than what the program wants; and more may have
        been read ahead.  So after a failure the first sector is read separately.
        """
        if not view:
            return 0
        next_sector = at - at % self._sector + self._sector
        read = self._read_ahead if self._reads_ahead else self._read_now
        try:
            count = read(view, at)
        except DiskError:
            if not self._reads_ahead and at + len(view) <= next_sector:
                raise  # only the first sector was read
            count = 0
        if not count:
            self._ahead.jump(at)
            count = self._read_readable(view, at, next_sector - at)
        self._read_to = at + count
        return count

    def _read_now(self, view: memoryview, at: int) -> int:
        """Read what was asked for, without a buffer."""
        if _can_be_direct(view):
            self._read_direct(view, at)
            return len(view)
        with view[:_MIN_DIRECT] as part:
            self._read_copied(part, at)
            return len(part)

    def _read_direct(self, view: memoryview, at: int) -> None:
        """Read directly into the caller's memory."""
        self._behind.drain(at, at + len(view))
        self._is_stopped = True
        request = self._opened().queue.read(_whole(view), at)
        self._opened().wait_for(request)
        self._is_stopped = False
        _raise_error(request)

    def _read_copied(self, view: memoryview, at: int) -> None:
        """Read into memory of our own, and copy from there."""
        self._behind.drain(at, at + len(view))
        memory, whole = new_memory(len(view))
        self._finish(self._opened().queue.read(memory, at))
        view[:] = whole

    def _read_readable(self, view: memoryview, at: int, count: int) -> int:
        """Read what is readable before a bad sector: `count` bytes first, then twice as many, ...

        Under a buffer only the first bytes are read: the program may not want more, and a disk may
        take long to find out that it cannot read a sector.
        """
        filled = 0
        while filled < len(view):
            with view[filled : filled + count] as part:
                try:
                    self._read_copied(part, at + filled)
                except DiskError as reason:
                    if filled:
                        break
                    self._opened().check()  # raises a better error for a lost connection
                    wanted = len(part) if self._buffering else len(view)
                    text = failure(READ, wanted, at, reason.errnum).args
                    raise DiskError(*text) from None
                filled += len(part)
            if self._buffering:
                break
            count *= 2
        return filled

    def _read_ahead(self, view: memoryview, at: int) -> int:
        """Read what has arrived in the window; wait if nothing has."""
        ahead = self._ahead
        if self._is_outdated:
            ahead.drop()
            self._is_outdated = False
        start, stop = self._asked_for(at)
        if at != self._read_to:
            ahead.jump(at)
            if stop - at < _SMALL:
                stop = at + min(_AFTER_JUMP, self._buffering)
            if stop - at <= min(PIECE, len(view)):  # one command is enough: save the window's cost
                with view[: stop - at] as part:
                    self._read_copied(part, at)
                    return len(part)
        ahead.aim(start, stop)
        if not ahead.covers(at) and _can_be_direct(view):
            self._read_direct(view, at)
            return len(view)
        self._behind.drain(at, ahead.stop)
        filled = 0
        while filled < len(view):
            piece = ahead.piece_at(at + filled)
            if piece is None or (filled and not _has_arrived(piece)):
                break
            if not piece.request.is_done:
                since = monotonic()
                self._opened().wait_for(piece.request)
                ahead.waited(monotonic() - since)
            _raise_error(piece.request)
            with view[filled:] as rest:
                filled += ahead.take(piece, rest, at + filled)
        return filled

    def _asked_for(self, at: int) -> tuple[int, int]:
        """Return which range the program's call asks for; it contains the position.

        The call may say less than it needs, as readline does.
        """
        if self.asked is not None:
            start, argument = self.asked
            count = _size_of(argument)
            stop = self._size if count < 0 else start + count
            if start <= at < stop:
                return start, stop
        return at, at + 1

    def _finish(self, request: Request) -> None:
        """Wait for a request, and raise its error."""
        self._opened().wait_for(request)
        _raise_error(request)


def refuse_to_pickle() -> NoReturn:
    """Raise the exception for an attempt to copy or pickle a file."""
    raise TypeError("a file on a connection cannot be copied or pickled; open it again")


def _size_of(argument: Any) -> int:
    """Return how many bytes a method of io reads at most with this argument; -1 for all."""
    if argument is None:
        return -1
    try:
        return index(argument)
    except TypeError:
        with memoryview(argument) as view:
            return view.nbytes


def _can_be_direct(view: memoryview) -> bool:
    """Return whether replies can go directly into the caller's memory, and that is worth it."""
    return len(view) >= _MIN_DIRECT and not BOUNCES and not is_unowned(view)


def _whole(view: memoryview) -> Any:
    """Return the object under a view that covers all of it; otherwise the view.

    Until CPython 3.12.7 the garbage collector may clear a pinned memoryview and crash (gh-77894),
    if an exception interrupts the pinning.
    """
    owner = view.obj
    return owner if type(owner) is bytearray and len(owner) == len(view) else view


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise DiskError(*request.error.args)


def _has_arrived(piece: Piece) -> bool:
    return piece.request.is_done and piece.request.error is None
