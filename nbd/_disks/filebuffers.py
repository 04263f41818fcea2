# SPDX-License-Identifier: LGPL-2.0-or-later
"""The buffers of io over a DiskFile, with what io's own lack.

A flush reaches the disk.  A write past its end is refused before io has it in its buffer, which it
would try to write again each time.  A call that an exception has stopped moves nothing, so that it
can be made again.  A file on a server that hangs can be closed, by several threads at once too.

The locks inside io's buffers are unknown here.  In the child of a fork a thread of the parent may
have one for ever, so a file that is inherited is closed without them.
"""

from __future__ import annotations

import io
from functools import wraps
from io import SEEK_SET

from nbd._binding.memory import as_bytes
from nbd._binding.shim import IS_CPYTHON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, TypeVar

    from _typeshed import ReadableBuffer, WriteableBuffer

    from nbd._disks.rawfile import DiskFile

    Class = TypeVar("Class", bound=type)

_READS = ("read", "read1", "readinto", "readinto1", "readline", "readlines", "peek")
_WRITES = ("write", "writelines")


def _moving_together(*names: str) -> Callable[[Class], Class]:
    """Have methods of a class go back to the old position if an exception stops them."""

    def decorate(cls: Class) -> Class:
        for name in names:
            setattr(cls, name, _alone(_going_back(getattr(cls, name), cls.tell)))  # type: ignore[attr-defined]
        return cls

    return decorate


def _alone(method: Any) -> Any:
    """Have one thread at a time in a method on PyPy, whose io crashes in seek beside a close."""
    if IS_CPYTHON:
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
        except ValueError:
            self._explain()
            _go_back(self, start)
            raise
        except BaseException:
            _go_back(self, start)
            raise

    return call


def _go_back(file: Any, start: int) -> None:
    if not file.closed and file.tell() != start:
        file.seek(start)


class _Buffer:
    """What the buffers have in common; io's class follows it."""

    raw: DiskFile

    @_alone
    def flush(self) -> None:
        raw = self._raw()
        # What is in an inherited buffer is the parent's.
        if raw.closed or not (raw.is_inherited or raw.has_given_up):
            try:
                super().flush()  # type: ignore[misc]  # of io
            except ValueError:
                self._explain()
                raise
            raw.flush()

    @_alone
    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
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
        """Close it while an exception is on its way, or none."""
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
            except RuntimeError:  # this is a signal handler that has stopped a call of io's
                is_in_call = True
                raise
            except BaseException as failed:
                # With a plain ValueError io has no buffer left: an exception has stopped its close.
                if type(failed) is not ValueError and not raw.give_up(failed, error):
                    raise
            finally:
                if not is_in_call:
                    self._close_both(error)

    def _close_both(self, error: BaseException | None) -> None:
        """Close io's buffer, and what is below it even if an exception has stopped that."""
        try:
            super().close()  # type: ignore[misc]  # of io
        finally:
            self.raw.close_after(error)

    def detach(self) -> DiskFile:
        raw: DiskFile = super().detach()  # type: ignore[misc]  # of io
        raw.detached()
        return raw

    def _explain(self) -> None:
        """Raise a better ValueError, if another thread has closed the file during a call.

        CPython's io complains of its own buffer then.
        """
        if self.raw is not None and self.raw.closed:
            raise ValueError("I/O operation on closed file") from None

    def _raw(self) -> DiskFile:
        if self.raw is None:  # CPython has None there, PyPy raises the same
            raise ValueError("raw stream has been detached")
        return self.raw

    def __del__(self) -> None:
        try:
            raw = self._raw()
        except ValueError:  # it was detached, or not made
            return
        if not raw.closed:
            try:
                raw._dealloc_warn(self)
            finally:
                self._close_after(None)


@_moving_together(*_READS)
class BufferedDiskReader(_Buffer, io.BufferedReader):
    """A buffer for reading."""

    raw: DiskFile


@_moving_together(*_WRITES)
class BufferedDiskWriter(_Buffer, io.BufferedWriter):
    """A buffer for writing."""

    raw: DiskFile

    def write(self, data: ReadableBuffer, /) -> int:
        self.raw.check_room(self.tell(), data)
        return super().write(data)


@_moving_together(*_READS, *_WRITES)
class BufferedDisk(_Buffer, io.BufferedRandom):
    """A buffer for both.  The methods here lose bytes in io.BufferedRandom."""

    raw: DiskFile

    def write(self, data: ReadableBuffer, /) -> int:
        self.raw.check_room(self.tell(), data)
        return super().write(data)

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
