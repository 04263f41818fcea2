# SPDX-License-Identifier: LGPL-2.0-or-later
"""Connections that the caller provides: a callable that makes them, or a list of handles."""

from __future__ import annotations

import errno
import signal
from contextlib import suppress
from weakref import ref

from nbd._binding.constants import SIZE_MAXIMUM, SIZE_MINIMUM
from nbd._binding.errors import ClosedHandle, Error
from nbd._binding.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Union

    from nbd._disks.connect import Uri

    # What nbd.open takes.
    Source = Union[Uri, NBD, Sequence[NBD], Callable[[], NBD]]

#: Objects with one of these attributes are files or paths, even if they can be called.
_OF_FILES = ("read", "write", "__fspath__")


class Maker:
    """A callable of the caller that makes connected handles, which are ours to close.

    Args:
        name: What messages call it: the caller's argument.
        function: The callable.
        given: The shim's handles that are in use; those that this callable makes are added.  The
            caller's objects may refer to anything, so they are not kept.
    """

    def __init__(self, name: str, function: Callable[[], object], given: list[Any]) -> None:
        self._name = name
        self._function = function
        self._given = given

    def first(self) -> NBD:
        """Make the first connection; what the callable raises passes through.

        Raises:
            TypeError: The callable returns something other than a handle.
            ValueError: It returns a handle that is closed, or that it has returned before.
            nbd.Error: It returns a handle that is not connected.
        """
        return self.checked(self.call())

    def call(self) -> object:
        """Call the callable; its result has to be checked."""
        return self._function()

    def checked(self, made: object) -> NBD:
        """Return what the callable has made, or raise as `first` does."""
        if not isinstance(made, NBD):
            raise self._type_error(made)
        if made._h in self._given:  # it stays open: its first owner closes it
            raise ValueError(
                f"{self._name}: the callable has returned a handle that is in use already; it has "
                "to make a new connection at each call"
            )
        self._given.append(made._h)
        try:
            check_connected(f"{self._name}: what the callable has returned", made)
        except BaseException:
            made.__exit__(None, None, None)
            self.forget(made)
            raise
        return made

    def forget(self, handle: NBD) -> None:
        """Drop the reference to what this callable has made, and what is closed now."""
        with suppress(ValueError):  # it is not in use any more
            self._given.remove(handle._h)

    def _type_error(self, made: object) -> TypeError:
        kind = type(made).__name__
        needed = "it has to return a connected nbd.NBD, as nbd.connect does"
        if hasattr(type(made), "__await__"):
            if hasattr(made, "close"):
                made.close()  # a coroutine: else Python warns that nothing has awaited it
            needed = f"a coroutine function cannot be used here; {needed}"
        return TypeError(f"{self._name}: the callable has returned {kind}: {needed}")


class WeakMaker:
    """A Maker for what lives longer than the program needs it, and so may not keep its callable.

    Args:
        maker: The Maker, to which something else has to refer.
    """

    def __init__(self, maker: Maker) -> None:
        self._maker = ref(maker)

    def call(self) -> object:
        """Call the callable, as a Maker does.

        Raises:
            nbd.Error: The Maker is gone (ECANCELED).
        """
        return self._strong().call()

    def checked(self, made: object) -> NBD:
        """Check its result, as a Maker does."""
        return self._strong().checked(made)

    def forget(self, handle: NBD) -> None:
        """Drop the reference to what the callable has made, as a Maker does."""
        self._strong().forget(handle)

    def _strong(self) -> Maker:
        maker = self._maker()
        if maker is None:
            raise Error("the disk was dropped", errno.ECANCELED)
        return maker


def is_maker(what: Any) -> bool:
    """Whether `what` is a callable that makes connections; a file or a path is not."""
    return callable(what) and not any(hasattr(what, name) for name in _OF_FILES)


def listed(name: str, what: object) -> list[NBD] | None:
    """Return the caller's handles if `what` is a list or tuple of them; None for anything else.

    Raises:
        TypeError: Only some of its items are handles.
        ValueError: A handle is closed or is given twice, or the exports differ.
        nbd.Error: A handle is not connected.
    """
    if not isinstance(what, (list, tuple)) or not any(isinstance(one, NBD) for one in what):
        return None
    for index, one in enumerate(what):
        if not isinstance(one, NBD):
            raise TypeError(
                f"{name}[{index}]: nbd.NBD is needed, not {type(one).__name__}: a list is either "
                "of connected handles or of the words of a command"
            )
        if any(one._h == other._h for other in what[:index]):
            raise ValueError(f"{name}[{index}]: the same handle is given twice")
        check_connected(f"{name}[{index}]", one)
        if export_of(one) != export_of(what[0]):
            raise ValueError(
                f"{name}[{index}]: it is connected to another export than {name}[0]: their names, "
                "sizes, block sizes or permissions differ"
            )
    return list(what)


def check_connected(name: str, handle: NBD) -> None:
    """Raise if a handle is not connected.

    Raises:
        nbd.Error: It is not connected (ENOTCONN).
        nbd.ClosedHandle: It is closed.
    """
    try:
        is_connected = handle.aio_is_ready() or handle.aio_is_processing()
    except ClosedHandle:
        raise ClosedHandle(f"{name}: the handle is closed") from None
    if not is_connected:
        raise Error(f"{name}: the handle is not connected; use nbd.connect", errno.ENOTCONN)


def check_can_share(name: str, handles: list[NBD]) -> None:
    """Refuse to write over several connections if the server does not allow that.

    Without NBD's promise of multi-conn, a flush need not include the writes of other connections.
    """
    if len(handles) > 1 and not handles[0].can_multi_conn():
        raise ValueError(
            f"{name}: the server does not allow several connections to write "
            "(nbd.NBD.can_multi_conn); pass one handle"
        )


def export_of(handle: NBD) -> tuple[object, ...]:
    """What all connections to one export have in common."""
    sizes = (handle.get_block_size(which) for which in (SIZE_MINIMUM, SIZE_MAXIMUM))
    return handle.get_export_name(), handle.is_read_only(), handle.get_size(), *sizes


def can_have_more(handle: NBD) -> bool:
    """Whether further connections to the disk of a handle can be made in the same way."""
    return bool(handle.can_multi_conn()) and not has_process(handle)


def has_process(handle: NBD) -> bool:
    """Whether a handle has started its server, so that another one would have another server.

    libnbd 1.14 reports that only by the failure of kill_subprocess.  The signal has no effect.
    """
    try:
        handle.kill_subprocess(signal.SIGURG)
    except Error:
        return False
    return True


def name_of_made(handle: NBD, function: object) -> str:
    """What messages call a disk that a callable has connected: its URI if it has one."""
    try:
        return str(handle.get_uri())
    except Error:  # it is connected to a process, or to a socket of the program
        return repr(function)
