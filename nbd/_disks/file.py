# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a disk as a binary file."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from nbd._binding.convert import as_number, as_seconds
from nbd._binding.errors import DiskError
from nbd._binding.methods import NBD
from nbd._binding.shim import lib
from nbd._disks.connect import connect
from nbd._disks.connections import Connections
from nbd._disks.filebuffers import BufferedDisk, BufferedDiskReader, BufferedDiskWriter
from nbd._disks.openfiles import look_after
from nbd._disks.rawfile import DiskFile
from nbd._disks.readahead import PIECE

if TYPE_CHECKING:
    from typing import BinaryIO

#: How many commands are in flight at most: writes, what is read ahead, and the read that a program
#: waits for, which must not stand in line behind them.
_DEPTH = 64


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

    With a buffer, reading in order reads ahead, up to as many bytes as were read in order, and at
    most 8 MiB.  A seek outside of the buffer reads anew.  Without a buffer, each read sees the disk
    as it is at that moment.

    Writing does not wait for the server, up to 8 MiB: an error comes out of the next write, flush
    or close.  A disk has a fixed size: a write past its end is refused with ENOSPC, and there is no
    truncate.

    Where a part of the disk cannot be read, only reads of that part fail.

    A file that is dropped without being closed is closed, with a ResourceWarning.  What was written
    is finished first, but a server that makes no progress is given only a second.  So is it where
    an exception such as Ctrl-C has stopped a call and then leaves the `with` block of the file:
    then nothing is flushed.

    Args:
        source: A URI; the command line of a server, as a list of str; or a connected nbd.NBD, which
            stays open.
        mode: "rb"; "r+b" to read and write; "wb" to write, which does not empty the disk.
        buffering: The size of the buffer in bytes; -1 chooses one.  0 is none: reads and writes
            may be short then, as those of io.RawIOBase.
        connections: How many connections to make to a URI, at most 64; one if the server does not
            allow several.  The file is usable on the first; the others join when they are ready.
        timeout: Raise nbd.Timeout when no byte has moved for this many seconds.  None is for ever;
            with an nbd.NBD, it is the handle's own timeout.
        retry_for: How many seconds to wait for a server that is not there yet.  See nbd.connect.

    Returns:
        A file of the module io.  Its errors are nbd.DiskError, an OSError and nbd.Error.  flush()
        is NBD's flush, where the server has one: what was written is on the disk then.

    Raises:
        nbd.Error: The server cannot be reached, or the export has 2**63 bytes or more (EOVERFLOW).
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
    can = _parsed(mode)
    size = as_number("buffering", buffering)
    if size < -1 or size == 1:
        raise ValueError(f"buffering: {size} is not -1, 0, or the size of a buffer in bytes")
    size = PIECE if size == -1 else size
    seconds = None if timeout is None else as_seconds("timeout", timeout)
    number = _number(connections, source)
    if isinstance(source, NBD):
        seconds = source.gettimeout() if seconds is None else seconds
        return _opened(source, [], source, mode, can, seconds, size)
    handle = connect(source, timeout=seconds, retry_for=retry_for)
    try:
        more = number - 1 if number > 1 and handle.can_multi_conn() else 0
        return _opened(handle, [handle], source, mode, can, seconds, size, more)
    except BaseException:
        handle.__exit__(None, None, None)
        raise


def _opened(
    handle: NBD,
    ours: list[NBD],
    source: object,
    mode: str,
    can: tuple[bool, bool],
    timeout: float | None,
    size: int,
    more: int = 0,
) -> BinaryIO:
    """A file on a connected handle; if it cannot be made, the handles that are ours are closed."""
    if can[1] and handle.is_read_only():
        raise DiskError("the export is read-only; open it with mode 'rb'", errno.EROFS)
    connections = Connections(handle, ours, timeout, _DEPTH, PIECE)
    try:
        raw = DiskFile(connections, source, mode, *can, size)
        if more:
            connections.add(str(source), more)
        file = _buffered(raw, *can, size)
        look_after(raw, file)
        connections.keep(raw if size else None)
        return file
    except BaseException:
        connections.abandon()
        raise


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
    if number > lib.NBDQUEUE_MAX_HANDLES:
        raise ValueError(f"connections: {number} is more than {lib.NBDQUEUE_MAX_HANDLES}")
    if number > 1 and not isinstance(source, str):
        raise ValueError(f"connections: {number} need a URI; a command or a handle is only one")
    return number


def _buffered(raw: DiskFile, readable: bool, writable: bool, size: int) -> BinaryIO:
    file: object = raw
    # io asks for the position, and drops what a signal handler raises meanwhile.  So it calls int,
    # which returns 0 and during which no handler runs.
    raw.__dict__["tell"] = int
    try:
        if size and not writable:
            file = BufferedDiskReader(raw, size)
        elif size:
            file = BufferedDisk(raw, size) if readable else BufferedDiskWriter(raw, size)
    finally:
        del raw.__dict__["tell"]
    return file  # type: ignore[return-value]  # typeshed: files of io are no BinaryIO
