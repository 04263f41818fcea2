# SPDX-License-Identifier: LGPL-2.0-or-later
"""Memory that libnbd works on: results, blocks and their pool, pins and bounce buffers.

A result is the bytearray that pread returns.  Every read has a new one.

A block is the memory of an nbd.Buffer.  On CPython it is a bytearray.  A pool keeps blocks of
dropped Buffers for new ones of the same size, up to a limit (set_pool_limit).  Fresh memory would
cost a page fault for each page, which the kernel clears: with the pool, reads of 1 MiB into new
Buffers take a third of the time.  Without the GIL the pool stays empty: a block is free if nothing
else refers to it, and the reference counts that tell so may be changing in another thread.

A pin is the cdata that ffi.from_buffer makes of an object.  As long as it lives, CPython neither
moves nor resizes the object.  PyPy before 8 may do both.  Later versions do not, but they keep the
object pinned until the next garbage collection, which is too long.

A bounce buffer is C memory that libnbd uses instead of the caller's object.  What was read is
copied from it to the object.  On PyPy every object needs one; on CPython only a view without owner.
"""

from __future__ import annotations

import sys
from errno import ERANGE

from nbd._binding.convert import as_number
from nbd._binding.errors import Error
from nbd._binding.shim import IS_CPYTHON, IS_FREE_THREADED, ffi, lib, one_for_all_imports

if not IS_CPYTHON:
    from nbd._binding import pypy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any
else:
    from _collections import deque  # collections itself would make `import nbd` longer

#: Whether libnbd works on bounce buffers instead of the caller's objects.
BOUNCES = not IS_CPYTHON

#: No libnbd reads more in one command, so pread refuses it before it allocates memory.
_MAX_READ = 128 * 1024 * 1024
#: Results of at least this size use huge pages, which cost a page fault for every 2 MiB instead of
#: every 4 KiB.  That halves the time of a read of 32 MiB.
_HUGE = 4 * 1024 * 1024
#: The pool keeps at most _POOL_SIZES block sizes, and inspects at most _POOL_LOOKS blocks to find a
#: free one.
_POOL_SIZES = 4
_POOL_LOOKS = 4

_SIZE_MAX = 2 ** (8 * ffi.sizeof("size_t")) - 1
_CHARS = ffi.typeof("char[]")
_CLEAN, _STALE = lib.NBDSHIM_CLEAN, lib.NBDSHIM_STALE

_new = ffi.new
#: The pin of an object whose memory is used as it is.
from_buffer = ffi.from_buffer
#: Frees a bounce buffer at once.
free = ffi.release if IS_CPYTHON else pypy.free
#: The state of memory that the caller provides: it holds no bytes that must stay hidden.
NEVER_STALE = _new("int *", _CLEAN)

_pool_limit = 64 * 1024 * 1024


@one_for_all_imports
class Block:
    """Memory of our own, whose address and size never change.

    Attributes:
        storage: The object that has the bytes: a bytearray (PyPy: a memoryview).
        pin: The memory for C, a cdata of its size.  A command in flight refers to it.
        state: A pointer to the state of the bytes (enum nbdshim_state).  A block from the pool is
            stale: it has bytes of an earlier Buffer.  A read overwrites them, and nbd.Buffer clears
            them before anybody can see them.  If every block were cleared when it is taken from
            the pool, reads of 1 MiB would take 18 in 100 longer.
    """

    __slots__ = ("pin", "state", "storage")

    def __init__(self, storage: Any, pin: Any, state: int) -> None:
        self.storage = storage
        self.pin = pin
        self.state = _new("int *", state)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.pin)


@one_for_all_imports
class Shared:
    """The memory of a bytes-like object of the caller, who may resize it between two commands.

    Attributes:
        storage: The object.
        state: A pointer to its state: never stale.
    """

    __slots__ = ("storage",)

    state = NEVER_STALE

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    @property
    def size(self) -> int:
        """Its size in bytes as it is now."""
        with memoryview(self.storage) as view:
            return view.nbytes


# The pool: blocks by size, whether in use or not, those that were used last at the end.  Each block
# is in a tuple, so that no variable counts as a reference to it.
_pool: dict[int, deque[tuple[Block]]] = {}


def set_pool_limit(size: int) -> None:
    """Limit how much memory of dropped nbd.Buffer objects is kept for new ones.

    PyPy keeps none, because it notices late that an object was dropped.  There the limit is the
    number of bytes that may be allocated for reads before garbage is collected; the minimum is
    8 MiB.  A free-threaded CPython keeps none either, and the limit has no effect there.

    Args:
        size: The limit in bytes; 0 keeps no memory.  The default is 64 MiB (PyPy: 32 MiB).

    Raises:
        ValueError: size is negative.
    """
    global _pool_limit
    size = as_number("size", size)
    if size < 0:
        raise ValueError(f"size: {size} is negative; 0 keeps no memory")
    _pool_limit = size
    _pool.clear()
    if not IS_CPYTHON:
        pypy.set_limit(size)


def new_block(size: int) -> Block:
    """A block that nothing else refers to.  It may be stale."""
    return _unused_block(size) or _new_block(size)


def give_away(block: Block) -> Any:
    """The storage of a block, for a caller who may keep it: the pool forgets the block."""
    try:
        _pool[block.size].remove((block,))
    except (KeyError, ValueError):  # it is not in the pool, or another thread is looking at it
        return block.storage
    return block.storage


def _unused_block(size: int) -> Block | None:
    """A block that only the pool refers to, if there is one among the next _POOL_LOOKS."""
    kept = _pool.get(size)
    for _ in range(_POOL_LOOKS if kept else 0):
        try:
            oldest = kept.popleft()  # type: ignore[union-attr] # no other thread sees it meanwhile
        except IndexError:  # other threads are inspecting the rest
            break
        block = oldest[0] if _references(oldest) == _UNUSED else None
        if block is not None:
            block.state[0] = _STALE
        kept.append(oldest)  # type: ignore[union-attr]
        if block is not None:
            return block
    return None


def _new_block(size: int) -> Block:
    if not IS_CPYTHON:
        pin = pypy.allocate(size)
        return Block(memoryview(ffi.buffer(pin)), pin, _STALE)
    storage, is_clean = _new_bytearray(size)
    block = Block(storage, from_buffer(_CHARS, storage, True), _CLEAN if is_clean else _STALE)
    if 0 < size <= _pool_limit and not IS_FREE_THREADED:
        _keep(block, size)
    return block


def _keep(block: Block, size: int) -> None:
    """Put a block into the pool if it fits; blocks of other sizes are dropped to make room."""
    for other in list(_pool):
        if _pooled() + size <= _pool_limit and (size in _pool or len(_pool) < _POOL_SIZES):
            break
        if other != size:
            _pool.pop(other, None)
    if _pooled() + size <= _pool_limit:
        _pool.setdefault(size, deque()).append((block,))


def _pooled() -> int:
    """The size of all blocks of the pool."""
    return sum(size * len(kept) for size, kept in list(_pool.items()))


def new_result(size: int) -> tuple[bytearray, Any]:
    """A bytearray of zeroes for the result of a read, and its pin; `result_of` ends the pin.

    Raises:
        nbd.Error: The size is more than libnbd reads in one command.
        OverflowError, ValueError: The size is negative, or too large for a size_t.
    """
    if not 0 <= size <= _MAX_READ:
        raise _refused_size(size)
    result, is_clean = _new_bytearray(size)
    pin = from_buffer(result)
    if not is_clean:
        lib.nbdshim_clear(pin, size)
    return result, pin


def result_of(result: bytearray, pin: Any) -> bytearray:
    """End the pin of a result and return it: from now on the bytearray can be resized."""
    ffi.release(pin)
    return result


def new_shown_result(size: int) -> tuple[bytearray, Any]:
    """The same for a call that shows the memory to a callback while it reads.

    On PyPy the callback could resize the bytearray, so libnbd gets a bounce buffer there.
    """
    if not BOUNCES:
        return new_result(size)
    if not 0 <= size <= _MAX_READ:
        raise _refused_size(size)
    return pypy.zeroed(size), pypy.allocate(size, clear=True)


def shown_result_of(result: bytearray, pin: Any) -> bytearray:
    """End the pin of a result from `new_shown_result`, and return the result."""
    if not BOUNCES:
        return result_of(result, pin)
    if len(result) != len(pin):  # the callback has resized it
        result = bytearray(len(pin))
    copy_back(result, pin)
    free(pin)
    return result


def _refused_size(size: int) -> Exception:
    if size < 0:
        return ValueError(f"count: {size} is negative")
    if size > _SIZE_MAX:
        return OverflowError(f"count: {size} is not between 0 and {_SIZE_MAX}")
    return Error(
        f"count: {size} is more than libnbd reads at once (64 MiB); read it in pieces", ERANGE
    )


def _new_bytearray(size: int) -> tuple[bytearray, bool]:
    """A bytearray, and whether it is zeroed.  On CPython a large one has arbitrary bytes."""
    if not IS_CPYTHON:
        return pypy.zeroed(size), True
    if size < _HUGE:
        return bytearray(size), True
    import ctypes

    # Not PyByteArray_FromStringAndSize: if memory runs out, it drops a half-made bytearray, and
    # CPython prints a SystemError about that.
    resize = ctypes.pythonapi["PyByteArray_Resize"]
    resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]
    if size == sys.maxsize:
        raise MemoryError(f"no memory for {size} bytes")
    large = bytearray()
    resize(large, size)
    lib.nbdshim_advise_huge(from_buffer(large), size)
    return large, False


def pinned(buffer: Any, is_written: bool) -> tuple[Any, int, Any]:
    """The address, the size and the pin of an object.

    Address and size are taken together, so that no other thread can resize the object in between.
    cffi raises TypeError, ValueError or BufferError if the object has no such memory.

    For a memoryview, the object behind it is pinned: until CPython 3.12.7 the garbage collector may
    clear a memoryview that is pinned, and crash (gh-77894).
    """
    view = from_buffer(_CHARS, buffer, is_written)
    if BOUNCES or not isinstance(buffer, memoryview):
        return view, len(view), view
    try:
        pin = from_buffer(buffer.obj)
    except (TypeError, ValueError, BufferError):
        pin = view
    return ffi.cast("char *", view), len(view), pin


def as_bytes(buffer: Any) -> memoryview:
    """A view of the bytes of a contiguous object, whatever the type of its items."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    with view:  # else it would be released at PyPy's next collection
        return view.cast("B") if view.nbytes else memoryview(b"")


# Each function below inspects an object and copies its bytes by one operation of a memoryview, so
# that no other thread can resize the object in between.


def copied(buffer: Any) -> bytes:
    """A copy of the bytes that a command writes to the disk: bytes cannot be resized."""
    with memoryview(buffer) as view:
        if not view.c_contiguous:
            raise BufferError
        return view.tobytes()


def is_unowned(buffer: Any) -> bool:
    """Whether a buffer is a memoryview without an owner, whose memory cannot be pinned.

    CPython's io passes such views of its own buffers to the methods readinto and write of a file.
    """
    return isinstance(buffer, memoryview) and buffer.obj is None


def bounce_buffer(buffer: Any) -> Any:
    """Zeroed C memory for a command to read into, instead of the memory of an object."""
    with memoryview(buffer) as view:
        if view.readonly or not view.c_contiguous:
            raise BufferError
        size = view.nbytes
    return pypy.allocate(size, clear=True) if BOUNCES else _new(_CHARS, size)


def copy_back(target: Any, pin: Any) -> None:
    """Copy the bytes of a bounce buffer to the caller's object.

    Raises:
        BufferError: The object was resized.
    """
    with as_bytes(target) as whole:
        try:
            whole[:] = ffi.buffer(pin)[:]
        except ValueError:
            raise BufferError(
                "the buffer was resized while a command was reading into it: what it read is lost"
            ) from None


def part(target: Any, pin: Any, start: int, count: int) -> memoryview:
    """A read-only view of bytes of a command's buffer, for a callback.

    Args:
        target: The caller's object; None if the pin is the caller's memory itself.
        pin: The memory that libnbd uses.
        start, count: The range of bytes.
    """
    if target is None:
        return memoryview(ffi.buffer(pin))[start : start + count].toreadonly()
    try:
        view = as_bytes(target)
    except ValueError:  # memoryview does not know all item types of numpy
        view = memoryview(ffi.buffer(pin))
    if count != len(view):
        view = view[start : start + count]
    if BOUNCES:
        arrived = ffi.buffer(pin + start, count)[:]
        try:
            view[:] = arrived
        except ValueError:  # the object was resized meanwhile; bring_back will report that
            return memoryview(arrived)
    return view.toreadonly()


if IS_CPYTHON:
    from sys import getrefcount

    def _references(kept: tuple[Block]) -> tuple[int, int, int]:
        """The reference counts of a block, its pin and its storage."""
        return getrefcount(kept[0]), getrefcount(kept[0].pin), getrefcount(kept[0].storage)

    #: The reference counts of a block that only the pool refers to: no Buffer has it, and no
    #: command in flight uses it.  A finalizer of the Buffer could tell the same, but what a signal
    #: handler raises inside a finalizer is printed and lost.
    _UNUSED = _references((_new_block(0),))
