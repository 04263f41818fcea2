# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a disk as a binary file."""

from __future__ import annotations

import io

from nbd._core.connecting import connect
from nbd._core.convert import as_number, as_seconds
from nbd._core.diskfile import DiskFile
from nbd._core.memory import as_bytes
from nbd._core.methods import NBD
from nbd._core.openfiles import look_after
from nbd._core.readahead import PIECE
from nbd._core.shim import IS_CPYTHON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from _typeshed import WriteableBuffer


def open(
    source: str | list[str] | tuple[str, ...] | NBD,
    mode: str = "rb",
    *,
    buffering: int = -1,
    connections: int = 1,
    timeout: float | None = None,
    retry_for: float | None = None,
) -> BinaryIO:
    """Open a disk as a binary file, as the built-in open does for files.

    Reading in order reads ahead, up to 8 MiB.  Writing does not wait for the server, up to 8 MiB:
    an error comes out of the next write, flush or close.  A disk has a fixed size: a write past its
    end is refused with ENOSPC, and there is no truncate.

    Args:
        source: A URI; the command line of a server, as a list of str; or a connected nbd.NBD, which
            stays open.
        mode: "rb"; "r+b" to read and write; "wb" to write, which does not empty the disk.
        buffering: The size of the buffer in bytes; -1 chooses one.  0 is none: reads and writes
            may be short then, as those of io.RawIOBase.
        connections: How many connections to make to a URI; one if the server does not allow
            several.
        timeout: Raise nbd.Timeout when the server has done nothing for so many seconds.  None is
            for ever; with an nbd.NBD, it is the handle's own timeout.
        retry_for: How many seconds to wait for a server that is not there yet.  See nbd.connect.

    Returns:
        A file of the module io.  Its errors are nbd.DiskError, an OSError and nbd.Error.  flush()
        is NBD's flush, where the server has one: what was written is on the disk then.

    Raises:
        nbd.Error: The server cannot be reached.
        nbd.DiskError: It is opened for writing, and the export is read-only (EROFS).
        ValueError: mode, buffering or connections is none of those above.

    Example:
        >>> with nbd.open(["nbdkit", "-s", "memory", "1M"], "r+b") as disk:
        ...     _ = disk.seek(512)
        ...     _ = disk.write(b"hello")
        ...     _ = disk.seek(510)
        ...     disk.read(9)
        b'\\x00\\x00hello\\x00\\x00'

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_flush.
    """
    readable, writable = _parsed(mode)
    size = as_number("buffering", buffering)
    if size < -1 or size == 1:
        raise ValueError(f"buffering: {size} is not -1, 0, or the size of a buffer in bytes")
    size = PIECE if size == -1 else size
    patience = None if timeout is None else as_seconds("timeout", timeout)
    number = _number(connections, source)
    if isinstance(source, NBD):
        handles = [source]
        patience = source.gettimeout() if patience is None else patience
    else:
        handles = _connected(source, number, patience, retry_for)
    try:
        raw = DiskFile(handles, source, mode, readable, writable, patience, size)
    except BaseException:
        if not isinstance(source, NBD):
            _close_all(handles)
        raise
    file = _buffered(raw, readable, writable, size)
    look_after(raw, file)
    return file


def _parsed(mode: object) -> tuple[bool, bool]:
    """Whether a file is to be read, and whether it is to be written."""
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
    """How many connections to make."""
    number = as_number("connections", connections)
    if number < 1:
        raise ValueError(f"connections: {number} is not at least 1")
    if number > 1 and not isinstance(source, str):
        raise ValueError(f"connections: {number} need a URI; a command or a handle is only one")
    return number


def _connected(
    source: str | list[str] | tuple[str, ...],
    number: int,
    timeout: float | None,
    retry_for: float | None,
) -> list[NBD]:
    handles = [connect(source, timeout=timeout, retry_for=retry_for)]
    try:
        if number > 1 and handles[0].can_multi_conn():
            while len(handles) < number:
                handles.append(connect(source, timeout=timeout))
    except BaseException:
        _close_all(handles)
        raise
    return handles


def _close_all(handles: list[NBD]) -> None:
    for handle in handles:
        handle.__exit__(None, None, None)


def _buffered(raw: DiskFile, readable: bool, writable: bool, size: int) -> BinaryIO:
    file: object = raw
    if size and not writable:
        file = io.BufferedReader(raw, size)
    elif size:
        file = _BufferedDisk(raw, size) if readable else _BufferedDiskWriter(raw, size)
    return file  # type: ignore[return-value]  # typeshed: files of io are no BinaryIO


class _BufferedDisk(io.BufferedRandom):
    """A buffer whose flush reaches the disk: io's own does not flush what is below it.

    The other methods here lose bytes in io.BufferedRandom.
    """

    raw: DiskFile

    def flush(self) -> None:
        if not self.raw.is_inherited:  # else what is in the buffer is the parent's
            super().flush()
            self.raw.flush()

    def read1(self, size: int = -1, /) -> bytes:
        # CPython 3.11 drops what was written to the buffer, and 3.13 does not.  This seek writes it
        # to the disk, and does nothing if there is something to read in the buffer.
        self.seek(0, io.SEEK_CUR)
        return super().read1(size)

    if not IS_CPYTHON:
        # PyPy 3.11 reads once more from the disk what it has had from the buffer.

        def readinto(self, buffer: WriteableBuffer, /) -> int:
            return _copy_into(buffer, self.read)

        def readinto1(self, buffer: WriteableBuffer, /) -> int:
            return _copy_into(buffer, self.read1)


def _copy_into(buffer: WriteableBuffer, read: Callable[[int], bytes]) -> int:
    """Read into writable memory by a method that returns bytes; returns how many."""
    with as_bytes(buffer) as view:
        if view.readonly:
            raise TypeError("buffer: writable memory is needed, as a bytearray has")
        data = read(len(view))
        view[: len(data)] = data
        return len(data)


class _BufferedDiskWriter(io.BufferedWriter):
    """The same, for writing alone."""

    raw: DiskFile

    def flush(self) -> None:
        if not self.raw.is_inherited:
            super().flush()
            self.raw.flush()
