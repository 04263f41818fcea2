# SPDX-License-Identifier: LGPL-2.0-or-later
"""The endpoint that is a file, by its descriptor; and the opening of paths and file objects.

A path or file object becomes a `File` if it is a regular file or block device, and if using its
descriptor is the same as using the object.  Everything else becomes a `Stream`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from contextlib import suppress
from time import sleep

from nbd._binding.errors import DiskError
from nbd._binding.shim import lib
from nbd._disks.copystream import FileReader, FileWriter
from nbd._disks.endpoints import (
    MIN_PART,
    BoundedWait,
    Endpoint,
    identity_of,
    is_past,
    name_of,
    parts,
    side_name,
)
from nbd._disks.queue import SOURCE
from nbd._disks.streamendpoint import Stream, is_of_system, raw_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nbd._disks.endpoints import Anything, Bad, Reader, Settings, Writer
    from nbd._disks.queue import ShimQueue

#: Seconds between two attempts to open a FIFO that nobody reads.
_RETRY_INTERVAL = 0.02
#: The size of the smallest part of a file with O_DIRECT: every device accepts it.
_MIN_DIRECT_PART = 4096
# Linux's values, for which PyPy's os has no names.
_SEEK_DATA, _SEEK_HOLE, _ACCESS_MODE = 3, 4, 3


class File(Endpoint):
    """A regular file or block device.

    Args:
        file: The unbuffered file with the descriptor.
        base: Where the copy begins in the file, in bytes.
        side: SOURCE or TARGET.
        settings: Those of the copy.
        is_ours: Whether to close `file`.
        owner: The caller's file object; None if the caller has given a path.

    Attributes:
        fd: The descriptor.
        size: In bytes, from `base` on.
    """

    size: int
    max_workers = 2**31  # any number of threads can share a descriptor
    _error_type = DiskError

    def __init__(
        self,
        file: io.FileIO,
        base: int,
        side: int,
        settings: Settings,
        *,
        is_ours: bool = False,
        owner: Any = None,
    ) -> None:
        super().__init__(settings)
        self._file = file
        self._is_ours = is_ours
        self._owner = owner
        self._side = side_name(side)
        self.fd: int = file.fileno()
        self._base = base
        self.name = name_of(owner if owner is not None else file)
        self._is_regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        # The copy moves the descriptor's position, which io's buffered objects rely on.
        self._position = os.lseek(self.fd, 0, os.SEEK_CUR)
        self.size = max(0, self._end_of_file() - base)
        self.capacity = None if self._is_regular else self.size

    def _end_of_file(self) -> int:
        """The size of the whole file."""
        if self._is_regular:
            return os.fstat(self.fd).st_size
        return os.lseek(self.fd, 0, os.SEEK_END)

    def identity(self) -> tuple[int, ...] | None:
        """What all names of one file or device have in common; None if that is not known."""
        try:
            return identity_of(self.fd)
        except OSError:
            return None

    # In order.

    def reader(self) -> Reader:
        """Begin to read from the beginning to the end."""
        return FileReader(self)

    def writer(self) -> Writer:
        """Begin to write from the beginning."""
        return FileWriter(self)

    # At any offset.

    def add_to(self, queue: ShimQueue, side: int, worker: int, workers: int) -> None:
        """Give a queue the descriptor."""
        queue.add_file(side, self.fd, self._base, self.size)

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The holes in a range, as far as the file system reports them: start and stop of each.

        Raises:
            nbd.Error: The file has become shorter, so that its missing end would count as a hole.
        """
        at, last = self._base + start, self._base + stop
        while at < last:
            data = self._seek(at, _SEEK_DATA)
            if data is None:
                return
            data = min(data, last)
            if data > at:
                self.check_size(data - self._base)
                yield at - self._base, data - self._base
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
        self.check_size(at - self._base)
        return 2**63  # only a hole follows

    def check_size(self, stop: int) -> None:
        """Raise if a regular file that is being read has become shorter than `stop`."""
        if self._is_regular and self._end_of_file() < self._base + stop:
            raise self._shrunk()

    def read_at(self, view: memoryview, offset: int) -> memoryview:
        """Read as much as a view takes; returns the view, or other memory with the bytes."""
        try:
            self.read_into(view, offset)
        except DiskError as reason:
            errnum = reason.errnum
        else:
            return view
        return self.rescued(offset, len(view), errnum)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read as much as a view takes.

        Raises:
            nbd.DiskError: It cannot be read, or the file has become shorter.
        """
        done = 0
        while done < len(view):
            try:
                count = _read_at(self.fd, view[done:], self._base + offset + done)
            except OSError as reason:
                self._fail("reading", reason, offset + done)
                raise
            if count == 0:
                raise self._shrunk()
            done += count

    def read_parts(self, view: memoryview, offset: int, deadline: float | None) -> list[Bad]:
        """Read as much of a range as possible; returns the ranges that cannot be read."""
        bad: list[Bad] = []
        is_direct = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_DIRECT
        block = _MIN_DIRECT_PART if is_direct else MIN_PART
        self.check_size(offset + len(view))
        todo = list(parts([(offset, offset + len(view))], block))
        while todo:
            self.settings.check()
            start, stop = todo.pop()
            try:
                self.read_into(view[start - offset : stop - offset], start)
            except OSError as reason:
                if stop - start <= block or is_past(deadline):
                    bad.append((start, stop - start, reason.errno or 0))
                else:
                    todo += parts([(start, stop)], block)
        return bad

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write everything, beginning at an offset."""
        while data:
            try:
                count = os.pwrite(self.fd, data, self._base + offset)
            except (OSError, OverflowError) as reason:
                self._fail("writing", reason, offset)
                raise
            data = data[count:]
            offset += count

    def zero_at(self, offset: int, length: int) -> bool:
        """Zero a range without writing, where the file system can; returns whether it did."""
        return bool(lib.nbdshim_zero_range(self.fd, self._base + offset, length))

    def grow(self, size: int) -> None:
        """Make the file as large as the copy, after emptying a file that was named by its path.

        If only ranges are copied, the file keeps its contents.

        Raises:
            nbd.DiskError: The file system refuses the size.
        """
        try:
            is_replaced = self._owner is None and self.settings.ranges is None
            if self._is_regular and is_replaced and self.size > 0:
                # An empty file is not truncated: ext4 writes a file that was truncated to 0 to its
                # disk when it is closed.
                os.ftruncate(self.fd, 0)
                self.size = 0
            self.is_zero = self._is_regular and self.size == 0
            if self._is_regular and self.size < size:
                os.ftruncate(self.fd, self._base + size)
                self.size = size
        except (OSError, OverflowError) as reason:
            self._fail("growing", reason, size)
            raise

    # The end.

    def flush(self) -> None:
        """Have the system write everything to its disk."""
        if not self.settings.flush:
            return
        try:
            os.fdatasync(self.fd)
        except OSError as reason:
            self._fail("flushing", reason)
            raise

    def finish(self, end: int) -> None:
        """Close our file, and seek the caller's file to just past the copied bytes."""
        self.close()
        if self._owner is not None:
            self._owner.seek(self._base + end)

    def close(self) -> None:
        """Close our file, or put the position of the caller's descriptor back."""
        with suppress(OSError):  # the exception of the copy is the one to raise
            if self._is_ours:
                self._file.close()
            elif self._position >= 0:
                os.lseek(self.fd, self._position, os.SEEK_SET)
                self._position = -1

    def _fail(self, what: str, reason: BaseException, offset: int = 0) -> None:
        """If the system has refused something, raise an exception that names the file.

        Args:
            what: What was tried: "reading", "writing", "growing" or "flushing".
            reason: An OSError; or an OverflowError, if an offset is too large for a system call.
            offset: Where, in bytes from `base` on; for "growing", to what size.
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
            f"it has {max(0, self._end_of_file() - self._base)} of {self.size} bytes; "
            "copy it again when nothing changes it",
            errno.EIO,
        )


def open_file(what: Anything, side: int, settings: Settings) -> Endpoint:
    """Open a side of a copy that is a path or a file object.

    Raises:
        nbd.Timeout: Nobody has opened the other side of a FIFO.
        OSError: It cannot be opened.
        TypeError: It is nothing that can be copied.
    """
    if isinstance(what, (str, bytes, os.PathLike)):
        return _open_path(os.fspath(what), side, settings)
    name = side_name(side)
    if isinstance(what, io.TextIOBase):
        raise TypeError(f"{name}: a text file cannot be copied; open it with mode 'rb' or 'wb'")
    if not hasattr(what, "read" if side == SOURCE else "write"):
        raise TypeError(
            f"{name}: a URI, nbd.NBD, callable, path or binary file is needed, "
            f"not {type(what).__name__}"
        )
    return _open_object(what, side, settings)


def _open_path(path: str | bytes, side: int, settings: Settings) -> File | Stream:
    """Open a file or block device; or anything else, such as a pipe, as a stream.

    Opening a FIFO is bounded by the copy's timeout.

    Raises:
        nbd.Timeout: Nobody has opened the other side of a FIFO that is to be written.
        OSError: It cannot be opened.
    """
    file = _file_at(path, side, settings)
    try:
        if _has_offsets(file.fileno()):
            endpoint = File(file, 0, side, settings, is_ours=True)
            if side != SOURCE or _has_stated_size(endpoint.fd):
                return endpoint
        return Stream(file, side, settings, is_ours=True)
    except BaseException:
        file.close()
        raise


def _file_at(path: str | bytes, side: int, settings: Settings) -> io.FileIO:
    """Open a path without blocking.

    A FIFO is opened with O_NONBLOCK: for reading that succeeds at once, for writing as soon as it
    has a reader.
    """
    is_fifo = _is_fifo(path)
    flags = os.O_CLOEXEC | os.O_NOCTTY | (os.O_NONBLOCK if is_fifo else 0)
    flags |= os.O_RDONLY if side == SOURCE else os.O_WRONLY | os.O_CREAT
    wait = BoundedWait(settings, f"nobody has opened the other side of {os.fsdecode(path)!r}")

    def opener(name: str, _: int) -> int:
        return os.open(name, flags, 0o666)

    while True:
        try:
            return io.FileIO(path, "r" if side == SOURCE else "w", opener=opener)
        except OSError as reason:
            if reason.errno != errno.ENXIO or not is_fifo:
                raise
        wait.check()
        sleep(min(_RETRY_INTERVAL, wait.slice()))


def _is_fifo(path: str | bytes) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:  # open raises a better exception
        return False


def _open_object(file: Any, side: int, settings: Settings) -> File | Stream:
    """Use a file object of the caller's: its descriptor, where that has the bytes of the object.

    Raises:
        io.UnsupportedOperation: It was not opened for what the copy needs.
        OSError: It was opened with O_DIRECT, and cannot be opened without.
    """
    _check_mode(file, side)
    raw = raw_of(file)
    if type(raw) is not io.FileIO:
        return Stream(file, side, settings)
    flags = fcntl.fcntl(raw.fileno(), fcntl.F_GETFL)
    if flags & _ACCESS_MODE not in (os.O_RDWR, os.O_RDONLY if side == SOURCE else os.O_WRONLY):
        raise _wrong_mode(side)  # open(fd, mode) does not compare the mode with the descriptor's
    if not _has_offsets(raw.fileno()):
        return Stream(file, side, settings)
    if file.writable():
        file.flush()
    plain = _without_direct(raw, flags, side) if flags & os.O_DIRECT else raw
    is_ours = plain is not raw
    if side != SOURCE and flags & os.O_APPEND:  # the system chooses where each write goes
        stream = plain if is_ours else file
        return Stream(stream, side, settings, is_ours=is_ours, owner=file)
    endpoint = File(plain, file.tell(), side, settings, is_ours=is_ours, owner=file)
    if side == SOURCE and not _has_stated_size(endpoint.fd):
        endpoint.close()
        return Stream(file, side, settings)
    return endpoint


def _check_mode(file: Any, side: int) -> None:
    """Refuse a file of the wrong mode before anything is opened, emptied or written."""
    is_possible = getattr(file, "readable" if side == SOURCE else "writable", None)
    if callable(is_possible) and isinstance(file, io.IOBase) and not is_possible():
        raise _wrong_mode(side)


def _wrong_mode(side: int) -> io.UnsupportedOperation:
    wanted, mode = ("readable", "rb") if side == SOURCE else ("writable", "wb")
    return io.UnsupportedOperation(
        f"{side_name(side)}: the file is not {wanted}; open it with mode {mode!r}"
    )


def _without_direct(raw: io.FileIO, flags: int, side: int) -> io.FileIO:
    """Open a file again without O_DIRECT, which takes only whole blocks in aligned memory."""
    wanted = os.O_RDONLY if side == SOURCE else os.O_WRONLY | (flags & os.O_APPEND)

    def opener(path: str, _: int) -> int:
        return os.open(path, wanted | os.O_CLOEXEC)

    mode = "r" if side == SOURCE else "w"
    try:
        return io.FileIO(f"/proc/self/fd/{raw.fileno()}", mode, opener=opener)
    except OSError as reason:
        raise OSError(
            reason.errno,
            f"nbd.copy: the {side_name(side)} was opened with O_DIRECT, and cannot be opened "
            f"without ({os.strerror(reason.errno or 0)}); open it without O_DIRECT",
            name_of(raw),
        ) from reason


def _has_offsets(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _has_stated_size(fd: int) -> bool:
    """Whether a file has as many bytes as fstat says: files in /proc and /sys have more, or fewer.

    There the size is 0, or that of a page.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return True
    size = status.st_size
    try:
        return bool(os.pread(fd, 1, max(0, size - 1))) == (size > 0)
    except OSError:  # the copy raises a better exception
        return True


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read once, without moving the position of the descriptor; returns how much."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)  # PyPy
    view[: len(data)] = data
    return len(data)
