# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.connect: make a handle and connect it, even if the server is still starting.

close_all, begin_shutdown and finish_shutdown are the end of what connect begins.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import wraps
from time import monotonic, sleep
from urllib.parse import quote, unquote

from nbd._binding.constants import CONTEXT_BASE_ALLOCATION
from nbd._binding.convert import as_seconds
from nbd._binding.errors import ClosedHandle, Error
from nbd._binding.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Union

    Uri = Union[str, list[str], tuple[str, ...]]

#: Closing waits at most this many seconds for outstanding replies, and as long again for the server
#: to shut down all connections.
CLOSE_TIMEOUT = 1.0
#: Errnos of a connection attempt while the server is not listening yet.
NOT_LISTENING = (errno.ECONNREFUSED, errno.ENOENT)
#: What libnbd says to call for a URI with tls-certificates or tls-psk-file.
_LOCAL_FILE = "set_uri_allow_local_file"
#: What the caller of nbd.connect, or of a function without the argument `prepare`, has to type.
TO_PREPARE = f"pass prepare=lambda h: h.{_LOCAL_FILE}(True)"
TO_CALL = (
    f"replace it by functools.partial(nbd.connect, uri, prepare=lambda h: h.{_LOCAL_FILE}(True))"
)
#: Seconds between two attempts to connect.
_MIN_RETRY_INTERVAL, _MAX_RETRY_INTERVAL = 0.01, 0.25


def connect(
    uri: Uri,
    *,
    timeout: float | None = None,
    retry_for: float | None = None,
    contexts: Iterable[str] = (CONTEXT_BASE_ALLOCATION,),
    prepare: Callable[[NBD], object] | None = None,
) -> NBD:
    """Make a handle and connect it.

    Args:
        uri: The URI of a server; or the command line of a server, as a list of str.  The command is
            started, and NBD is spoken over its standard input and output, as with `nbdkit -s`.
        timeout: How many seconds each call on the handle may wait, including this one.  None waits
            for ever.  See nbd.NBD.settimeout.
        retry_for: How many seconds to keep trying while the server is not listening: while
            connections are refused, or its Unix socket does not exist.  None tries once.
        contexts: The meta contexts to negotiate.  nbd.extents needs base:allocation.
        prepare: Called with each new handle before it is connected, for instance to set up TLS or
            an export name.  The URI must not contradict what it sets.

    Returns:
        The connected handle, which the caller closes.

    Raises:
        nbd.Error: The server cannot be reached, or it refuses the connection.
        nbd.Timeout: The server does not answer in time.
        ValueError: The URI contradicts the export name or the TLS settings that prepare has set.

    Example:
        >>> with nbd.connect(["nbdkit", "-s", "memory", "1M"], timeout=10) as disk:
        ...     disk.get_size()
        1048576

    C: nbd_connect_uri or nbd_connect_command, nbd_add_meta_context.
    """
    names = context_names(contexts)
    intervals = retry_intervals(0 if retry_for is None else as_seconds("retry_for", retry_for))
    while True:
        try:
            return _connected(uri, timeout, names, prepare)
        except Error as reason:
            interval = next(intervals, None) if reason.errnum in NOT_LISTENING else None
            if interval is None:
                advise(reason)
                raise
        _rest(interval)


def connect_uri(uri: Uri, *, timeout: float | None, retry_for: float | None = None) -> NBD:
    """nbd.connect for nbd.open and nbd.copy, which have no argument `prepare`."""
    try:
        return connect(uri, timeout=timeout, retry_for=retry_for)
    except Error as reason:
        advise(reason, TO_CALL)
        raise


def advise(refused: Error, advice: str = TO_PREPARE) -> None:
    """Raise a better exception for a connection that failed because libnbd forbids its URI.

    libnbd names a function of C, which a caller who has no handle cannot call.

    Args:
        refused: The exception of the call; if the reason was another one, nothing is raised.
        advice: What to type: TO_PREPARE or TO_CALL.
    """
    if refused.errnum == errno.EPERM and _LOCAL_FILE in refused.string:
        method = refused.string.partition(":")[0]
        raise Error(
            f"{method}: the URI names local files, which libnbd reads only if the handle allows "
            f"it; if you trust the URI, {advice}",
            errno.EPERM,
        ) from None


def context_names(contexts: Iterable[str]) -> list[str]:
    """Return the meta contexts as a list; a single str is refused, as it would give its letters."""
    if isinstance(contexts, (str, bytes)):
        raise TypeError(f"contexts: a list of str is needed, not {type(contexts).__name__}")
    return list(contexts)


def _connected(
    uri: Uri,
    timeout: float | None,
    contexts: list[str],
    prepare: Callable[[NBD], object] | None,
) -> NBD:
    """Make one attempt, with a new handle: one that failed to connect cannot be used again."""
    handle, uri = prepared(uri, contexts, prepare)
    try:
        if timeout is not None:  # else the timeout that `prepare` may have set stays
            handle.settimeout(timeout)
        if isinstance(uri, (list, tuple)):
            handle.connect_command(list(uri))
        else:
            handle.connect_uri(uri)
    except BaseException:
        handle.__exit__(None, None, None)
        raise
    return handle


def prepared(
    uri: Uri, contexts: list[str], prepare: Callable[[NBD], object] | None
) -> tuple[NBD, Uri]:
    """Return a handle that is ready to be connected, and the URI to connect it to."""
    handle = NBD()
    try:
        for context in contexts:
            handle.add_meta_context(context)
        noted = {} if prepare is None else _prepare_and_note(handle, prepare)
        if isinstance(uri, str):
            uri = agreed(uri, handle.get_export_name(), noted)
        return handle, uri
    except BaseException:
        handle.__exit__(None, None, None)
        raise


class _Noting(NBD):
    """A handle during `prepare`: it records TLS settings, which libnbd cannot return."""

    _noted: dict[str, object]


def _noting(name: str) -> Callable[..., None]:
    setter = getattr(NBD, name)

    def note(self: _Noting, *args: object, **kwargs: object) -> None:
        setter(self, *args, **kwargs)
        self._noted[name] = (*args, *kwargs.values())[0]

    return wraps(setter)(note)


for _name in [name for name in dir(NBD) if name.startswith("set_tls_")]:
    setattr(_Noting, _name, _noting(_name))


def _prepare_and_note(handle: NBD, prepare: Callable[[NBD], object]) -> dict[str, object]:
    """Let the caller prepare a handle; returns the TLS settings it made, by the method's name."""
    noted: dict[str, object] = {}
    handle.__class__ = _Noting
    handle._noted = noted  # type: ignore[attr-defined] # an attribute of _Noting
    try:
        prepare(handle)
    finally:
        handle.__class__ = NBD
        del handle._noted  # type: ignore[attr-defined]
    return noted


def agreed(uri: str, name: str, tls: dict[str, object]) -> str:
    """Return the URI with the export name that was set on the handle.

    Without a name in the URI, libnbd would replace the one that was set.

    Args:
        uri: The caller's URI.  Its scheme may have capital letters, which libnbd does not accept.
        name: The export name that was set, or the empty string.
        tls: The value that was given to each set_tls_X that was called.

    Raises:
        ValueError: The URI contradicts a setting, or has a part that libnbd ignores.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark or not scheme.lower().startswith("nbd"):
        return uri  # libnbd raises an error that says what is wrong
    if "#" in rest:
        raise ValueError("uri: libnbd ignores what follows '#'; write %23 for a '#' in a name")
    rest, question, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    for item in query.replace(";", "&").split("&"):
        key = unquote(item.partition("=")[0])
        if "set_" + key.replace("-", "_") in tls:
            raise _contradiction(f"{key}=", f"set_{key.replace('-', '_')}")
    user, at, _ = authority.rpartition("@")
    if at and tls.get("set_tls_username", unquote(user)) != unquote(user):
        raise _contradiction(f"the user name {unquote(user)!r}", "set_tls_username")
    if name and not path:
        slash, path = "/", quote(name, safe="", errors="surrogateescape")
    elif name and unquote(path, errors="surrogateescape") != name:
        its = unquote(path, errors="surrogateescape")
        raise _contradiction(f"the export name {its!r}", f"set_export_name({name!r})")
    return f"{scheme.lower()}://{authority}{slash}{path}{question}{query}"


def _contradiction(what: str, call: str) -> ValueError:
    return ValueError(
        f"uri: it has {what}, and prepare has called {call}: leave out one of the two"
    )


def retry_intervals(retry_for: float) -> Iterator[float]:
    """Yield the seconds to wait before each further attempt, until `retry_for` seconds are over."""
    return _intervals_until(monotonic() + retry_for)


def _intervals_until(until: float) -> Iterator[float]:
    interval = _MIN_RETRY_INTERVAL
    while monotonic() < until:
        yield min(interval, max(0.0, until - monotonic()))
        interval = min(2 * interval, _MAX_RETRY_INTERVAL)


def _rest(seconds: float) -> None:
    """Wait between two attempts; tests replace this."""
    sleep(seconds)


def close_all(handles: Iterable[NBD]) -> None:
    """Close handles."""
    for handle in handles:
        handle.__exit__(None, None, None)


def begin_shutdown(handles: Iterable[NBD]) -> None:
    """Ask the server to end connections, without waiting for it."""
    for handle in handles:
        with suppress(Error, ClosedHandle):  # the connection has ended already
            handle.aio_disconnect()


def finish_shutdown(handles: Iterable[NBD], until: float) -> None:
    """Wait until the server has ended connections, but no longer than time.monotonic() `until`."""
    for handle in handles:
        with suppress(Error, ClosedHandle):
            handle.settimeout(max(0.001, until - monotonic()))
            handle.shutdown()
