# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.copy: runs a copy in a thread of its own, with connections made by the event loop."""

from __future__ import annotations

import asyncio
import atexit
from concurrent import futures
from contextlib import ExitStack, suppress
from functools import partial, singledispatchmethod
from inspect import iscoroutinefunction
from threading import Thread

from nbd._binding.constants import CONTEXT_BASE_ALLOCATION
from nbd._disks.connect import TO_CALL
from nbd._disks.copy import Copy, open_endpoint
from nbd._disks.diskendpoint import Disk, disk_over, is_server
from nbd._disks.endpoints import TICK, Settings, side_name
from nbd._disks.queue import SOURCE, TARGET
from nbd._disks.reconnect import check_can_reconnect, refuse_to_reconnect
from nbd.aio._client import Client
from nbd.aio._connect import Plan, close_soon, connected
from nbd.aio._threads import AT_EXIT, end_future, in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable
    from typing import Any, Union

    from nbd._binding.errors import Error
    from nbd._binding.methods import NBD
    from nbd._disks.copy import Copied
    from nbd._disks.endpoints import Anything, Endpoint, OnError, Progress, Ranges

    AnythingOrClient = Union[Anything, Client]
    # Opens one side of the copy; called in the copy's thread.
    Opener = Callable[[], Endpoint]


async def copy(
    source: AnythingOrClient,
    target: AnythingOrClient | None,
    *,
    connections: int | None = None,
    depth: int | None = None,
    sparse: bool | int = True,
    target_is_zero: bool = False,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
    reconnect: float | None = None,
    flush: bool = True,
    on_error: OnError | None = None,
) -> Copied:
    """Copy a whole disk, or ranges of it: nbd.copy, to be awaited.

    The copy runs in threads of its own, so that it can use several processors and does not block
    the event loop.  An nbd.aio.Client can be used for other commands meanwhile.  A file object is
    read or written in a thread too.

    If its task is cancelled, the copy ends at once, in the middle.  Commands that were sent to a
    server before may still be executed.

    Args:
        source, target: As for nbd.copy; or an nbd.aio.Client, of which the copy uses the
            connections that have been made by then.  A callable is called in a thread, so it may
            block, as nbd.connect does.  It must not be a coroutine function.
        connections, depth, sparse, target_is_zero, ranges, timeout, reconnect, flush: As for
            nbd.copy.  With an nbd.aio.Client, a timeout of None is the client's own, and reconnect
            has to be None.
        progress: Called in the event loop as progress(done, total), in bytes; see nbd.copy.
        on_error: Called in the event loop as on_error(offset, length, error); see nbd.copy.  The
            copy waits for its result.

    Returns:
        How many bytes were copied, how many were zeroed, and as `bad` the ranges that were bad.

    Raises:
        nbd.Error, OSError, ValueError: As nbd.copy.
        TypeError: progress or on_error is a coroutine function; or as nbd.copy.

    Example:
        >>> asyncio.run(nbd.aio.copy(["nbdkit", "-s", "memory", "1M"], "disk.img"))
        Copied(copied=0, zeroed=1048576)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
    for name, function in (("progress", progress), ("on_error", on_error)):
        if iscoroutinefunction(function):
            raise TypeError(f"{name}: a function is needed, not a coroutine function")
    settings = Settings(
        connections,
        depth,
        sparse,
        target_is_zero,
        ranges,
        progress,
        timeout,
        flush,
        on_error,
        reconnect,
    )
    return await _CopyThread(settings).run(source, target)


#: The copies whose threads are running.
_running: set[_CopyThread] = set()


class _CopyThread:
    """The thread of one copy, and what the event loop needs to begin, follow and stop it.

    Until the copy begins, a callable or a FIFO of the caller may keep the thread from returning.
    If the copy is stopped meanwhile, the event loop closes what has been opened by then.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._progress = settings.progress
        if self._progress is not None:
            settings.progress = self._report_later
        self._on_error = settings.on_error
        if self._on_error is not None:
            settings.on_error = self._ask
        self._ended: Future[Copied] = self._loop.create_future()
        self._ours: list[tuple[list[NBD], Plan]] = []
        self._opened: list[Endpoint] = []  # by the thread
        self._copy: Copy | None = None
        self._thread: Thread | None = None

    async def run(self, source: AnythingOrClient, target: AnythingOrClient | None) -> Copied:
        """Connect servers in the event loop; open everything else, and copy, in the thread."""
        try:
            openers = await self._opener(source, SOURCE), await self._opener(target, TARGET)
            # A daemon: after its task was cancelled, it may still wait, and must not keep the
            # program from ending.
            self._thread = Thread(target=self._work, args=openers, name="nbd.aio.copy", daemon=True)
            _running.add(self)
            self._thread.start()
            return await self._ended
        except BaseException:
            self._settings.is_stopped = True
            if self._copy is not None:  # in a thread: it waits for the end of a server's process
                in_thread(self._loop, self._copy.stop)
            else:
                for handles, plan in self._ours:
                    close_soon(handles, plan)
                for endpoint in list(self._opened):
                    in_thread(self._loop, endpoint.abort)
            if self._thread is None or self._thread.ident is None:  # it was not started
                _running.discard(self)
            raise

    def join(self) -> None:
        """Wait until the thread ends; if the copy was stopped, only for a moment."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(AT_EXIT if self._settings.is_stopped else None)

    @singledispatchmethod
    async def _opener(self, what: Any, side: int) -> Opener:
        """How the thread opens one side of the copy; a server is connected here already."""
        settings = self._settings
        if not is_server(what):  # such as a callable, which may block
            return partial(open_endpoint, what, side, settings)
        if settings.reconnect is not None:
            check_can_reconnect(side_name(side), what)
        contexts = [CONTEXT_BASE_ALLOCATION]
        plan = Plan(what, contexts, None, settings.timeout, 0.0, settings.reconnect)
        handle = await connected(plan, TO_CALL)
        self._ours.append(([handle], plan))
        disk = disk_over(handle, what, settings)
        return lambda: disk

    @_opener.register(Client)
    async def _(self, client: Client, side: int) -> Opener:
        """A client's connections are used, as many as it has by now."""
        client._check()
        if self._settings.reconnect is not None:
            refuse_to_reconnect(side_name(side), "an nbd.aio.Client")
        if self._settings.timeout is None:
            self._settings.timeout = client._timeout
        disk = Disk(list(client.handles), self._settings, is_ours=False)
        return lambda: disk

    def _work(self, open_source: Opener, open_target: Opener) -> None:
        """Copy; called in the thread."""
        copied: Copied | None = None
        failure: BaseException | None = None
        try:
            with ExitStack() as opened:
                source = self._open(opened, open_source)
                target = self._open(opened, open_target)
                self._copy = Copy(source, target, self._settings)
                self._settings.check()
                copied = self._copy.run()
        except BaseException as raised:
            failure = raised
        finally:
            _running.discard(self)
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(end_future, self._ended, copied, failure)

    def _open(self, opened: ExitStack, opener: Opener) -> Endpoint:
        """Open one side; called in the thread."""
        endpoint = opener()
        opened.callback(endpoint.close)
        self._opened.append(endpoint)
        self._settings.check()  # in this order: a stop in between does not see the endpoint
        return endpoint

    def _ask(self, offset: int, length: int, error: Error) -> bool:
        """Call the caller's on_error in the event loop; called in the thread, which waits."""
        answer: futures.Future[bool] = futures.Future()
        self._loop.call_soon_threadsafe(self._answer, answer, offset, length, error)
        while True:
            self._settings.check()
            with suppress(futures.TimeoutError):
                return answer.result(TICK)

    def _answer(self, answer: futures.Future[bool], offset: int, length: int, error: Error) -> None:
        """Call the caller's on_error.  An exception that it raises ends the copy."""
        if self._ended.done() or self._on_error is None:
            return
        try:
            answer.set_result(bool(self._on_error(offset, length, error)))
        except Exception as raised:
            end_future(self._ended, None, raised)

    def _report_later(self, done: int, total: int | None) -> None:
        """Have the caller's progress called in the event loop; called in the thread."""
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._report, done, total)

    def _report(self, done: int, total: int | None) -> None:
        """Call the caller's progress.  An exception that it raises ends the copy."""
        if self._ended.done() or self._progress is None:
            return
        try:
            self._progress(done, total)
        except Exception as raised:
            end_future(self._ended, None, raised)


@atexit.register
def _join_all() -> None:
    """Let copies that were not stopped run to their end before the program ends."""
    for thread in list(_running):
        thread.join()
