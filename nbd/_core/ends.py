# SPDX-License-Identifier: LGPL-2.0-or-later
"""What nbd.copy reads from and writes to: disks, files, and streams.

A disk is one NBD export, over one handle or several.  A file has a descriptor, which the shim reads
and writes by itself; it may be a block device.  A stream is anything else that a program can read
or write from its beginning to its end: a pipe, an io.BytesIO, a gzip.GzipFile.
"""

from __future__ import annotations

import errno
import io
import os
import stat

from nbd._core.disks import Disk as Disk
from nbd._core.disks import connected
from nbd._core.engine import SOURCE
from nbd._core.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Union

    from nbd._core.engine import Engine

    Anything = Union[str, "os.PathLike[str]", bytes, Sequence[str], NBD, Any]
    End = Union["Disk", "File", "Stream"]

_SCHEMES = ("nbd", "nbds")  # perhaps followed by +unix, +vsock, +ssh
_MOST_CONNECTIONS = 4


class File:
    """A file or block device, by its descriptor.

    Attributes:
        size: In bytes, from `base` on.
    """

    most_workers = 2**31
    is_read_only = False

    def __init__(self, fd: int, base: int, is_ours: bool, owner: Any = None) -> None:
        self.fd = fd
        self.base = base
        self.is_ours = is_ours
        self.owner = owner  # the caller's file object
        self.name = repr(getattr(owner, "name", fd))
        self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        whole = os.fstat(fd).st_size if self.is_regular else os.lseek(fd, 0, os.SEEK_END)
        self.size = max(0, whole - base)

    def add_to(self, engine: Engine, end: int, worker: int, workers: int) -> None:
        """Give an engine the file."""
        engine.add_file(end, self.fd, self.base, self.size)

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The holes in a range, as far as the file system tells: start and stop."""
        at, last = self.base + start, self.base + stop
        while at < last:
            try:
                data = os.lseek(self.fd, at, _SEEK_DATA)
            except OSError as reason:
                if reason.errno == errno.ENXIO:  # no data follows
                    yield at - self.base, stop
                return
            if data > at:
                yield at - self.base, min(data, last) - self.base
            if data >= last:
                return
            at = os.lseek(self.fd, data, _SEEK_HOLE)

    def check_size(self, stop: int) -> None:
        """Raise if a regular file that is being read is now shorter than this."""
        if self.is_regular and os.fstat(self.fd).st_size < self.base + stop:
            raise OSError(errno.EIO, "nbd.copy: the source has become shorter")

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read exactly as much as the view takes, from an offset behind `base`."""
        with io.FileIO(self.fd, closefd=False) as file:
            file.seek(self.base + offset)
            while view:
                view = view[file.readinto(view) or 0 :]

    def write(self, data: memoryview, offset: int) -> None:
        """Write everything, to an offset behind `base`."""
        while data:
            count = os.pwrite(self.fd, data, self.base + offset)
            data, offset = data[count:], offset + count

    def grow(self, size: int) -> None:
        """Make the file as large as what is copied to it, and empty a file that we have opened."""
        if self.is_regular and self.is_ours and self.size > 0:
            # Not an empty file: ext4 writes what is cut to nothing to its disk when it is closed.
            os.ftruncate(self.fd, 0)
            self.size = 0
        if self.is_regular and self.size < size:
            os.ftruncate(self.fd, self.base + size)
            self.size = size

    def flush(self) -> None:
        """Have the system write everything to its disk."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the descriptor, if it is ours."""
        if self.is_ours:
            self.is_ours = False
            os.close(self.fd)

    def say_goodbye(self, count: int) -> None:
        """Leave the caller's file object behind the bytes that were copied."""
        if self.owner is not None:
            self.owner.seek(self.base + count)


class Stream:
    """A binary file object that is read or written in order.

    Attributes:
        file: The object.
        size: In bytes; None if that is not known.
    """

    is_read_only = False

    def __init__(self, file: Any, is_ours: bool, is_source: bool) -> None:
        self.file = file
        self.is_ours = is_ours
        self.size = _rest_of(file) if is_source else None

    def flush(self) -> None:
        """Write what the object has buffered."""
        if hasattr(self.file, "flush"):
            self.file.flush()

    def close(self) -> None:
        """Close the object, if it is ours."""
        if self.is_ours:
            self.file.close()

    def say_goodbye(self, count: int) -> None:
        """Nothing is left to do."""


def _rest_of(file: Any) -> int | None:
    """How many bytes follow the position of a file object; None if it cannot tell."""
    try:
        at = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(at)
    except (AttributeError, OSError, ValueError):
        return None
    return max(0, int(size) - int(at))


def open_end(what: Anything, end: int, connections: int | None, timeout: float | None) -> End:
    """Open the source or target of a copy, as its caller has named it.

    Raises:
        nbd.Error, OSError: It cannot be connected or opened.
        TypeError: It is nothing that can be copied.
    """
    if isinstance(what, NBD):
        return Disk([what], is_ours=False)
    if is_server(what):
        return connected(what, connections, timeout, most_connections())
    if isinstance(what, (str, bytes, os.PathLike)):
        return _opened(os.fspath(what), end)
    if isinstance(what, io.TextIOBase):
        raise TypeError(
            f"{_name(end)}: a text file cannot be copied; open it with mode 'rb' or 'wb'"
        )
    wanted = "read" if end == SOURCE else "write"
    if not hasattr(what, wanted):
        raise TypeError(
            f"{_name(end)}: a URI, nbd.NBD, path or binary file is needed, "
            f"not {type(what).__name__}"
        )
    return _of_object(what, end)


def is_server(what: object) -> bool:
    """Whether it is a URI, or the command line of a server."""
    return isinstance(what, (list, tuple)) or (isinstance(what, str) and _is_uri(what))


def most_connections() -> int:
    """How many connections to make to a server that allows several, if nobody says."""
    return min(processors(), _MOST_CONNECTIONS)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # PyPy


def _name(end: int) -> str:
    return "source" if end == SOURCE else "target"


def _is_uri(text: str) -> bool:
    scheme, colon, _ = text.partition(":")
    return colon != "" and scheme.partition("+")[0] in _SCHEMES


def _opened(path: str | bytes, end: int) -> File | Stream:
    """A file or block device; a stream if the path names something else, as a pipe."""
    flags = os.O_RDONLY if end == SOURCE else os.O_WRONLY | os.O_CREAT
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        if _is_seekable(fd):
            return File(fd, 0, is_ours=True)
        file: Any = io.FileIO(fd, "r" if end == SOURCE else "w")
    except BaseException:
        os.close(fd)
        raise
    return Stream(file, True, end == SOURCE)


def _of_object(file: Any, end: int) -> File | Stream:
    """A file object of the caller: its descriptor, where that has the bytes of the object."""
    raw = getattr(file, "raw", file)
    if type(raw) is io.FileIO and isinstance(file, (io.FileIO, *_BUFFERED)):
        fd = raw.fileno()
        is_usable = raw.readable() if end == SOURCE else raw.writable() and "a" not in raw.mode
        if is_usable and _is_seekable(fd):
            if end != SOURCE:
                file.flush()
            return File(fd, file.tell(), is_ours=False, owner=file)
    return Stream(file, False, end == SOURCE)


def _is_seekable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def is_same(source: End, target: End) -> bool:
    """Whether both are one file, which the copy would destroy."""
    return (
        isinstance(source, File)
        and isinstance(target, File)
        and os.path.sameopenfile(source.fd, target.fd)
    )


_BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
# Linux's, which PyPy's os does not name.
_SEEK_DATA, _SEEK_HOLE = 3, 4
