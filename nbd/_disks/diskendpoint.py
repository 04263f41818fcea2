# SPDX-License-Identifier: LGPL-2.0-or-later
"""The endpoint that is a disk: one NBD export, over one connection or several.

Every wait here is bounded by the copy's timeout, and ends soon after the copy was stopped.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic

from nbd._binding.constants import CONTEXT_BASE_ALLOCATION, STATE_ZERO
from nbd._binding.errors import Error, Timeout
from nbd._binding.methods import NBD
from nbd._binding.shim import ffi
from nbd._disks.background import BackgroundThread, Joining
from nbd._disks.connect import (
    CLOSE_TIMEOUT,
    begin_shutdown,
    close_all,
    connect_uri,
    finish_shutdown,
)
from nbd._disks.copystream import DiskReader, DiskWriter, await_some
from nbd._disks.endpoints import (
    DRAIN_IDLE,
    MAX_PARTS,
    MIN_PART,
    BoundedWait,
    Endpoint,
    is_past,
    parts,
    side_name,
)
from nbd._disks.extents import Survey
from nbd._disks.handles import (
    Maker,
    can_have_more,
    check_can_share,
    export_of,
    has_process,
    is_maker,
    listed,
    name_of_made,
)
from nbd._disks.queue import (
    FLUSH,
    MAX_CONNECTIONS,
    PIECE,
    READ,
    TARGET,
    WRITE,
    ZERO,
    Queue,
    ShimQueue,
)
from nbd._disks.reconnect import (
    COPY_JOURNAL,
    check_can_reconnect,
    first_connection,
    refuse_to_reconnect,
)
from nbd._disks.replacing import Replacing, is_alive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from nbd._disks.endpoints import Bad, Reader, Settings, Writer
    from nbd._disks.extents import Question
    from nbd._disks.queue import Request

#: How many seconds a server that is a process of ours has left to end if closing the connections
#: has taken all of CLOSE_TIMEOUT.
_MIN_EXIT_TIMEOUT = 0.1
#: A queue has room for the handles of two disks.
_MAX_HANDLES = MAX_CONNECTIONS // 2
#: The first letters of a URI; a transport may follow, as in nbd+unix.
_SCHEMES = ("nbd", "nbds")


class Disk(Endpoint):
    """An NBD export.

    Args:
        handles: Its connections.
        settings: Those of the copy.
        is_ours: Whether the copy has made the connections, and closes them.
        name: What messages call it; None is the repr of the first handle.
        server: The URI or the callable by which further connections can be made; None if they
            cannot.
        max_further: How many further connections can be made.
        is_command: Whether a handle of ours has started the server.

    Attributes:
        can_zero: Whether the server has a zero command.
    """

    size: int

    def __init__(
        self,
        handles: list[NBD],
        settings: Settings,
        *,
        is_ours: bool,
        name: str | None = None,
        server: str | Maker | None = None,
        max_further: int = 0,
        is_command: bool = False,
    ) -> None:
        super().__init__(settings)
        first = handles[0]
        self.handles = handles
        self.size = self.capacity = first.get_size()
        self.name = repr(first) if name is None else name
        self.is_read_only = first.is_read_only()
        self.timeout = first.gettimeout()
        self._is_ours = is_ours
        self._export = export_of(first)
        self.can_zero = first.can_zero()
        self._can_flush = first.can_flush()
        self._replacing: Replacing | None = None
        if settings.reconnect is not None and server is not None:
            self._replacing = Replacing(handles, server, settings, self.name)
        self.is_flushed_by_queues = self._replacing is not None and self._can_flush
        self._server = server
        self._max_further = max_further if server is not None else 0
        self.max_workers = len(handles) + self._max_further  # each needs a handle of its own
        self._connect_timeout = settings.timeout
        self._is_command = is_command
        self._joining: Joining | None = None
        self._moved_at = 0.0
        self._shutdown_deadline: float | None = None

    # In order.

    def reader(self) -> Reader:
        """Begin to read from the beginning to the end."""
        return DiskReader(self)

    def writer(self) -> Writer:
        """Begin to write from the beginning."""
        return DiskWriter(self)

    # At any offset.

    @property
    def ready_workers(self) -> int:
        """How many threads can share it now: each needs a handle of its own."""
        return len(self.handles)

    def add_to(self, queue: ShimQueue, side: int, worker: int, workers: int) -> None:
        """Give a queue the handles of one worker."""
        places = range(worker, len(self.handles), workers)[:_MAX_HANDLES]
        self._give(queue, side, places, COPY_JOURNAL if side == TARGET else 0)

    def _give(self, queue: ShimQueue, side: int, places: range, bound: int) -> None:
        """Give a queue the handles in these places; `bound` is the size of its journal."""
        if self._replacing is not None:
            self._replacing.add_to(queue, side, places, bound, BoundedWait(self.settings))
            return
        for place in places:
            queue.add(side, self.handles[place])

    def queue_of_first(self, depth: int, piece: int = PIECE) -> Queue:
        """A queue on the first connection."""
        if self._replacing is None:
            return Queue(self.handles[:1], depth=depth, piece=piece)
        return self._replacing.queue(depth, piece, BoundedWait(self.settings))

    def start_joining(
        self, count: int, add: Callable[[NBD], object], fail: Callable[[Exception], object]
    ) -> None:
        """Make at most `count` further connections; call `add` with each, in another thread.

        `add` appends the handle to `handles`.  A connection to another export is refused.
        """
        count = min(count, self._max_further)
        if count <= 0 or self._server is None:
            return

        def check_and_add(handle: NBD) -> None:
            if export_of(handle) != self._export:
                raise ValueError("handles: the export is not the same")
            add(handle)
            if self._replacing is not None:
                self._replacing.note_joined(handle)

        self._joining = Joining(self._server, count, self._connect_timeout, check_and_add, fail)
        self._joining.start()

    def stop_joining(self) -> None:
        """Make no further connection, without waiting for the one that is being made."""
        if self._joining is not None:
            self._joining.stop()

    def is_lost(self, queue: ShimQueue) -> bool:
        """Whether a queue has lost one of the connections, and it will not be made again."""
        if self._replacing is not None:
            return self._replacing.failure is not None
        return any(map(queue.error_of, self.handles))

    def note_losses(self, queue: ShimQueue) -> None:
        """Have the connections made again that a queue has lost, if the copy reconnects."""
        if self._replacing is not None:
            self._replacing.note_losses(queue)

    def failure(self, operation: int, offset: int, length: int, errnum: int) -> Error:
        """The exception for a range, or for connections that could not be made again."""
        if self._replacing is not None and self._replacing.failure is not None:
            return self._replacing.raised()
        if operation == FLUSH:
            return self._flush_error(errnum)
        return super().failure(operation, offset, length, errnum)

    def _flush_error(self, errnum: int) -> Error:
        reason = os.strerror(errnum)
        return Error(f"nbd.copy: flushing the target {self.name} failed: {reason}", errnum)

    def last_moved(self) -> float:
        """When a byte last moved outside of any queue, by time.monotonic()."""
        return self._moved_at

    def zeroes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that read as zeroes, as far as the server reports them.

        Raises:
            nbd.Timeout: Nothing has moved on the connection for too long.
            nbd.Error: The server breaks the protocol.
        """
        handle, survey = self._survey(start, stop, worker)
        while survey is not None and not survey.is_complete:
            question = survey.question()
            while not self._ask(handle, survey.method, question):
                lost, handle = handle, self._live(worker)
                if handle is lost:
                    return  # holes can be read as well as data
            found: Iterator[Any] = survey.learn(question)
            for extent in found:
                if extent.flags & STATE_ZERO:
                    yield extent.offset, extent.offset + extent.length

    def _survey(self, start: int, stop: int, worker: int) -> tuple[NBD, Survey | None]:
        """The connection of a worker and a survey; None if the server does not report extents."""
        while True:
            handle = self._live(worker)
            try:
                if not handle.can_meta_context(CONTEXT_BASE_ALLOCATION):
                    return handle, None
                return handle, Survey(handle, CONTEXT_BASE_ALLOCATION, start, stop)
            except Error:
                if self._replacing is None or is_alive(handle):
                    raise

    def _live(self, worker: int) -> NBD:
        """The connection of a worker; if it is lost, the one that replaces it."""
        if self._replacing is None:
            return self.handles[worker]
        return self._replacing.live(worker, BoundedWait(self.settings))

    def _ask(self, handle: NBD, method: str, question: Question) -> bool:
        """Ask the server for extents; returns whether it has answered.

        The command is asynchronous: the synchronous call is bounded by the handle's timeout instead
        of the copy's, and cannot be stopped by another thread.  Its end is not taken from the
        completion alone, because an exception of a signal handler may interrupt that one.
        """
        wait = BoundedWait(self.settings, moves=self)
        reply = _Reply(handle)
        try:
            reply.cookie = getattr(handle, f"aio_{method}")(
                question.count, question.offset, question.note, reply.complete
            )
            while not reply.has_arrived():
                if reply.poll(wait.slice()):
                    self._moved_at = monotonic()
                else:
                    wait.check()
        except Error as reason:
            if isinstance(reason, Timeout) or self.settings.is_stopped:
                raise
            return False  # if the connection is lost, the next read reports it
        finally:
            reply.await_briefly()
        if reply.error:
            return False
        if self._replacing is not None:
            self._replacing.count_answer()
        return True

    def read_at(self, view: memoryview, offset: int) -> memoryview:
        """Read as much as a view takes; returns the view, or other memory with the bytes."""
        with self._short_queue() as queue:
            queue.read(view, offset)
            error = await_some(queue, self)[0].error
            if error is None:
                return view
            if self.is_lost(queue._shim_queue):
                raise self.failure(READ, offset, len(view), error.errnum)
        return self.rescued(offset, len(view), error.errnum)

    def read_parts(self, view: memoryview, offset: int, deadline: float | None) -> list[Bad]:
        """Read as much of a range as possible; returns the ranges that cannot be read."""
        bad: list[Bad] = []
        with self._short_queue(MAX_PARTS) as queue:
            block = max(MIN_PART, queue.minimum)
            todo = [(offset, offset + len(view))]
            in_flight: dict[Request, tuple[int, int]] = {}
            while todo or in_flight:
                for start, stop in parts(todo, block):
                    request = queue.read(view[start - offset : stop - offset], start)
                    in_flight[request] = start, stop
                todo = []
                for request in await_some(queue, self):
                    start, stop = in_flight.pop(request)
                    if request.error is None:
                        continue
                    errnum = request.error.errnum
                    if self.is_lost(queue._shim_queue):
                        raise self.failure(READ, start, stop - start, errnum)
                    if stop - start <= block or is_past(deadline):
                        bad.append((start, stop - start, errnum))
                    else:
                        todo.append((start, stop))
        return bad

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write everything, beginning at an offset."""
        with self._short_queue() as queue:
            queue.write(data, offset)
            error = await_some(queue, self)[0].error
            if error is None:
                self._flush_short(queue)
        if error is not None:
            raise self.failure(WRITE, offset, len(data), error.errnum)

    def zero_at(self, offset: int, length: int) -> bool:
        """Zero a range without sending zeroes, if the server can; returns whether it did."""
        if not self.can_zero:
            return False
        with self._short_queue() as queue:
            queue.zero(length, offset)
            error = await_some(queue, self)[0].error
            if error is None:
                self._flush_short(queue)
        if error is not None:
            raise self.failure(ZERO, offset, length, error.errnum)
        return True

    @contextmanager
    def _short_queue(self, depth: int = 1) -> Iterator[Queue]:
        """A queue on the first connection, which waits a moment for replies if its user fails."""
        queue = self.queue_of_first(depth)
        try:
            yield queue
        finally:
            try:
                if len(queue):
                    queue.wait(len(queue), DRAIN_IDLE)
            finally:
                queue.close()

    def _flush_short(self, queue: Queue) -> None:
        """Flush before a short queue ends, as it would make again what it has written."""
        if self.is_flushed_by_queues:
            self.flush_queue(queue)

    def flush_queue(self, queue: Queue) -> None:
        """Flush through a queue that has written.

        Raises:
            nbd.Error: The flush failed.
        """
        queue.flush()
        error = await_some(queue, self)[0].error
        if error is not None:
            raise self.failure(FLUSH, 0, 0, error.errnum)

    # The end.

    def flush(self) -> None:
        """Have the server write everything to its disk, if it has a command for that."""
        if not self.settings.flush or not self._can_flush or self.is_flushed_by_queues:
            return
        queue = ShimQueue(1, 4096)
        try:
            queue.add(TARGET, self.handles[0])
            queue.submit(FLUSH, 1, ffi.NULL, 0, 0, 0)
            wait = BoundedWait(self.settings, moves=queue)
            count = 0
            while not count:
                done, count = queue.wait(1, wait.slice())
                if not count:
                    wait.check()
            if done[0].error:
                raise self._flush_error(done[0].error)
        finally:
            queue.close()

    def finish(self, end: int) -> None:
        """Ask the server to close our connections, without waiting for that."""
        if self._replacing is not None:
            self._replacing.stop()
        self.stop_joining()
        begin_shutdown(self._our_handles())  # everything is written and flushed

    def await_shutdown(self, deadline: float) -> None:
        """Wait until the server has closed our connections, but not past a time.monotonic()."""
        self._shutdown_deadline = deadline
        finish_shutdown(self._our_handles(), deadline)

    def abort(self) -> None:
        """Have calls of other threads on our handles return."""
        self.close()

    def close(self) -> None:
        """Close our handles at once; calls of other threads on them return."""
        if self._replacing is not None:
            self._replacing.stop()
        self.stop_joining()
        if self._is_command:
            self._close_command()
        close_all(self._our_handles())

    def _close_command(self) -> None:
        """Close the handle that has started the server, but do not wait long for the process.

        libnbd calls waitpid, which nothing interrupts, so a background thread does it.
        """
        close = partial(self.handles[0].__exit__, None, None, None)
        thread = BackgroundThread(close, close)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            return
        deadline = self._shutdown_deadline  # None: the copy has failed
        remaining = CLOSE_TIMEOUT if deadline is None else deadline - monotonic()
        thread.join(max(_MIN_EXIT_TIMEOUT, remaining))

    def _our_handles(self) -> list[NBD]:
        return self.handles if self._is_ours else []


class _Reply:
    """The reply to an asynchronous command of a handle.

    Attributes:
        cookie: The command's; 0 before the command was sent.
        error: The errno of the command; None before the reply has arrived.
    """

    def __init__(self, handle: NBD) -> None:
        self._handle = handle
        self.cookie = 0
        self.error: int | None = None

    def complete(self, error: Any) -> int:
        """Note the result: libnbd calls this when the reply has arrived."""
        self.error = error.value
        return 1  # libnbd may forget the command

    def has_arrived(self) -> bool:
        """Whether the reply has arrived.

        Raises:
            nbd.Error: The command has failed.
        """
        if self.error is None and self._handle.aio_command_completed(self.cookie):
            self.error = 0
        return self.error is not None

    def poll(self, seconds: float) -> bool:
        """Let libnbd send and receive; returns whether something has moved."""
        try:
            return self._handle.poll(int(1000 * seconds)) > 0
        except Timeout:  # the handle's own timeout is shorter, but bytes may have moved before
            return False

    def await_briefly(self) -> None:
        """Wait a moment for a reply that is not needed any more.

        nbdkit 1.32 can abort, for all of its clients, if it cannot send a reply.
        """
        deadline = monotonic() + DRAIN_IDLE
        with suppress(Error):
            while self.cookie and not self.has_arrived() and monotonic() < deadline:
                self.poll(max(0.001, deadline - monotonic()))


def open_disk(what: Any, side: int, settings: Settings) -> Disk | None:
    """Open a side of a copy if its caller has named a disk.

    It is named by a handle, a list of them, a URI, a command line, or a callable that makes
    connections.  Of a URI and a callable, one connection is made; further ones are made when the
    copy begins.

    Returns:
        The endpoint; None if `what` is not a disk.

    Raises:
        nbd.Error: The server cannot be reached, or refuses.
        nbd.Timeout: The server does not answer.
        TypeError, ValueError: The handles cannot be used.
    """
    handles = [what] if isinstance(what, NBD) else listed(side_name(side), what)
    if settings.reconnect is not None and (handles is not None or is_server(what)):
        check_can_reconnect(side_name(side), what)
    if handles is not None:
        return _disk_of_caller(handles, side, settings)
    if is_maker(what):
        return _made_disk(what, side, settings)
    if not is_server(what):
        return None
    connect = partial(connect_uri, what, timeout=settings.timeout)
    handle = first_connection(connect, settings.reconnect, settings.check)
    try:
        return disk_over(handle, what, settings)
    except BaseException:
        handle.__exit__(None, None, None)
        raise


def _disk_of_caller(handles: list[NBD], side: int, settings: Settings) -> Disk:
    """The endpoint over handles of the caller."""
    if any(handle._h in settings.given for handle in handles):
        raise ValueError(
            "target: a handle is given twice, as it is in use on the other side; connect another"
        )
    settings.given += (handle._h for handle in handles)
    if side == TARGET:
        check_can_share(side_name(side), handles)
    return Disk(handles, settings, is_ours=False)


def _made_disk(function: Callable[[], object], side: int, settings: Settings) -> Disk:
    """The endpoint over a connection that the caller's callable makes."""
    maker = Maker(side_name(side), function, settings.given)
    handle = first_connection(maker.first, settings.reconnect, settings.check)
    try:
        settings.check()  # nbd.aio.copy may have been cancelled meanwhile
        if settings.reconnect is not None and has_process(handle):
            refuse_to_reconnect(side_name(side), "a started command")
        return Disk(
            [handle],
            settings,
            is_ours=True,
            name=name_of_made(handle, function),
            server=maker,
            max_further=settings.max_connections - 1 if can_have_more(handle) else 0,
            is_command=has_process(handle),
        )
    except BaseException:
        handle.__exit__(None, None, None)
        raise


def disk_over(handle: NBD, what: Any, settings: Settings) -> Disk:
    """The endpoint over a connection that the copy has made to a URI or command line."""
    is_uri = isinstance(what, str)
    can_join = is_uri and handle.can_multi_conn()
    return Disk(
        [handle],
        settings,
        is_ours=True,
        name=what if is_uri else repr(what),
        server=what if is_uri else None,
        max_further=settings.max_connections - 1 if can_join else 0,
        is_command=not is_uri,
    )


def is_server(what: object) -> bool:
    """Whether `what` is a URI, or the command line of a server."""
    if isinstance(what, (list, tuple)):
        return not any(isinstance(one, NBD) for one in what)
    return isinstance(what, str) and _is_uri(what)


def _is_uri(text: str) -> bool:
    scheme, colon, _ = text.partition(":")
    return colon != "" and scheme.lower().partition("+")[0] in _SCHEMES
