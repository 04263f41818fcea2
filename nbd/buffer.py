# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.Buffer: memory that stays where it is while commands use it."""

from __future__ import annotations

from operator import index

from nbd._ffi import ffi, lib
from nbd.memory import new_bytearray

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _typeshed import ReadableBuffer

# Whether the bytes of a Buffer mean something: nothing was ever written, the first command that
# writes all of them has been given out, or they do.
_UNWRITTEN, _CLAIMED, _WRITTEN = range(3)


class Buffer:
    """Memory for the asynchronous calls: aio_pread, aio_pread_structured and aio_pwrite.

    It can be used for any number of commands, one after the other.  Bytes that were never written
    read as zeroes.

    Args:
        len: Its size in bytes.

    Example:
        >>> buf = nbd.Buffer(512)
        >>> cookie = h.aio_pread(buf, 0)
        >>> while not h.aio_command_completed(cookie):
        ...     _ = h.poll(-1)
        >>> buf.is_zero()
        True

    See also: NBD.aio_pread, NBD.aio_pwrite.
    """

    __module__ = "nbd"
    __slots__ = ("__weakref__", "_is_readonly", "_pin", "_pointer", "_state", "_storage")

    def __init__(self, len: int) -> None:
        size = index(len)
        if size < 0:
            raise ValueError(f"len: a buffer cannot have {size} bytes")
        self._storage: Any
        self._storage, is_zero = new_bytearray(size)
        self._state = _WRITTEN if is_zero else _UNWRITTEN
        self._pin: Any = ffi.from_buffer(self._storage)
        self._pointer: Any = self._pin
        self._is_readonly = False

    @classmethod
    def from_buffer(cls, buf: ReadableBuffer) -> Buffer:
        """A Buffer that shares the memory of a bytes-like object.

        Args:
            buf: bytearray, memoryview, mmap, bytes, ...: any contiguous bytes-like object.  Its
                size cannot change while the Buffer exists.  aio_pread needs a writable one.

        Example:
            >>> data = bytearray(b"abc")
            >>> nbd.Buffer.from_buffer(data)[0] == data[0]
            True
        """
        self = cls.__new__(cls)
        self._pin, self._pointer = _pin(buf)
        self._storage = buf
        self._state = _WRITTEN
        self._is_readonly = memoryview(buf).readonly
        return self

    @classmethod
    def from_bytearray(cls, ba: ReadableBuffer) -> Buffer:
        """A Buffer with a copy of the bytes of a bytearray or other bytes-like object.

        Args:
            ba: What is copied.

        Example:
            >>> nbd.Buffer.from_bytearray(bytearray(b"abc")).size()
            3
        """
        return cls.from_buffer(bytearray(ba))

    def to_buffer(self) -> Any:
        """The memory itself, not a copy: a bytearray, or what from_buffer was given.

        What later commands read into the Buffer is seen through it.
        """
        self._fill()
        return self._storage

    def to_bytearray(self) -> bytearray:
        """A copy of the bytes, in a new bytearray."""
        self._fill()
        return bytearray(self._storage)

    def size(self) -> int:
        """The size in bytes."""
        return len(self._pointer)

    def __len__(self) -> int:
        return len(self._pointer)

    def __bytes__(self) -> bytes:
        self._fill()
        return bytes(self._storage)

    def __iter__(self) -> Iterator[int]:
        self._fill()
        return iter(memoryview(self._storage).cast("B"))

    def __getitem__(self, key: Any) -> Any:
        self._fill()
        return self._storage[key]

    def __setitem__(self, key: Any, newvalue: Any) -> None:
        self._fill()
        memoryview(self._storage).cast("B")[key] = newvalue

    def is_zero(self, offset: int = 0, size: int = -1) -> bool:
        """Whether bytes of the buffer are all zero.

        Args:
            offset: The first byte to look at.
            size: How many bytes to look at; -1 for all from offset on.

        Returns:
            True also if there are no bytes to look at.

        Raises:
            IndexError: offset or offset + size is outside the buffer, or size is less than -1.

        Example:
            >>> nbd.Buffer(4096).is_zero(1024, 512)
            True
        """
        whole = len(self)
        if not 0 <= offset <= whole:
            raise IndexError(f"offset {offset} is outside the buffer of {whole} bytes")
        if size == -1:
            size = whole - offset
        if size < 0:
            raise IndexError(f"size {size} is negative; only -1, for the rest, may be")
        if offset + size > whole:
            raise IndexError(
                f"offset {offset} + size {size} is outside the buffer of {whole} bytes"
            )
        self._fill()
        return bool(lib.nbdshim_is_zero(self._pointer + offset, size))

    def __repr__(self) -> str:
        return f"<nbd.Buffer of {len(self)} bytes>"

    def _fill(self) -> None:
        """Make zeroes of what was never written, before anybody sees it."""
        if self._state == _UNWRITTEN:
            lib.nbdshim_clear(self._pointer, len(self._pointer))
        self._state = _WRITTEN

    def _claim(self, handle: Any) -> Any:
        """The memory for a command that writes all of it.

        libnbd fills it with zeroes before anything can fail, unless pread-initialize is off.
        """
        if self._state == _UNWRITTEN:
            if lib.nbdcall_get_pread_initialize(handle) == 1:
                self._state = _CLAIMED
            else:
                self._fill()
        else:
            self._state = _WRITTEN
        return self._pointer

    def _disclaim(self) -> None:
        """Undo _claim: libnbd was not called."""
        if self._state == _CLAIMED:
            self._state = _UNWRITTEN


def _pin(buf: Any) -> tuple[Any, Any]:
    """What keeps the memory of a bytes-like object in place, and the memory.

    Of a memoryview the object behind it is pinned: until CPython 3.12.7 the garbage collector may
    clear a memoryview that is still pinned, and crash (gh-77894).
    """
    memory = ffi.from_buffer(buf)
    if not isinstance(buf, memoryview):
        return memory, memory
    try:
        whole = ffi.from_buffer(buf.obj)
    except (TypeError, ValueError, BufferError):
        return memory, memory
    start = ffi.cast("char *", memory)
    return whole, ffi.from_buffer(ffi.buffer(start, len(memory)))
