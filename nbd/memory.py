# SPDX-License-Identifier: LGPL-2.0-or-later
"""Fresh memory for what is read."""

from __future__ import annotations

import sys

from nbd._ffi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: From this size on, not filling memory with zeroes first is worth the way to CPython's C API.
LARGE = 128 * 1024
#: From this size on, memory may be in huge pages: a page fault for 2 MiB instead of for 4 KiB.
HUGE = 4 * 1024 * 1024

_allocate: Callable[[int], bytearray] | None = None


def new_bytearray(size: int) -> tuple[bytearray, bool]:
    """A bytearray of size bytes, and whether they are zeroes; else they are anything."""
    if size < LARGE or sys.implementation.name != "cpython":
        return bytearray(size), True
    fresh = _uninitialised(size)
    if size >= HUGE:
        lib.nbdshim_advise_huge(ffi.from_buffer(fresh), size)
    return fresh, False


def _uninitialised(size: int) -> bytearray:
    global _allocate
    if _allocate is None:
        import ctypes

        function = ctypes.pythonapi.PyByteArray_FromStringAndSize
        function.restype = ctypes.py_object
        function.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
        _allocate = lambda n: function(None, n)  # noqa: E731
    return _allocate(size)
