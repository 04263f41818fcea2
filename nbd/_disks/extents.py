# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.extents: what a server tells of a disk's ranges, from one end to the other.

A reply may end before the range that was asked for, or behind it.  `Survey` asks again from where
the last one ended, for one context or several at once.  It makes no call itself, so that an event
loop can do that.
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
    """What is asked of a server about a range, and what was learned: no call is made here.

    Attributes:
        method: The method of a handle that takes a question.
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
                f"start {start} and end {self._end} are no range of a disk of {self._size} bytes"
            )
        self._block = max(1, h.get_block_size(SIZE_MINIMUM))
        self.method = "block_status_64" if hasattr(h, "block_status_64") else "block_status"
        is_extended: Any = getattr(h, "get_extended_headers_negotiated", bool)
        self._most = self._size if is_extended() else _MOST
        # The last part: the next one may go on with the same flags.
        self._offset = self._length = 0
        self._flags: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the whole range is known."""
        return self._at == self._end

    def question(self) -> Question:
        """What to ask next."""
        offset = self._at - self._at % self._block
        count = min(self._end - offset, self._most)
        return Question(offset, min(count + -count % self._block, self._size - offset))

    def learn(self, question: Question) -> Iterator[Extent | Extents]:
        """The extents that are complete now that a question was answered.

        Raises:
            nbd.Error: The answer does not get on.
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
    """One command, and its answer.

    Attributes:
        offset, count: The range.
        answers: For each context (length, flags) from the offset on, as far as it goes.
    """

    def __init__(self, offset: int, count: int) -> None:
        self.offset = offset
        self.count = count
        self.answers: dict[str, list[tuple[int, int]]] = {}

    def note(self, context: str, offset: int, entries: list[Any], error: object) -> None:
        """Note what a callback of block_status, or of block_status_64, is told.

        A second answer for a context breaks the protocol.  Which of them is true is not known, so
        none is left.
        """
        if entries and isinstance(entries[0], int):
            entries = list(zip(entries[::2], entries[1::2]))
        self.answers[context] = [] if context in self.answers else entries


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
