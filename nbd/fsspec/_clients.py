# SPDX-License-Identifier: LGPL-2.0-or-later
"""Connections that are kept for later calls, one nbd.aio.Client for each export and event loop.

A client that nobody uses is closed after a while, when its connection is lost, and when its event
loop ends.  The child of a fork drops those of its parent without a word to the servers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from concurrent import futures
from contextlib import asynccontextmanager, suppress
from typing import Any

from nbd._binding.errors import ClosedHandle, Error
from nbd.aio._client import Client
from nbd.fsspec._options import Options

#: How many seconds an unused connection is kept.
IDLE = 5.0
#: The maximum number of requests in flight that a client has from a file system.
DEPTH = 64
#: How many seconds to wait at most for connections to be closed.
_MAX_CLOSE = 1.0


class Kept:
    """A client that is connected or being connected, and how many calls use it.

    Attributes:
        connecting: The task whose result is the client.
        users: How many calls use it or wait for it.
        places: How many more requests may be sent.  Those who wait here wait for ever: the timeout
            of a client is for its requests, each of which has to be done before.
        timer: Closes it when it was not used for a while.
    """

    def __init__(self, connecting: Coroutine[Any, Any, Client]) -> None:
        self.connecting = asyncio.ensure_future(connecting)
        self.users = 0
        self.places = asyncio.Semaphore(DEPTH)
        self.timer: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> Client:
        """The client, once it is connected."""
        return self.connecting.result()

    def client(self) -> Client | None:
        """Return the client, or None if it is not connected, or not any more."""
        task = self.connecting
        if not task.done() or task.cancelled() or task.exception() is not None:
            return None
        client = task.result()
        return None if is_lost(client) else client

    def is_useless(self) -> bool:
        """Whether it could not be connected, or its connection is lost."""
        return self.connecting.done() and self.client() is None

    async def close(self) -> None:
        """Close the client, or stop connecting it."""
        if self.timer is not None:
            self.timer.cancel()
        self.connecting.cancel()
        with suppress(asyncio.CancelledError, Error, OSError, ValueError):
            await (await self.connecting).close()


def is_lost(client: Client) -> bool:
    """Return whether a client has no connection any more."""
    try:
        return all(client._queue.error_of(handle) for handle in client.handles)
    except (ClosedHandle, ValueError):
        return True


class _LoopClients:
    """The clients of one event loop; only that loop calls the methods."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._kept: dict[str, Kept] = {}
        self._closing: dict[Kept, asyncio.Task[None]] = {}
        self._end: AsyncGenerator[None, None] | None = None

    @asynccontextmanager
    async def use(self, url: str) -> AsyncIterator[Kept]:
        """Connect a client, unless there is one, and keep it for the time of a `with` block."""
        if self._end is None:
            self._end = self._until_end()
            await self._end.__anext__()
        kept = self._kept.get(url)
        if kept is None or kept.is_useless():
            kept = Kept(self._connected(url))
            self._kept[url] = kept
        if kept.timer is not None:
            kept.timer.cancel()
        kept.users += 1
        try:
            await asyncio.shield(kept.connecting)
            yield kept
        finally:
            kept.users -= 1
            if not kept.users:
                self._rest(url, kept)

    async def _connected(self, url: str) -> Client:
        return await self._options.client(url)

    def _rest(self, url: str, kept: Kept) -> None:
        """Close a client that no call uses: now if it is useless, or else after a while."""
        if self._kept.get(url) is not kept or kept.client() is None:
            self._close(url, kept)
            return
        loop = asyncio.get_running_loop()
        kept.timer = loop.call_later(IDLE, self._close, url, kept)

    def _close(self, url: str, kept: Kept) -> None:
        if self._kept.get(url) is kept:
            del self._kept[url]
        task = self._closing[kept] = asyncio.get_running_loop().create_task(kept.close())
        task.add_done_callback(lambda _: task.cancelled() or self._closing.pop(kept, None))

    def drop(self, url: str | None) -> None:
        """Close the unused client of a URL, or all; those in use are closed afterwards."""
        for name, kept in list(self._kept.items()):
            if url is None or name == url:
                if kept.users:
                    del self._kept[name]
                else:
                    self._close(name, kept)

    async def close(self) -> None:
        """Close all clients, also those in use."""
        for url, kept in list(self._kept.items()):
            self._close(url, kept)
        if self._closing:
            await asyncio.wait(self._closing.values())
        # The end of a loop cancels all tasks, also those that were closing clients.
        for kept in list(self._closing):
            await kept.close()
            self._closing.pop(kept, None)

    def begin_to_close(self, closed: futures.Future[None]) -> None:
        """Close all clients in a task, and set the future then."""
        task = asyncio.get_running_loop().create_task(self.close())
        task.add_done_callback(lambda _: closed.set_result(None))

    async def _until_end(self) -> AsyncGenerator[None, None]:
        """Close all clients when the loop closes its asynchronous generators, at its end.

        asyncio.run does that.  A loop has no other way to say that it ends.
        """
        try:
            yield
        finally:
            await self.close()

    def abandon(self) -> None:
        """Drop the clients of a loop that does not run any more."""
        for kept in self._kept.values():
            client = kept.client()
            if client is not None:
                client._is_closed = True  # it has nothing to warn of
        self._kept.clear()


class Clients:
    """The clients of a file system."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._process = os.getpid()
        self._by_loop: dict[asyncio.AbstractEventLoop, _LoopClients] = {}

    def use(self, url: str) -> Any:
        """Return an asynchronous context manager, which gives the client of an export."""
        self._forget_others()
        loop = asyncio.get_running_loop()
        return self._by_loop.setdefault(loop, _LoopClients(self._options)).use(url)

    def drop(self, url: str | None) -> None:
        """Have unused connections closed, by their event loops."""
        self._forget_others()
        for loop, clients in list(self._by_loop.items()):
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(clients.drop, url)

    def close(self, wait: bool = False) -> None:
        """Close all connections, and wait for that for at most a second, if the caller wants to."""
        self._forget_others()
        closing: list[futures.Future[None]] = []
        for loop, clients in list(self._by_loop.items()):
            closed: futures.Future[None] = futures.Future()
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(clients.begin_to_close, closed)
                closing.append(closed)
        if wait:
            futures.wait(closing, _MAX_CLOSE)

    def _forget_others(self) -> None:
        """Drop the clients of loops that are closed, and those of a parent process."""
        is_child = self._process != os.getpid()
        for loop, clients in list(self._by_loop.items()):
            if is_child or loop.is_closed():
                del self._by_loop[loop]
                clients.abandon()
        self._process = os.getpid()
