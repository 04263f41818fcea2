# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.copy: nbd.copy in a thread of its own, with connections that the event loop has made."""

from __future__ import annotations

import asyncio
import atexit
from concurrent import futures
from contextlib import suppress
from inspect import iscoroutinefunction
from threading import Thread

from nbd._binding.constants import CONTEXT_BASE_ALLOCATION
from nbd._disks.copy import Ends, Job, Settings
from nbd._disks.diskendpoint import TICK, Disk
from nbd._disks.endpoints import is_server, most_connections
from nbd._disks.queue import SOURCE, TARGET
from nbd.aio._client import Client
from nbd.aio._connect import Plan, close_soon, connected
from nbd.aio._threads import AT_EXIT, end_future, in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import Future
    from typing import Any, Union

    from nbd._binding.errors import Error
    from nbd._binding.methods import NBD
    from nbd._disks.copy import Copied, OnError, Progress
    from nbd._disks.endpoints import Anything

    AnythingOrClient = Union[Anything, Client]


async def copy(
    source: AnythingOrClient,
    target: AnythingOrClient,
    *,
    connections: int | None = None,
    depth: int | None = None,
    sparse: bool = True,
    progress: Progress | None = None,
    timeout: float | None = None,
    flush: bool = True,
    on_error: OnError | None = None,
) -> Copied:
    """Copy a whole disk: nbd.copy, to be awaited.

    The copy runs in threads of its own, so that it can use several processors, and the event loop
    goes on.  An nbd.aio.Client may be used for other commands meanwhile.  A file object is read or
    written in a thread too.

    If its task is cancelled, the copy ends at once, in the middle.  What was sent to a server may
    still happen.

    Args:
        source, target: As for nbd.copy; or an nbd.aio.Client, whose connections are used, as many
            as it has by then.
        connections, depth, sparse, timeout, flush: As for nbd.copy.  With an nbd.aio.Client, no
            timeout is the client's own.
        progress: Called in the event loop as progress(done, total), in bytes; see nbd.copy.
        on_error: Called in the event loop as on_error(offset, length, error); see nbd.copy.  The
            copy waits for what it returns.

    Returns:
        How many bytes were copied, how many were zeroed, and as `bad` the ranges that were bad.

    Raises:
        nbd.Error, OSError, ValueError: As nbd.copy.
        TypeError: Also if progress or on_error is a coroutine function: they are called.

    Example:
        >>> asyncio.run(nbd.aio.copy(["nbdkit", "-s", "memory", "1M"], "disk.img"))
        Copied(copied=0, zeroed=1048576)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
    for name, function in (("progress", progress), ("on_error", on_error)):
        if iscoroutinefunction(function):
            raise TypeError(f"{name}: a function is needed, not a coroutine function")
    settings = Settings(connections, depth, sparse, progress, timeout, flush, on_error)
    return await _Transfer(settings).run(source, target)


#: The copies whose threads run.
_running: set[_Transfer] = set()


class _Transfer:
    """A copy, in the event loop, and its thread."""

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
        self._job: Job | None = None
        self._thread: Thread | None = None

    async def run(self, source: AnythingOrClient, target: AnythingOrClient) -> Copied:
        try:
            opened = await self._open(source), await self._open(target)
            # A daemon: what it waits for when the task was cancelled does not hold up the program.
            self._thread = Thread(target=self._work, args=opened, name="nbd.aio.copy", daemon=True)
            _running.add(self)
            self._thread.start()
            return await self._ended
        except BaseException:
            self._settings.is_stopped = True
            if self._job is not None:  # in a thread: it waits for the end of a server's process
                in_thread(self._loop, self._job.stop)
            if self._thread is None or self._thread.ident is None:  # it was not started
                _running.discard(self)
                for handles, plan in self._ours:
                    close_soon(handles, plan)
            raise

    def finish(self) -> None:
        """Wait for the thread: to its end, or, if the copy was stopped, not for long."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(AT_EXIT if self._settings.is_stopped else None)

    async def _open(self, what: Any) -> Any:
        """The disk of a server or a client; anything else as it is."""
        settings = self._settings
        if isinstance(what, Client):
            what._check()
            if settings.timeout is None:
                settings.timeout = what._timeout
            return Disk(list(what.handles), is_ours=False)
        if not is_server(what):
            return what
        plan = Plan(what, [CONTEXT_BASE_ALLOCATION], None, settings.timeout, 0.0)
        handle = await connected(plan)
        self._ours.append(([handle], plan))
        if plan.is_command:
            return Disk([handle], is_ours=True, name=repr(what), is_command=True)
        wanted = settings.connections or most_connections()
        return Disk(
            [handle],
            is_ours=True,
            name=what,
            uri=what,
            further=wanted - 1 if handle.can_multi_conn() else 0,
            timeout=settings.timeout,
        )

    def _work(self, source: Any, target: Any) -> None:
        """What the thread does."""
        copied: Copied | None = None
        failure: BaseException | None = None
        try:
            with Ends() as ends:
                source_end, target_end = (
                    ends.own(what)
                    if isinstance(what, Disk)
                    else ends.open(what, end, self._settings)
                    for what, end in ((source, SOURCE), (target, TARGET))
                )
                self._job = Job(source_end, target_end, self._settings)
                self._settings.check()
                copied = self._job.run()
        except BaseException as raised:
            failure = raised
        finally:
            _running.discard(self)
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(end_future, self._ended, copied, failure)

    def _ask(self, offset: int, length: int, error: Error) -> bool:
        """Called by the thread; it waits for the answer of the caller's function."""
        answer: futures.Future[bool] = futures.Future()
        self._loop.call_soon_threadsafe(self._answer, answer, offset, length, error)
        while True:
            self._settings.check()
            with suppress(futures.TimeoutError):
                return answer.result(TICK)

    def _answer(self, answer: futures.Future[bool], offset: int, length: int, error: Error) -> None:
        """What the caller's function raises ends the copy."""
        if self._ended.done() or self._on_error is None:
            return
        try:
            answer.set_result(bool(self._on_error(offset, length, error)))
        except Exception as raised:
            end_future(self._ended, None, raised)

    def _report_later(self, done: int, total: int | None) -> None:
        """Called by the thread."""
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._report, done, total)

    def _report(self, done: int, total: int | None) -> None:
        """What the caller's function raises ends the copy."""
        if self._ended.done() or self._progress is None:
            return
        try:
            self._progress(done, total)
        except Exception as raised:
            end_future(self._ended, None, raised)


@atexit.register
def _finish_all() -> None:
    """When the program ends, the copies that were not stopped have ended in order."""
    for one in list(_running):
        one.finish()
