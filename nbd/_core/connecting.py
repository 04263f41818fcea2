# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.connect: a connected handle, also of a server that is still starting."""

from __future__ import annotations

import errno
from time import monotonic, sleep

from nbd._core.constants import CONTEXT_BASE_ALLOCATION
from nbd._core.convert import as_seconds
from nbd._core.errors import Error
from nbd._core.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Between two tries, in seconds.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.25
#: What a connect fails with while the server does not listen yet.
NOT_THERE = (errno.ECONNREFUSED, errno.ENOENT)


def connect(
    uri: str | list[str] | tuple[str, ...],
    *,
    timeout: float | None = None,
    retry_for: float | None = None,
    contexts: Iterable[str] = (CONTEXT_BASE_ALLOCATION,),
    prepare: Callable[[NBD], object] | None = None,
) -> NBD:
    """Make a handle and connect it.

    Args:
        uri: The URI of a server; or the command line of one, as a list of str, which is started and
            spoken to over its standard input and output, as `nbdkit -s` does.
        timeout: How many seconds each call on the handle may wait, this one first; None is for
            ever.  See nbd.NBD.settimeout.
        retry_for: How many seconds to go on trying while the server is not there yet: while
            connections are refused, or its Unix socket does not exist.  None tries once.
        contexts: The meta contexts to ask for; base:allocation is what nbd.extents needs.
        prepare: Called with each new handle before it is connected: for TLS, for an export name.

    Returns:
        The connected handle, which the caller closes.

    Raises:
        nbd.Error: The server cannot be reached, or refuses.
        nbd.Timeout: The server does not answer.

    Example:
        >>> with nbd.connect(["nbdkit", "-s", "memory", "1M"], timeout=10) as disk:
        ...     disk.get_size()
        1048576

    C: nbd_connect_uri or nbd_connect_command, nbd_add_meta_context.
    """
    names = context_names(contexts)
    tried_until = monotonic() + (0 if retry_for is None else as_seconds("retry_for", retry_for))
    pause = SHORTEST_PAUSE
    while True:
        try:
            return _connected(uri, timeout, names, prepare)
        except Error as reason:
            if reason.errnum not in NOT_THERE or monotonic() >= tried_until:
                raise
        _rest(min(pause, max(0.0, tried_until - monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE)


def context_names(contexts: Iterable[str]) -> list[str]:
    """The meta contexts to ask for; a str alone is refused, as it would be its letters."""
    if isinstance(contexts, (str, bytes)):
        raise TypeError(f"contexts: a list of str is needed, not {type(contexts).__name__}")
    return list(contexts)


def _connected(
    uri: str | list[str] | tuple[str, ...],
    timeout: float | None,
    contexts: list[str],
    prepare: Callable[[NBD], object] | None,
) -> NBD:
    """One try, with a handle of its own: one that has failed cannot be used again."""
    handle = prepared(contexts, prepare)
    try:
        handle.settimeout(timeout)
        if isinstance(uri, (list, tuple)):
            handle.connect_command(list(uri))
        else:
            handle.connect_uri(uri)
    except BaseException:
        handle.__exit__(None, None, None)
        raise
    return handle


def prepared(contexts: list[str], prepare: Callable[[NBD], object] | None) -> NBD:
    """A handle that is ready to be connected."""
    handle = NBD()
    try:
        for context in contexts:
            handle.add_meta_context(context)
        if prepare is not None:
            prepare(handle)
    except BaseException:
        handle.__exit__(None, None, None)
        raise
    return handle


def _rest(seconds: float) -> None:
    """Pause between two tries."""
    sleep(seconds)
