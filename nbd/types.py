# SPDX-License-Identifier: LGPL-2.0-or-later
"""Types for annotations: the callables that libnbd calls, and socket addresses.

This module is for programs that are type checked.  The package itself does not load it.
"""

from __future__ import annotations

import os
from typing import Protocol, Union

Address = Union[str, bytes, "os.PathLike[str]", tuple[str, int], tuple[str, int, int, int]]


class ErrorNumber(Protocol):
    """The errno of a command: `value` can be read and set; it is true if value is not 0."""

    value: int

    def __bool__(self) -> bool: ...


class ChunkCallback(Protocol):
    """Called with each part of a structured read as it arrives."""

    def __call__(
        self, subbuf: memoryview, offset: int, status: int, error: ErrorNumber, /
    ) -> object: ...


class CompletionCallback(Protocol):
    """Called once when a command or option is done; returning 1 retires a command at once."""

    def __call__(self, error: ErrorNumber, /) -> object: ...


class ContextCallback(Protocol):
    """Called with the name of a meta context."""

    def __call__(self, name: str, /) -> object: ...


class DebugCallback(Protocol):
    """Called with the name of a C function and a debug message of that function."""

    def __call__(self, function: str, message: str, /) -> object: ...


class ExtentCallback(Protocol):
    """Called with the extents of one meta context as a flat list: length, flags, length, ..."""

    def __call__(
        self, metacontext: str, offset: int, entries: list[int], error: ErrorNumber, /
    ) -> object: ...


class Extent64Callback(Protocol):
    """Called with the extents of one meta context as a list of (length, flags)."""

    def __call__(
        self, metacontext: str, offset: int, entries: list[tuple[int, int]], error: ErrorNumber, /
    ) -> object: ...


class ListCallback(Protocol):
    """Called with the name and the description of an export."""

    def __call__(self, name: str, description: str, /) -> object: ...
