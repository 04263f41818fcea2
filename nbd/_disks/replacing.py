# SPDX-License-Identifier: LGPL-2.0-or-later
"""Replacing: the lost connections of a copy's disk are replaced in all queues that use them."""

from __future__ import annotations

import errno
import os
from _thread import RLock
from time import sleep

from nbd._binding.errors import ClosedHandle, Error
from nbd._disks.endpoints import BoundedWait
from nbd._disks.queue import TARGET, Queue
from nbd._disks.reconnect import JOURNAL, Reconnector, other_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nbd._binding.methods import NBD
    from nbd._disks.endpoints import Settings
    from nbd._disks.handles import Maker
    from nbd._disks.queue import ShimQueue

#: Seconds between two looks at whether a connection was replaced.
_PAUSE = 0.01


class Replacing:
    """Has the lost connections of a disk made again, and puts the new ones in their places.

    Args:
        handles: The connections of the disk.  A new one takes the place of the lost one there, too.
        server: By which new ones can be made.
        settings: Those of the copy; it has to reconnect.
        name: What messages call the disk.

    Attributes:
        failure: Why a lost connection was not replaced, and the disk has no other; or None.
    """

    def __init__(
        self, handles: list[NBD], server: str | Maker, settings: Settings, name: str
    ) -> None:
        self._handles = handles
        self._settings = settings
        self._what = f"nbd.copy: the connection to {name}"
        self._lock = RLock()  # protects `handles` and the queues while a place changes its handle
        self._queues: list[tuple[ShimQueue, int]] = []
        self._losses: dict[ShimQueue, int] = {}
        self._is_stopped = False
        self._tried: list[NBD] = []  # for the lost one, but they were lost before all queues had it
        self._answers = 0  # outside of queues
        self.failure: Error | None = None
        self._reconnector = Reconnector(
            server,
            settings.reconnect or 0.0,
            settings.timeout,
            self._what,
            handles[0],
            self._replace,
            self._give_up,
        )

    def add_to(
        self, queue: ShimQueue, side: int, places: range, bound: int, wait: BoundedWait
    ) -> None:
        """Give a queue the connections in these places of `handles`.

        Raises:
            nbd.Error: A lost connection was not replaced in time, or the copy was stopped.
            nbd.Timeout: This has taken longer than the copy's timeout.
        """
        self.enroll(queue, side, bound)
        for place in places:
            self._use_live(place, wait, lambda handle: queue.add(side, handle))

    def queue(self, depth: int, piece: int, wait: BoundedWait) -> Queue:
        """Return a queue on the first connection, with a journal of data; raises as add_to."""
        made: list[Queue] = []

        def make(handle: NBD) -> None:
            made.append(Queue(handle, depth=depth, piece=piece))
            self.enroll(made[0]._shim_queue, TARGET, JOURNAL)

        self._use_live(0, wait, make)
        return made[0]

    def _use_live(self, place: int, wait: BoundedWait, use: Callable[[NBD], None]) -> None:
        """Call `use` with a connection that is not lost and is not replaced meanwhile."""
        while True:
            handle = self.live(place, wait)
            with self._lock:
                if handle is not self._handles[place]:
                    continue
                try:
                    use(handle)
                    return
                except Error:
                    if is_alive(handle):
                        raise

    def enroll(self, queue: ShimQueue, side: int, bound: int) -> None:
        """Replace what a queue loses from now on; it has no request yet."""
        queue.set_reconnect(side, bound)
        with self._lock:
            self._queues = [one for one in self._queues if not one[0].is_dropped]
            self._queues.append((queue, side))
            self._losses = {one: self._losses.get(one, 0) for one, _ in self._queues}

    def live(self, place: int, wait: BoundedWait) -> NBD:
        """Return the connection in a place, as soon as it is not lost; raises as add_to."""
        while True:
            handle = self._handles[place]
            if is_alive(handle):
                return handle
            self.report(handle, errno.ENOTCONN)
            if self.failure is not None:
                raise self.raised()
            sleep(min(wait.slice(), _PAUSE))
            if handle is self._handles[place]:
                wait.check()

    def note_losses(self, queue: ShimQueue) -> None:
        """Have the connections made again that a queue has lost since the last call."""
        losses = queue.losses()
        if losses == self._losses.get(queue, losses):
            return
        with self._lock:  # a new handle is in its place before its loss is looked for
            for handle in list(self._handles):
                errnum = queue.error_of(handle)
                if errnum:
                    self.report(handle, errnum)
            # Last: if a signal handler raises, the next call looks again.
            self._losses[queue] = losses

    def note_joined(self, handle: NBD) -> None:
        """Have a further connection made again that was lost before it was in `handles`."""
        if not is_alive(handle):
            self.report(handle, errno.ENOTCONN)

    def report(self, handle: NBD, errnum: int) -> None:
        """Have a connection made again that was found to be lost."""
        answers = sum(queue.answers(side) for queue, side in list(self._queues))
        error = Error(os.strerror(errnum), errnum)
        with self._lock:
            if handle in self._handles:  # it was not replaced meanwhile
                self._reconnector.lost(handle, error, self._answers + answers)

    def count_answer(self) -> None:
        """Note that the server has answered outside of a queue."""
        self._answers += 1

    def raised(self) -> Error:
        """The failure, to be raised: without the traceback that it may have already."""
        failure = self.failure or Error("", errno.ENOTCONN)
        return Error(failure.string, failure.errnum)

    def stop(self) -> None:
        """Make no connection again any more, without waiting."""
        self._is_stopped = True
        self._reconnector.stop()

    def _replace(self, lost: NBD, made: NBD) -> None:
        with self._lock:
            if self._is_stopped:
                raise Error("the copy has ended", errno.ECANCELED)
            self._tried.append(made)
            self._use(lost, made)
            self._tried.clear()
            for place, handle in enumerate(self._handles):
                if handle is lost:
                    self._handles[place] = made
        if self._is_stopped:  # in this order: the disk closes it, or this does
            made.__exit__(None, None, None)
        lost.__exit__(None, None, None)

    def _use(self, lost: NBD, other: NBD) -> None:
        """Have the queues that had a connection use another."""
        old = [lost, *(handle for handle in self._tried if handle is not other)]
        for queue, side in self._queues:
            if queue.is_dropped or not any(map(queue.has, old)):
                continue
            try:
                if not queue.has(other):
                    queue.add(side, other)
            except ValueError as reason:
                if not queue.is_dropped:
                    raise other_disk(self._what, str(reason)) from None
            for handle in old:
                queue.forget(handle)
            queue.wake()

    def _give_up(self, lost: NBD, error: Error) -> None:
        """Use another connection instead of a lost one, or fail if there is none."""
        with self._lock:
            alive = [handle for handle in self._handles if is_alive(handle)]
            if alive and error.errnum != errno.ESTALE:
                self._use(lost, alive[0])
                self._tried.clear()
                for place, handle in enumerate(self._handles):
                    if handle is lost:
                        self._handles[place] = alive[0]
                lost.__exit__(None, None, None)
                return
            self.failure = error
            for queue, side in self._queues:
                if not queue.is_dropped:
                    queue.give_up(side, error.errnum)
                    queue.wake()


def is_alive(handle: NBD) -> bool:
    """Whether a connection was not found to be lost."""
    try:
        return not handle.aio_is_dead() and not handle.aio_is_closed()
    except ClosedHandle:
        return False
