# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy: disks and files copied with many commands in flight.

Between disks and files the shim's queue does the work: each command that was read is written by C.
The calling thread begins on the first connection.  Further connections are made beside it; with
those that come, other threads join, each with a queue of its own.  They take ranges of the disk,
one after the other, until none is left.

What cannot be read is left to the calling thread, which reads around it (rescue.py).

A stream is copied by one thread, in order (streaming.py).
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from collections import deque, namedtuple
from contextlib import ExitStack, suppress
from functools import partial
from time import monotonic

from nbd._binding.convert import as_seconds
from nbd._binding.errors import Error, Timeout
from nbd._binding.shim import ffi, lib
from nbd._disks.background import BackgroundThread
from nbd._disks.connect import CLOSE_TIMEOUT
from nbd._disks.copystream import copy_stream
from nbd._disks.diskendpoint import QUIET, TICK, Disk, late
from nbd._disks.endpoints import File, Stream, is_same, open_end, processors
from nbd._disks.queue import (
    COPY,
    MAX_DEPTH,
    PIECE,
    READ,
    SOURCE,
    TARGET,
    WRITE,
    ZERO,
    IdleTimer,
    ShimQueue,
    as_count,
)
from nbd._disks.rescue import await_some, failure, rescued, short_queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Union

    from nbd._binding.methods import NBD
    from nbd._disks.endpoints import Anything, End

    Progress = Callable[[int, Union[int, None]], object]
    OnError = Callable[[int, int, Error], object]
    # What an engine was asked for: an operation, start and stop.
    Asked = tuple[int, int, int]

_DEPTH = 16
#: The largest request to copy, which is reported to Python as one.
_REQUEST = 8 * 1024 * 1024
_MIN_RANGE = 8 * 1024 * 1024
_MAX_RANGE = 128 * 1024 * 1024
#: How many seconds a copy that has failed waits for replies: nbdkit 1.32 can abort, for all of its
#: clients, if it cannot send them.
_GRACE = 1.0
#: How long nothing may move meanwhile if nbd.Timeout is what has failed.
_SHORT_QUIET = 0.1


_Copied = namedtuple("_Copied", ("copied", "zeroed"))


class Copied(_Copied):
    """What nbd.copy has done: a tuple of two numbers of bytes.

    Attributes:
        copied: How many were read and written.
        zeroed: How many became zeroes without being read: the source has a hole there, or cannot
            read them.
        bad: The ranges that the source cannot read, as a tuple of (offset, length) in order; it is
            empty unless on_error has continued.
    """

    __module__ = "nbd"

    copied: int
    zeroed: int
    bad: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        bad = f", bad={self.bad}" if self.bad else ""
        return f"Copied(copied={self.copied}, zeroed={self.zeroed}{bad})"


def copy(
    source: Anything,
    target: Anything,
    *,
    connections: int | None = None,
    depth: int | None = None,
    sparse: bool = True,
    progress: Progress | None = None,
    timeout: float | None = None,
    flush: bool = True,
    on_error: OnError | None = None,
) -> Copied:
    """Copy a whole disk.

    Source and target are each one of: a URI; a connected nbd.NBD; the command line of a server, as
    a list of str; the path of a file or block device; an open binary file, which is copied from its
    position, or to it.

    A file that is named by its path is made, or emptied, first.  A disk, a block device and an open
    file keep what follows the copy.  What is written to a file is sent on to its disk at once, and
    then leaves the system's cache, so that a large copy does not fill it.

    Anything with a binary read or write method is copied as a stream, in order: a pipe, a socket, a
    file that was opened for appending, an io.BytesIO.  What the buffer of an open file holds is a
    part of it.  Afterwards its position is just past the copied bytes.  A copy that fails flushes
    nothing, leaves the position of an open file where it was, and loses what it has read from a
    stream.

    Args:
        connections: How many connections to make at most to each server, if it allows several
            (nbd.NBD.can_multi_conn).  None is one for each processor, up to 4.  The copy begins on
            the first; others join while it runs, and those that never come are not waited for.
        depth: How many commands may be in flight at once, of up to 256 KiB each; 16 if None.  More
            help where a server takes long to answer: over a slow network, for instance.  A thread
            that joins with a further connection has its share of them in addition.
        sparse: Do not read the source's holes, but make zeroes of them, and holes if the target can
            have some.  With False, everything is read and written.
        progress: Called as progress(done, total), in bytes, at most ten times a second and once at
            the end.  total is None if the source is a stream whose size is not known.
        timeout: Raise nbd.Timeout when no byte has moved for this many seconds.  It bounds each
            connect and every wait for a server, a FIFO, a pipe, a socket or a terminal; the
            methods of other objects wait as they do.  None is for ever or, with an nbd.NBD, the
            handle's own timeout.
        flush: Have the target on its disk when the copy returns: NBD's flush, or fdatasync.
        on_error: Called as on_error(offset, length, error) for each range that the source cannot
            read, in bytes and with the nbd.Error, in the calling thread.  If it returns true, the
            copy continues, with zeroes in that place of the target; else the error is raised.  The
            range is exact: what has failed is read again in parts, down to the source's minimum
            block size, or to 512 bytes.

    Returns:
        How many bytes were copied, how many were zeroed, and as `bad` the ranges that were bad.

    Raises:
        nbd.Error: A server cannot be reached, the target is smaller than the source or is
            read-only, or a command has failed: the message names the side and the range.
        nbd.Timeout: A server does not answer.
        OSError: A file cannot be opened.
        ValueError: An argument is out of range, or source and target are one file.

    Example:
        >>> nbd.copy(["nbdkit", "-s", "memory", "1M"], "disk.img")
        Copied(copied=0, zeroed=1048576)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
    settings = Settings(connections, depth, sparse, progress, timeout, flush, on_error)
    with Ends() as ends:
        source_end = ends.open(source, SOURCE, settings)
        target_end = ends.open(target, TARGET, settings)
        return Job(source_end, target_end, settings).run()


class Settings:
    """What the caller of a copy has asked for.

    Attributes:
        is_stopped: The copy has to end, because a part of it has failed, or the caller wants it.
        bad: The ranges that could not be read, in any order: (offset, length) of each.
    """

    def __init__(
        self,
        connections: int | None,
        depth: int | None,
        sparse: bool,
        progress: Progress | None,
        timeout: float | None,
        flush: bool,
        on_error: OnError | None = None,
    ) -> None:
        if on_error is not None and not callable(on_error):
            kind = type(on_error).__name__
            raise TypeError(f"on_error: a callable or None is needed, not {kind}")
        self.connections = _at_least_one("connections", connections)
        self.depth = _at_least_one("depth", depth) or _DEPTH
        self.sparse = bool(sparse)
        self.progress = progress
        self.timeout = None if timeout is None else as_seconds("timeout", timeout)
        self.flush = bool(flush)
        self.on_error = on_error
        self.is_stopped = False
        self.bad: list[tuple[int, int]] = []

    def check(self) -> None:
        """Raise if the copy has to end."""
        if self.is_stopped:
            raise Error("nbd.copy: it was stopped before its end", errno.ECANCELED)


def _at_least_one(name: str, value: object) -> int | None:
    return None if value is None else as_count(name, value)


class Ends:
    """The source and target of one copy, closed when it ends, whatever happens."""

    def __init__(self) -> None:
        self._opened: list[End] = []

    def open(self, what: Anything, end: int, settings: Settings) -> End:
        """Open one of them."""
        return self.own(open_end(what, end, settings))

    def own(self, opened: End) -> End:
        """Take over one that is open."""
        self._opened.append(opened)
        return opened

    def close(self) -> None:
        """Close them at once."""
        with ExitStack() as stack:  # it closes all of them, whatever one raises
            for one in self._opened:
                stack.callback(one.close)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _check(source: End, target: End) -> None:
    """Refuse what cannot be, before anything is written."""
    if is_same(source, target):
        raise ValueError(
            "source and target are the same file: the copy would read what it has written; "
            "copy to another one"
        )
    if target.is_read_only:
        raise Error("nbd.copy: the target is read-only; copy to another export", errno.EROFS)
    is_fixed = isinstance(target, Disk) or (isinstance(target, File) and not target.is_regular)
    if is_fixed and (target.size or 0) < (source.size or 0):
        raise Error(
            f"nbd.copy: the target has {target.size} bytes and the source {source.size}; "
            "copy to a larger one",
            errno.ENOSPC,
        )


class Job:
    """A copy between two open ends, which another thread may stop."""

    def __init__(self, source: End, target: End, settings: Settings) -> None:
        self._source = source
        self._target = target
        self._settings = settings
        self._copy: _Copy | None = None
        self._disks = [end for end in (source, target) if isinstance(end, Disk)]
        if settings.timeout is None:
            own = [d.handles[0].gettimeout() for d in self._disks if not d.is_ours]
            settings.timeout = min((seconds for seconds in own if seconds), default=None)
        for disk in self._disks:
            disk.settings = settings

    def run(self) -> Copied:
        """Copy everything."""
        source, target, settings = self._source, self._target, self._settings
        _check(source, target)
        if isinstance(source, Stream) or isinstance(target, Stream):
            copied, zeroed = copy_stream(source, target, settings)
        else:
            if isinstance(target, File):
                target.grow(source.size)
            self._copy = _Copy(source, target, settings)
            settings.check()
            copied, zeroed = self._copy.run()
        settings.check()
        if settings.flush or isinstance(target, Stream):
            target.flush()
        self._say_goodbye(copied + zeroed)
        return _result(copied, zeroed, settings.bad)

    def _say_goodbye(self, count: int) -> None:
        """End our connections in order, within a bounded time, and leave the caller's files."""
        for end in (self._source, self._target):
            end.say_goodbye(count)
        until = monotonic() + min(CLOSE_TIMEOUT, self._settings.timeout or CLOSE_TIMEOUT)
        for disk in self._disks:
            disk.await_goodbye(until)

    def stop(self) -> None:
        """Have `run` raise soon, in its thread; calls that wait on our own handles return."""
        self._settings.is_stopped = True
        if self._copy is not None:
            self._copy.wake()  # and before it closes the disks, it lets replies come
            return
        for disk in self._disks:
            disk.close()


def _result(copied: int, zeroed: int, bad: list[tuple[int, int]]) -> Copied:
    """What the caller gets; bad ranges were counted as copied."""
    lost = sum(length for _, length in bad)
    result = Copied(copied - lost, zeroed + lost)
    merged: list[tuple[int, int]] = []
    for start, length in sorted(bad):
        if merged and sum(merged[-1]) == start:
            merged[-1] = merged[-1][0], merged[-1][1] + length
        else:
            merged.append((start, length))
    if merged:
        result.bad = tuple(merged)
    return result


class _Unread(namedtuple("_Unread", ("start", "stop", "offset", "length", "errnum", "moved"))):
    """A request of which a piece could not be read: the request's range, and the piece."""

    __slots__ = ()


class _Copy:
    """A copy between disks and files, and what its threads share."""

    def __init__(self, source: Disk | File, target: Disk | File, settings: Settings) -> None:
        self._source = source
        self._target = target
        self._settings = settings
        self._size = source.size
        few = -(-source.size // _MIN_RANGE)  # what more would have nothing to do
        self._most = max(1, min(processors(), source.most_workers, target.most_workers, few))
        self._lock = allocate_lock()  # protects the ranges, and the start of workers
        self._engines: list[ShimQueue] = []
        self._asked: list[dict[int, Asked]] = []  # what each is doing, by token
        self._threads: list[BackgroundThread] = []
        self._failures: list[BaseException] = []
        # A copy that has failed waits until then for replies, or until nothing moves for so long.
        self._leave_at = 0.0
        self._quiet = _GRACE
        # What could not be read, and what is to be copied again because of that.
        self._unread: deque[_Unread] = deque()
        self._again: deque[Asked] = deque()
        self._adjusted = 0  # bytes that the engines have not copied, or have copied in vain
        self._reported = 0
        self._reported_at = 0.0

    def run(self) -> tuple[int, int]:
        """Copy, with the calling thread as the first worker.

        Returns:
            How many bytes were copied, and how many were zeroed.
        """
        try:
            self._begin()
            self._work_all()
            self._copy_rest()
            self._report(is_last=True)
        except BaseException as raised:
            self._stop(raised)
            self._drain(0)
            if self._failures and isinstance(raised, Error) and raised.errnum == errno.ECANCELED:
                raise self._failures[0] from None  # this is why it was stopped
            raise
        finally:
            copied, zeroed = self._end()
        if copied + zeroed != self._source.size:
            text = f"nbd.copy: {copied + zeroed} of {self._source.size} bytes were copied"
            raise Error(f"{text}: this is a fault of nbd.copy; report it", errno.EIO)
        return copied, zeroed

    def _begin(self) -> None:
        """Start on the connections that are there, and have others made."""
        with self._lock:
            self._start_worker()
            first = self._engines[0]
            self._block = max(_minimum(first, SOURCE), _minimum(first, TARGET))
            has_rest = self._size % _minimum(first, TARGET) != 0
            if has_rest and self._size != lib.nbdqueue_size(first.q, TARGET):
                self._size -= self._size % self._block  # the rest does not fill a block there
            self._range = self._length_of_ranges()
            self._next_start = 0
            self._start_workers()
        few = -(-self._size // _MIN_RANGE)
        for end in (self._source, self._target):
            if isinstance(end, Disk):
                end.start_joining(few - len(end.handles), self._join)

    def _length_of_ranges(self) -> int:
        """How much a worker takes at once."""
        length = min(max(self._size // (8 * self._most), _MIN_RANGE), _MAX_RANGE)
        return max(length - length % self._block, self._block)

    def _join(self, disk: Disk, handle: NBD) -> None:
        """Use a further connection; called by the thread that has made it."""
        disk.check_joining(handle)
        with self._lock:
            worker = len(disk.handles) % self._most
            if worker < len(self._engines):
                side = SOURCE if disk is self._source else TARGET
                self._engines[worker].add(side, handle)
            disk.handles.append(handle)  # from now on the disk closes it
            self._start_workers()

    def _start_workers(self) -> None:
        """Start the workers for which both sides have a connection.  The lock is held."""
        sides = (self._source, self._target)
        ready = min(len(e.handles) if isinstance(e, Disk) else self._most for e in sides)
        while len(self._engines) < min(ready, self._most):
            worker = self._start_worker()
            thread = BackgroundThread(partial(self._work_beside, worker), self._stop_at_exit)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left: the others do its work
                thread.cancel()

    def _start_worker(self) -> int:
        """Make the queue of one worker more; returns its number."""
        worker = len(self._engines)
        # The first one may stay alone.
        share = self._settings.depth if worker == 0 else self._settings.depth // self._most
        engine = ShimQueue(min(max(1, share), MAX_DEPTH), PIECE)
        try:
            self._source.add_to(engine, SOURCE, worker, self._most)
            self._target.add_to(engine, TARGET, worker, self._most)
            self._asked.append({})
            self._engines.append(engine)
        except BaseException:
            engine.close()
            raise
        return worker

    def _work_all(self) -> None:
        """Work until nothing is left, also for the other workers."""
        self._work(0)
        self._stop_joining()  # from now on no thread is started
        while True:
            is_alone = all(thread.cancel() or thread.join(0) for thread in self._threads)
            self._work(0)  # what the others could not read
            if is_alone:
                return
            for thread in self._threads:
                if not thread.cancel() and not thread.join(TICK):
                    break
            self._report()

    def _stop_joining(self) -> None:
        for end in (self._source, self._target):
            if isinstance(end, Disk):
                end.stop_joining()

    def _raise_failure(self) -> None:
        """Raise what has ended another worker."""
        if self._failures:
            raise self._failures[0]
        self._settings.check()

    def wake(self) -> None:
        """Have all workers look whether the copy has to end."""
        for engine in list(self._engines):
            engine.wake()

    def _stop(self, raised: BaseException) -> None:
        """End all workers, because one has failed."""
        self._settings.is_stopped = True
        if isinstance(raised, Timeout):
            self._quiet = _SHORT_QUIET
        elif not isinstance(raised, Error):
            self._quiet = QUIET  # perhaps the caller has stopped it because a server hangs
        self._leave_at = self._leave_at or monotonic() + _GRACE
        self.wake()

    def _stop_at_exit(self) -> None:
        """The program ends while a daemon thread is copying."""
        self._settings.is_stopped = True
        self.wake()

    def _drain(self, worker: int) -> None:
        """Let the replies to what a worker has in flight come, for a moment."""
        if worker >= len(self._engines):
            return
        engine = self._engines[worker]
        for token in list(self._asked[worker]):
            engine.cancel(token)
        until = self._leave_at or monotonic() + _GRACE
        timer = IdleTimer(engine, self._quiet)
        while lib.nbdqueue_length(engine.q) and not timer.is_over():
            left = until - monotonic()
            if left <= 0:
                return
            engine.take(*engine.wait(1, min(left, timer.remaining())))

    def _end(self) -> tuple[int, int]:
        """End the threads and the queues; returns how many bytes were copied and zeroed."""
        try:
            self._stop_joining()
            for thread in self._threads:
                if not thread.cancel():
                    thread.join()
        finally:
            copied = self._adjusted + sum(lib.nbdqueue_copied(e.q) for e in self._engines)
            zeroed = sum(lib.nbdqueue_zeroed(e.q) for e in self._engines)
            for engine in self._engines:
                engine.close()  # who keeps an exception keeps its frames, but not their queues
            self._failures.clear()  # their tracebacks refer to self
        return copied, zeroed

    def _work_beside(self, worker: int) -> None:
        """The work of another thread than the calling one."""
        try:
            self._work(worker)
        except BaseException as raised:
            self._failures.append(raised)
            self._stop(raised)
        if self._settings.is_stopped:
            with suppress(Exception):  # the first failure is the one that is raised
                self._drain(worker)

    def _work(self, worker: int) -> None:
        """Copy ranges until none is left."""
        engine, asked = self._engines[worker], self._asked[worker]
        requests = self._requests(worker)
        token, total = 0, _moved(engine)
        while not self._settings.is_stopped:
            if worker == 0:
                self._rescue_unread()
            while total - _moved(engine) < 2 * _REQUEST:
                has_again = worker == 0 and self._again
                request = self._again.popleft() if has_again else next(requests, None)
                if request is None:
                    break
                operation, start, stop = request
                token += 1
                asked[token] = request
                engine.submit(operation, token, ffi.NULL, stop - start, start, 0)
                total += stop - start
            if not asked:
                break
            total -= self._wait(engine, worker)
            if worker == 0:
                self._report()
        if worker == 0:
            self._raise_failure()

    def _wait(self, engine: ShimQueue, worker: int) -> int:
        """Wait for requests to be done, but not longer than the caller's timeout.

        Returns:
            How many bytes of those that are done were not moved.
        """
        moves: Any = self  # it has last_moved(), as an engine has
        timer = IdleTimer(moves, self._settings.timeout)
        while not self._settings.is_stopped:
            is_reporting = worker == 0 and self._settings.progress is not None
            done, count = engine.wait(1, timer.remaining(TICK if is_reporting else None))
            lost = sum(self._finish(engine, worker, done[i]) for i in range(count))
            engine.take(done, count)
            if count:
                return lost
            if timer.is_over():
                raise late(self._settings.timeout)
            if worker == 0:
                self._report()
                if self._unread:
                    return 0
        return 0

    def last_moved(self) -> float:
        """When a byte of the copy last moved, by time.monotonic()."""
        seen = [engine.last_moved() for engine in list(self._engines)]
        asked = [e.last_moved() for e in (self._source, self._target) if isinstance(e, Disk)]
        return max(seen + asked)

    def _finish(self, engine: ShimQueue, worker: int, done: Any) -> int:
        """Note that a request is done; returns how many of its bytes were not moved."""
        operation, start, stop = self._asked[worker].pop(done.token)
        if not done.error:
            return 0
        place = done.offset, done.length or stop - start, done.error
        if done.side != SOURCE:
            raise failure(ZERO if operation == ZERO else WRITE, self._target, *place)
        if isinstance(self._source, Disk) and self._source.is_lost(engine):
            raise failure(READ, self._source, *place)
        self._unread.append(_Unread(start, stop, *place, done.moved))
        self._engines[0].wake()
        return int(stop - start - done.moved)

    def _rescue_unread(self) -> None:
        """Read around what could not be read, and have the rest of these requests copied again."""
        while self._unread:
            one = self._unread.popleft()
            self._adjusted -= one.moved
            data = rescued(self._source, one.offset, one.length, self._settings, one.errnum)
            self._write(data, one.offset)
            self._adjusted += one.length
            self._again.extend(_split(one.start, one.offset))
            self._again.extend(_split(one.offset + one.length, one.stop))
            self._report()

    def _requests(self, worker: int) -> Iterator[Asked]:
        """What a worker asks its queue for."""
        while True:
            with self._lock:
                start = self._next_start
                stop = self._next_start = min(start + self._range, self._size)
            if start == stop:
                return
            at = start
            for hole, end in self._holes(start, stop, worker):
                yield from _split(at, hole)
                yield ZERO, hole, end
                at = end
            yield from _split(at, stop)

    def _holes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The whole blocks of a range that the source reports to be zeroes."""
        if not self._settings.sparse:
            return
        block = self._block
        for first, last in self._source.zeroes(start, stop, worker):
            first += -first % block
            if last != self._source.size:
                last -= last % block
            if first < last:
                yield first, last

    def _copy_rest(self) -> None:
        """Copy what is less than a block of the target: it has to be merged there."""
        rest = self._source.size - self._size
        if rest:
            self._write(self._read(self._size, rest), self._size)
            self._adjusted += rest

    def _read(self, offset: int, length: int) -> memoryview:
        """Read a range of the source."""
        view = memoryview(bytearray(length))
        if isinstance(self._source, Disk):
            with short_queue(self._source) as queue:
                queue.read(view, offset)
                error: Any = await_some(queue, self._settings)[0].error
                if error is not None and self._source.is_lost(queue._shim_queue):
                    raise failure(READ, self._source, offset, length, error.errnum)
        else:
            try:
                self._source.read_into(view, offset)
                error = None
            except OSError as reason:
                error = Error("", reason.errno or 0)
        if error is None:
            return view
        return rescued(self._source, offset, length, self._settings, error.errnum)

    def _write(self, data: memoryview, offset: int) -> None:
        """Write to the target."""
        if isinstance(self._target, File):
            self._target.write(data, offset)
            return
        with short_queue(self._target) as queue:
            queue.write(data, offset)
            error = await_some(queue, self._settings)[0].error
        if error is not None:
            raise failure(WRITE, self._target, offset, len(data), error.errnum)

    def _report(self, is_last: bool = False) -> None:
        """Call the caller's progress, if it is time."""
        if self._settings.progress is None:
            return
        now = monotonic()
        if is_last:
            self._settings.progress(self._source.size, self._source.size)
        elif now - self._reported_at >= TICK:
            self._reported_at = now
            # What is copied again is not taken back.
            moved = self._adjusted + sum(map(_moved, list(self._engines)))
            self._reported = max(self._reported, moved)
            self._settings.progress(self._reported, self._source.size)


def _split(start: int, stop: int) -> Iterator[Asked]:
    """Requests to copy a range."""
    for at in range(start, stop, _REQUEST):
        yield COPY, at, min(at + _REQUEST, stop)


def _minimum(engine: ShimQueue, end: int) -> int:
    return int(lib.nbdqueue_minimum(engine.q, end))


def _moved(engine: ShimQueue) -> int:
    """How many bytes an engine has copied or zeroed."""
    return int(lib.nbdqueue_copied(engine.q) + lib.nbdqueue_zeroed(engine.q))
