# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy: copies disks, files and streams, with many commands in flight.

If both sides have offsets, the shim's queue does the work: C writes each piece that was read,
without Python.  The calling thread is the first worker and begins on the first connection.  Further
connections are made in the background, and with them further workers start, each in a thread of its
own, with a queue of its own.  The workers take one range of the disk after the other.  A range that
cannot be read is left to the calling thread, which reads around it (Endpoint.rescued).

If one side is a stream, the calling thread copies in order (copystream).
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from collections import deque, namedtuple
from contextlib import ExitStack, suppress
from functools import partial
from time import monotonic

from nbd._binding.errors import Error
from nbd._binding.shim import ffi, lib
from nbd._disks.background import BackgroundThread
from nbd._disks.connect import CLOSE_TIMEOUT
from nbd._disks.copystream import Counts, copy_stream, write_runs
from nbd._disks.diskendpoint import open_disk
from nbd._disks.endpoints import (
    DRAIN_TIMEOUT,
    TICK,
    Settings,
    check_sides,
    drain_idle,
    late,
    merged,
    processors,
)
from nbd._disks.fileendpoint import open_file
from nbd._disks.nullendpoint import Null
from nbd._disks.queue import (
    COPY,
    FLUSH,
    MAX_DEPTH,
    PIECE,
    READ,
    SOURCE,
    TARGET,
    ZERO,
    IdleTimer,
    ShimQueue,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from nbd._binding.methods import NBD
    from nbd._disks.endpoints import Anything, Endpoint, OnError, Progress, Ranges

    # What a queue is asked for: an operation, start and stop.
    Task = tuple[int, int, int]

#: The size of the largest request to copy; the queue cuts it into pieces, and reports it as one.
_REQUEST = 8 * 1024 * 1024
#: The size of the ranges that a worker takes.
_MIN_RANGE = 8 * 1024 * 1024
_MAX_RANGE = 1024 * 1024 * 1024

_NOTHING = Counts(0, 0, 0, 0)

_Copied = namedtuple("_Copied", ("copied", "zeroed"))


class Copied(_Copied):
    """What nbd.copy has done: a tuple of two numbers of bytes, whose sum is the size of the copy.

    Attributes:
        copied: How many were copied as data.
        zeroed: How many became zeroes, or were zeroes already: the source has a hole there, or
            blocks of zeroes, or cannot read them.
        read: How many were read from the source: the copied ones, and the zeroes that are not in a
            hole.
        written: How many were sent to the target as data: the copied ones, and zeroes for which it
            has no other command.  With the target None it is 0.
        bad: The ranges that the source cannot read, as a tuple of (offset, length) in order; it is
            empty unless on_error has let the copy continue.
    """

    __module__ = "nbd"

    copied: int
    zeroed: int
    read: int = 0
    written: int = 0
    bad: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        bad = f", bad={self.bad}" if self.bad else ""
        return f"Copied(copied={self.copied}, zeroed={self.zeroed}{bad})"


def copy(
    source: Anything,
    target: Anything | None,
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
    """Copy a whole disk, or ranges of it.

    Source and target are each one of: a URI; a connected nbd.NBD, or a list of them, which are
    connections to one export; the command line of a server, as a list of str; a callable without
    arguments that returns a connected nbd.NBD; the path of a file or block device; an open binary
    file, whose copy begins at its position.  With the target None, the source is read, and nothing
    is written.

    The callable is called once for each connection, the first time by the calling thread, then by
    another one.  The copy closes what it returns, but no handle that it is given.  The copy's
    timeout does not bound the callable, and without one, the timeout of the first handle applies.
    functools.partial(nbd.connect, uri, prepare=...) sets up TLS, an export name and so on for all
    connections.  An object that can be read or written is a file, even if it can be called.

    A file that is named by its path is created, or truncated to 0 bytes, first; with ranges, it
    keeps its contents, and becomes as large as the source if it is smaller.  A disk, a block
    device and an open file keep their contents behind the copy.  Data that is written to a file is
    sent on to its disk at once and then leaves the page cache, so that a large copy does not fill
    the memory.

    Anything with a binary read or write method is copied as a stream, in order: a pipe, a socket, a
    file that was opened for appending, an io.BytesIO.  The bytes in the buffer of an open file are
    copied too.  After the copy, the position of an open file is just past the copied bytes.  A copy
    that fails does not flush, puts the position of an open file back, and loses what it has read
    from a stream.

    Args:
        connections: How many connections to make at most to each server, if it allows several
            (nbd.NBD.can_multi_conn).  None is one for each processor, up to 4.  Several help where
            one processor is the limit, as with TLS, and where a network limits each connection.
            The copy begins on the first one.  Others join while it runs; it does not wait for them.
        depth: How many commands may be in flight at once, of up to 256 KiB each; None is 16.  They
            are all that moves in one round trip: 16 are 4 MiB, so a reply time of 20 ms allows 200
            MB/s, and one of 100 ms 40 MB/s.  There, more help: 64 or 256.  Each thread that joins
            with a further connection has a share of this number in addition.
        sparse: Do not read the holes of the source, and do not write zeroes, but make holes in the
            target where it can have them.  Zeroes are found in blocks of 4096 bytes; a number is
            another size of the blocks in bytes, a power of two from 512 to 33,554,432.  Blocks are
            at least as large as the minimum block size of the target.  With False, everything is
            read and written.
        target_is_zero: The target is known to read as zeroes, so nothing is sent for zeroes; data
            that is there would stay.  A file that is created or truncated needs no such promise.
        ranges: What to copy, each as (offset, length) in bytes or as an nbd.Extent; None is
            everything.  They may overlap, and are copied in order, each byte once, to the same
            offset of the target.  Neither side may be a stream.  An incremental backup needs those
            of nbd.extents(h, "qemu:dirty-bitmap:NAME") that have the flag 1.
        progress: Called as progress(done, total), in bytes, at most ten times a second and once at
            the end.  total is None if the source is a stream of unknown size.
        timeout: Raise nbd.Timeout when no byte has moved for this many seconds.  It bounds each
            connect and every wait for a server, a FIFO, a pipe, a socket or a terminal, but not the
            methods of other objects.  None is for ever or, with an nbd.NBD, the handle's own
            timeout.
        reconnect: When a connection is lost, try for this many seconds to make it again, and then
            go on; the copy does not fail meanwhile, unless its timeout is shorter.  A killed target
            may lose what it has acknowledged and not flushed, so that is copied again: up to 1 GiB,
            after which a flush is sent, or 64 MiB of a stream, which are kept.  The disk has to be
            the same one (ESTALE), and no other client may write to it meanwhile.  A server without
            flush is taken at its word.  The first connection is retried, too.  Only URIs and
            callables can be connected again; None gives up at once.
        flush: Have the target on its disk when the copy returns, by NBD's flush or fdatasync.
        on_error: Called as on_error(offset, length, error) for each range that the source cannot
            read, in bytes and with the nbd.Error, in the calling thread.  If it returns true, the
            copy continues and writes zeroes there; otherwise the error is raised.  The range is
            exact: after a failure, parts of the range are read again, down to the source's minimum
            block size, or to 512 bytes.

    Returns:
        How many bytes were copied, how many were zeroed, and which ranges could not be read.

    Raises:
        nbd.Error: A server cannot be reached; the target is read-only, or smaller than the source;
            or a command has failed, in which case the message names the side and the range.
        nbd.Timeout: A server does not answer.
        OSError: A file cannot be opened.
        ValueError: An argument is out of range; source and target are the same file; a range is
            not inside the source, or a side is a stream; or reconnect is given with a handle or a
            command.

    Example:
        >>> nbd.copy(["nbdkit", "-s", "memory", "1M"], "disk.img")
        Copied(copied=0, zeroed=1048576)

        >>> data = [extent for extent in nbd.extents(h) if not extent.flags & nbd.STATE_ZERO]
        >>> nbd.copy(h, "disk.img", ranges=data)
        Copied(copied=0, zeroed=0)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
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
    with ExitStack() as opened:  # it closes both, whatever one of them raises
        source_endpoint = open_endpoint(source, SOURCE, settings)
        opened.callback(source_endpoint.close)
        target_endpoint = open_endpoint(target, TARGET, settings)
        opened.callback(target_endpoint.close)
        return Copy(source_endpoint, target_endpoint, settings).run()


def open_endpoint(what: Anything | None, side: int, settings: Settings) -> Endpoint:
    """Open a side of a copy as its caller has named it.

    Raises:
        nbd.Error, OSError: It cannot be connected or opened.
        nbd.Timeout: A server does not answer, or nobody has opened the other side of a FIFO.
        TypeError: It cannot be copied.
    """
    if what is None and side == TARGET:
        return Null(settings)
    return open_disk(what, side, settings) or open_file(what, side, settings)


class Copy:
    """One copy between two open endpoints, which another thread may stop."""

    def __init__(self, source: Endpoint, target: Endpoint, settings: Settings) -> None:
        self._source = source
        self._target = target
        self._settings = settings
        if settings.timeout is None:
            timeouts = (source.timeout, target.timeout)
            settings.timeout = min((seconds for seconds in timeouts if seconds), default=None)
        size = source.size or 0
        self._ranges = [(0, size)] if settings.ranges is None else settings.ranges
        self._total = sum(stop - start for start, stop in self._ranges)
        limits = processors(), source.max_workers, target.max_workers, self._max_tasks()
        self._max_workers = max(1, min(limits))
        # Protects the next range, and the start of workers.  The lists of workers and of failures
        # are read without it: they only grow, and each loop goes over a copy.
        self._lock = allocate_lock()
        self._has_workers = False
        self._workers: list[_Worker] = []
        self._failures: list[BaseException] = []
        # After a failure: until when to wait for replies, and for how many seconds without any.
        self._drain_deadline = 0.0
        self._drain_idle = DRAIN_TIMEOUT
        # What could not be read, which any worker appends; and what has to be copied again because
        # of that: the rest of the requests to which it belongs.  Only the first worker removes
        # anything, so it alone calls on_error.
        self._unread: deque[_Unread] = deque()
        self._again: deque[Task] = deque()
        self._adjustment = _NOTHING  # corrects what the queues have counted
        self._reported = 0
        self._reported_at = 0.0

    def run(self) -> Copied:
        """Copy everything."""
        source, target, settings = self._source, self._target, self._settings
        check_sides(source, target)
        if source.has_offsets and target.has_offsets:
            target.grow(source.size or 0)
            self._has_workers = True
            settings.check()
            counts = self._copy_ranges()
            end = self._ranges[-1][1] if self._ranges else 0
        else:
            counts = copy_stream(source, target, settings)
            end = counts.copied + counts.zeroed
        settings.check()
        target.flush()
        self._finish(end)
        return _result(counts, settings.bad)

    def stop(self) -> None:
        """Have `run` raise soon, in its thread; called by another one."""
        self._settings.is_stopped = True
        if self._has_workers:
            self._wake()  # the workers let replies arrive before the handles are closed
            return
        self._source.abort()
        self._target.abort()

    def _finish(self, end: int) -> None:
        """End our connections in order, within a bounded time; seek the caller's files."""
        endpoints = self._source, self._target
        for endpoint in endpoints:
            endpoint.finish(end)
        timeout = self._settings.timeout or CLOSE_TIMEOUT
        deadline = monotonic() + min(CLOSE_TIMEOUT, timeout)
        for endpoint in endpoints:
            endpoint.await_shutdown(deadline)

    def _copy_ranges(self) -> Counts:
        """Copy between endpoints with offsets; the calling thread is the first worker."""
        try:
            self._begin()
            self._work_all()
            self._copy_edges()
            self._flush_workers()
            self._report(is_last=True)
        except Error as raised:
            self._stop_and_drain(raised)
            if raised.errnum == errno.ECANCELED and self._failures:
                raise self._failures[0] from None  # the reason why the copy was stopped
            raise
        except BaseException as raised:
            self._stop_and_drain(raised)
            raise
        finally:
            counts = self._end_workers()
        moved = counts.copied + counts.zeroed
        if moved != self._total:
            text = f"nbd.copy: {moved} of {self._total} bytes were copied"
            raise Error(f"{text}: this is a fault of nbd.copy; report it", errno.EIO)
        return counts

    def _begin(self) -> None:
        """Start the workers for which there are connections, and make further connections."""
        with self._lock:
            queue = self._new_worker().queue
            self._block = max(_minimum(queue, SOURCE), _minimum(queue, TARGET))
            self._align(queue)
            self._request = max(_REQUEST, self._settings.sparse, self._block)
            self._range = self._range_size()
            self._start_workers()
        for endpoint, side in ((self._source, SOURCE), (self._target, TARGET)):
            join = partial(self._join, endpoint, side)
            endpoint.start_joining(self._max_tasks() - len(endpoint.handles), join, self._fail)

    def _max_tasks(self) -> int:
        """How many workers have something to do."""
        return -(-self._total // _MIN_RANGE)

    def _align(self, queue: ShimQueue) -> None:
        """Split the ranges into whole blocks, and edges that fill a block only in part.

        An edge has to be read, merged into its block and written, which a request to copy does not
        do.  The last block of a disk is as short as the disk, so the end of both is no edge.
        """
        block, size = self._block, self._source.size or 0
        is_at_end = size % _minimum(queue, TARGET) == 0 or size == lib.nbdqueue_size(
            queue.q, TARGET
        )
        self._todo: deque[tuple[int, int]] = deque()
        self._edges: list[tuple[int, int]] = []
        for start, stop in self._ranges:
            first = start + -start % block
            last = stop if stop == size and is_at_end else stop - stop % block
            if first >= last:
                self._edges.append((start, stop))
                continue
            self._todo.append((first, last))
            self._edges += [edge for edge in ((start, first), (last, stop)) if edge[0] < edge[1]]

    def _range_size(self) -> int:
        """How many bytes of the disk a worker takes at once."""
        size = min(max(self._total // (8 * self._max_workers), _MIN_RANGE), _MAX_RANGE)
        return max(size - size % self._request, self._request)

    def _join(self, endpoint: Endpoint, side: int, handle: NBD) -> None:
        """Use a further connection; called by the thread that has made it."""
        with self._lock:
            worker = len(endpoint.handles) % self._max_workers
            if worker < len(self._workers):
                self._workers[worker].queue.add(side, handle)
            endpoint.handles.append(handle)  # from now on the endpoint closes it
            self._start_workers()

    def _start_workers(self) -> None:
        """Start the workers for which both sides are ready.  The caller holds the lock."""
        ready = min(self._source.ready_workers, self._target.ready_workers)
        while len(self._workers) < min(ready, self._max_workers):
            worker = self._new_worker()
            work = partial(self._work_in_background, worker)
            worker.thread = BackgroundThread(work, self._stop_at_exit)
            try:
                worker.thread.start()
            except RuntimeError:  # the system has no thread left: the other workers do its work
                worker.thread.cancel()

    def _new_worker(self) -> _Worker:
        """Add a worker, with the handles and descriptors that it will use."""
        number = len(self._workers)
        depth = self._settings.depth
        if number > 0:  # the first one gets all of it, as the others may never start
            depth = max(1, depth // self._max_workers)
        sparse = self._settings.sparse
        queue = ShimQueue(min(depth, MAX_DEPTH), max(PIECE, sparse))
        try:
            is_zero = self._settings.target_is_zero or self._target.is_zero
            queue.set_sparse(sparse, bool(sparse) and is_zero)
            self._source.add_to(queue, SOURCE, number, self._max_workers)
            self._target.add_to(queue, TARGET, number, self._max_workers)
            worker = _Worker(number, queue)
            self._workers.append(worker)
        except BaseException:
            queue.close()
            raise
        return worker

    def _work_all(self) -> None:
        """Copy all ranges, together with the other workers."""
        first = self._workers[0]
        self._work(first)
        self._stop_joining()  # from now on no thread is started
        threads = [worker.thread for worker in self._workers if worker.thread is not None]
        while True:
            # In this order: a worker appends what it could not read before it ends, so nothing
            # follows this call if all had ended before it.
            have_ended = all(thread.cancel() or thread.join(0) for thread in threads)
            self._work(first)  # what the others could not read
            if have_ended:
                return
            for thread in threads:
                if not thread.cancel() and not thread.join(TICK):
                    break  # it may have found more that cannot be read
            self._report()

    def _flush_workers(self) -> None:
        """Flush through the queue of each worker, if the target needs that."""
        if not self._target.is_flushed_by_queues or not self._settings.flush:
            return
        for worker in self._workers:
            worker.submit((FLUSH, 0, 0))
        for worker in self._workers:
            while worker.in_flight:
                self._raise_failure()
                self._wait(worker)

    def _stop_joining(self) -> None:
        self._source.stop_joining()
        self._target.stop_joining()

    def _wake(self) -> None:
        """Have all workers check whether the copy has to end."""
        for worker in list(self._workers):
            worker.queue.wake()

    def _raise_failure(self) -> None:
        """Raise the exception of another worker, if it has ended the copy."""
        if self._failures:
            raise self._failures[0]
        self._settings.check()

    def _stop_workers(self, raised: BaseException) -> None:
        """Stop all workers, because one has raised an exception."""
        self._settings.is_stopped = True
        self._drain_idle = min(self._drain_idle, drain_idle(raised))
        self._drain_deadline = self._drain_deadline or monotonic() + DRAIN_TIMEOUT
        self._wake()

    def _stop_and_drain(self, raised: BaseException) -> None:
        """The same, of the first worker; the others drain their queues by themselves."""
        self._stop_workers(raised)
        if self._workers:
            self._drain(self._workers[0])

    def _stop_at_exit(self) -> None:
        """Stop all workers, because the program ends while a daemon thread is copying."""
        self._settings.is_stopped = True
        self._wake()

    def _drain(self, worker: _Worker) -> None:
        """Wait a moment for the replies to what a worker has in flight."""
        queue = worker.queue
        for token in list(worker.in_flight):
            queue.cancel(token)
        deadline = self._drain_deadline or monotonic() + DRAIN_TIMEOUT
        timer = IdleTimer(queue, self._drain_idle)
        while lib.nbdqueue_length(queue.q) and not timer.is_over():
            remaining = deadline - monotonic()
            if remaining <= 0:
                return
            queue.take(*queue.wait(1, min(remaining, timer.remaining())))

    def _end_workers(self) -> Counts:
        """End the threads and the queues; returns what they have done."""
        try:
            self._stop_joining()
            for worker in self._workers:
                if worker.thread is not None and not worker.thread.cancel():
                    worker.thread.join()
        finally:
            counts = self._adjustment
            for worker in self._workers:
                counts = _sum(counts, worker.counts())
                # Now: an exception that is kept keeps this frame, and so the queues.
                worker.queue.close()
            self._failures.clear()  # their tracebacks refer to self
        return counts

    def _fail(self, raised: BaseException) -> None:
        """End the copy because of an exception in another thread, which `run` then raises."""
        self._failures.append(raised)
        self._stop_workers(raised)

    def _work_in_background(self, worker: _Worker) -> None:
        """The work of a background thread."""
        try:
            self._work(worker)
        except BaseException as raised:
            self._fail(raised)
        if self._settings.is_stopped:
            with suppress(Exception):  # the first failure is the one that is raised
                self._drain(worker)

    def _work(self, worker: _Worker) -> None:
        """Copy one range after the other, until all are taken."""
        is_first = worker.number == 0
        tasks = self._tasks(worker)
        submitted = worker.moved()  # bytes
        while not self._settings.is_stopped:
            if is_first:
                self._rescue_unread()
            while submitted - worker.moved() < 2 * self._request:
                has_again = is_first and self._again
                task = self._again.popleft() if has_again else next(tasks, None)
                if task is None:
                    break
                worker.submit(task)
                submitted += task[2] - task[1]
            if not worker.in_flight:
                break
            submitted -= self._wait(worker)
            if is_first:
                self._report()
        if is_first:
            self._raise_failure()

    def _wait(self, worker: _Worker) -> int:
        """Wait until requests of a worker are done, bounded by the copy's timeout.

        Returns:
            How many bytes of those requests were not moved.
        """
        is_first = worker.number == 0
        max_wait = TICK if is_first and self._settings.progress is not None else None
        timer = IdleTimer(self, self._settings.timeout)
        while not self._settings.is_stopped:
            # Before each wait: the one that a loss has ended may also have reported requests.
            self._source.note_losses(worker.queue)
            self._target.note_losses(worker.queue)
            done, count = worker.queue.wait(1, timer.remaining(max_wait))
            unmoved = sum(self._finish_task(worker, done[i]) for i in range(count))
            worker.queue.take(done, count)
            if count:
                return unmoved
            if timer.is_over():
                raise late(self._settings.timeout)
            if is_first:
                self._report()
                if self._unread:
                    return 0
        return 0

    def last_moved(self) -> float:
        """When a byte of the copy last moved, by time.monotonic()."""
        queues = (worker.queue.last_moved() for worker in list(self._workers))
        return max(self._source.last_moved(), self._target.last_moved(), *queues)

    def _finish_task(self, worker: _Worker, done: Any) -> int:
        """Note that a request is done; returns how many of its bytes were not moved."""
        _, start, stop = worker.in_flight.pop(done.token)
        if not done.error:
            return 0
        piece = done.offset, done.length or stop - start, done.error
        if done.side != SOURCE:
            raise self._target.failure(done.command, *piece)
        if self._source.is_lost(worker.queue):
            raise self._source.failure(READ, *piece)
        # What has succeeded is copied again, with the rest: see _rescue_unread.
        data = done.moved - done.zeroed
        written = 0 if self._target.discards else data
        moved = Counts(-data, -done.zeroed, -done.moved, -written)
        self._unread.append(_Unread(start, stop, *piece, moved))
        self._workers[0].queue.wake()
        return int(stop - start - done.moved)

    def _rescue_unread(self) -> None:
        """Read around what could not be read, and have the rest of these requests copied again."""
        while self._unread:
            one = self._unread.popleft()
            self._adjustment = _sum(self._adjustment, one.moved)
            before = len(self._settings.bad)
            data = self._source.rescued(one.offset, one.length, one.errnum)
            self._write(data, one.offset, self._settings.bad[before:])
            self._again.extend(self._copy_tasks(one.start, one.offset))
            self._again.extend(self._copy_tasks(one.offset + one.length, one.stop))
            self._report()

    def _tasks(self, worker: _Worker) -> Iterator[Task]:
        """What a worker asks its queue for."""
        while True:
            spans = self._take()
            if not spans:
                return
            holes = self._holes(spans[0][0], spans[-1][1], worker)
            hole = next(holes, None)
            for at, stop in spans:
                while hole is not None and hole[0] < stop:
                    first, last = max(hole[0], at), min(hole[1], stop)
                    if first < last:
                        yield from self._copy_tasks(at, first)
                        yield ZERO, first, last
                        at = last
                    if hole[1] > stop:
                        break  # it reaches into the next span
                    hole = next(holes, None)
                yield from self._copy_tasks(at, stop)

    def _copy_tasks(self, start: int, stop: int) -> Iterator[Task]:
        """Requests to copy a range, which end at multiples of their size, and so do the blocks."""
        while start < stop:
            end = min(start - start % self._request + self._request, stop)
            yield COPY, start, end
            start = end

    def _take(self) -> list[tuple[int, int]]:
        """Take the next parts of the disk that no worker has taken: start and stop of each.

        Small parts are taken together, so that their holes are asked for at once.
        """
        taken: list[tuple[int, int]] = []
        room = self._range
        with self._lock:
            todo = self._todo
            end = todo[0][0] // _MAX_RANGE * _MAX_RANGE + _MAX_RANGE if todo else 0
            while todo and room > 0 and todo[0][0] < end:
                start, stop = todo.popleft()
                whole = max(room - room % self._request, self._request)
                limit = min(start - start % self._request + whole, end)
                if stop > limit:
                    todo.appendleft((limit, stop))
                    stop = limit
                taken.append((start, stop))
                room -= stop - start
        return taken

    def _holes(self, start: int, stop: int, worker: _Worker) -> Iterator[tuple[int, int]]:
        """The whole blocks of a part of the disk that the source reports to read as zeroes."""
        if not self._settings.sparse:
            return
        block = self._block
        for first, last in self._source.zeroes(start, stop, worker.number):
            first += -first % block
            if last != self._source.size:
                last -= last % block
            if first < last:
                yield first, last

    def _copy_edges(self) -> None:
        """Copy what fills a block only in part; see _align."""
        for start, stop in self._edges:
            self._settings.check()
            before = len(self._settings.bad)
            data = self._source.read_at(memoryview(bytearray(stop - start)), start)
            self._write(data, start, self._settings.bad[before:])
            self._report()

    def _write(self, data: memoryview, offset: int, bad: list[tuple[int, int]]) -> None:
        """Write what was read outside of the queues; `bad` ranges of it could not be read."""
        at = 0
        for start, length in sorted(bad):
            start -= offset
            self._write_part(data[at:start], offset + at, is_bad=False)
            self._write_part(data[start : start + length], offset + start, is_bad=True)
            at = start + length
        self._write_part(data[at:], offset + at, is_bad=False)

    def _write_part(self, data: memoryview, offset: int, is_bad: bool) -> None:
        size = len(data)
        zeroed, written = write_runs(self._target, data, offset, self._block)
        counts = (
            Counts(0, size, 0, written) if is_bad else Counts(size - zeroed, zeroed, size, written)
        )
        self._adjustment = _sum(self._adjustment, counts)

    def _report(self, is_last: bool = False) -> None:
        """Call the caller's progress, if it is time to do so."""
        if self._settings.progress is None:
            return
        now = monotonic()
        if is_last:
            self._settings.progress(self._total, self._total)
        elif now - self._reported_at >= TICK:
            self._reported_at = now
            adjustment = self._adjustment.copied + self._adjustment.zeroed
            moved = adjustment + sum(worker.moved() for worker in list(self._workers))
            # The figure never decreases, though a request that is copied again moves less.
            self._reported = max(self._reported, moved)
            self._settings.progress(self._reported, self._total)


class _Worker:
    """A queue, and the thread that uses it.

    Attributes:
        thread: None for the first worker: that is the calling thread.
        in_flight: What the queue was asked for, and has not finished, by token.
    """

    def __init__(self, number: int, queue: ShimQueue) -> None:
        self.number = number
        self.queue = queue
        self.thread: BackgroundThread | None = None
        self.in_flight: dict[int, Task] = {}
        self._last_token = 0

    def submit(self, task: Task) -> None:
        """Ask the queue for something."""
        operation, start, stop = task
        self._last_token += 1
        self.in_flight[self._last_token] = task
        self.queue.submit(operation, self._last_token, ffi.NULL, stop - start, start, 0)

    def moved(self) -> int:
        """How many bytes the queue has copied or zeroed."""
        return int(lib.nbdqueue_copied(self.queue.q) + lib.nbdqueue_zeroed(self.queue.q))

    def counts(self) -> Counts:
        """What the queue has done."""
        q = self.queue.q
        moved = lib.nbdqueue_copied(q), lib.nbdqueue_zeroed(q)
        return Counts(*moved, lib.nbdqueue_read(q), lib.nbdqueue_written(q))


class _Unread(namedtuple("_Unread", ("start", "stop", "offset", "length", "errnum", "moved"))):
    """A request of which a piece could not be read.

    It has the request's range; the piece; and the Counts by which to correct those of the queues,
    as the whole request is copied again.
    """

    __slots__ = ()


def _sum(a: Counts, b: Counts) -> Counts:
    return Counts(*map(sum, zip(a, b)))


def _result(counts: Counts, bad: list[tuple[int, int]]) -> Copied:
    """What the caller gets."""
    result = Copied(counts.copied, counts.zeroed)
    result.read, result.written = counts.read, counts.written
    if bad:
        ranges = merged([(start, length, 0) for start, length in bad])
        result.bad = tuple((start, length) for start, length, _ in ranges)
    return result


def _minimum(queue: ShimQueue, side: int) -> int:
    """The minimum block size of a side, in bytes."""
    return int(lib.nbdqueue_minimum(queue.q, side))
