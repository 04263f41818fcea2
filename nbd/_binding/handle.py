# SPDX-License-Identifier: LGPL-2.0-or-later
"""The life of a handle: it is made, and it is closed once, at the latest when the process ends."""

from __future__ import annotations

import atexit
from sys import is_finalizing

from nbd._binding.convert import as_seconds
from nbd._binding.errors import (
    end_other_threads,
    explained,
    failure_of,
    pending,
    raise_pending,
    report_pending,
)
from nbd._binding.finalize import owned
from nbd._binding.shim import IS_CPYTHON, ffi, lib

if not IS_CPYTHON:
    from nbd._binding import pypy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, NoReturn, TypeVar

    Self = TypeVar("Self", bound="Handle")

# Looked up once, as the calls in nbd._binding.methods are.
nbdshim_create = lib.nbdshim_create
nbdshim_close = lib.nbdshim_close
nbdshim_destroy = lib.nbdshim_destroy

# The shim's handles that are open.  They are closed at exit, when PyPy runs no destructors.
_open: set[Any] = set()
_is_exiting = False

# The shim's handles on which files of nbd.open are open.  If one is dropped meanwhile, the last of
# its files closes it, whatever the order in which a garbage collector finalizes them.
_held: dict[Any, set[object]] = {}
_dropped: set[Any] = set()


class Handle:
    """The part of nbd.NBD that is written by hand: how it begins, and how it ends."""

    #: The shim's handle.  The shim takes a null pointer for a closed handle.  It is one where
    #: __init__ failed, or was not called.
    _h: Any = ffi.NULL

    def __init__(self) -> None:
        """Make a handle that is not connected to a server yet.

        Raises:
            MemoryError: There is no memory for a handle.

        C: nbd_create, since libnbd 1.0.
        """
        if self._h:  # __init__ was called before
            _close_quietly(self._h)
        if not IS_CPYTHON:
            pypy.collect_dropped(_open)
        made = nbdshim_create()
        if not made:
            raise MemoryError("no memory for a handle")
        # Closing does not free the memory of the shim's handle: as long as the cdata lives, a call
        # may be made with it.
        self._h = made = owned(made, nbdshim_destroy)
        _open.add(made)

    def close(self) -> None:
        """Close the handle and its connection at once.

        Commands in flight are dropped, a server started by connect_command is
        waited for, and the callables and buffers that libnbd held are let go.
        For an orderly end call shutdown first.  A handle that is no longer
        referred to is closed by itself, and `with nbd.NBD() as h:` closes it at
        the end of the block.

        Raises:
            nbd.ClosedHandle: The handle is closed already.

        Example:
            >>> h.close()
            >>> try:
            ...     h.get_size()
            ... except nbd.ClosedHandle:
            ...     print("closed")
            closed

        C: nbd_close, since libnbd 1.0.
        """
        result = nbdshim_close(self._h)
        if result == 0:
            _open.discard(self._h)
        if result < 0:
            raise failure_of(self._h, result, "close")
        if pending:
            raise_pending(self._h)

    def settimeout(self, seconds: float | None) -> None:
        """Bound how long each later call on this handle may wait.

        It is for every call that waits for the server: connect_*, opt_*, pread,
        flush, poll, shutdown and so on. A call raises nbd.Timeout when its time
        is over. The time of a connect is that of the whole handshake. What
        libnbd itself cannot end goes on: the look-up of a host's name in
        connect_tcp and connect_uri, the wait for the end of a server's process
        in close, and a shutdown that abandons commands in flight.

        A command that was sent cannot be taken back: a write that was stopped
        may have happened, wholly or in part. Its answer is dropped when it
        comes, and the handle can be used as before. A call that overlaps a
        write, zero or trim that was stopped is sent after that one's answer.
        After 64 such commands, or 64 MiB, the next one waits for an answer
        first. A connect that was stopped goes on: the next call that waits
        finishes it first.

        Args:
            seconds: More than 0; None, as at the beginning, is for ever.

        Raises:
            ValueError: seconds is 0, negative or NaN.
            nbd.ClosedHandle: The handle is closed.

        Example:
            >>> h.settimeout(2.5)
            >>> h.gettimeout()
            2.5

        See also: gettimeout, nbd.Timeout.
        """
        try:
            limit = 0.0 if seconds is None else as_seconds("seconds", seconds)
        except BaseException as raised:
            raise explained(self._h, raised)  # noqa: B904 - explained has set the context
        result = lib.nbdshim_set_timeout(self._h, limit)
        if result < 0:
            raise failure_of(self._h, result, "settimeout")

    def gettimeout(self) -> float | None:
        """Return how many seconds a call on this handle may wait.

        Returns:
            The number that settimeout was given, as a float; None if there is
            no bound, as at the beginning.

        Raises:
            nbd.ClosedHandle: The handle is closed.

        See also: settimeout.
        """
        limit: float = lib.nbdshim_timeout(self._h)
        if limit < 0:
            raise failure_of(self._h, int(limit), "gettimeout")
        return limit or None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _close_quietly(self._h)
        if pending:  # what the handler of a signal has raised meanwhile
            raise_pending(self._h)

    def __del__(self) -> None:
        if _is_exiting and is_finalizing():  # too late for callbacks: Python has ended
            lib.nbdshim_end_upcalls()
        if self._h in _held:
            _dropped.add(self._h)
        else:
            _close_quietly(self._h)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a handle is a connection of this process: it cannot be copied or pickled; "
            "make another with nbd.NBD() and connect it"
        )


def hold(h: Any, user: object) -> None:
    """Have a handle of the shim stay open if its object is dropped, until its users let it go."""
    _held.setdefault(h, set()).add(user)


def let_go(h: Any, user: object) -> None:
    """Undo a `hold`, if there is one; the last user closes a handle that was dropped."""
    users = _held.get(h, set())
    users.discard(user)
    if not users:
        _held.pop(h, None)
        if h in _dropped:
            _close_quietly(h)
            _dropped.discard(h)


def _close_quietly(h: Any) -> None:
    """Close a handle of the shim unless it is closed."""
    if nbdshim_close(h) == 0:
        _open.discard(h)
    if pending:
        report_pending(h)


@atexit.register
def _close_all() -> None:
    global _is_exiting
    _is_exiting = True
    end_other_threads()
    for h in list(_open):
        _close_quietly(h)
