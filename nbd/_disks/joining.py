# SPDX-License-Identifier: LGPL-2.0-or-later
"""Further connections to a server, which join work that has begun on the first one.

More connections are an optimisation.  A thread makes them, one after the other; each that is there
is handed over.  One that never comes, as with a server that has no room for another client, costs
nothing: nobody waits for it, and `stop` abandons it.
"""

from __future__ import annotations

import os
from _thread import RLock
from contextlib import suppress

from nbd._disks.connect import connect
from nbd._disks.threads import Helper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nbd._binding.methods import NBD


class Joining:
    """Connections that are being made beside the program.

    `stop` does not wait for the thread, and the end of the program hardly, as the look-up of a
    host's name cannot be interrupted.  The thread refers to `add` until it ends: what should be
    collected earlier must not be reachable from there.

    Args:
        uri: The URI of the server.
        count: How many connections to make at most.
        timeout: How many seconds one connection may take; None is for ever.
        add: Called in the thread with each connected handle, which it takes over.  If it raises,
            the handle is closed and no other is made.  It must not wait for a lock that a caller
            of `stop` holds.
    """

    def __init__(
        self, uri: str, count: int, timeout: float | None, add: Callable[[NBD], object]
    ) -> None:
        self._uri = uri
        self._count = count
        self._timeout = timeout
        self._add = add
        self._process = os.getpid()
        self._lock = RLock()  # held while a handle is handed over
        self._is_stopped = False
        self._connecting: NBD | None = None
        self._thread = Helper(self._run, self.stop)

    def start(self) -> None:
        """Begin; called once."""
        # RuntimeError: the system has no thread left, or the program is ending.
        with suppress(RuntimeError):
            self._thread.start()

    def stop(self) -> None:
        """Make no further connection, and do not wait for one that is being made.

        Once this has returned, `add` is not called any more.  Stopping twice does nothing.
        """
        self._is_stopped = True
        if os.getpid() != self._process:
            return  # a fork has left the thread behind, perhaps with the lock
        with self._lock:
            connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.__exit__(None, None, None)  # this ends the call of the thread

    def _run(self) -> None:
        # Whatever is raised: the program does not need the connection.
        with suppress(Exception):
            for _ in range(self._count):
                self._hand_over(connect(self._uri, timeout=self._timeout, prepare=self._note))

    def _note(self, handle: NBD) -> None:
        """Remember a handle that is about to be connected, for `stop`."""
        with self._lock:
            self._check()
            self._connecting = handle

    def _hand_over(self, handle: NBD) -> None:
        try:
            with self._lock:
                self._check()
                self._connecting = None
                self._add(handle)
        except BaseException:
            handle.__exit__(None, None, None)
            raise

    def _check(self) -> None:
        if self._is_stopped:
            raise RuntimeError("the connection is not needed any more")
