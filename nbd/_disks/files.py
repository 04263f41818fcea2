# SPDX-License-Identifier: LGPL-2.0-or-later
"""Files and streams: what nbd.copy reads from and writes to besides disks.

A file has offsets: a regular file or a block device, which the shim reads and writes by its
descriptor.  A file object of the caller's is used by its descriptor only where that is the same as
using the object.  A stream is anything else that can be read or written from its beginning to its
end: a pipe, a file that is appended to, an io.BytesIO, a gzip.GzipFile.
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
from nbd._disks.channels import BUFFERED, Channel, Wait, is_channel
from nbd._disks.queue import SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Union

    from nbd._disks.copy import Settings
    from nbd._disks.queue import ShimQueue

    Data = Union[bytes, memoryview]

_CHUNK = 1024 * 1024
#: Objects of these types use what they are given only while `write` runs.
_BORROWERS = (io.FileIO, io.BytesIO, *BUFFERED)
# Where system calls are made.
_MODULES = (__name__, Channel.__module__)
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
        self.name = _name_of(owner if owner is not None else file)
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
            if not _is_of_system(reason):
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
        if not _is_of_system(reason):
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
        self.name = _name_of(file if owner is None else owner)
        self._is_ours = is_ours
        self._settings = settings
        self._side = side_name(end)
        self._is_file = type(_raw_of(file)) is io.FileIO
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
        if (self._is_file or self._channel is not None) and _is_of_system(reason):
            text = f"nbd.copy: {what} the {self._side} failed: {os.strerror(reason.errno or 0)}"
            raise OSError(reason.errno, text, self.name) from reason


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
    raw = _raw_of(file)
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
            _name_of(raw),
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


def side_name(end: int) -> str:
    """What a message calls one of the two sides."""
    return "source" if end == SOURCE else "target"


def _is_of_system(reason: BaseException) -> bool:
    """Whether a system call has failed, and not the handler of a signal that came during it."""
    last = reason.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_here = last is not None and last.tb_frame.f_globals.get("__name__") in _MODULES
    is_numbered = isinstance(reason, OverflowError) or isinstance(
        getattr(reason, "errno", None), int
    )
    return is_here and is_numbered


def _raw_of(file: Any) -> Any:
    """What has the descriptor of a file object.

    Only of io's own types: a subclass may have methods of its own, which count.
    """
    return file.raw if type(file) in BUFFERED else file


def _name_of(file: Any) -> str:
    name = getattr(file, "name", None)
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return f"descriptor {name}" if isinstance(name, int) else type(file).__name__


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


def _rest_of(file: Any) -> int | None:
    """How many bytes follow the position of a file object; None if that is not known.

    Only for io's own types: to find the end of another one may take as long as to read it.
    """
    if type(file) not in (io.BytesIO, *BUFFERED) or type(_raw_of(file)) is io.FileIO:
        return None  # a file of io's that gets here has content that its size does not tell
    if not file.seekable():
        return None
    at = int(file.tell())
    size = int(file.seek(0, os.SEEK_END))
    file.seek(at)
    return max(0, size - at)
