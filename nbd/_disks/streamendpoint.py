# SPDX-License-Identifier: LGPL-2.0-or-later
"""Streams: what nbd.copy reads or writes from the beginning to the end, in order.

That is a pipe, a file that is appended to, an io.BytesIO, a gzip.GzipFile.
Pipes, sockets and terminals, of which a copy waits only in poll.

A thread that is inside read() or write() on a pipe knows no timeout, and nothing but a signal gets
it out.  So every wait is a poll, in slices after each of which the copy may be stopped, and the
system calls that follow it do not block.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from time import monotonic, sleep

from nbd._binding.convert import as_number
from nbd._binding.errors import Timeout
from nbd._disks.queue import SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar, Union

    from nbd._disks.copy import Settings

    Data = Union[bytes, memoryview]
    Result = TypeVar("Result")

#: Seconds after which each wait looks whether the copy has to end.
SLICE = 0.1
#: Seconds between two attempts to open a FIFO that nobody reads.
_RETRY_INTERVAL = 0.02
#: What a terminal that poll calls writable takes at once.
_TERMINAL_WRITE = 256

BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
_CHUNK = 1024 * 1024
#: Objects of these types use what they are given only while `write` runs.
_BORROWERS = (io.FileIO, io.BytesIO, *BUFFERED)
# Where system calls are made.
_MODULES = (__name__, "nbd._disks.fileendpoint")


class Wait:
    """One wait of a copy: bounded by its timeout, and ended when the copy is stopped.

    Args:
        settings: Those of the copy.
        what: What the wait is for, such as "the source has sent nothing", for nbd.Timeout.
    """

    def __init__(self, settings: Settings, what: str) -> None:
        self._settings = settings
        self._what = what
        self._began = monotonic()

    def until_ready(self, fd: int, event: int) -> None:
        """Wait until a descriptor can be read (select.POLLIN) or written (select.POLLOUT)."""
        while not is_ready(fd, event, self._slice()):
            self._settings.check()
            # A process that was suspended meanwhile is late, and yet the descriptor may be ready.
            if self._is_over() and not is_ready(fd, event):
                raise self._late()

    def pause(self) -> None:
        """Rest before the next attempt."""
        self._settings.check()
        if self._is_over():
            raise self._late()
        sleep(min(_RETRY_INTERVAL, self._slice()))

    def _slice(self) -> float:
        timeout = self._settings.timeout
        if timeout is None:
            return SLICE
        return max(0.0, min(SLICE, self._began + timeout - monotonic()))

    def _is_over(self) -> bool:
        timeout = self._settings.timeout
        return timeout is not None and monotonic() - self._began >= timeout

    def _late(self) -> Timeout:
        return Timeout(
            f"nbd.copy: {self._what} for {self._settings.timeout:g} seconds; "
            "try again, or allow more time",
            errno.ETIMEDOUT,
        )


class Channel:
    """A pipe, socket or terminal of a file object.

    Its bytes go past the object's buffer, whose content is used first.

    Args:
        file: The object, for which `is_channel` is true.
        settings: Those of the copy.
        is_source: Whether it is read, and not written.
    """

    def __init__(self, file: Any, settings: Settings, is_source: bool) -> None:
        self._file = file
        self._settings = settings
        self._side = "source" if is_source else "target"
        self._fd: int = file.fileno()
        self._direct = io.FileIO(self._fd, "r" if is_source else "w", closefd=False)
        self._sender: io.FileIO | None = None  # one that does not block
        self._kept = b""  # what was in the object's buffer
        self._is_begun = False
        self._is_ended = False

    def read_into(self, view: memoryview) -> int:
        """Read what is there, after a wait if that is nothing; returns how much, 0 at the end."""
        filled = 0
        if not self._is_begun:
            self._kept = self._buffered()
            self._is_begun = True
        if self._kept:
            filled = min(len(view), len(self._kept))
            view[:filled] = self._kept[:filled]
            self._kept = self._kept[filled:]
        while filled < len(view) and not self._is_ended:
            if not filled:
                self._wait("has sent nothing", select.POLLIN)
            elif not is_ready(self._fd, select.POLLIN):
                break
            count = self._direct.readinto(view[filled:])
            self._is_ended = count == 0  # a terminal says that once
            filled += count or 0  # None: another process was faster
            self._settings.check()
        return filled

    def write(self, data: memoryview) -> None:
        """Write everything."""
        if not self._is_begun:
            self._flush()
            self._prepare()
            self._is_begun = True
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
        Wait(self._settings, f"the {self._side} {what}").until_ready(self._fd, event)

    def _buffered(self) -> bytes:
        """What the object has read, and its program has not."""
        if type(self._file) not in BUFFERED:
            return b""
        # peek reads if it has nothing.
        data: bytes = without_blocking(self._fd, self._file.peek)
        return bytes(self._file.read(len(data))) if data else b""

    def _flush(self) -> None:
        """Write what the program has written before."""
        while True:
            try:
                without_blocking(self._fd, self._file.flush)
            except BlockingIOError:
                self._wait("has taken nothing", select.POLLOUT)
            else:
                return

    def _prepare(self) -> None:
        """Find a way to write what the channel takes at once, and no more.

        The flag O_NONBLOCK belongs to all that have the other end or a copy of the descriptor.  So
        a pipe is opened again, to have a flag of its own.
        """
        if not os.get_blocking(self._fd):
            self._sender = self._direct
        elif stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            try:
                self._sender = _opened_again(self._fd, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # no /proc, or a pipe of another user
                self._sender = None

    def _send(self, data: memoryview) -> int | None:
        """Write what can be written without waiting; returns how much, or None."""
        if _is_socket(self._file):
            try:
                return int(_socket_of(self._file).send(data, _dont_wait()))
            except BlockingIOError:
                return None
        if self._sender is not None:
            return self._sender.write(data)
        self._wait("has taken nothing", select.POLLOUT)
        most = _TERMINAL_WRITE if os.isatty(self._fd) else select.PIPE_BUF
        return self._direct.write(data[:most])


def is_ready(fd: int, event: int, seconds: float = 0.0) -> bool:
    """Whether poll reports a descriptor, after waiting at most `seconds`."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(1000 * seconds))


def is_channel(file: Any) -> bool:
    """Whether an object reads or writes a pipe, socket or terminal, and nothing else."""
    raw = file.raw if type(file) in BUFFERED else file
    if type(raw) is not io.FileIO and not _is_socket(raw):
        return False
    mode = os.fstat(raw.fileno()).st_mode
    if stat.S_ISCHR(mode):
        return os.isatty(raw.fileno())  # others, as /dev/null, never wait
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def without_blocking(fd: int, call: Callable[[], Result]) -> Result:
    """The result of a call, during which system calls on a descriptor do not wait."""
    was = os.get_blocking(fd)
    try:
        os.set_blocking(fd, False)
        return call()
    finally:
        os.set_blocking(fd, was)


def _opened_again(fd: int, flags: int) -> io.FileIO:
    """Another description of what a descriptor stands for."""

    def opener(path: str, _: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)

    return io.FileIO(f"/proc/self/fd/{fd}", "w" if flags & os.O_WRONLY else "r", opener=opener)


def _is_socket(file: Any) -> bool:
    """Whether it is what socket.makefile returns.

    Not for one of TLS, whose bytes are not those of the descriptor, and not for one with a timeout
    of its own.
    """
    raw = file.raw if type(file) in BUFFERED else file
    module: Any = sys.modules.get("socket")
    if module is None or type(raw) is not module.SocketIO:
        return False
    sock = raw._sock
    return type(sock) is module.socket and not sock.gettimeout()


def _socket_of(file: Any) -> Any:
    raw = file.raw if type(file) in BUFFERED else file
    return raw._sock


def _dont_wait() -> int:
    module: Any = sys.modules["socket"]
    return int(module.MSG_DONTWAIT)


class Stream:
    """A binary file object that is read or written in order.

    Attributes:
        file: The object.
        size: In bytes; None if that is not known.
        name: Its path, or what else the caller knows it by.
    """

    is_read_only = False

    def __init__(
        self, file: Any, end: int, settings: Settings, is_ours: bool = False, owner: Any = None
    ) -> None:
        """Take an object.

        Args:
            file: The object.
            end: SOURCE or TARGET.
            settings: Those of the copy.
            is_ours: Whether to close it.
            owner: The caller's object, if that is another one.
        """
        self.file = file
        self.name = name_of(file if owner is None else owner)
        self._is_ours = is_ours
        self._settings = settings
        self._side = side_name(end)
        self._is_file = type(raw_of(file)) is io.FileIO
        is_source = end == SOURCE
        self._channel = Channel(file, settings, is_source) if is_channel(file) else None
        self.size = _rest_of(file) if is_source and self._channel is None else None

    def chunks(self) -> Iterator[Data]:
        """The rest of the object.  A memoryview has its bytes only until the next one is asked for.

        Raises:
            nbd.Timeout: A pipe, socket or terminal has sent nothing for too long.
            BlockingIOError, TypeError: The object's `read` does not return bytes.
        """
        if self._channel is not None:
            buffer = memoryview(bytearray(_CHUNK))
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
        """The next bytes of an object."""
        try:
            data = self.file.read(_CHUNK)
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
            return memoryview(data).cast("B")
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
        if self._channel is None and type(self.file) not in _BORROWERS:
            data = bytes(data)  # the object may keep what it is given
        view = memoryview(data)
        try:
            if self._channel is not None:
                self._channel.write(view)
                return
            while view:
                whole = len(view) == len(data)
                count = self.file.write(data if whole else type(data)(view))
                view = view[self._taken(count, len(view)) :]
                self._settings.check()
        except OSError as reason:
            self._explain("writing", reason)
            raise

    def _taken(self, count: object, length: int) -> int:
        """How much `write` has taken, by what it has returned."""
        if count is None and not isinstance(self.file, io.RawIOBase):
            return length  # as many objects say that they have taken all
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
        """Write what the object has buffered; have a file that is appended to on its disk."""
        try:
            if self._channel is None and hasattr(self.file, "flush"):
                self.file.flush()
            if self._is_file and self._settings.flush and stat.S_ISREG(self._mode()):
                os.fdatasync(self.file.fileno())
        except OSError as reason:
            self._explain("flushing", reason)
            raise

    def _mode(self) -> int:
        return os.fstat(self.file.fileno()).st_mode

    def close(self) -> None:
        """Close the object, if it is ours."""
        if self._channel is not None:
            self._channel.close()
        if self._is_ours:
            self.file.close()

    def say_goodbye(self, count: int) -> None:
        """Do nothing: the object is behind the copied bytes."""

    def _explain(self, what: str, reason: OSError) -> None:
        """Raise an exception of the same type with the name, if the system has refused something.

        Not for other objects than io's: those have said it in their own way.
        """
        if (self._is_file or self._channel is not None) and is_of_system(reason):
            text = f"nbd.copy: {what} the {self._side} failed: {os.strerror(reason.errno or 0)}"
            raise OSError(reason.errno, text, self.name) from reason


def side_name(end: int) -> str:
    """What a message calls one of the two sides."""
    return "source" if end == SOURCE else "target"


def is_of_system(reason: BaseException) -> bool:
    """Whether a system call has failed, and not the handler of a signal that came during it."""
    last = reason.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_here = last is not None and last.tb_frame.f_globals.get("__name__") in _MODULES
    is_numbered = isinstance(reason, OverflowError) or isinstance(
        getattr(reason, "errno", None), int
    )
    return is_here and is_numbered


def raw_of(file: Any) -> Any:
    """What has the descriptor of a file object.

    Only of io's own types: a subclass may have methods of its own, which count.
    """
    return file.raw if type(file) in BUFFERED else file


def name_of(file: Any) -> str:
    name = getattr(file, "name", None)
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return f"descriptor {name}" if isinstance(name, int) else type(file).__name__


def _rest_of(file: Any) -> int | None:
    """How many bytes follow the position of a file object; None if that is not known.

    Only for io's own types: to find the end of another one may take as long as to read it.
    """
    if type(file) not in (io.BytesIO, *BUFFERED) or type(raw_of(file)) is io.FileIO:
        return None  # a file of io's that gets here has content that its size does not tell
    if not file.seekable():
        return None
    at = int(file.tell())
    size = int(file.seek(0, os.SEEK_END))
    file.seek(at)
    return max(0, size - at)
