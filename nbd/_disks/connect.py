# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.connect: a connected handle, also of a server that is still starting."""

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

#: How many seconds a server gets to send its outstanding replies, and as many again to shut down
#: the connections.
CLOSE_TIMEOUT = 1.0
#: With these a connection fails while the server does not listen yet.
NOT_LISTENING = (errno.ECONNREFUSED, errno.ENOENT)
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
        uri: The URI of a server; or the command line of one, as a list of str, which is started and
            spoken to over its standard input and output, as `nbdkit -s` does.
        timeout: How many seconds each call on the handle may wait, this one first; None is for
            ever.  See nbd.NBD.settimeout.
        retry_for: How many seconds to go on trying while the server is not there yet: while
            connections are refused, or its Unix socket does not exist.  None tries once.
        contexts: The meta contexts to ask for; base:allocation is what nbd.extents needs.
        prepare: Called with each new handle before it is connected: for TLS, for an export name.
            What it sets counts: a URI may not say something else.

    Returns:
        The connected handle, which the caller closes.

    Raises:
        nbd.Error: The server cannot be reached, or refuses.
        nbd.Timeout: The server does not answer.
        ValueError: prepare has set an export name, or something of TLS, and the URI has another.

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
                raise
        _rest(interval)


def context_names(contexts: Iterable[str]) -> list[str]:
    """The meta contexts to ask for; a str alone is refused, as it would be its letters."""
    if isinstance(contexts, (str, bytes)):
        raise TypeError(f"contexts: a list of str is needed, not {type(contexts).__name__}")
    return list(contexts)


def _connected(
    uri: Uri,
    timeout: float | None,
    contexts: list[str],
    prepare: Callable[[NBD], object] | None,
) -> NBD:
    """One try, with a handle of its own: one that has failed cannot be used again."""
    handle, uri = prepared(uri, contexts, prepare)
    try:
        if timeout is not None:  # else what `prepare` has set stays
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
    """A handle that is ready to be connected, and the URI to connect it to."""
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
    """A handle while `prepare` has it: libnbd cannot tell what was set of TLS, so it is noted."""

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
    """Let the caller prepare a handle; returns what was set of TLS, by the method's name."""
    noted: dict[str, object] = {}
    handle.__class__ = _Noting
    handle._noted = noted  # type: ignore[attr-defined] # it is one of _Noting
    try:
        prepare(handle)
    finally:
        handle.__class__ = NBD
        del handle._noted  # type: ignore[attr-defined]
    return noted


def agreed(uri: str, name: str, tls: dict[str, object]) -> str:
    """The URI with the export name that was set on the handle, which libnbd would replace.

    Args:
        uri: As the caller has it.  Its scheme may have capital letters, which libnbd does not know.
        name: The export name that was set, or the empty string.
        tls: The value of each set_tls_X that was called.

    Raises:
        ValueError: The URI has something else than what was set; or a part that libnbd ignores.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark or not scheme.lower().startswith("nbd"):
        return uri  # libnbd says what is wrong with it
    if "#" in rest:
        raise ValueError("uri: what follows '#' would be ignored; write %23 if a name has it")
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
