# SPDX-License-Identifier: LGPL-2.0-or-later
"""How a handle is made, and how it is closed: once, and at exit at the latest."""

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

# Looked up once, like the functions in nbd._binding.methods.
nbdshim_create = lib.nbdshim_create
nbdshim_close = lib.nbdshim_close
nbdshim_destroy = lib.nbdshim_destroy

# The shim's handles that are open.  They are closed at exit, where PyPy runs no destructors.
_open: set[Any] = set()
_is_exiting = False

# The shim's handles that open files of nbd.open use, with those files.  If a handle's object is
# dropped, the last file closes the handle, in whichever order garbage collection finalizes them.
_held: dict[Any, set[object]] = {}
_dropped: set[Any] = set()


class Handle:
    """The part of nbd.NBD that is written by hand: making and closing a handle, and its timeout."""

    #: The shim's handle.  It is a null pointer, which the shim takes for a closed handle, if
    #: __init__ failed or was not called.
    _h: Any = ffi.NULL

    def __init__(self) -> None:
        """Make a handle that is not connected to a server yet.

        Raises:
            MemoryError: libnbd cannot allocate a handle.

        C: nbd_create, since libnbd 1.0.
        """
        if self._h:  # __init__ was called before
            _close_quietly(self._h)
        if not IS_CPYTHON:
            pypy.collect_dropped(_open)
        made = nbdshim_create()
        if not made:
            raise MemoryError("no memory for a handle")
        # Closing does not free the memory of the shim's handle: a call can be made with it as long
        # as its cdata lives.
        self._h = made = owned(made, nbdshim_destroy)
        _open.add(made)

    def close(self) -> None:
        """Close the handle and its connection at once.

        This drops commands in flight, waits for a server that connect_command
        started, and releases the callables and buffers that libnbd held. For
        an orderly end, call shutdown first. A handle that nothing refers to is
        closed automatically, and `with nbd.NBD() as h:` closes it at the end of
        the block.

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
        """Set the timeout of each later call on this handle.

        It applies to every call that waits for the server: connect_*, opt_*,
        pread, flush, poll, shutdown and so on. A call that exceeds it raises
        nbd.Timeout. For a connect it covers the whole handshake. The timeout
        does not end what libnbd itself cannot stop: looking up a host name in
        connect_tcp and connect_uri, waiting in close for the server's process
        to exit, and a shutdown that abandons commands in flight.

        NBD cannot cancel a command: a write that was stopped may still happen,
        wholly or in part. Its reply is dropped when it arrives, and the handle
        remains usable. A call that overlaps a write, zero or trim that was
        stopped is sent after the reply to that one. Once 64 such commands, or
        64 MiB, have no reply yet, the next call waits for one first. A connect
        that was stopped continues: the next call that waits finishes it first.

        Args:
            seconds: More than 0; None, the default, means no timeout.

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
        """Return the timeout of calls on this handle, in seconds.

        Returns:
            The number passed to settimeout, as a float; None, the default, if
            calls have no timeout.

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
        if pending:  # a signal handler may have raised meanwhile
            raise_pending(self._h)

    def __del__(self) -> None:
        if lib is None:
            # Python has cleared this module: without the GIL it may do so before it finalizes the
            # last objects.  _close_all has closed the handles that were open.
            return
        if _is_exiting and is_finalizing():  # Python has ended, so no callback can run
            lib.nbdshim_end_upcalls()
        _dropped.add(self._h)  # before the check, as the last user does these two in reverse order
        _close_dropped(self._h)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a handle is a connection of this process, so it cannot be copied or pickled; "
            "make another one with nbd.NBD() and connect it"
        )


# A finalizer calls let_go, and may run in the midst of these functions.  So they take no lock; the
# order of their steps makes them safe beside other threads.


def hold(h: Any, user: object) -> None:
    """Keep a handle of the shim open, even if its object is dropped, until `let_go`."""
    _held.setdefault(h, set()).add(user)


def let_go(h: Any, user: object) -> None:
    """Undo `hold`, if it was called; the last user closes a handle whose object was dropped."""
    users = _held.get(h, set())
    users.discard(user)
    if users:
        return
    # `hold` may have added a user to this set after the check: then it is used further.
    for late in list(_held.pop(h, ())):
        hold(h, late)
    _close_dropped(h)


def _close_dropped(h: Any) -> None:
    """Close a handle whose object was dropped, unless a file uses it."""
    if h in _dropped and h not in _held:
        _close_quietly(h)
        _dropped.discard(h)


def _close_quietly(h: Any) -> None:
    """Close a handle of the shim; a closed one is left alone."""
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
