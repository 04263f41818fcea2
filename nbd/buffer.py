# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.Buffer: memory that stays where it is while commands use it."""

from __future__ import annotations

from _operator import index

from nbd._ffi import lib
from nbd.memory import (
    IS_CPYTHON,
    NOWHERE,
    RECYCLES,
    Shared,
    contiguous_size,
    new_memory,
    spares,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _typeshed import ReadableBuffer

    from nbd.memory import Memory


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
    __slots__ = ("__dict__", "__weakref__", "_is_written", "_memory")

    # _is_written: the bytes mean something, or will before the command that fills them is done.

    _memory: Memory | Shared

    def __init__(self, len: int) -> None:
        size = index(len)
        try:
            self._memory = spares[size].pop()
            self._is_written = False
        except (KeyError, IndexError):
            if size < 0:
                raise ValueError(f"len: a buffer cannot have {size} bytes") from None
            self._memory, self._is_written = new_memory(size)

    if RECYCLES:

        def __del__(self) -> None:
            try:
                memory: Any = self._memory  # where it is Shared, its shelf takes nothing
            except AttributeError:
                return  # __init__ failed
            shelf = memory.shelf
            if len(shelf.items) < shelf.most:
                del self._memory  # another finalizer of a cycle may still see this object
                shelf.items.append(memory)

    @classmethod
    def from_buffer(cls, buf: ReadableBuffer) -> Buffer:
        """A Buffer that shares the memory of a bytes-like object.

        Args:
            buf: bytearray, memoryview, mmap, bytes, ...: any contiguous bytes-like object.
                aio_pread needs a writable one.  If it is resized, which it cannot be while a
                command is in flight, the Buffer has its new size.

        Example:
            >>> data = bytearray(b"abc")
            >>> nbd.Buffer.from_buffer(data)[0] == data[0]
            True
        """
        contiguous_size(buf)  # or raise
        self = cls.__new__(cls)
        self._memory = Shared(buf)
        self._is_written = True
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
        """The memory itself, not a copy: a bytearray (PyPy: memoryview), or from_buffer's argument.

        What later commands read into the Buffer is seen through it.
        """
        storage = self._exposed()
        if IS_CPYTHON:
            self._memory = Shared(storage)
        return storage

    def to_bytearray(self) -> bytearray:
        """A copy of the bytes, in a new bytearray."""
        self._fill()
        return bytearray(self._memory.storage)

    def size(self) -> int:
        """The size in bytes."""
        return self._memory.size

    def __len__(self) -> int:
        return self._memory.size

    def __bytes__(self) -> bytes:
        self._fill()
        return bytes(self._memory.storage)

    def __iter__(self) -> Iterator[int]:
        return iter(memoryview(self._exposed()).cast("B"))

    def __getitem__(self, key: Any) -> Any:
        self._fill()
        found = self._memory.storage[key]
        return bytearray(found) if isinstance(key, slice) else found

    def __setitem__(self, key: Any, newvalue: Any) -> None:
        self._fill()
        storage = self._memory.storage
        if isinstance(key, slice):
            # Of a memoryview, as that does not change the size.
            with memoryview(storage) as view, view.cast("B") as whole:
                whole[key] = _bytes_of(newvalue)
        elif 0 <= newvalue <= 255:
            storage[key] = newvalue
        else:
            raise ValueError(f"a byte must be between 0 and 255, not {newvalue}")

    def is_zero(self, offset: int = 0, size: int = -1) -> bool:
        """Whether bytes of the buffer are all zero.

        Args:
            offset: The first byte to look at.
            size: How many bytes to look at; -1 for all from offset on.

        Returns:
            True also if there are no bytes to look at.

        Raises:
            IndexError: offset or offset + size is outside the buffer, or size is less than -1;
                but not if size is 0.

        Example:
            >>> nbd.Buffer(4096).is_zero(1024, 512)
            True
        """
        if size == 0:
            return True
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
        if isinstance(self._memory, Shared) and not IS_CPYTHON:
            return self._memory.bytes_at(offset, size) == bytes(size)
        room = self._memory.room
        return bool(lib.nbdshim_is_zero(room[0] + offset, size))

    def __copy__(self) -> Buffer:
        twin = self.from_buffer(self.to_buffer())
        vars(twin).update(vars(self))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytearray, (self.to_bytearray(),), vars(self) or None

    def __repr__(self) -> str:
        return f"<nbd.Buffer of {len(self)} bytes>"

    def _fill(self) -> None:
        """Make zeroes of what was never written, before anybody sees it."""
        if not self._is_written:
            self._is_written = True
            lib.nbdshim_clear(*self._memory.room[:2])

    def _exposed(self) -> Any:
        """The object that holds the memory, for somebody who may keep it: nobody else gets it."""
        self._fill()
        self._memory.shelf = NOWHERE
        return self._memory.storage


def _bytes_of(value: Any) -> memoryview | bytes:
    """The bytes of what a slice of a bytearray can be set to: a buffer, or some numbers."""
    try:
        return memoryview(value).cast("B")
    except TypeError:
        return bytes(iter(value))
