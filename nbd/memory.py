# SPDX-License-Identifier: LGPL-2.0-or-later
"""Memory for what is read: fresh, or from the pool of what dropped nbd.Buffers had.

Fresh memory is dear: the kernel hands it out in pages that it has to clear, one fault for each.  So
on CPython the pool keeps the blocks of the nbd.Buffers of a few sizes, up to a bound
(set_pool_limit), and gives one to a new nbd.Buffer when only the pool refers to it: then there is
no Buffer that has it, no command in flight that uses it, and nobody who sees its bytes.  No
finalizer is needed for that: a signal handler that raises in one would be printed and lost.

A block that is given out again holds old bytes: it is stale.  The shim overwrites them before a
read, and a Buffer before anybody looks at them.
"""

from __future__ import annotations

import sys

from nbd._arguments import as_number
from nbd._ffi import IS_CPYTHON, ffi, lib, one_for_all_imports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from typing import Any
else:
    from _collections import deque  # which takes a fraction of the time of collections

#: From this size on, not filling memory with zeroes first is worth the way to CPython's C API.
LARGE = 128 * 1024
#: From this size on, memory may be in huge pages: a page fault for 2 MiB instead of for 4 KiB.
HUGE = 4 * 1024 * 1024

if not IS_CPYTHON:
    import gc

    from __pypy__ import (  # type: ignore[import-not-found]
        add_memory_pressure as _add_memory_pressure,
    )

#: malloc puts large memory 16 bytes into a page: to copy to there takes AMD's Zen three times as
#: long as to anywhere else.  So many bytes on, a cache line begins.
_TO_LINE = 48

#: How many sizes the pool has at once.
_SIZES = 4
#: How many blocks are looked at for one that is not in use.
_LOOKS = range(4)

#: The largest that glibc's malloc lets itself be taught to keep.
_MALLOC_KEEPS = 31 * 1024 * 1024

_CHARS = ffi.typeof("char[]")
_INT = ffi.typeof("int *")
CLEAN, STALE = lib.NBDSHIM_CLEAN, lib.NBDSHIM_STALE
#: The memory of a bytes-like object, pinned: it stays where it is as long as the result lives.
from_buffer = ffi.from_buffer
_new = ffi.new
_new_uncleared = ffi.new_allocator(should_clear_after_alloc=False)
#: The state of memory that was never stale.
NEVER_STALE = _new(_INT, CLEAN)
_pool_limit = (64 if IS_CPYTHON else 32) * 1024 * 1024
#: PyPy copies zeroes in a fifth of the time that it takes to make them.
_zeroes = bytearray(0 if IS_CPYTHON else 64 * 1024)
# Gets an item after each of PyPy's collections, from the destructor of a cdata: list.append runs no
# bytecode, at which the exception of a signal handler would be lost.
_collected: list[Any] = [] if IS_CPYTHON else [None]
#: PyPy collects garbage when this many times as much is in use as after the last collection, ...
_GROWTH = 1.82
#: ... but not before it is this much where the processor's cache is small.
_LEAST_USED = 32 * 1024 * 1024
#: How many bytes were allocated since the last collection, and how many may be.
_since_collection = 0
_until_collection = _LEAST_USED
_resize: Callable[[bytearray, int], object] | None = None


@one_for_all_imports
class Block:
    """Memory that is ours: it stays where it is as long as its pin lives.

    Attributes:
        storage: The object that has the bytes: a bytearray (PyPy: a memoryview).
        pin: Its address for C, as a cdata of its size.  A command in flight refers to it.
        state: Points to the enum nbdshim_state of the bytes.
    """

    __slots__ = ("pin", "state", "storage")

    def __init__(self, storage: Any, pin: Any, state: int) -> None:
        self.storage = storage
        self.pin = pin
        self.state = _new(_INT, state)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.pin)


def as_bytes(buffer: Any) -> memoryview:
    """A view of the bytes of a contiguous object, whatever its items are."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


@one_for_all_imports
class Shared:
    """A bytes-like object of somebody else, who may resize it between two uses.

    Attributes:
        storage: The object.
        state: It is never stale.
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


# The blocks of each size, in use or not; what was given out last is at the end.  Each is in a
# tuple, so that no variable counts among what refers to it.
_pool: dict[int, deque[tuple[Block]]] = {}


def set_pool_limit(size: int) -> None:
    """Bound how much memory of dropped nbd.Buffer objects is kept for new ones.

    On PyPy nothing is kept: there it is how much more than PyPy's own bound, or than 32 MiB where
    that is larger, may be allocated before PyPy looks for what was dropped.  That holds from the
    next time that it does.

    Args:
        size: Bytes, at the most; 0 keeps none.  It is 64 MiB to begin with (PyPy: 32 MiB).  A
            Buffer larger than a quarter of it is never kept.
    """
    global _pool_limit
    size = as_number("size", size)
    if size < 0:
        raise ValueError(f"size: {size} is negative; 0 keeps no memory")
    _pool_limit = size
    _pool.clear()


def new_block(size: int) -> Block:
    """A block that nobody else has or sees; it may be stale."""
    kept = _pool.get(size)
    if kept:
        for _ in _LOOKS:
            try:
                first = kept.popleft()  # the one that was given out first
            except IndexError:  # other threads have the rest
                break
            if getrefcount(first[0]) != ALONE[0] or getrefcount(first[0].pin) != ALONE[1]:
                kept.append(first)
            elif getrefcount(first[0].storage) == ALONE[2]:
                block = first[0]  # no other thread finds it unused from here on
                block.state[0] = STALE
                kept.append(first)
                return block
    block = _fresh_block(size)
    if IS_CPYTHON and 0 < size <= _pool_limit // _SIZES:
        _keep(block, size)
    return block


def _keep(block: Block, size: int) -> None:
    """Let the pool have a block; blocks of the size that it has had longest make room."""
    kept = _pool.setdefault(size, deque())
    kept.append((block,))
    for oldest in list(_pool):
        if oldest == size or (len(_pool) <= _SIZES and _pooled() <= _pool_limit):
            break
        _pool.pop(oldest, None)
    if _pooled() > _pool_limit:
        kept.popleft()


def _pooled() -> int:
    """How many bytes the pool has."""
    return sum(size * len(kept) for size, kept in list(_pool.items()))


def give_away(block: Block) -> Any:
    """The storage of a block, for somebody who may keep it and change its size."""
    try:
        _pool[block.size].remove((block,))
    except (KeyError, ValueError):  # not pooled, or another thread is looking at it
        return block.storage
    return block.storage


def _fresh_block(size: int) -> Block:
    if IS_CPYTHON:
        storage, is_zero = new_bytearray(size)
        return Block(storage, from_buffer(_CHARS, storage, True), CLEAN if is_zero else STALE)
    pin = allocate(size)
    return Block(memoryview(ffi.buffer(pin)), pin, STALE)


def allocate(size: int, clear: bool = False) -> Any:
    """Memory for C where a bytearray's can move: that of PyPy."""
    _count(size)
    return (ffi.new if clear else _new_uncleared)(_CHARS, size)


def free(pointer: Any, size: int) -> None:
    """Give back what allocate gave, and let PyPy know, which has counted it."""
    global _since_collection
    ffi.release(pointer)
    _add_memory_pressure(-size)
    _since_collection -= size


def _count(size: int) -> None:
    """Collect garbage if PyPy would leave too much before it does.

    It makes a nursery of half the processor's cache, and waits until eight nurseries are in use.
    Where that is a GiB, all of it would be fresh memory from the kernel, page by page.
    """
    global _since_collection
    if _collected:
        _give_slack()
    _since_collection += size
    if _since_collection > _until_collection and gc.isenabled():
        _since_collection = size
        while not gc.collect_step().major_is_done:  # type: ignore[attr-defined]
            pass


def _give_slack() -> None:
    """Let more be allocated until PyPy's next collection, which has set its bound anew.

    In a small program it would go through everything that is alive for every 8 MiB allocated: the
    time of a hundred reads of 64 KiB.
    """
    global _since_collection, _until_collection
    try:
        _collected.pop()
    except IndexError:  # another thread was faster
        return
    ffi.gc(_new(_INT), _collected.append)  # dropped at once: the next collection frees it
    _add_memory_pressure(-_pool_limit)
    now: Any = gc.get_stats()
    used = now._s.total_arena_memory + now._s.total_rawmalloced_memory
    _since_collection, _until_collection = 0, max(int(_GROWTH * used), _LEAST_USED) + _pool_limit
    # What a collection frees is wanted again at once.  glibc's malloc gives it to the kernel, to be
    # cleared page by page, until it has seen something as large freed.
    ffi.release(_new_uncleared(_CHARS, _MALLOC_KEEPS))


def new_bytearray(size: int) -> tuple[bytearray, bool]:
    """A bytearray of size bytes, and whether they are zeroes; else they are anything."""
    if not IS_CPYTHON:
        return _repeated_zeroes(size), True
    if size < LARGE:
        return bytearray(size), True
    fresh = _uninitialised(size)
    if size >= HUGE:
        lib.nbdshim_advise_huge(ffi.from_buffer(fresh), size)
    return fresh, False


def _repeated_zeroes(size: int) -> bytearray:
    """A bytearray of zeroes, as PyPy makes one fast."""
    _count(size)
    if size <= len(_zeroes):
        return _zeroes[:size]
    fresh = _zeroes * -(-size // len(_zeroes))
    del fresh[size:]
    return fresh


def _uninitialised(size: int) -> bytearray:
    """A bytearray whose bytes are anything.

    Resized, and not made by PyByteArray_FromStringAndSize: where there is no memory, that drops a
    half-made bytearray, about which CPython prints a SystemError.
    """
    global _resize
    if _resize is None:
        import ctypes

        _resize = ctypes.pythonapi["PyByteArray_Resize"]
        _resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]
    if size > sys.maxsize - _TO_LINE:
        raise MemoryError(f"no memory for {size} bytes")
    fresh = bytearray()
    _resize(fresh, size + _TO_LINE)
    del fresh[:_TO_LINE]
    return fresh


if IS_CPYTHON:
    from sys import getrefcount

    _first = (_fresh_block(1),)
    #: How often a block, its pin and its storage are referred to when only the pool has it.
    ALONE = getrefcount(_first[0]), getrefcount(_first[0].pin), getrefcount(_first[0].storage)
