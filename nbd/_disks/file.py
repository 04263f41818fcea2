# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a disk as a binary file, buffered by io.

The buffers here are io's with these additions.  A flush reaches the server's disk.  A write past
the end of the disk is refused before it is in io's buffer; io would try to write it again with each
flush.  A call that an exception interrupts does not move the position, so that it can be repeated.
A file whose server hangs can be closed, also by several threads at once.

The locks inside io's buffers cannot be reached from here.  In the child of a fork, a thread of the
parent may hold one for ever; so an inherited file is closed without them.

When the program ends, open files are closed here before handles are closed: atexit runs last what
was registered first, and this module is imported after the one that closes handles.  io itself
would flush the files too late.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
from contextlib import ExitStack
from functools import partial, wraps
from weakref import ref

from nbd._binding.convert import as_number, as_seconds
from nbd._binding.errors import DiskError
from nbd._binding.memory import as_bytes
from nbd._binding.methods import NBD
from nbd._binding.shim import IS_CPYTHON, IS_FREE_THREADED
from nbd._disks.connect import connect_uri
from nbd._disks.connections import Connections
from nbd._disks.handles import (
    Maker,
    can_have_more,
    check_can_share,
    has_process,
    is_maker,
    listed,
    name_of_made,
)
from nbd._disks.queue import MAX_CONNECTIONS, PIECE, as_count
from nbd._disks.rawfile import DiskFile, refuse_to_pickle
from nbd._disks.reconnect import (
    as_reconnect,
    check_can_reconnect,
    first_connection,
    refuse_to_reconnect,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, BinaryIO, NoReturn, TypeVar

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._disks.handles import Source

    Class = TypeVar("Class", bound=type)

#: The maximum number of commands in flight.  Writes and read-ahead never use all of them, so that a
#: read that the program waits for need not queue behind them.
_DEPTH = 64
_READS = ("read", "read1", "readinto", "readinto1", "readline", "readlines", "peek")
#: Those whose argument says how many bytes are read at most.
_SIZED = ("read", "read1", "readinto", "readinto1")
_WRITES = ("write", "writelines")

# Weak references to open files and their buffers, and the references whose object is gone.  This is
# not a WeakSet, as its callback is a Python function: if a signal handler raises in it, the
# exception is lost.
_open_files: dict[ref[Any], None] = {}
_gone: list[ref[Any]] = []


def open(
    source: Source,
    mode: str = "rb",
    *,
    buffering: int = -1,
    connections: int = 1,
    timeout: float | None = None,
    reconnect: float | None = None,
    retry_for: float | None = None,
) -> BinaryIO:
    """Open a disk as a binary file, as the built-in open does for files.

    With a buffer, sequential reads read ahead: as many bytes as were read sequentially so far, and
    at most 8 MiB.  After a seek outside of the buffer, a read asks the server for what it returns,
    or for 32 KiB if it is smaller than 4 KiB.  Without a buffer, each read returns what is on the
    disk at that moment.

    Up to 8 MiB, a write does not wait for the server; if it fails, the next write, flush or close
    raises the error.  A disk has a fixed size: a write past its end is refused with ENOSPC, and
    truncate to another size with io.UnsupportedOperation.

    Where a part of the disk cannot be read, only reads of that part fail.

    A file that is dropped without being closed is closed, with a ResourceWarning.  Its writes are
    finished first, but only as long as the server makes progress within a second.  The same limit
    applies when an exception such as Ctrl-C interrupts a call and then leaves the `with` block of
    the file; in that case nothing is flushed.

    Args:
        source: A URI; the command line of a server, as a list of str; a connected nbd.NBD, which
            stays open; a list of them, which are connections to one export; or a callable without
            arguments that returns a connected nbd.NBD.  It is called once for each connection,
            after the first in another thread, and its handles are closed with the file.
            functools.partial(nbd.connect, uri, prepare=...) is one, for TLS or an export name.
        mode: "rb" to read; "r+b" to read and write; "wb" to write, which does not empty the disk.
        buffering: The size of the buffer in bytes; -1 chooses a size.  With 0 the file has no
            buffer, and reads and writes may be short, as with io.RawIOBase.
        connections: How many connections to make to a URI or by a callable, at most 64.  If the
            server does not allow several, only one is made.  The file can be used as soon as the
            first is connected; the others join when they are ready, and one that fails is left out.
        timeout: Raise nbd.Timeout when no byte has moved for this many seconds.  It does not bound
            a callable.  None waits for ever or, with an nbd.NBD or a callable, uses the timeout of
            the first handle.
        reconnect: When a connection is lost, try for this many seconds to make it again; meanwhile
            calls wait, and nothing fails.  A killed server may lose what it has acknowledged and
            not flushed, so the file keeps up to 64 MiB of what was written since the last flush,
            and writes it again first.  The disk has to be the same one (ESTALE), and no other
            client may write to it meanwhile.  A server without flush is taken at its word.  The
            first connection is retried, too.  Only for a URI or a callable; None gives up at once.
        retry_for: How many seconds to keep trying while the server is not listening.  See
            nbd.connect.  Only for a URI or a command line.

    Returns:
        A file of the module io.  Its errors are nbd.DiskError, which is an OSError and an
        nbd.Error.  Its flush sends NBD's flush, if the server supports it: afterwards everything
        that was written is on stable storage.

    Raises:
        nbd.Error: The server cannot be reached, or the export has 2**63 bytes or more (EOVERFLOW).
        nbd.DiskError: The mode is for writing, and the export is read-only (EROFS).
        ValueError: mode, buffering or connections has another value than those above; handles
            are given twice, or are connected to different exports; or reconnect is given for a
            disk that cannot be connected again.
        TypeError: A callable returns something other than an nbd.NBD.

    Example:
        >>> with nbd.open(["nbdkit", "-s", "memory", "1M"], "r+b") as disk:
        ...     _ = disk.seek(512)
        ...     _ = disk.write(b"hello")
        ...     _ = disk.seek(510)
        ...     disk.read(9)
        b'\\x00\\x00hello\\x00\\x00'

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_flush.
    """
    can = _parsed(mode)
    size = as_number("buffering", buffering)
    if size < -1 or size == 1:
        raise ValueError(f"buffering: {size} is not -1, 0, or the size of a buffer in bytes")
    size = PIECE if size == -1 else size
    seconds = None if timeout is None else as_seconds("timeout", timeout)
    reconnect = as_reconnect(reconnect)
    number = _number(connections, source)
    handles = [source] if isinstance(source, NBD) else listed("source", source)
    if reconnect is not None:
        check_can_reconnect("source", source)
    if handles is not None:
        made = _connections(handles, can, seconds, is_ours=False)
        return _opened(made, source, can, size)
    server: Any = source
    is_made = is_maker(source)
    if is_made:
        server = Maker("source", server, [])
        connect: Callable[[], NBD] = server.first
    else:
        connect = partial(connect_uri, server, timeout=seconds, retry_for=retry_for)
    handle = first_connection(connect, reconnect)
    try:
        more = number - 1 if number > 1 and can_have_more(handle) else 0
        name = name_of_made(handle, source) if is_made else source
        if reconnect is not None and has_process(handle):
            refuse_to_reconnect("source", "a started command")
        made = _connections([handle], can, seconds, is_ours=True, is_of_program=is_made)
        if reconnect is not None:
            made.reconnect(server, reconnect, seconds, f"nbd.open: the connection to {name}")
        return _opened(made, name, can, size, server, more)
    except BaseException:
        handle.__exit__(None, None, None)
        raise


def _connections(
    handles: list[NBD],
    can: tuple[bool, bool],
    timeout: float | None,
    *,
    is_ours: bool,
    is_of_program: bool = False,
) -> Connections:
    """Return the connections of a file; without a timeout, the handles have their own."""
    if can[1]:
        check_can_share("source", handles)
        if handles[0].is_read_only():
            raise DiskError("the export is read-only; open it with mode 'rb'", errno.EROFS)
    seconds = handles[0].gettimeout() if timeout is None else timeout
    return Connections(
        handles, seconds, _DEPTH, PIECE, is_ours=is_ours, is_of_program=is_of_program
    )


def _opened(
    connections: Connections,
    source: object,
    can: tuple[bool, bool],
    size: int,
    server: str | Maker = "",
    more: int = 0,
) -> BinaryIO:
    """Make a file, and begin to make `more` connections; if that fails, its handles are closed."""
    try:
        raw = DiskFile(connections, source, *can, size)
        if more:
            connections.add(server, more)
        file: Any = _buffered(raw, *can, size)
        file.maker = server
        _close_at_exit(raw, file)
        connections.keep(raw if size else None)
        return file  # type: ignore[no-any-return]
    except BaseException:
        connections.abandon()
        raise


def _parsed(mode: object) -> tuple[bool, bool]:
    """Return whether a mode is for reading, and whether it is for writing."""
    if not isinstance(mode, str):
        raise TypeError(f"mode: str is needed, not {type(mode).__name__}")
    letters = sorted(mode)
    if "b" not in letters:
        raise ValueError(f"mode: {mode!r} is for text; a disk is binary: add b, as in 'rb'")
    rest = "".join(letter for letter in letters if letter != "b")
    if letters.count("b") != 1 or rest not in ("r", "w", "+r", "+w"):
        raise ValueError(f"mode: {mode!r} is not 'rb', 'r+b', 'wb' or 'w+b'")
    return rest != "w", rest != "r"


def _number(connections: object, source: object) -> int:
    """Return how many connections to make."""
    number = as_count("connections", connections, MAX_CONNECTIONS)
    if number > 1 and not isinstance(source, str) and not is_maker(source):
        raise ValueError(
            f"connections: {number} need a URI or a callable; a command or a handle has only one"
        )
    return number


def _buffered(raw: DiskFile, readable: bool, writable: bool, size: int) -> BinaryIO:
    file: object = raw
    # io calls tell, and would discard an exception of a signal handler that runs meanwhile.  So it
    # gets int instead, which returns 0, and during which no handler can run.
    raw.__dict__["tell"] = int
    try:
        if size and not writable:
            file = BufferedDiskReader(raw, size)
        elif size:
            file = BufferedDisk(raw, size) if readable else BufferedDiskWriter(raw, size)
    finally:
        del raw.__dict__["tell"]
    return file  # type: ignore[return-value]  # typeshed: files of io are no BinaryIO


def _moving_together(*names: str) -> Callable[[Class], Class]:
    """Let methods of a class restore the position if an exception interrupts them."""

    def decorate(cls: Class) -> Class:
        if IS_FREE_THREADED:  # io's tell stores the position that it has asked for
            cls.tell = _alone(cls.tell)  # type: ignore[attr-defined]
        for name in names:
            going_back = _sized if name in _SIZED else _going_back
            setattr(cls, name, _alone(going_back(getattr(cls, name), cls.tell)))  # type: ignore[attr-defined]
        return cls

    return decorate


def _alone(method: Any) -> Any:
    """Let only one thread at a time into a method where io itself does not.

    PyPy's io crashes in seek beside close.  CPython's takes bytes from its buffer without a lock,
    so two threads would get the same bytes without the GIL (seen in 3.13).
    """
    if IS_CPYTHON and not IS_FREE_THREADED:
        return method

    @wraps(method)
    def call(self: Any, *args: Any) -> Any:
        with self._raw().closing:
            return method(self, *args)

    return call


def _going_back(method: Any, tell: Callable[[Any], int]) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any) -> Any:
        start = tell(self)
        try:
            return method(self, *args)
        except BaseException as error:
            _give_back(self, start, error)
            raise

    return call


def _sized(method: Any, tell: Callable[[Any], int]) -> Any:
    """Do the same for a method whose argument says how many bytes it reads at most.

    The DiskFile gets to know the argument while the method runs, and not longer: it must not refer
    to objects of the program.  The argument has no star, which reads of 512 bytes would notice.
    """

    @wraps(method)
    def call(self: Any, size: Any = -1, /) -> Any:
        start = tell(self)
        raw = self.raw
        try:
            raw.asked = start, size
            try:
                return method(self, size)
            finally:
                raw.asked = None
        except BaseException as error:
            _give_back(self, start, error)
            raise

    return call


def _give_back(file: Any, start: int, error: BaseException) -> None:
    if isinstance(error, ValueError):
        file._explain()
    _go_back(file, start)


def _go_back(file: Any, start: int) -> None:
    if not file.closed and file.tell() != start:
        file.seek(start)


class _Buffer:
    """What the buffers have in common.  It comes before io's class in their base classes.

    Attributes:
        maker: By what connections are made; the DiskFile may not refer to a callable.
    """

    raw: DiskFile
    maker: str | Maker = ""

    @_alone
    def flush(self) -> None:
        raw = self._raw()
        # The content of an inherited buffer is for the parent to write.
        if raw.closed or not (raw.is_inherited or raw.has_given_up):
            try:
                super().flush()  # type: ignore[misc]  # of io
            except ValueError:
                self._explain()
                raise
            raw.flush()

    @_alone
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)  # type: ignore[misc,no-any-return]  # of io
        except ValueError:
            self._explain()
            raise

    def close(self) -> None:
        self._close_after(self._raw().reason_to_hurry())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close_after(exc_value)

    def _close_after(self, error: BaseException | None) -> None:
        """Close the file; `error` is the exception that the program is handling, or None."""
        raw = self._raw()
        if raw.is_inherited:
            raw.close()
            return
        raw.check_not_in_call()
        with raw.closing:
            if raw.closed:
                return
            raw.prepare_to_close(error)
            is_in_call = False
            try:
                self.flush()
            except RuntimeError:  # a signal handler calls this, and has interrupted a call of io's
                is_in_call = True
                raise
            except BaseException as failed:
                # After a plain ValueError io has no buffer any more: its close was interrupted.
                if type(failed) is not ValueError and not raw.give_up(failed, error):
                    raise
            finally:
                if not is_in_call:
                    self._close_both(error)

    def _close_both(self, error: BaseException | None) -> None:
        """Close io's buffer, and the DiskFile below it even if that fails."""
        try:
            super().close()  # type: ignore[misc]  # of io
        finally:
            self.raw.close_after(error)

    def detach(self) -> DiskFile:
        raw: DiskFile = super().detach()  # type: ignore[misc]  # of io
        raw.maker = self.maker
        raw.detached()
        return raw

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_pickle()

    def _explain(self) -> None:
        """Raise a better ValueError than io's, if another thread has closed the file.

        CPython's io complains about its own buffer then.
        """
        if self.raw is not None and self.raw.closed:
            raise ValueError("I/O operation on closed file") from None

    def _raw(self) -> DiskFile:
        if self.raw is None:  # PyPy raises the same error here by itself
            raise ValueError("raw stream has been detached")
        return self.raw

    def __del__(self) -> None:
        if io is None:  # see Handle.__del__
            return
        try:
            raw = self._raw()
        except ValueError:  # the buffer was detached, or __init__ failed
            return
        if not raw.closed:
            try:
                raw._dealloc_warn(self)
            finally:
                self._close_after(None)


@_moving_together(*_READS)
class BufferedDiskReader(_Buffer, io.BufferedReader):
    """A disk that is read through a buffer."""

    raw: DiskFile


@_moving_together(*_WRITES)
class BufferedDiskWriter(_Buffer, io.BufferedWriter):
    """A disk that is written through a buffer."""

    raw: DiskFile

    def write(self, data: ReadableBuffer, /) -> int:
        self.raw.check_fits(self.tell(), data)
        return super().write(data)


@_moving_together(*_READS, *_WRITES)
class BufferedDisk(_Buffer, io.BufferedRandom):
    """A disk that is read and written through a buffer.

    The methods that are replaced here lose bytes in io.BufferedRandom.
    """

    raw: DiskFile

    def write(self, data: ReadableBuffer, /) -> int:
        self.raw.check_fits(self.tell(), data)
        return super().write(data)

    def read1(self, size: int = -1, /) -> bytes:
        # CPython 3.11 drops what was written to the buffer; 3.13 does not.  This seek writes it to
        # the disk.  It does nothing if the buffer has bytes to read.
        self.seek(0, io.SEEK_CUR)
        return super().read1(size)

    if not IS_CPYTHON:
        # PyPy 3.11 reads bytes from the disk that it has already taken from its buffer.

        def readinto(self, buffer: WriteableBuffer, /) -> int:
            return _copy_into(buffer, self.read)

        def readinto1(self, buffer: WriteableBuffer, /) -> int:
            return _copy_into(buffer, self.read1)


def _copy_into(buffer: WriteableBuffer, read: Callable[[int], bytes]) -> int:
    """Fill writable memory by a method that returns bytes; returns how many were read."""
    with as_bytes(buffer) as view:
        if view.readonly:
            raise TypeError("buffer: writable memory is needed, as a bytearray has")
        data = read(len(view))
        view[: len(data)] = data
        return len(data)


def _close_at_exit(raw: DiskFile, file: Any) -> None:
    """Close a file when the program ends; `file` is its buffer, or `raw` again if it has none."""
    for one in (raw, file):
        _open_files[ref(one, _gone.append)] = None
    while _gone:
        try:
            _open_files.pop(_gone.pop(), None)
        except IndexError:  # another thread has removed the last one
            break


def _all_open() -> list[Any]:
    """Return the open files and their buffers, each buffer after its file."""
    found = [reference() for reference in list(_open_files)]
    return [one for one in found if one is not None]


def _mark_inherited() -> None:
    """Called in the child of a fork: the connections belong to the parent."""
    for one in _all_open():
        if isinstance(one, DiskFile):
            one.become_inherited()


os.register_at_fork(after_in_child=_mark_inherited)


@atexit.register
def _close_all() -> None:
    with ExitStack() as stack:  # it runs all callbacks in reverse order, and raises the last error
        for one in _all_open():
            stack.callback(_close, one)


def _close(file: Any) -> None:
    """Close a file that the program left open, unless another thread is using it."""
    try:
        raw = file if isinstance(file, DiskFile) else file.raw
    except ValueError:  # the buffer has been detached
        return
    if not raw.closed and not raw.is_inherited and raw.is_idle():
        try:
            raw._dealloc_warn(file)
        finally:
            file.close()
