# SPDX-License-Identifier: LGPL-2.0-or-later
"""Values from C to Python.

Text is UTF-8; what is not UTF-8 survives as surrogates, to be given back unchanged.
"""

from __future__ import annotations

from nbd._ffi import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The bytes at a char pointer.
string = ffi.string
#: A list of the integers at a pointer to some.
unpack = ffi.unpack


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


def pairs(array: Any, length: int) -> list[tuple[int, int]]:
    """An array of structs of two integers, given as the integers one after the other."""
    flat = iter(unpack(array, 2 * length))
    return list(zip(flat, flat))
