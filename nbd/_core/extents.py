# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.extents: what a server tells of a disk's ranges, from one end to the other.

A reply may end before the range that was asked for, or behind it.  `_Reader` asks again from where
the last one ended, for one context or several at once.
"""

from __future__ import annotations

import errno
from collections import namedtuple

from nbd._core.constants import CONTEXT_BASE_ALLOCATION, SIZE_MINIMUM
from nbd._core.convert import as_number
from nbd._core.errors import Error
from nbd._core.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, overload

#: The most that is asked for at once without extended headers, whose lengths have 32 bits.
_MOST = 2**31


_Extent = namedtuple("_Extent", ("offset", "length", "flags"))


class Extent(_Extent):
    """A range of a disk whose status is the same everywhere.

    Attributes:
        offset: Where it starts, in bytes from the start of the export.
        length: Its size in bytes.
        flags: The status, such as nbd.STATE_HOLE | nbd.STATE_ZERO.
    """

    __module__ = "nbd"
    __slots__ = ()

    offset: int
    length: int
    flags: int


_Extents = namedtuple("_Extents", ("offset", "length", "flags"))


class Extents(_Extents):
    """The same for several meta contexts.

    Attributes:
        offset: Where it starts, in bytes from the start of the export.
        length: Its size in bytes.
        flags: The status in each context, in the order in which they were asked for.
    """

    __module__ = "nbd"
    __slots__ = ()

    offset: int
    length: int
    flags: tuple[int, ...]


if TYPE_CHECKING:

    @overload
    def extents(
        h: NBD,
        context: str = CONTEXT_BASE_ALLOCATION,
        *,
        start: int = 0,
        end: int | None = None,
    ) -> Iterator[Extent]: ...

    @overload
    def extents(
        h: NBD,
        context: list[str] | tuple[str, ...],
        *,
        start: int = 0,
        end: int | None = None,
    ) -> Iterator[Extents]: ...


def extents(
    h: NBD,
    context: str | list[str] | tuple[str, ...] = CONTEXT_BASE_ALLOCATION,
    *,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Any]:
    """Go through the extents of a disk, or of a part of it.

    The whole range is covered, in order.  Two extents next to each other differ.  The handle may be
    used for other calls meanwhile.

    Args:
        h: A connected handle for which the contexts were negotiated; nbd.connect asks for
            base:allocation.
        context: The name of a meta context.  With a list of names, each extent has a tuple of
            flags, one for each name.
        start: Where to begin, in bytes from the start of the export.
        end: Where to end; None is the end of the export.

    Returns:
        An iterator of tuples (offset, length, flags).

    Raises:
        nbd.Error: A context was not negotiated (ENOTSUP); a command has failed; or the server's
            answer has no extent for a place (EPROTO).
        ValueError: start or end is outside the export.

    Example:
        >>> disk = nbd.connect(["nbdkit", "-s", "memory", "1M"])
        >>> disk.pwrite(b"data", 0)
        >>> for extent in nbd.extents(disk):
        ...     print(extent)
        Extent(offset=0, length=32768, flags=0)
        Extent(offset=32768, length=1015808, flags=3)

    C: nbd_block_status_64, or nbd_block_status.
    """
    if not isinstance(h, NBD):
        raise TypeError(f"h: nbd.NBD is needed, not {type(h).__name__}")
    names = [context] if isinstance(context, str) else list(context)
    if not names:
        raise ValueError("context: at least one name is needed")
    for name in names:
        _check_context(h, name)
    size: int = h.get_size()
    first, last = as_number("start", start), size if end is None else as_number("end", end)
    if not 0 <= first <= last <= size:
        raise ValueError(f"start {first} and end {last} are no range of a disk of {size} bytes")
    parts = _merged(_cut(_Reader(h, names), first, last))
    if isinstance(context, str):
        return (Extent(offset, length, flags[0]) for offset, length, flags in parts)
    return (Extents(*part) for part in parts)


def _check_context(h: NBD, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"context: str is needed, not {type(name).__name__}")
    if not h.can_meta_context(name):
        raise Error(
            f"nbd.extents: {name} was not negotiated: the server does not offer it, or it was not "
            f"asked for; to ask, call h.add_meta_context({name!r}) before connecting, or use "
            f"nbd.connect(uri, contexts=[{name!r}])",
            errno.ENOTSUP,
        )


class _Reader:
    """Asks a server for the status of a range, in several contexts."""

    def __init__(self, h: NBD, names: list[str]) -> None:
        self._h = h
        self._names = names
        self._size: int = h.get_size()
        self._block = max(1, h.get_block_size(SIZE_MINIMUM))
        asks_64: Any = getattr(h, "block_status_64", None)
        self._ask: Any = asks_64 or h.block_status
        self._has_pairs = asks_64 is not None
        is_extended: Any = getattr(h, "get_extended_headers_negotiated", bool)
        self._most = self._size if is_extended() else _MOST

    def ask(self, start: int, end: int) -> list[list[tuple[int, int]]]:
        """One reply: for each context (length, flags) from start on, as far as it goes.

        Raises:
            nbd.Error: The command has failed, or the reply does not get on.
        """
        at = start - start % self._block
        count = min(end - at, self._most)
        count = min(count + -count % self._block, self._size - at)
        answers: dict[str, list[tuple[int, int]]] = {}

        def note(context: str, offset: int, entries: list[Any], error: object) -> None:
            if not self._has_pairs:
                entries = list(zip(entries[::2], entries[1::2]))
            answers.setdefault(context, []).extend(entries)

        self._ask(count, at, note)
        return [_from(start - at, answers.get(name, []), name, start) for name in self._names]


def _from(
    skipped: int, entries: list[tuple[int, int]], name: str, start: int
) -> list[tuple[int, int]]:
    """The entries without their first bytes, which were asked for only for the alignment."""
    left = []
    for length, flags in entries:
        if length > skipped:
            left.append((length - skipped, flags))
        skipped = max(0, skipped - length)
    if not left:
        raise Error(
            f"nbd.extents: the server has told of no extent of {name} at offset {start}; "
            "it breaks the protocol",
            errno.EPROTO,
        )
    return left


def _cut(reader: _Reader, start: int, end: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Parts of the range, cut where any of the contexts changes, as far as all have told."""
    while start < end:
        answers = [entries[::-1] for entries in reader.ask(start, end)]
        while start < end and all(answers):
            length = min(end - start, min(answer[-1][0] for answer in answers))
            yield start, length, tuple(answer[-1][1] for answer in answers)
            start += length
            for answer in answers:
                left, flags = answer.pop()
                if left > length:
                    answer.append((left - length, flags))


def _merged(
    parts: Iterator[tuple[int, int, tuple[int, ...]]],
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The same parts, neighbours with the same flags made one."""
    offset = length = 0
    flags: tuple[int, ...] | None = None
    for start, count, status in parts:
        if status == flags:
            length += count
            continue
        if flags is not None:
            yield offset, length, flags
        offset, length, flags = start, count, status
    if flags is not None:
        yield offset, length, flags
