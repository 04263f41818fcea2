# SPDX-License-Identifier: LGPL-2.0-or-later
"""Files: regular files and block devices, which the shim reads and writes by their descriptor.

A file object of the caller's is used by its descriptor only where that is the same as using the
object.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from contextlib import suppress

from nbd._binding.convert import as_number
from nbd._binding.errors import DiskError
from nbd._disks.queue import SOURCE
from nbd._disks.streamendpoint import Stream, Wait, is_of_system, name_of, raw_of, side_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nbd._disks.copy import Settings
    from nbd._disks.queue import ShimQueue

# Linux's, which PyPy's os does not name.
_SEEK_DATA, _SEEK_HOLE, _ACCESS_MODE = 3, 4, 3


class File:
    """A regular file or block device, by its descriptor.

    Attributes:
        fd: The descriptor.
        base: Where the copy begins in the file, in bytes.
        size: In bytes, from `base` on.
        name: Its path, or what else the caller knows it by.
        is_regular: Whether it is no device.
    """

    most_workers = 2**31
    is_read_only = False

    def __init__(
        self, file: io.FileIO, base: int, end: int, is_ours: bool = False, owner: Any = None
    ) -> None:
        """Take a file.

        Args:
            file: It has the descriptor.
            base: Where to begin.
            end: SOURCE or TARGET.
            is_ours: Whether to close `file`.
            owner: The caller's file object; None if the caller has given a path.
        """
        self._file = file
        self._is_ours = is_ours
        self._owner = owner
        self._side = side_name(end)
        self.fd: int = file.fileno()
        self.base = base
        self.name = name_of(owner if owner is not None else file)
        self.is_regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        # The copy moves the position of the descriptor, of which buffers of io have a note.
        self._position = os.lseek(self.fd, 0, os.SEEK_CUR)
        self.size = max(0, self._whole() - base)

    def _whole(self) -> int:
        """The size of the file, also before `base`."""
        if self.is_regular:
            return os.fstat(self.fd).st_size
        return os.lseek(self.fd, 0, os.SEEK_END)

    def add_to(self, engine: ShimQueue, end: int, worker: int, workers: int) -> None:
        """Give an engine the file."""
        engine.add_file(end, self.fd, self.base, self.size)

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The holes in a range, as far as the file system reports them: start and stop.

        Raises:
            nbd.Error: The file is shorter than it was: its end would count as a hole.
        """
        at, last = self.base + start, self.base + stop
        while at < last:
            data = self._seek(at, _SEEK_DATA)
            if data is None:
                return
            data = min(data, last)
            if data > at:
                self.check_size(data - self.base)
                yield at - self.base, data - self.base
            hole = self._seek(data, _SEEK_HOLE) if data < last else last
            if hole is None:
                return
            at = hole

    def _seek(self, at: int, whence: int) -> int | None:
        """Where data or a hole begins, perhaps far behind the end; None if that is not known."""
        try:
            return os.lseek(self.fd, at, whence)
        except OSError as reason:
            if not is_of_system(reason):
                raise
            if reason.errno != errno.ENXIO:
                return None
        self.check_size(at - self.base)
        return 2**63  # only a hole follows

    def check_size(self, stop: int) -> None:
        """Raise if a regular file that is being read is now shorter than this."""
        if self.is_regular and self._whole() < self.base + stop:
            raise self._shrunk()

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read exactly as much as the view takes, from an offset behind `base`."""
        done = 0
        while done < len(view):
            try:
                count = _read_at(self.fd, view[done:], self.base + offset + done)
            except OSError as reason:
                self._fail("reading", reason, offset + done)
                raise
            if count == 0:
                raise self._shrunk()
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write everything, to an offset behind `base`."""
        while data:
            try:
                count = os.pwrite(self.fd, data, self.base + offset)
            except (OSError, OverflowError) as reason:
                self._fail("writing", reason, offset)
                raise
            data = data[count:]
            offset += count

    def grow(self, size: int) -> None:
        """Make the file as large as what is copied to it, and empty one that the caller has named.

        Raises:
            nbd.DiskError: The file system does not take it.
        """
        try:
            if self.is_regular and self._owner is None and self.size > 0:
                # Not an empty file: ext4 writes what is cut to nothing to its disk when it is
                # closed.
                os.ftruncate(self.fd, 0)
                self.size = 0
            if self.is_regular and self.size < size:
                os.ftruncate(self.fd, self.base + size)
                self.size = size
        except (OSError, OverflowError) as reason:
            self._fail("growing", reason, size)
            raise

    def flush(self) -> None:
        """Have the system write everything to its disk."""
        try:
            os.fdatasync(self.fd)
        except OSError as reason:
            self._fail("flushing", reason)
            raise

    def close(self) -> None:
        """Close what is ours, and put the caller's descriptor where it was."""
        with suppress(OSError):  # a failure of the copy is more important
            if self._is_ours:
                self._file.close()
            elif self._position >= 0:
                os.lseek(self.fd, self._position, os.SEEK_SET)
                self._position = -1

    def say_goodbye(self, count: int) -> None:
        """Seek the caller's file to just past the copied bytes."""
        self.close()
        if self._owner is not None:
            self._owner.seek(self.base + count)

    def _fail(self, what: str, reason: BaseException, offset: int = 0) -> None:
        """Raise an exception with the file's name, if the system has refused something.

        Args:
            what: What was tried: "reading", "writing", "growing" or "flushing".
            reason: An OSError; or an OverflowError, if an offset is none of the system's.
            offset: Where, in bytes behind `base`; for "growing", to what size.
        """
        if not is_of_system(reason):
            return
        number = (reason.errno if isinstance(reason, OSError) else None) or errno.EFBIG
        places = {"growing": f" to {offset} bytes", "flushing": ""}
        where = places.get(what, f" at offset {offset}")
        text = f"nbd.copy: {what} the {self._side} {self.name!r} failed{where}: "
        raise DiskError(text + os.strerror(number), number) from reason

    def _shrunk(self) -> DiskError:
        return DiskError(
            f"nbd.copy: the {self._side} {self.name!r} has become shorter during the copy: "
            f"it has {max(0, self._whole() - self.base)} of {self.size} bytes; "
            "copy it again when nothing changes it",
            errno.EIO,
        )


def opened(path: str | bytes, end: int, settings: Settings) -> File | Stream:
    """A file or block device; a stream if the path names something else, as a pipe.

    A FIFO is waited for as long as the copy's timeout allows.

    Raises:
        nbd.Timeout: Nobody has opened the other side of a FIFO that is written.
        OSError: It cannot be opened.
    """
    file = _open(path, end, settings)
    try:
        if _has_offsets(file.fileno()):
            made = File(file, 0, end, is_ours=True)
            if end != SOURCE or _is_as_large_as_it_says(made.fd):
                return made
        return Stream(file, end, settings, is_ours=True)
    except BaseException:
        file.close()
        raise


def _open(path: str | bytes, end: int, settings: Settings) -> io.FileIO:
    """Open a path without blocking: a FIFO can be read at once, and written when it is read."""
    is_fifo = _is_fifo(path)
    flags = os.O_CLOEXEC | os.O_NOCTTY | (os.O_NONBLOCK if is_fifo else 0)
    flags |= os.O_RDONLY if end == SOURCE else os.O_WRONLY | os.O_CREAT
    wait = Wait(settings, f"nobody has opened the other side of {os.fsdecode(path)!r}")

    def opener(name: str, _: int) -> int:
        return os.open(name, flags, 0o666)

    while True:
        try:
            return io.FileIO(path, "r" if end == SOURCE else "w", opener=opener)
        except OSError as reason:
            if reason.errno != errno.ENXIO or not is_fifo:
                raise
        wait.pause()


def _is_fifo(path: str | bytes) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:  # open says it better
        return False


def of_object(file: Any, end: int, settings: Settings) -> File | Stream:
    """A file object of the caller: its descriptor, where that has the bytes of the object.

    Raises:
        io.UnsupportedOperation: It was not opened for what the copy needs.
        OSError: It was opened with O_DIRECT, and cannot be without.
    """
    _check_mode(file, end)
    raw = raw_of(file)
    if type(raw) is not io.FileIO:
        return Stream(file, end, settings)
    flags = fcntl.fcntl(raw.fileno(), fcntl.F_GETFL)
    if flags & _ACCESS_MODE not in (os.O_RDWR, os.O_RDONLY if end == SOURCE else os.O_WRONLY):
        raise _wrong_mode(end)  # the object had to believe its caller
    if not _has_offsets(raw.fileno()):
        return Stream(file, end, settings)
    if file.writable():
        file.flush()
    plain = _without_direct(raw, flags, end) if flags & os.O_DIRECT else raw
    is_ours = plain is not raw
    if end != SOURCE and flags & os.O_APPEND:  # the system chooses where each write goes
        return Stream(plain if is_ours else file, end, settings, is_ours, owner=file)
    made = File(plain, file.tell(), end, is_ours=is_ours, owner=file)
    if end == SOURCE and not _is_as_large_as_it_says(made.fd):
        made.close()
        return Stream(file, end, settings)
    return made


def _check_mode(file: Any, end: int) -> None:
    """Refuse a file of the wrong mode before anything is opened, emptied or written."""
    is_possible = getattr(file, "readable" if end == SOURCE else "writable", None)
    if callable(is_possible) and isinstance(file, io.IOBase) and not is_possible():
        raise _wrong_mode(end)


def _wrong_mode(end: int) -> io.UnsupportedOperation:
    wanted, mode = ("readable", "rb") if end == SOURCE else ("writable", "wb")
    return io.UnsupportedOperation(
        f"{side_name(end)}: the file is not {wanted}; open it with mode {mode!r}"
    )


def _without_direct(raw: io.FileIO, flags: int, end: int) -> io.FileIO:
    """The same file without O_DIRECT, which takes only whole blocks in aligned memory."""
    wanted = os.O_RDONLY if end == SOURCE else os.O_WRONLY | (flags & os.O_APPEND)

    def opener(path: str, _: int) -> int:
        return os.open(path, wanted | os.O_CLOEXEC)

    mode = "r" if end == SOURCE else "w"
    try:
        return io.FileIO(f"/proc/self/fd/{raw.fileno()}", mode, opener=opener)
    except OSError as reason:
        raise OSError(
            reason.errno,
            f"nbd.copy: the {side_name(end)} was opened with O_DIRECT, and cannot be without "
            f"({os.strerror(reason.errno or 0)}); open it without O_DIRECT",
            name_of(raw),
        ) from reason


def identity(what: File | Stream) -> tuple[int, ...] | None:
    """What tells two files, devices or pipes apart; None if there is no such thing."""
    try:
        fd = what.fd if isinstance(what, File) else what.file.fileno()
        status = os.fstat(as_number("fileno", fd))
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)  # a device may have several names
    if stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return (status.st_dev, status.st_ino)
    return None


def _has_offsets(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _is_as_large_as_it_says(fd: int) -> bool:
    """Whether a file has as many bytes as its size is: in /proc and /sys that is 0, or a page."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return True
    size = status.st_size
    try:
        return bool(os.pread(fd, 1, max(0, size - 1))) == (size > 0)
    except OSError:  # the copy says it better
        return True


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read once, without moving the position of the descriptor; returns how much."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)  # PyPy
    view[: len(data)] = data
    return len(data)
