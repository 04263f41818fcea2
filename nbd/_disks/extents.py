# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.extents: the extents of a disk, as the server reports them.

A reply may cover less or more than the range of the command.  `Survey` continues where the last
reply ended, for one context or several at once.  It only computes, and sends nothing: its callers
send the commands, one with calls that wait and one in an event loop.
"""

from __future__ import annotations

import errno
from collections import namedtuple

from nbd._binding.constants import CONTEXT_BASE_ALLOCATION, SIZE_MINIMUM
from nbd._binding.convert import as_number
from nbd._binding.errors import Error
from nbd._binding.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, overload

#: The largest range of one command without extended headers, whose lengths have 32 bits.
_MAX_COUNT = 2**31


_Extent = namedtuple("_Extent", ("offset", "length", "flags"))


class Extent(_Extent):
    """A range of a disk with one status.

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
    """A range of a disk with one status in each of several meta contexts.

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
    """Iterate over the extents of a disk, or of a part of it.

    The extents cover the whole range, in order.  Adjacent extents differ in their flags.  The
    handle may be used for other calls meanwhile.

    Args:
        h: A connected handle with which the contexts were negotiated; nbd.connect negotiates
            base:allocation.
        context: The name of a meta context.  With a list of names, each extent has a tuple of
            flags, one for each name.
        start: Where to begin, in bytes from the start of the export.
        end: Where to end; None is the end of the export.

    Returns:
        An iterator of tuples (offset, length, flags).

    Raises:
        nbd.Error: A context was not negotiated (ENOTSUP); a command failed; or the server reported
            no extent at the start of the range it was asked for (EPROTO).
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
    return _ask_all(h, Survey(h, context, start, end))


def _ask_all(h: NBD, survey: Survey) -> Iterator[Any]:
    ask = getattr(h, survey.method)
    while not survey.is_complete:
        question = survey.question()
        ask(question.count, question.offset, question.note)
        yield from survey.learn(question)


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


class Survey:
    """Computes which commands to send for a range, and extents from the replies.

    Attributes:
        method: The name of the handle's method that sends a question.
    """

    def __init__(
        self, h: NBD, context: str | list[str] | tuple[str, ...], start: int, end: int | None
    ) -> None:
        self._names = [context] if isinstance(context, str) else list(context)
        self._is_single = isinstance(context, str)
        if not self._names:
            raise ValueError("context: at least one name is needed")
        for name in self._names:
            _check_context(h, name)
        self._size: int = h.get_size()
        self._at = as_number("start", start)
        self._end = self._size if end is None else as_number("end", end)
        if not 0 <= self._at <= self._end <= self._size:
            raise ValueError(
                f"start {start} and end {self._end} are not a range of a disk of {self._size} bytes"
            )
        self._block = max(1, h.get_block_size(SIZE_MINIMUM))
        self.method = "block_status_64" if hasattr(h, "block_status_64") else "block_status"
        is_extended: Any = getattr(h, "get_extended_headers_negotiated", bool)
        self._max_count = self._size if is_extended() else _MAX_COUNT
        # The extent that is not complete yet, as the next reply may begin with the same flags.
        self._offset = self._length = 0
        self._flags: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the whole range was reported."""
        return self._at == self._end

    def question(self) -> Question:
        """Return the next question; it starts and ends at the server's minimum block size."""
        offset = self._at - self._at % self._block
        count = min(self._end - offset, self._max_count)
        return Question(offset, min(count + -count % self._block, self._size - offset))

    def learn(self, question: Question) -> Iterator[Extent | Extents]:
        """Yield the extents that are complete now that a question was answered.

        Raises:
            nbd.Error: The reply covers none of the range that was asked for.
        """
        skipped = self._at - question.offset
        answers = [
            _from(skipped, question.answers.get(name, []), name, self._at)[::-1]
            for name in self._names
        ]
        while self._at < self._end and all(answers):
            length = min(self._end - self._at, min(answer[-1][0] for answer in answers))
            flags = tuple(answer[-1][1] for answer in answers)
            if self._length and flags != self._flags:
                yield self._extent()
            if not self._length or flags != self._flags:
                self._offset, self._length, self._flags = self._at, 0, flags
            self._length += length
            self._at += length
            for answer in answers:
                left, status = answer.pop()
                if left > length:
                    answer.append((left - length, status))
        if self.is_complete and self._length:
            yield self._extent()

    def _extent(self) -> Extent | Extents:
        if self._is_single:
            return Extent(self._offset, self._length, self._flags[0])
        return Extents(self._offset, self._length, self._flags)


class Question:
    """One command and its reply.

    Attributes:
        offset, count: The range of the command.
        answers: The entries of each context, as (length, flags), from the offset on.
    """

    def __init__(self, offset: int, count: int) -> None:
        self.offset = offset
        self.count = count
        self.answers: dict[str, list[tuple[int, int]]] = {}

    def note(self, context: str, offset: int, entries: list[Any], error: object) -> None:
        """Store the entries of one context: a callback for block_status and block_status_64.

        A second reply for a context breaks the protocol.  Neither can be trusted, so both are
        discarded.
        """
        if entries and isinstance(entries[0], int):
            entries = list(zip(entries[::2], entries[1::2]))
        self.answers[context] = [] if context in self.answers else entries


def _from(
    skipped: int, entries: list[tuple[int, int]], name: str, start: int
) -> list[tuple[int, int]]:
    """Return the entries without the first bytes, which were asked for only to be aligned."""
    left = []
    for length, flags in entries:
        if length > skipped:
            left.append((length - skipped, flags))
        skipped = max(0, skipped - length)
    if not left:
        raise Error(
            f"nbd.extents: the server has reported no extent of {name} at offset {start}; "
            "it breaks the protocol",
            errno.EPROTO,
        )
    return left
