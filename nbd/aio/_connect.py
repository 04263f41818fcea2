# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.connect: make connections without blocking the event loop."""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
from functools import partial
from socket import SOCK_STREAM
from urllib.parse import urlsplit
from weakref import ref

from nbd._binding.constants import (
    AIO_DIRECTION_READ,
    AIO_DIRECTION_WRITE,
    CONTEXT_BASE_ALLOCATION,
    SIZE_MAXIMUM,
    SIZE_MINIMUM,
    SIZE_PREFERRED,
    TLS_DISABLE,
)
from nbd._binding.convert import as_number, as_seconds
from nbd._binding.errors import ClosedHandle, Error, failure_of, pending, raise_pending
from nbd._binding.methods import NBD
from nbd._binding.shim import lib
from nbd._disks.connect import (
    NOT_LISTENING,
    TO_PREPARE,
    advise,
    close_all,
    context_names,
    prepared,
    retry_intervals,
)
from nbd._disks.queue import MAX_CONNECTIONS, as_count, timeout_error
from nbd._disks.reconnect import FirstConnection, as_reconnect, check_can_reconnect
from nbd.aio._client import DELEGATED, Client, extended, limited
from nbd.aio._reconnect import Reconnection
from nbd.aio._threads import close_in_thread, in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable, Coroutine, Generator, Iterable
    from types import TracebackType
    from typing import Any, TypeVar

    from nbd._binding.errors import Timeout
    from nbd._disks.connect import Uri

    Result = TypeVar("Result")

_PORT = 10809
_SIZES = (SIZE_MINIMUM, SIZE_PREFERRED, SIZE_MAXIMUM)


def connect(
    uri: Uri,
    *,
    connections: int = 1,
    depth: int = 64,
    timeout: float | None = None,
    reconnect: float | None = None,
    retry_for: float | None = None,
    contexts: Iterable[str] = (CONTEXT_BASE_ALLOCATION,),
    prepare: Callable[[NBD], object] | None = None,
) -> Connecting:
    """Connect a disk: `async with nbd.aio.connect(uri) as disk`, or `disk = await ...`.

    Args:
        uri: A URI or a command line, as for nbd.connect.
        connections: How many connections to make, at most 64.  If the server does not allow several
            (nbd.NBD.can_multi_conn), only one is made.  The disk can be used as soon as the first
            is connected.  The others join when they are ready; one that fails is left out.
        depth: The maximum number of commands in flight; further callers wait in line.
        timeout: How many seconds each call may wait, including the connecting.  None waits for
            ever.
        reconnect: For how many seconds new connections are tried when one was lost, or when the
            first is refused or lost.  Meanwhile commands wait, at most for their timeout, and are
            then sent again.  Changes that the server had acknowledged and not flushed are made
            again, too: their data is kept, up to 64 MiB, and then flushed.  That is right only
            while no other client writes there.  If the server has no flush, what it has
            acknowledged counts as stored.  None does not reconnect.
        retry_for, contexts, prepare: As for nbd.connect.

    Returns:
        An object to await, or to use with `async with`, which gives an nbd.aio.Client.  When that
        client is closed, it can be used again.

    Raises:
        nbd.Error: The server cannot be reached, or it refuses the connection.
        nbd.Timeout: The server does not answer in time.
        RuntimeError: The returned object is used again while its last client is open.
        ValueError: A number is out of range; the URI contradicts the export name or the TLS
            settings that prepare has set; prepare has set the option mode; or a command line is
            given with reconnect.

    Example:
        >>> async def size_of(uri):
        ...     async with nbd.aio.connect(uri, timeout=10) as disk:
        ...         return disk.get_size()
        >>> asyncio.run(size_of(["nbdkit", "-s", "memory", "1M"]))
        1048576

    C: nbd_aio_connect_uri or nbd_aio_connect_command.
    """
    count = as_count("connections", connections, MAX_CONNECTIONS)
    seconds = as_reconnect(reconnect)
    if seconds is not None:
        check_can_reconnect("uri", uri)
    plan = Plan(
        uri,
        context_names(contexts),
        prepare,
        None if timeout is None else limited(as_seconds("timeout", timeout)),
        0.0 if retry_for is None else as_seconds("retry_for", retry_for),
        seconds,
    )
    return Connecting(plan, count, as_number("depth", depth))


class Connecting:
    """What nbd.aio.connect returns: await it, or use it with `async with`, to connect."""

    __module__ = "nbd.aio"

    def __init__(self, plan: Plan, connections: int, depth: int) -> None:
        self._plan = plan
        self._connections = connections
        self._depth = depth
        self._is_connecting = False
        self._entered: Client | None = None
        self._made: Callable[[], Client | None] = _nothing

    def __await__(self) -> Generator[Any, None, Client]:
        return self._client().__await__()

    async def __aenter__(self) -> Client:
        self._entered = await self._client()
        return self._entered

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            await entered.close()

    async def _client(self) -> Client:
        """Connect a client, one at a time: `async with` could close only the last of several."""
        last = self._made()
        if self._is_connecting or (last is not None and last._is_usable()):
            raise RuntimeError(
                "this nbd.aio.connect(...) is in use: close its client first, or call "
                "nbd.aio.connect again for a second one"
            )
        self._is_connecting = True
        try:
            client = await self._connected()
            self._made = ref(client)
        finally:
            self._is_connecting = False
        return client

    async def _connected(self) -> Client:
        plan = self._plan
        first = await connected(plan)
        try:
            reconnection = None if plan.reconnect is None else _reconnection(first, plan)
            client = Client([first], self._depth, plan.timeout, plan.is_command, reconnection)
        except BaseException:
            close_soon([first], plan)
            raise
        if self._connections > 1 and not plan.is_command and first.can_multi_conn():
            for _ in range(self._connections - 1):
                client._start_joining(_join(ref(client), plan))
        return client


def _nothing() -> None:
    return None


class Plan:
    """How to connect.

    Attributes:
        uri: A URI or a command line.
        is_command: Whether it is a command line.
        contexts: The names of meta contexts.
        prepare: The caller's function, or None.
        timeout: How many seconds one attempt may take, or None.
        retry_for: For how many seconds to retry.
        reconnect: For how many seconds to try to replace a lost connection, or None.
    """

    def __init__(
        self,
        uri: Uri,
        contexts: list[str],
        prepare: Callable[[NBD], object] | None,
        timeout: float | None,
        retry_for: float,
        reconnect: float | None = None,
    ) -> None:
        self.uri = uri
        self.is_command = isinstance(uri, (list, tuple))
        self.contexts = contexts
        self.prepare = prepare
        self.timeout = timeout
        self.retry_for = retry_for
        self.reconnect = reconnect


async def connected(plan: Plan, advice: str = TO_PREPARE) -> NBD:
    """Connect a handle, and retry as long as the plan allows; `advice` is for `advise`."""
    loop = asyncio.get_running_loop()
    intervals = retry_intervals(plan.retry_for)
    first = None if plan.reconnect is None else FirstConnection(plan.reconnect)
    while True:
        try:
            return await _Attempt(plan, loop).run()
        except Error as reason:
            interval = next(intervals, None) if reason.errnum in NOT_LISTENING else None
            if interval is None and first is not None:
                interval = first.next_pause(reason)
            if interval is None:
                advise(reason, advice)
                raise
        await asyncio.sleep(interval)


def _reconnection(first: NBD, plan: Plan) -> Reconnection:
    return Reconnection(
        plan.reconnect or 0.0,
        str(plan.uri),
        first,
        partial(_connected_within, plan),
        lambda handle: close_soon([handle], plan),
        DELEGATED,
    )


async def _connected_within(plan: Plan, seconds: float) -> NBD:
    """Make one attempt to connect, for at most `seconds`, and no longer than the timeout."""
    timeout = seconds if plan.timeout is None else min(seconds, plan.timeout)
    return await _Attempt(plan, asyncio.get_running_loop(), limited(timeout)).run()


async def _join(client: ref[Client], plan: Plan) -> None:
    """Make a further connection for a client, which works without it if that fails."""
    with suppress(Error, OSError):
        handle = await connected(plan)
        try:
            self = client()
            if self is not None and _is_same_export(self, handle, plan):
                self._join(handle)
                return
        except (ClosedHandle, ValueError):  # the client is closed, or it is another export
            pass
        except BaseException:
            close_soon([handle], plan)
            raise
        close_soon([handle], plan)


def _is_same_export(client: Client, other: NBD, plan: Plan) -> bool:
    """Return whether a connection seems to be to the same export as those of a client."""
    return _properties(client, plan) == _properties(other, plan)


def _properties(handle: NBD | Client, plan: Plan) -> list[int]:
    """Return what is the same for all connections to an export."""
    return [
        handle.get_size(),
        handle.is_read_only(),
        *map(handle.get_block_size, _SIZES),
        *map(handle.can_meta_context, plan.contexts),
    ]


def close_soon(handles: list[NBD], plan: Plan) -> None:
    """Close handles without blocking the loop: libnbd waits for a command's process to end."""
    if not plan.is_command:
        close_all(handles)
        return
    for handle in handles:
        close_in_thread(asyncio.get_running_loop(), handle, plan.timeout)


class _Attempt:
    """One attempt to connect, within a timeout; None is that of the plan."""

    def __init__(self, plan: Plan, loop: AbstractEventLoop, timeout: float | None = None) -> None:
        self._plan = plan
        self._loop = loop
        self._timeout = plan.timeout if timeout is None else timeout
        self._until = None if self._timeout is None else loop.time() + self._timeout

    async def run(self) -> NBD:
        handle, uri = self._new_handle()
        if isinstance(uri, (list, tuple)):
            return await self._connected(handle, "connect_command", list(uri))
        host = _host_to_look_up(uri)
        if host is None:
            return await self._connected(handle, "connect_uri", uri)
        if uri.startswith("nbds") or handle.get_tls() != TLS_DISABLE:
            # libnbd has to get the name, which it compares with the server's certificate.
            return await self._connected(handle, "connect_uri", uri, is_slow=True)
        handle.__exit__(None, None, None)
        *others, last = await self._look_up(*host)
        for address in others:
            with suppress(Error):
                return await self._connected_to(address)
        return await self._connected_to(last)

    def _new_handle(self) -> tuple[NBD, Uri]:
        """Return a new handle, as one that failed to connect cannot be used again, and its URI."""
        plan = self._plan
        handle, uri = prepared(plan.uri, plan.contexts, plan.prepare)
        if handle.get_opt_mode():
            handle.__exit__(None, None, None)
            raise ValueError(
                "prepare: it has called set_opt_mode, but nbd.aio negotiates by itself; "
                "leave that out, or use nbd.connect in a thread"
            )
        return handle, uri

    async def _look_up(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host; at least one."""
        try:
            found = await self._in_time(self._loop.getaddrinfo(host, port, type=SOCK_STREAM))
        except (OSError, UnicodeError) as reason:
            raise Error(f"nbd_aio_connect_uri: {host}: {reason}", 0) from None
        return list(dict.fromkeys(str(one[4][0]) for one in found))

    async def _connected_to(self, address: str) -> NBD:
        handle, uri = self._new_handle()
        return await self._connected(handle, "connect_uri", _with_host(str(uri), address))

    async def _connected(
        self, handle: NBD, method: str, argument: Any, is_slow: bool = False
    ) -> NBD:
        """Connect a handle; if it fails, the handle is closed."""
        begin = partial(getattr(handle, f"aio_{method}"), argument)
        try:
            if is_slow:
                await self._in_time(in_thread(self._loop, begin))
            else:
                begin()
            await self._finish(handle, f"aio_{method}")
        except BaseException:
            close_soon([handle], self._plan)
            raise
        return handle

    async def _finish(self, handle: NBD, method: str) -> None:
        """Let libnbd continue until the handle is connected."""
        while handle.aio_is_connecting():
            is_late = not await self._ready(handle)
            result = lib.nbdcall_poll(handle._h, 0)
            if result < 0:
                raise failure_of(handle._h, result, method)
            if pending:
                raise_pending(handle._h)
            if is_late and handle.aio_is_connecting():
                raise self._timeout_error()
        if not handle.aio_is_ready() and not handle.aio_is_negotiating():
            raise Error(f"nbd_{method}: the server has closed the connection", errno.ECONNRESET)

    async def _ready(self, handle: NBD) -> bool:
        """Wait until the socket is ready for libnbd; returns whether that was in time.

        libnbd may use another socket in its next step, so the loop stops watching this one.
        """
        fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
        ready: Future[None] = self._loop.create_future()
        timer = None if self._until is None else self._loop.call_at(self._until, _wake, ready)
        try:
            if direction & AIO_DIRECTION_READ:
                self._loop.add_reader(fd, _wake, ready)
            if direction & AIO_DIRECTION_WRITE:
                self._loop.add_writer(fd, _wake, ready)
            await ready
        finally:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            if timer is not None:
                timer.cancel()
        if self._until is None or self._timeout is None:
            return True
        now = self._loop.time()
        self._until = extended(self._until, now, self._timeout)
        return now < self._until

    async def _in_time(self, awaited: Future[Result] | Coroutine[Any, Any, Result]) -> Result:
        """Return the result of a future or coroutine; raise nbd.Timeout if it takes too long."""
        if self._until is None:
            return await awaited
        future = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait({future}, timeout=max(0.0, self._until - self._loop.time()))
            if not future.done():
                raise self._timeout_error()
            return future.result()
        finally:
            future.cancel()

    def _timeout_error(self) -> Timeout:
        return timeout_error("nbd.aio: the connection was not made within", self._timeout)


def _wake(ready: Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _host_to_look_up(uri: str) -> tuple[str, int] | None:
    """Return the host and port of a URI over TCP, if the host is a name."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "localhost", parts.port or _PORT
    except (AttributeError, TypeError, ValueError):
        return None  # libnbd raises an error that says what is wrong
    if parts.scheme not in ("nbd", "nbds") or ":" in host or host.replace(".", "").isdigit():
        return None
    return host, port


def _with_host(uri: str, address: str) -> str:
    """Replace the host's name in a URI by an address."""
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    host = f"[{address.replace('%', '%25')}]" if ":" in address else address
    port = f":{parts.port}" if parts.port is not None else ""
    return parts._replace(netloc=f"{user}{at}{host}{port}").geturl()
