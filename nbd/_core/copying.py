# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy: disks and files copied with many commands in flight.

Between disks and files the shim's queue does the work: each command that was read is written by C.
Several threads share a copy, each with a queue and connections of its own; the calling thread is
one of them.  They take ranges of the disk, one after the other, until none is left.

A stream is copied by one thread, in order, with nbd.open on the other side.
"""

from __future__ import annotations

import errno
import os
from collections import namedtuple

from nbd._core.convert import as_number, as_seconds
from nbd._core.ends import Disk, File, Stream, is_same, open_end, processors
from nbd._core.engine import COPY, SOURCE, TARGET, ZERO, Engine
from nbd._core.errors import Error, Timeout
from nbd._core.shim import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Union

    from nbd._core.ends import Anything, End

    Progress = Callable[[int, Union[int, None]], object]

_PIECE = 256 * 1024
_DEPTH = 16
#: The most that one request copies: Python hears of a copy once for so many bytes.
_REQUEST = 8 * 1024 * 1024
_LEAST_RANGE = 8 * 1024 * 1024
_MOST_RANGE = 128 * 1024 * 1024
#: Seconds between two calls of `progress`.
_TICK = 0.1


_Copied = namedtuple("_Copied", ("copied", "zeroed"))


class Copied(_Copied):
    """What nbd.copy has done, in bytes.

    Attributes:
        copied: So many were read and written.
        zeroed: So many were not read, because the source has a hole there.
    """

    __module__ = "nbd"
    __slots__ = ()

    copied: int
    zeroed: int


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
) -> Copied:
    """Copy a whole disk.

    Source and target are each one of: a URI; a connected nbd.NBD; the command line of a server, as
    a list of str; the path of a file or block device; an open binary file, which is copied from its
    position, or to it.

    A file that is named by its path is made, or emptied, first.  A disk, a block device and an open
    file keep what follows the copy.  What is written to a file goes on to the disk at once, and
    then leaves the system's cache, so that a large copy does not fill it.

    Args:
        connections: How many connections to make to each server, if it allows several
            (nbd.NBD.can_multi_conn).  None is one for each processor, up to 4.
        depth: How many commands may be in flight at once, of up to 256 KiB each; 16 if None.  More
            help where a server takes long to answer: over a slow network, for instance.
        sparse: Do not read the source's holes, but make zeroes of them, and holes if the target can
            have some.  With False, everything is read and written.
        progress: Called as progress(done, total), in bytes, at most ten times a second and once at
            the end.  total is None if the source is a stream whose size is not known.
        timeout: Raise nbd.Timeout when nothing was copied for so many seconds.
        flush: Have the target on its disk when the copy returns: NBD's flush, or fdatasync.

    Returns:
        How many bytes were copied, and how many were zeroed.

    Raises:
        nbd.Error: A server cannot be reached, the target is smaller than the source or is
            read-only, or a command has failed: the message names the side and the offset.
        OSError: A file cannot be opened.
        ValueError: An argument is out of range, or source and target are one file.

    Example:
        >>> nbd.copy(["nbdkit", "-s", "memory", "1M"], "disk.img")
        Copied(copied=0, zeroed=1048576)

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_block_status.
    """
    settings = Settings(connections, depth, sparse, progress, timeout, flush)
    with Ends() as ends:
        source_end = ends.open(source, SOURCE, settings)
        target_end = ends.open(target, TARGET, settings)
        return Job(source_end, target_end, settings).run()


class Settings:
    """What the caller of a copy has asked for.

    Attributes:
        is_stopped: The copy has to end, because a part of it has failed, or the caller wants it.
    """

    def __init__(
        self,
        connections: int | None,
        depth: int | None,
        sparse: bool,
        progress: Progress | None,
        timeout: float | None,
        flush: bool,
    ) -> None:
        self.connections = _at_least_one("connections", connections)
        self.depth = _at_least_one("depth", depth) or _DEPTH
        self.sparse = bool(sparse)
        self.progress = progress
        self.timeout = None if timeout is None else as_seconds("timeout", timeout)
        self.flush = bool(flush)
        self.is_stopped = False

    def check(self) -> None:
        """Raise if the copy has to end."""
        if self.is_stopped:
            raise Error("nbd.copy: it was stopped before its end", errno.ECANCELED)


def _at_least_one(name: str, value: object) -> int | None:
    if value is None:
        return None
    number = as_number(name, value)
    if number < 1:
        raise ValueError(f"{name}: {number} is not at least 1")
    return number


class Ends:
    """The source and target of one copy, closed when it ends, whatever happens."""

    def __init__(self) -> None:
        self._opened: list[End] = []

    def open(self, what: Anything, end: int, settings: Settings) -> End:
        """Open one of them."""
        return self.own(open_end(what, end, settings.connections, settings.timeout))

    def own(self, opened: End) -> End:
        """Take over one that is open."""
        self._opened.append(opened)
        return opened

    def close(self) -> None:
        """Close them at once."""
        for one in self._opened:
            one.close()

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _check(source: End, target: End) -> None:
    """Refuse what cannot be, before anything is written."""
    if is_same(source, target):
        raise ValueError("source and target are the same file")
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

    def run(self) -> Copied:
        """Copy everything."""
        source, target, settings = self._source, self._target, self._settings
        _check(source, target)
        if isinstance(source, Stream) or isinstance(target, Stream):
            from nbd._core.streaming import copy_stream

            done = Copied(*copy_stream(source, target, settings))
        else:
            if isinstance(target, File):
                target.grow(source.size)
            self._copy = _Copy(source, target, settings)
            settings.check()
            done = self._copy.run()
        settings.check()
        if settings.flush or isinstance(target, Stream):
            target.flush()
        source.say_goodbye(sum(done))
        target.say_goodbye(sum(done))
        return done

    def stop(self) -> None:
        """Have `run` raise soon, in its thread; calls that wait on our own handles come back."""
        self._settings.is_stopped = True
        if self._copy is not None:
            self._copy.wake()
        for end in (self._source, self._target):
            if isinstance(end, Disk):
                end.close()


class _Copy:
    """A copy between disks and files, and what its threads share."""

    def __init__(self, source: Disk | File, target: Disk | File, settings: Settings) -> None:
        self._source = source
        self._target = target
        self._settings = settings
        self._workers = min(processors(), source.most_workers, target.most_workers)
        self._engines: list[Engine] = []
        self._failures: list[BaseException] = []
        self._reported_at = 0.0

    def run(self) -> Copied:
        """Copy, with the calling thread as the first worker."""
        import threading

        copied = zeroed = 0
        depth = max(1, self._settings.depth // self._workers)
        for worker in range(self._workers):
            engine = Engine(depth, _PIECE)
            self._engines.append(engine)
            self._source.add_to(engine, SOURCE, worker, self._workers)
            self._target.add_to(engine, TARGET, worker, self._workers)
        first = self._engines[0]
        self._block = max(_minimum(first, SOURCE), _minimum(first, TARGET))
        self._size = self._source.size
        if self._size != lib.nbdqueue_size(first.q, TARGET):
            self._size -= self._size % self._block  # the rest does not fill a block of the target
        self._range = self._length_of_ranges()
        self._starts = iter(range(0, self._size, self._range))  # next() of it is atomic
        threads = [
            threading.Thread(target=self._work_beside, args=(worker,), name=f"nbd.copy-{worker}")
            for worker in range(1, self._workers)
        ]
        try:
            for thread in threads:
                thread.start()
            self._work(0)
            self._join(threads)
            rest = self._copy_rest()
        except BaseException:
            self._stop()
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for engine in self._engines:
                copied += lib.nbdqueue_copied(engine.q)
                zeroed += lib.nbdqueue_zeroed(engine.q)
                engine.end()  # who keeps an exception keeps its frames, but not their queues
            self._failures.clear()  # their tracebacks refer to self
        copied += rest
        self._report(is_last=True)
        return Copied(copied, zeroed)

    def _length_of_ranges(self) -> int:
        """How much a worker takes at once."""
        length = min(max(self._size // (8 * self._workers), _LEAST_RANGE), _MOST_RANGE)
        return max(length - length % self._block, self._block)

    def _join(self, threads: list[Any]) -> None:
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK)
                self._report()
        if self._failures:
            raise self._failures[0]
        self._settings.check()

    def wake(self) -> None:
        """Have all workers look whether the copy has to end."""
        for engine in list(self._engines):
            engine.wake()

    def _stop(self) -> None:
        """End the other workers: also one that waits in a call on one of our handles."""
        self._settings.is_stopped = True
        self.wake()
        # Not files: another worker may be using the number.
        for end in (self._source, self._target):
            if self._workers > 1 and isinstance(end, Disk):  # then all handles are ours
                end.close()

    def _work_beside(self, worker: int) -> None:
        """The work of another thread than the calling one."""
        try:
            self._work(worker)
        except BaseException as failure:
            self._failures.append(failure)
            self._settings.is_stopped = True
            self._engines[0].wake()

    def _work(self, worker: int) -> None:
        """Copy ranges until none is left."""
        engine = self._engines[worker]
        requests = self._requests(worker)
        is_ended = False
        asked = 0
        enough = 2 * _REQUEST
        while not self._settings.is_stopped:
            while not is_ended and asked - _moved(engine) < enough:
                request = next(requests, None)
                if request is None:
                    is_ended = True
                else:
                    operation, start, stop = request
                    engine.submit(operation, 0, ffi.NULL, stop - start, start, 0)
                    asked += stop - start
            if is_ended and not lib.nbdqueue_length(engine.q):
                return
            self._wait(engine, worker)
        if worker == 0 and self._failures:
            raise self._failures[0]

    def _wait(self, engine: Engine, worker: int) -> None:
        """Wait for requests to be done, but not longer than the caller's timeout."""
        from time import monotonic

        patience = self._settings.timeout
        before = _moved(engine)
        began = monotonic()
        while not self._settings.is_stopped:
            done, count = engine.wait(1, self._tick(worker))
            for i in range(count):
                if done[i].error:
                    raise _failure(done[i])
            engine.take(done, count)
            if worker == 0:
                self._report()
            if count:
                return
            if _moved(engine) != before:
                before, began = _moved(engine), monotonic()
            elif patience is not None and monotonic() - began >= patience:
                raise _late(patience)

    def _tick(self, worker: int) -> float:
        """How long to wait at once, in seconds; less than 0 is for ever."""
        ticks = [_TICK] if worker == 0 and self._settings.progress is not None else []
        if self._settings.timeout is not None:
            ticks.append(self._settings.timeout)
        return min(ticks, default=-1.0)

    def _requests(self, worker: int) -> Iterator[tuple[int, int, int]]:
        """What a worker asks its queue for: an operation, start and stop."""
        for start in self._starts:
            at, stop = start, min(start + self._range, self._size)
            for hole, end in self._holes(start, stop, worker):
                yield from _split(at, hole)
                yield ZERO, hole, end
                at = end
            yield from _split(at, stop)

    def _holes(self, start: int, stop: int, worker: int) -> Iterator[tuple[int, int]]:
        """The whole blocks of a range that the source tells to be zeroes."""
        if not self._settings.sparse:
            return
        block = self._block
        for first, last in self._source.zeroes(start, stop, worker):
            first += -first % block
            if last != self._source.size:
                last -= last % block
            if first < last:
                yield first, last

    def _copy_rest(self) -> int:
        """Copy what is less than a block of the target: it has to be merged there."""
        rest = self._source.size - self._size
        if rest == 0:
            return 0
        from nbd._core.queue import Queue

        data = bytearray(rest)
        if isinstance(self._source, File):
            data[:] = os.pread(self._source.fd, rest, self._source.base + self._size)
        else:
            with Queue(self._source.handles[:1]) as queue:
                queue.read(data, self._size)
                _finish(queue, self._settings.timeout)
        assert isinstance(self._target, Disk)  # a file has no blocks
        with Queue(self._target.handles[:1]) as queue:
            queue.write(data, self._size)
            _finish(queue, self._settings.timeout)
        return rest

    def _report(self, is_last: bool = False) -> None:
        """Call the caller's progress, if it is time."""
        if self._settings.progress is None:
            return
        from time import monotonic

        now = monotonic()
        if is_last:
            self._settings.progress(self._source.size, self._source.size)
        elif now - self._reported_at >= _TICK:
            self._reported_at = now
            self._settings.progress(sum(map(_moved, self._engines)), self._source.size)


def _finish(queue: Any, timeout: float | None) -> None:
    """Wait for the only request of a queue."""
    done = queue.wait(1, timeout)
    if not done:
        raise _late(timeout or 0)
    if done[0].error is not None:
        raise done[0].error


def _split(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Requests to copy a range."""
    for at in range(start, stop, _REQUEST):
        yield COPY, at, min(at + _REQUEST, stop)


def _minimum(engine: Engine, end: int) -> int:
    return int(lib.nbdqueue_minimum(engine.q, end))


def _moved(engine: Engine) -> int:
    """How many bytes an engine has copied or zeroed."""
    return int(lib.nbdqueue_copied(engine.q) + lib.nbdqueue_zeroed(engine.q))


def _failure(done: Any) -> Error:
    what = "reading the source" if done.end == SOURCE else "writing to the target"
    reason = os.strerror(done.error)
    return Error(f"nbd.copy: {what} failed at offset {done.offset}: {reason}", done.error)


def _late(seconds: float) -> Timeout:
    return Timeout(
        f"nbd.copy: nothing was copied for {seconds:g} seconds; try again, or allow more time",
        errno.ETIMEDOUT,
    )
