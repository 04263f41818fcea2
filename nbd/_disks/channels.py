# SPDX-License-Identifier: LGPL-2.0-or-later
"""Pipes, sockets and terminals, of which a copy waits only in poll.

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

from nbd._binding.errors import Timeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from nbd._disks.copy import Settings

    Result = TypeVar("Result")

#: Seconds after which each wait looks whether the copy has to end.
SLICE = 0.1
#: Seconds between two attempts to open a FIFO that nobody reads.
_RETRY_INTERVAL = 0.02
#: What a terminal that poll calls writable takes at once.
_TERMINAL_WRITE = 256

BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


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
