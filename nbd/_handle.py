# SPDX-License-Identifier: LGPL-2.0-or-later
"""The life of a handle: made, closed once, and closed at the latest when the process ends."""

from __future__ import annotations

import atexit
import os
from sys import is_finalizing

from nbd._callbacks import end_other_threads, pending, report_pending, settle
from nbd._ffi import IS_CPYTHON, ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, NoReturn, TypeVar

    Self = TypeVar("Self", bound="Handle")

# Looked up once, as the calls of nbd.methods are.
nbdshim_create = lib.nbdshim_create
nbdshim_close = lib.nbdshim_close
nbdshim_destroy = lib.nbdshim_destroy

# The open handles of the shim: PyPy runs no destructors at exit.
_open: set[Any] = set()
_is_exiting = False

#: PyPy finds out late what was dropped.  When so many handles more are open than after the last
#: collection, it is asked to look: each has some KiB of memory and, connected, two descriptors.
_MOST_DROPPED = 128
_collect_at = 8


class Handle:
    """What nbd.NBD is besides libnbd's calls: its beginning and its end."""

    #: The shim's handle.  A null pointer is like a closed one: __init__ failed, or was not called.
    _h: Any = ffi.NULL

    def __init__(self) -> None:
        """Make a handle that is not connected to a server yet.

        Raises:
            MemoryError: There is no memory for a handle.

        C: nbd_create, since libnbd 1.0.
        """
        if self._h:  # of an earlier call
            _close_quietly(self._h)
        if not IS_CPYTHON and len(_open) >= _collect_at:
            _collect_dropped()
        made = nbdshim_create()
        if not made:
            raise MemoryError("no memory for a handle")
        # The memory of the shim's handle goes with the last name for it, and not when it is closed.
        self._h = made = _owned(made)
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
        if _is_exiting and is_finalizing():  # there is no Python any more for callbacks to run in
            lib.nbdshim_end_upcalls()
        _close_quietly(self._h)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a handle is a connection of this process: it cannot be copied or pickled; "
            "make another with nbd.NBD() and connect it"
        )


def _close_quietly(h: Any) -> None:
    """Close a handle of the shim unless it is closed."""
    if nbdshim_close(h) == 0:
        _open.discard(h)
    if pending:
        report_pending(h)


if IS_CPYTHON:
    from _weakref import ref  # which takes a fraction of the time of weakref

    # The handles of the shim by weak references to the cdata by which Python names them, and the
    # references whose cdata is gone.  It is list.append that learns of it: that runs no bytecode,
    # at which the exception of a signal handler would be lost.
    _named: dict[ref[Any], Any] = {}
    _gone: list[ref[Any]] = []
    _pointer = ffi.typeof("struct nbdshim *")

    def _owned(made: Any) -> Any:
        """Free handles whose cdata is gone, and have this one freed so by a later call.

        Not by ffi.gc: of a garbage cycle CPython may finalize that cdata before others that use it.
        A cdata without a finalizer is no part of a cycle, and goes when nothing refers to it.
        """
        while _gone:
            try:
                nbdshim_destroy(_named.pop(_gone.pop()))
            except IndexError:  # another thread has it
                break
        _named[ref(made, _gone.append)] = ffi.cast(_pointer, made)
        return made

else:

    def _owned(made: Any) -> Any:
        """Have the memory of a handle freed when the cdata is gone that names it."""
        return ffi.gc(made, nbdshim_destroy)


def _collect_dropped() -> None:
    """Collect garbage, so that the handles are closed that nobody has any more."""
    global _collect_at
    import gc

    gc.collect()
    descriptors = os.sysconf("SC_OPEN_MAX")  # -1 if there is no bound
    few = descriptors // 8 if descriptors > 0 else _MOST_DROPPED
    _collect_at = len(_open) + max(1, min(_MOST_DROPPED, few))


@atexit.register
def _close_all() -> None:
    global _is_exiting
    _is_exiting = True
    end_other_threads()
    for h in list(_open):
        _close_quietly(h)
