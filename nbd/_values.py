# SPDX-License-Identifier: LGPL-2.0-or-later
"""Values from C to Python.

Text is UTF-8; what is not UTF-8 survives as surrogates, to be given back unchanged.
"""

from __future__ import annotations

from nbd._ffi import ffi, lib
from nbd.memory import IS_CPYTHON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

#: The bytes at a char pointer.
string = ffi.string

# Formats of memoryview: its tolist takes half the time of ffi.unpack on CPython.
_FORMATS: dict[str, Literal["I", "Q"]] = {"uint32_t": "I", "uint64_t": "Q"} if IS_CPYTHON else {}


def as_text(pointer: Any) -> str:
    """The string at a char pointer."""
    raw: bytes = string(pointer)
    return raw.decode("utf-8", "surrogateescape")


def owned_text(pointer: Any) -> str:
    """The string at a char pointer that the caller has to free, and frees."""
    try:
        return as_text(pointer)
    finally:
        lib.nbdshim_free(pointer)


def numbers(array: Any, length: int) -> list[int]:
    """An array of integers."""
    kind = ffi.typeof(array).item.cname
    if kind in _FORMATS:
        size = ffi.sizeof(kind)
        whole = memoryview(ffi.buffer(array, length * size))
        return whole.cast(_FORMATS[kind]).tolist()
    found: list[int] = ffi.unpack(array, length)
    return found


def pairs(array: Any, length: int) -> list[tuple[int, int]]:
    """An array of structs of two integers, given as the integers one after the other."""
    flat = numbers(array, 2 * length)
    return list(zip(flat[::2], flat[1::2]))
