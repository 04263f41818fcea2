# SPDX-License-Identifier: LGPL-2.0-or-later
"""Buffer arguments: nbd.Buffer, and the memory that libnbd gets for a buffer of any kind."""

from __future__ import annotations

from nbd._binding.convert import as_number
from nbd._binding.memory import (
    BOUNCES,
    NEVER_STALE,
    Block,
    Shared,
    as_bytes,
    bounce_buffer,
    copied,
    from_buffer,
    give_away,
    is_unowned,
    new_block,
    pinned,
)
from nbd._binding.shim import IS_CPYTHON, ffi, lib, one_for_all_imports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _typeshed import ReadableBuffer


_CHARS = ffi.typeof("char[]")
_clear_stale = lib.nbdshim_clear_stale


@one_for_all_imports
class Buffer:
    """Memory for the asynchronous calls: aio_pread, aio_pread_structured and aio_pwrite.

    A buffer can be used for any number of commands, one after the other.  Its bytes are zero until
    they are written.

    Args:
        len: The size in bytes.

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
    __slots__ = ("__dict__", "__weakref__", "_memory")

    _memory: Block | Shared

    def __init__(self, len: int) -> None:
        size = len if type(len) is int else as_number("len", len)
        if size < 0:
            raise ValueError(f"len: a buffer cannot have {size} bytes")
        self._memory = new_block(size)

    @classmethod
    def from_buffer(cls, buf: ReadableBuffer) -> Buffer:
        """A Buffer that shares the memory of a bytes-like object.

        Args:
            buf: Any contiguous bytes-like object: bytearray, memoryview, mmap, bytes, ...
                aio_pread needs a writable one.  It cannot be resized while a command is in
                flight.  If it is resized at another time, the Buffer has its new size.

        Example:
            >>> data = bytearray(b"abc")
            >>> nbd.Buffer.from_buffer(data)[0] == data[0]
            True
        """
        with memoryview(buf) as view:
            if not view.c_contiguous:
                raise BufferError("the buffer is not contiguous; pass a copy, bytes(...)")
        self = cls.__new__(cls)
        self._memory = Shared(buf)
        return self

    @classmethod
    def from_bytearray(cls, ba: ReadableBuffer) -> Buffer:
        """A Buffer with a copy of the bytes of a bytearray or other bytes-like object.

        Args:
            ba: The object to copy.

        Example:
            >>> nbd.Buffer.from_bytearray(bytearray(b"abc")).size()
            3
        """
        return cls.from_buffer(bytearray(ba))

    def to_buffer(self) -> Any:
        """The memory itself, not a copy: a bytearray (PyPy: memoryview), or from_buffer's argument.

        It also shows what later commands read into the Buffer.
        """
        memory = self._clean()
        if IS_CPYTHON and type(memory) is Block:
            self._memory = Shared(give_away(memory))
        return memory.storage

    def to_bytearray(self) -> bytearray:
        """A copy of the bytes, in a new bytearray."""
        return bytearray(self._clean().storage)

    def size(self) -> int:
        """The size in bytes."""
        return self._memory.size

    def __len__(self) -> int:
        return self._memory.size

    def __bytes__(self) -> bytes:
        return bytes(self._clean().storage)

    def __iter__(self) -> Iterator[int]:
        return iter(as_bytes(self._clean().storage))

    def __getitem__(self, key: Any) -> Any:
        exact = _exact_key(key)
        with as_bytes(self._clean().storage) as whole:
            found = whole[exact]
            return bytearray(found) if isinstance(found, memoryview) else found

    def __setitem__(self, key: Any, newvalue: Any) -> None:
        exact = _exact_key(key)
        if isinstance(exact, slice):
            value: Any = _bytes_of(newvalue)
        else:
            value = as_number("a byte", newvalue)
            if not 0 <= value <= 255:
                raise ValueError(f"a byte must be between 0 and 255, not {value}")
        # A memoryview's assignment cannot change the size.
        with as_bytes(self._clean().storage) as whole:
            whole[exact] = value

    def is_zero(self, offset: int = 0, size: int = -1) -> bool:
        """Whether bytes of the buffer are all zero.

        Args:
            offset: The first byte to check.
            size: The number of bytes to check; -1 for all bytes from offset on.

        Returns:
            True also if size is 0.

        Raises:
            IndexError: offset or offset + size is outside the buffer, or size is less than -1.  A
                size of 0 is never an error.

        Example:
            >>> nbd.Buffer(4096).is_zero(1024, 512)
            True
        """
        offset, size = as_number("offset", offset), as_number("size", size)
        if size == 0:
            return True
        seen = self._seen()
        whole = len(seen)
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
        if type(seen) is bytes:
            return seen.count(0, offset, offset + size) == size
        return bool(lib.nbdshim_is_zero(seen + offset, size))

    def __copy__(self) -> Buffer:
        twin = self.from_buffer(self.to_buffer())
        vars(twin).update(vars(self))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytearray, (self.to_bytearray(),), vars(self) or None

    def __repr__(self) -> str:
        if not hasattr(self, "_memory"):
            return "<nbd.Buffer without memory>"
        return f"<nbd.Buffer of {len(self)} bytes>"

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            if name == "_memory":
                name = "no memory was allocated: __init__ must call nbd.Buffer.__init__"
                raise AttributeError(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _clean(self) -> Block | Shared:
        """The memory, with zeroes instead of stale bytes."""
        memory = self._memory
        if (
            memory.state[0]
            and isinstance(memory, Block)
            and _clear_stale(memory.state, memory.pin, memory.size)
        ):
            raise BufferError("another thread is beginning to read into this nbd.Buffer: wait")
        return memory

    def _seen(self) -> Any:
        """The current bytes for is_zero: a pin, or a copy if the memory cannot be pinned."""
        memory = self._clean()
        if type(memory) is Block:
            return memory.pin
        if IS_CPYTHON:
            return from_buffer(_CHARS, memory.storage)
        with memoryview(memory.storage) as view:
            return view.tobytes()


def _exact_key(key: Any) -> int | slice:
    """An index or a slice with exact ints."""
    if isinstance(key, slice):
        ends = (key.start, key.stop, key.step)
        return slice(*(n if n is None else as_number("a slice", n) for n in ends))
    return as_number("an index", key)


def _bytes_of(value: Any) -> memoryview | bytes:
    """The bytes to which a slice is set, as for a bytearray: those of a buffer, or numbers."""
    try:
        return as_bytes(value)
    except TypeError:
        return bytes(iter(value))


def readable(name: str, buffer: Any) -> tuple[Any, int, Any]:
    """The memory of a buffer argument that libnbd reads: its address, size and pin.

    On CPython a method passes bytes to cffi directly, without this function.
    """
    if issubclass(type(buffer), Buffer):
        memory = buffer._clean()
        if type(memory) is not Shared:
            return memory.pin, memory.size, memory.pin
        buffer = memory.storage
    try:
        if (BOUNCES and type(buffer) is not bytes) or is_unowned(buffer):
            buffer = copied(buffer)
        return pinned(buffer, False)
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def writable(name: str, buffer: Any) -> tuple[Any, int, Any, Any, Any]:
    """The memory of a buffer argument that a command in flight writes.

    On CPython a method pins a bytearray directly, without this function.

    Returns:
        Its address, size, pin and state (enum nbdshim_state), and the caller's object.  On PyPy the
        pin of a foreign object is a bounce buffer; for the memory of an nbd.Buffer, None stands
        for the object.
    """
    if issubclass(type(buffer), Buffer):
        memory = buffer._memory
        if type(memory) is not Shared:
            pin = memory.pin
            return pin, len(pin), pin, memory.state, None if BOUNCES else memory.storage
        buffer = memory.storage
    try:
        if BOUNCES:
            pin = bounce_buffer(buffer)
            return pin, len(pin), pin, NEVER_STALE, buffer
        return *pinned(buffer, True), NEVER_STALE, buffer
    except (TypeError, ValueError, BufferError) as reason:
        raise _unusable(name, buffer, reason) from None


def writable_by_call(name: str, buffer: Any) -> tuple[Any, int, Any, Any, Any]:
    """The same for a call that waits, and may be stopped.

    Then the server's reply arrives after the call, when the memory of a view without an owner may
    no longer exist.  So such a view gets a bounce buffer, too.
    """
    if BOUNCES or not is_unowned(buffer):
        return writable(name, buffer)
    try:
        pin = bounce_buffer(buffer)
    except BufferError as reason:
        raise _unusable(name, buffer, reason) from None
    return pin, len(pin), pin, NEVER_STALE, buffer


def _unusable(name: str, buffer: Any, reason: Exception) -> Exception:
    """The exception for an object whose memory libnbd cannot use: TypeError or BufferError."""
    try:
        view = memoryview(buffer)
    except TypeError:
        return TypeError(
            f"{name}: a bytes-like object or nbd.Buffer is needed, not {type(buffer).__name__}"
        )
    if not view.c_contiguous:
        return BufferError(f"{name}: the buffer is not contiguous; pass a copy, bytes(...)")
    if view.readonly:
        return BufferError(f"{name}: the buffer is read-only; pass a bytearray or nbd.Buffer")
    return BufferError(f"{name}: {reason}")
