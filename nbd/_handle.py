# SPDX-License-Identifier: LGPL-2.0-or-later
"""The life of a handle: made, closed once, and closed at the latest when the process ends."""

from __future__ import annotations

import atexit

from nbd._callbacks import last_error, report_pending, settle
from nbd._ffi import ffi, lib, pending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, NoReturn, TypeVar

    Self = TypeVar("Self", bound="Handle")

# The open handles of the shim, by id: PyPy runs no destructors at exit.
_open: dict[int, Any] = {}


class Handle:
    """What nbd.NBD is besides libnbd's calls: its beginning and its end."""

    _h: Any = None

    def __init__(self) -> None:
        """Make a handle that is not connected to a server yet.

        Raises:
            nbd.Error: libnbd has no memory or no file descriptor left.

        C: nbd_create, since libnbd 1.0.
        """
        made = lib.nbdshim_create()
        if not made:
            raise last_error()
        self._h = ffi.gc(made, lib.nbdshim_destroy)
        _open[id(self._h)] = self._h

    def close(self) -> None:
        """Close the handle and its connection at once.

        Commands in flight are dropped, a server started by connect_command is waited for, and the
        callables and buffers that libnbd held are let go.  For an orderly end call shutdown first.
        A handle that is no longer referred to is closed by itself, and `with nbd.NBD() as h:`
        closes it at the end of the block.

        Raises:
            nbd.ClosedHandle: The handle is closed already.

        Example:
            >>> h.close()
            >>> h.get_size()
            Traceback (most recent call last):
                ...
            nbd.ClosedHandle: the handle is closed; make a new one with nbd.NBD()

        C: nbd_close, since libnbd 1.0.
        """
        result = lib.nbdshim_close(self._h)
        if result == 0:
            _open.pop(id(self._h), None)
        if result < 0 or pending:
            settle(self._h, result)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _close_quietly(self._h)

    def __del__(self) -> None:
        if self._h is not None:
            _close_quietly(self._h)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a handle is a connection of this process: it cannot be copied or pickled; "
            "make another with nbd.NBD() and connect it"
        )


def _close_quietly(h: Any) -> None:
    """Close a handle of the shim unless it is closed."""
    if lib.nbdshim_close(h) == 0:
        _open.pop(id(h), None)
    if pending:
        report_pending(h)


@atexit.register
def _close_all() -> None:
    for h in list(_open.values()):
        _close_quietly(h)
