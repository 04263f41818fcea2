# SPDX-License-Identifier: LGPL-2.0-or-later
"""The endpoint that is a stream: it is read or written in order, from its beginning to its end.

A stream is a pipe, a socket, a file that is appended to, or any object with a binary `read` or
`write`, such as an io.BytesIO or a gzip.GzipFile.

A thread inside read() or write() on a pipe has no timeout, and only a signal makes it return.  So
the copy waits for a pipe, socket or terminal only in poll, in slices, between which it can be
stopped; the system calls that follow do not block.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys

from nbd._binding.convert import as_number
from nbd._binding.shim import IS_CPYTHON
from nbd._disks.endpoints import (
    CHUNK,
    BoundedWait,
    Endpoint,
    Reader,
    Writer,
    identity_of,
    name_of,
    side_name,
)
from nbd._disks.queue import SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from nbd._disks.endpoints import Data, Settings

    Result = TypeVar("Result")

#: How many bytes a terminal takes without blocking once poll reports that it can be written.
_TERMINAL_WRITE = 256

BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
#: Objects of these types do not keep the memory that `write` is given.
_BORROWERS = (io.FileIO, io.BytesIO, *BUFFERED)
# The modules that make system calls.
_MODULES = (__name__, "nbd._disks.fileendpoint")


class Stream(Endpoint):
    """A binary file object that is read or written in order.

    Args:
        file: The object.
        side: SOURCE or TARGET.
        settings: Those of the copy.
        is_ours: Whether to close `file`.
        owner: The caller's object if that is not `file`; it has the name.
    """

    has_offsets = False

    def __init__(
        self, file: Any, side: int, settings: Settings, *, is_ours: bool = False, owner: Any = None
    ) -> None:
        super().__init__(settings)
        self.name = name_of(file if owner is None else owner)
        self._file = file
        self._is_ours = is_ours
        self._side = side_name(side)
        self._is_file = type(raw_of(file)) is io.FileIO
        is_source = side == SOURCE
        self._channel = Channel(file, settings, is_source) if is_channel(file) else None
        self.size = _size_of_rest(file) if is_source and self._channel is None else None

    def identity(self) -> tuple[int, ...] | None:
        """What all names of one file, device or pipe have in common; None if that is not known."""
        try:
            return identity_of(as_number("fileno", self._file.fileno()))
        except (AttributeError, OSError, TypeError, ValueError):
            return None

    def reader(self) -> Reader:
        """Begin to read from the position of the object to its end."""
        return _StreamReader(self)

    def writer(self) -> Writer:
        """Begin to write at the position of the object."""
        return _StreamWriter(self)

    def chunks(self) -> Iterator[Data]:
        """The rest of the object.  A memoryview keeps its bytes until the next one is asked for.

        Raises:
            nbd.Timeout: A pipe, socket or terminal has sent nothing for too long.
            BlockingIOError, TypeError: The object's `read` does not return bytes.
        """
        if self._channel is not None:
            buffer = memoryview(bytearray(CHUNK))
            while True:
                try:
                    count = self._channel.read_into(buffer)
                except OSError as reason:
                    self._explain("reading", reason)
                    raise
                if not count:
                    return
                yield buffer[:count]
        while True:
            data = self._read()
            if not data:
                return
            yield data

    def _read(self) -> Data:
        """Call the object's `read` once; returns what it has returned, as bytes."""
        try:
            data = self._file.read(CHUNK)
        except OSError as reason:
            self._explain("reading", reason)
            raise
        if data is None:
            raise BlockingIOError(
                errno.EAGAIN,
                f"nbd.copy: read() of the {self._side} has no data and does not wait for some; "
                "make it blocking",
            )
        if type(data) is bytes:
            return data
        try:
            view = memoryview(data)
            # PyPy 7.3 copies a slice of a view that was cast byte by byte, at 3 MB/s.
            return view.cast("B") if IS_CPYTHON or not view.c_contiguous else view.tobytes()
        except TypeError:
            kind = type(data).__name__
            raise TypeError(
                f"{self._side}: its read() has returned {kind}, not bytes; open it in binary mode"
            ) from None

    def write(self, data: Data) -> None:
        """Write everything.

        Raises:
            nbd.Timeout: A pipe, socket or terminal has taken nothing for too long.
            OSError: The object has not taken all of it.
        """
        if self._channel is None and type(self._file) not in _BORROWERS:
            data = bytes(data)  # the object may keep what it is given
        view = memoryview(data)
        try:
            if self._channel is not None:
                self._channel.write(view)
                return
            while view:
                whole = len(view) == len(data)
                count = self._file.write(data if whole else type(data)(view))
                view = view[self._written(count, len(view)) :]
                self.settings.check()
        except OSError as reason:
            self._explain("writing", reason)
            raise

    def _written(self, count: object, length: int) -> int:
        """How many of `length` bytes the object has written, if its `write` has returned `count`.

        Many objects return None for everything.  For io.RawIOBase, None means nothing.
        """
        if count is None and not isinstance(self._file, io.RawIOBase):
            return length
        number = 0 if count is None else as_number("target: what its write() has returned", count)
        if 0 < number <= length:
            return number
        if count is None:
            raise BlockingIOError(
                errno.EAGAIN,
                "nbd.copy: write() of the target takes no more data and does not wait; "
                "make it blocking",
            )
        raise OSError(errno.EIO, f"nbd.copy: write() of the target took {number} of {length} bytes")

    def flush(self) -> None:
        """Write what the object has buffered, and sync a regular file if the settings ask for it.

        The object's buffer is flushed in any case: its bytes are a part of the copy.
        """
        try:
            if self._channel is None and hasattr(self._file, "flush"):
                self._file.flush()
            if self._is_file and self.settings.flush and stat.S_ISREG(self._mode()):
                os.fdatasync(self._file.fileno())
        except OSError as reason:
            self._explain("flushing", reason)
            raise

    def _mode(self) -> int:
        return os.fstat(self._file.fileno()).st_mode

    def close(self) -> None:
        """Close the object if it is ours."""
        if self._channel is not None:
            self._channel.close()
        if self._is_ours:
            self._file.close()

    def _explain(self, what: str, reason: OSError) -> None:
        """If a system call has failed, raise an exception of the same type that names the stream.

        Objects other than io's have their own messages.
        """
        if (self._is_file or self._channel is not None) and is_of_system(reason):
            text = f"nbd.copy: {what} the {self._side} failed: {os.strerror(reason.errno or 0)}"
            raise OSError(reason.errno, text, self.name) from reason


class _StreamReader(Reader):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def chunks(self) -> Iterator[tuple[Data, bool]]:
        """All bytes in order; a stream has no holes."""
        for chunk in self._stream.chunks():
            yield chunk, False


class _StreamWriter(Writer):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, data: Data) -> None:
        """Write the next bytes."""
        self._stream.write(data)
        self.written += len(data)


class Channel:
    """A pipe, socket or terminal of a file object.

    Its bytes bypass the object's buffer; what the buffer holds already comes first.

    Args:
        file: The object, for which `is_channel` is true.
        settings: Those of the copy.
        is_source: Whether it is read rather than written.
    """

    def __init__(self, file: Any, settings: Settings, is_source: bool) -> None:
        self._file = file
        self._settings = settings
        self._side = "source" if is_source else "target"
        self._fd: int = file.fileno()
        self._direct = io.FileIO(self._fd, "r" if is_source else "w", closefd=False)
        self._sender: io.FileIO | None = None  # one that does not block
        self._buffered = b""  # what was in the object's buffer, and is not read yet
        self._has_begun = False
        self._is_at_end = False

    def read_into(self, view: memoryview) -> int:
        """Read what is available, after a wait if nothing is; returns how much, 0 at the end."""
        filled = 0
        if not self._has_begun:
            self._buffered = self._take_buffered()
            self._has_begun = True
        if self._buffered:
            filled = min(len(view), len(self._buffered))
            view[:filled] = self._buffered[:filled]
            self._buffered = self._buffered[filled:]
        while filled < len(view) and not self._is_at_end:
            if not filled:
                self._wait("has sent nothing", select.POLLIN)
            elif not is_ready(self._fd, select.POLLIN):
                break
            count = self._direct.readinto(view[filled:])
            self._is_at_end = count == 0  # a terminal reports that once
            filled += count or 0  # None: another process has read the bytes first
            self._settings.check()
        return filled

    def write(self, data: memoryview) -> None:
        """Write everything."""
        if not self._has_begun:
            self._flush()
            self._sender = self._nonblocking()
            self._has_begun = True
        while True:
            data = data[self._send(data) or 0 :]
            self._settings.check()
            if not data:
                return
            self._wait("has taken nothing", select.POLLOUT)

    def close(self) -> None:
        """Close what was opened here."""
        if self._sender is not None:
            self._sender.close()

    def _wait(self, what: str, event: int) -> None:
        """Wait until the descriptor can be read (select.POLLIN) or written (select.POLLOUT)."""
        wait = BoundedWait(self._settings, f"the {self._side} {what}")
        # The second look is for a process that was suspended past its timeout.
        while not is_ready(self._fd, event, wait.slice()) and not is_ready(self._fd, event):
            wait.check()

    def _take_buffered(self) -> bytes:
        """Empty the object's read buffer: what the object has read, and its program has not."""
        if type(self._file) not in BUFFERED:
            return b""
        # peek calls read() if the buffer is empty.
        data: bytes = _without_blocking(self._fd, self._file.peek)
        return bytes(self._file.read(len(data))) if data else b""

    def _flush(self) -> None:
        """Empty the object's write buffer: what the program has written before."""
        while True:
            try:
                _without_blocking(self._fd, self._file.flush)
            except BlockingIOError:
                self._wait("has taken nothing", select.POLLOUT)
            else:
                return

    def _nonblocking(self) -> io.FileIO | None:
        """A file that writes what the channel takes at once, and no more; None if none can be made.

        The flag O_NONBLOCK is shared with every process that has a copy of the descriptor.  So a
        pipe is opened again, which gives it a flag of its own.
        """
        if not os.get_blocking(self._fd):
            return self._direct
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            try:
                return _reopened(self._fd, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # /proc is not mounted, or the pipe belongs to another user
                return None
        return None

    def _send(self, data: memoryview) -> int | None:
        """Write what can be written without blocking; returns how much, or None for nothing."""
        if _is_socket(self._file):
            try:
                return int(raw_of(self._file)._sock.send(data, _dont_wait()))
            except BlockingIOError:
                return None
        if self._sender is not None:
            return self._sender.write(data)
        self._wait("has taken nothing", select.POLLOUT)
        limit = _TERMINAL_WRITE if os.isatty(self._fd) else select.PIPE_BUF
        return self._direct.write(data[:limit])


def is_ready(fd: int, event: int, seconds: float = 0.0) -> bool:
    """Whether poll reports a descriptor, after waiting at most `seconds`."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(1000 * seconds))


def is_channel(file: Any) -> bool:
    """Whether an object only passes on the bytes of a pipe, socket or terminal."""
    raw = raw_of(file)
    if type(raw) is not io.FileIO and not _is_socket(raw):
        return False
    mode = os.fstat(raw.fileno()).st_mode
    if stat.S_ISCHR(mode):
        return os.isatty(raw.fileno())  # others, such as /dev/null, never block
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def raw_of(file: Any) -> Any:
    """The unbuffered object below a file object of io.

    A subclass may override methods of io's types, so objects of one are left as they are.
    """
    return file.raw if type(file) in BUFFERED else file


def is_of_system(reason: BaseException) -> bool:
    """Whether a system call has failed, and not a signal handler that ran during it."""
    last = reason.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_here = last is not None and last.tb_frame.f_globals.get("__name__") in _MODULES
    is_numbered = isinstance(reason, OverflowError) or isinstance(
        getattr(reason, "errno", None), int
    )
    return is_here and is_numbered


def _without_blocking(fd: int, call: Callable[[], Result]) -> Result:
    """The result of a call, during which system calls on a descriptor do not block."""
    is_blocking = os.get_blocking(fd)
    try:
        os.set_blocking(fd, False)
        return call()
    finally:
        os.set_blocking(fd, is_blocking)


def _reopened(fd: int, flags: int) -> io.FileIO:
    """Open the file of a descriptor again, with flags of its own."""

    def opener(path: str, _: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)

    return io.FileIO(f"/proc/self/fd/{fd}", "w" if flags & os.O_WRONLY else "r", opener=opener)


def _is_socket(file: Any) -> bool:
    """Whether an object is what socket.makefile returns for a plain socket.

    The bytes of a TLS socket are not those of its descriptor, and a socket with a timeout waits by
    itself.
    """
    raw = raw_of(file)
    module: Any = sys.modules.get("socket")
    if module is None or type(raw) is not module.SocketIO:
        return False
    sock = raw._sock
    return type(sock) is module.socket and not sock.gettimeout()


def _dont_wait() -> int:
    module: Any = sys.modules["socket"]
    return int(module.MSG_DONTWAIT)


def _size_of_rest(file: Any) -> int | None:
    """How many bytes follow the position of a file object; None if that is not known.

    Only a BytesIO is asked.  Seeking to the end of another object, such as a gzip.GzipFile, also
    one below a buffer of io, may take as long as reading it.  A file that is copied as a stream has
    more content than its size says.
    """
    return max(0, len(file.getbuffer()) - file.tell()) if type(file) is io.BytesIO else None
