# SPDX-License-Identifier: LGPL-2.0-or-later
"""What only PyPy needs: C memory for buffers, and collecting garbage at the right time.

PyPy moves objects, so libnbd cannot work on their memory: blocks and bounce buffers are C memory,
from `allocate`.

PyPy frees memory and finalizes objects when it collects garbage.  It would do so for every 8 MiB
allocated, which takes as long as a hundred reads of 64 KiB; or, on processors with a large cache,
only for every GiB.  So this module hides the memory from PyPy's accounting (add_memory_pressure),
and collects after a fixed number of bytes.  That halves the time of reads of 64 KiB into new
Buffers.
"""

from __future__ import annotations

import gc
import os

from __pypy__ import add_memory_pressure  # type: ignore[import-not-found]

from nbd._binding.shim import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sized
    from typing import Any

#: Garbage is collected after at least this many bytes, whatever set_pool_limit was given.
_MIN_LIMIT = 8 * 1024 * 1024
#: Garbage is collected when this many handles were made since the last time.  A dropped handle has
#: some KiB of memory and, if connected, two descriptors.
_MAX_DROPPED = 128

_CHARS = ffi.typeof("char[]")
_zeroes = bytearray(64 * 1024)
_new_uncleared = ffi.new_allocator(should_clear_after_alloc=False)

# The bytes after which garbage is collected.  malloc gives memory back to the kernel when 62 MiB
# are freed at once, so the default is half of that.
_limit = 32 * 1024 * 1024
_allocated = 0
_collect_at = 8

# glibc's malloc returns freed memory to the kernel until a block of that size was freed once.  It
# adapts to blocks of at most 32 MiB.  Without this line, reads of 1 MiB take 2.8 times as long.
ffi.release(_new_uncleared(_CHARS, 31 * 1024 * 1024))


def set_limit(size: int) -> None:
    """Collect garbage after this many bytes were allocated."""
    global _limit
    _limit = max(size, _MIN_LIMIT)


def allocate(size: int, clear: bool = False) -> Any:
    """C memory for a block or a bounce buffer; if it is not cleared, it has arbitrary bytes."""
    _count(size)
    return ffi.new(_CHARS, size) if clear else _new_uncleared(_CHARS, size)


def free(pin: Any) -> None:
    """Free memory of `allocate` at once; nobody may refer to it any more."""
    global _allocated
    _allocated -= len(pin)
    ffi.release(pin)


def zeroed(size: int) -> bytearray:
    """A bytearray of zeroes.  With bytearray(size), reads of 64 KiB take 1.4 times as long."""
    _count(size)
    if size <= len(_zeroes):
        return _zeroes[:size]
    copy = _zeroes * -(-size // len(_zeroes))
    del copy[size:]
    return copy


def _count(size: int) -> None:
    """Collect garbage if it is time, before size bytes are allocated."""
    global _allocated
    add_memory_pressure(-size)
    if _allocated > _limit and gc.isenabled():
        _allocated = 0
        gc.collect()
    _allocated += size


def collect_dropped(handles: Sized) -> None:
    """Collect garbage if many handles are open: that closes those which were dropped."""
    global _collect_at
    if len(handles) < _collect_at:
        return
    gc.collect()
    descriptors = os.sysconf("SC_OPEN_MAX")  # -1 if unlimited
    share = descriptors // 8 if descriptors > 0 else _MAX_DROPPED
    _collect_at = len(handles) + max(1, min(_MAX_DROPPED, share))
