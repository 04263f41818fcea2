# SPDX-License-Identifier: LGPL-2.0-or-later
"""Memory for what is read: fresh, or recycled from an nbd.Buffer that nobody has any more.

Fresh memory is dear: the kernel hands it out in pages that it has to clear, one fault for each.  So
the memory of a dropped nbd.Buffer is kept for the next one of the same size, up to a bound
(set_pool_limit), unless anybody could still look at it.  What is recycled holds old bytes: the
Buffer makes sure that they never show.
"""

from __future__ import annotations

import sys

from nbd._ffi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    # Memory for C: its address, its size in bytes, and what keeps it in place.
    Room = tuple[Any, int, Any]

#: From this size on, not filling memory with zeroes first is worth the way to CPython's C API.
LARGE = 128 * 1024
#: From this size on, memory may be in huge pages: a page fault for 2 MiB instead of for 4 KiB.
HUGE = 4 * 1024 * 1024

#: Only where an object is finalised as soon as it is dropped is there something to recycle in time.
RECYCLES = IS_CPYTHON = sys.implementation.name == "cpython"

if not IS_CPYTHON:
    import gc

    from __pypy__ import (  # type: ignore[import-not-found]
        add_memory_pressure as _add_memory_pressure,
    )

#: malloc puts large memory 16 bytes into a page: to copy to there takes AMD's Zen three times as
#: long as to anywhere else.  So many bytes on, a cache line begins.
_TO_LINE = 48

#: How many sizes are kept at once; each has an equal share of the bound.
_SIZES = 4

#: The largest that glibc's malloc lets itself be taught to keep.
_MALLOC_KEEPS = 31 * 1024 * 1024

_CHARS = ffi.typeof("char[]")
_from_buffer = ffi.from_buffer
_new_uncleared = ffi.new_allocator(should_clear_after_alloc=False)
_pool_limit = (64 if RECYCLES else 32) * 1024 * 1024
#: PyPy copies zeroes in a fifth of the time that it takes to make them.
_zeroes = bytearray(0 if IS_CPYTHON else 64 * 1024)
# A list, since it can be emptied by one thread alone.
_lacks_slack = [] if IS_CPYTHON else [True]
#: PyPy collects garbage when this many times as much is in use as after the last collection, ...
_GROWTH = 1.82
#: ... but not before it is this much where the processor's cache is small.
_LEAST_USED = 32 * 1024 * 1024
#: How many bytes were allocated since the last collection, and how many may be.
_since_collection = 0
_until_collection = _LEAST_USED
_resize: Callable[[bytearray, int], object] | None = None


class Shelf:
    """Where memory of one size is kept until somebody wants it.

    Attributes:
        items: What is there.
        most: How many there may be.
    """

    __slots__ = ("items", "most")

    def __init__(self, most: int) -> None:
        self.items: list[Memory] = []
        self.most = most


NOWHERE = Shelf(0)


class Memory:
    """A bytes-like object whose memory C may use as long as this lives.

    Attributes:
        storage: The object.
        room: Its memory.
        shelf: Where it may be kept.
    """

    __slots__ = ("room", "shelf", "storage")

    def __init__(self, storage: Any, room: Room, shelf: Shelf) -> None:
        self.storage = storage
        self.room = room
        self.shelf = shelf

    @property
    def size(self) -> int:
        """Its size in bytes."""
        size: int = self.room[1]
        return size


class Shared:
    """A bytes-like object of somebody else, who may resize it between two uses.

    Attributes:
        storage: The object.
        shelf: Nowhere: it is not ours to be used again.
    """

    __slots__ = ("shelf", "storage")

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.shelf = NOWHERE

    @property
    def room(self) -> Room:
        """Its memory as it is now, and what keeps that in place."""
        return room_of(self.storage)

    @property
    def size(self) -> int:
        """Its size in bytes as it is now."""
        return contiguous_size(self.storage)

    def bytes_at(self, start: int, size: int) -> bytes:
        """A copy of some bytes; a view, or an address, would keep PyPy 8 from resizing it."""
        end = start + size
        with memoryview(self.storage) as view, view.cast("B") as whole, whole[start:end] as part:
            return part.tobytes()


#: The shelves' items, by size in bytes.
spares: dict[int, list[Memory]] = {}
_shelves: dict[int, Shelf] = {}


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
    if size < 0:
        raise ValueError(f"size: {size} is negative; 0 keeps no memory")
    _pool_limit = size
    for kind in list(_shelves):
        _take_down(kind)


def _take_down(size: int) -> None:
    shelf = _shelves.pop(size, NOWHERE)  # where another thread is as far as this
    spares.pop(size, None)
    shelf.most = 0
    shelf.items.clear()


def _shelf_for(size: int) -> Shelf:
    """The shelf for memory of a size, put up in the place of the oldest if there are too many."""
    found = _shelves.get(size)
    if found is None:
        most = _pool_limit // _SIZES // max(size, 1)
        if most == 0 or not RECYCLES:
            return NOWHERE
        for oldest in list(_shelves)[: 1 - _SIZES]:  # which leaves room for one more
            _take_down(oldest)
        found = _shelves.setdefault(size, Shelf(most))
        spares[size] = found.items
    return found


def new_memory(size: int) -> tuple[Memory, bool]:
    """Fresh memory of size bytes, and whether they are zeroes; else they are anything."""
    shelf = _shelf_for(size)
    if IS_CPYTHON:
        storage, is_zero = new_bytearray(size)
        return Memory(storage, room_of(storage), shelf), is_zero
    pointer = allocate(size)
    return Memory(memoryview(ffi.buffer(pointer)), (pointer, size, pointer), shelf), False


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
    if _lacks_slack:
        _give_slack()
    _since_collection += size
    if _since_collection > _until_collection and gc.isenabled():
        _since_collection = size
        while not gc.collect_step().major_is_done:  # type: ignore[attr-defined]
            pass


def _give_slack() -> None:
    """Keep PyPy, which is about to allocate much, from collecting all the time.

    In a small program it goes through everything that is alive for every 8 MiB allocated: the time
    of a hundred reads of 64 KiB.
    """
    try:
        _lacks_slack.pop()
    except IndexError:
        return
    _renew_slack()
    # What a collection frees is wanted again at once.  glibc's malloc gives it to the kernel, to be
    # cleared page by page, until it has seen something as large freed.
    ffi.release(_new_uncleared(_CHARS, _MALLOC_KEEPS))


def _renew_slack() -> None:
    """Let more be allocated until the next collection, and again after each."""
    global _since_collection, _until_collection
    _add_memory_pressure(-_pool_limit)
    now: Any = gc.get_stats()
    used = now._s.total_arena_memory + now._s.total_rawmalloced_memory
    _since_collection, _until_collection = 0, max(int(_GROWTH * used), _LEAST_USED) + _pool_limit
    _Collected()


class _Collected:
    """Dropped at once, and so finalised after a collection: that has set the bound anew."""

    def __del__(self) -> None:
        _renew_slack()


def contiguous_size(buffer: Any, writable: bool = False) -> int:
    """The bytes of a bytes-like object; BufferError if not contiguous, or not writable."""
    with memoryview(buffer) as view:
        if not view.c_contiguous:
            raise BufferError("the buffer is not contiguous; pass a copy, bytes(...)")
        if writable and view.readonly:
            raise BufferError("the buffer is read-only; pass a bytearray or nbd.Buffer")
        return view.nbytes


def room_of(buffer: Any, writable: bool = False) -> Room:
    """The memory of a bytes-like object; what cffi raises if it cannot be had.

    Of a memoryview the object behind it is pinned: until CPython 3.12.7 the garbage collector may
    clear a memoryview that is pinned, and crash (gh-77894).
    """
    is_view = isinstance(buffer, memoryview)
    if is_view and not buffer.c_contiguous:  # PyPy's cffi does not look
        raise BufferError("the memoryview is not contiguous")
    view = _from_buffer(_CHARS, buffer, writable)
    if not (is_view and IS_CPYTHON):
        return view, len(view), view
    try:
        pin = _from_buffer(buffer.obj)
    except (TypeError, ValueError, BufferError):
        pin = view
    return ffi.cast("char *", view), len(view), pin


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
