# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.copy: nbd.copy in a thread of its own, with connections that the event loop has made."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from threading import Thread

from nbd._core.asyncconnect import Plan, close_all, connected
from nbd._core.client import Client
from nbd._core.constants import CONTEXT_BASE_ALLOCATION
from nbd._core.copying import Ends, Job, Settings
from nbd._core.ends import Disk, is_server, most_connections
from nbd._core.engine import SOURCE, TARGET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import Future
    from typing import Any, Union

    from nbd._core.copying import Copied, Progress
    from nbd._core.ends import Anything
    from nbd._core.methods import NBD

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
) -> Copied:
    """Copy a whole disk: nbd.copy, to be awaited.

    The copy runs in threads of its own, so that it can use several processors, and the event loop
    goes on.  An nbd.aio.Client may be used for other commands meanwhile.  A file object is read or
    written in a thread too.

    If its task is cancelled, the copy ends at once, in the middle.  What was sent to a server may
    still happen.

    Args:
        source, target: As for nbd.copy; or an nbd.aio.Client, whose connections are used.
        connections, depth, sparse, timeout, flush: As for nbd.copy.
        progress: Called in the event loop as progress(done, total), in bytes; see nbd.copy.

    Returns:
        How many bytes were copied, and how many were zeroed.

    Raises:
        nbd.Error, OSError, ValueError: As nbd.copy.

    Example:
        >>> asyncio.run(nbd.aio.copy(["nbdkit", "-s", "memory", "1M"], "disk.img"))
        Copied(copied=0, zeroed=1048576)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
    return await _Transfer(Settings(connections, depth, sparse, progress, timeout, flush)).run(
        source, target
    )


class _Transfer:
    """A copy, in the event loop, and its thread."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._progress = settings.progress
        if self._progress is not None:
            settings.progress = self._report_later
        self._ended: Future[Copied] = self._loop.create_future()
        self._ours: list[tuple[list[NBD], bool]] = []
        self._job: Job | None = None

    async def run(self, source: AnythingOrClient, target: AnythingOrClient) -> Copied:
        is_started = False
        try:
            opened = await self._open(source), await self._open(target)
            # Not a daemon: when the program ends, the copy has ended in order.
            Thread(target=self._work, args=opened, name="nbd.aio.copy").start()
            is_started = True
            return await self._ended
        except BaseException:
            self._settings.is_stopped = True
            if self._job is not None:  # in a thread: it waits for the end of a server's process
                self._loop.run_in_executor(None, self._job.stop)
            if not is_started:
                for handles, is_command in self._ours:
                    close_all(handles, is_command)
            raise

    async def _open(self, what: Any) -> Any:
        """The disk of a server or a client; anything else as it is."""
        if isinstance(what, Client):
            what._check()
            return Disk(list(what.handles), is_ours=False)
        if not is_server(what):
            return what
        settings = self._settings
        plan = Plan(what, [CONTEXT_BASE_ALLOCATION], None, settings.timeout, 0.0)
        handles = await connected(plan, settings.connections or most_connections())
        self._ours.append((handles, plan.is_command))
        return Disk(handles, is_ours=True)

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
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._end, copied, failure)

    def _end(self, copied: Copied | None, failure: BaseException | None) -> None:
        if self._ended.done():  # the caller was cancelled
            return
        if failure is not None:
            self._ended.set_exception(failure)
        elif copied is not None:
            self._ended.set_result(copied)

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
            self._ended.set_exception(raised)
