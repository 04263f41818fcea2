"""Drive a handle from a test, with a timeout on every wait."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Callable

import nbd

#: The methods of a handle that libnbd's own module lacks.
OWN_METHODS = {"gettimeout", "pread_into", "settimeout"}
#: Those of them that never call libnbd.
NO_CALLS = {"gettimeout", "settimeout"}

POLL_TIMEOUT = 20_000  # milliseconds until a test fails because nothing happens on its handle

Extents = list[tuple[str, int, list[Any], int]]


def poll(handle: nbd.NBD) -> None:
    """Poll the handle until it makes a step; fail if it makes none within POLL_TIMEOUT."""
    assert handle.poll(POLL_TIMEOUT) == 1, f"nothing happened in state {handle.connection_state()}"


def raiser(exception: BaseException) -> Callable[..., int]:
    """Return a callback that raises the exception when it is called for the first time.

    Newer versions of libnbd call a completion again if the handle is closed before its command was
    retired.
    """
    waiting = [exception]

    def callback(*arguments: Any) -> int:
        if waiting:
            raise waiting.pop()
        return 0

    return callback


def drain(handle: nbd.NBD) -> None:
    """Run the handle until no command is in flight."""
    while handle.aio_in_flight():
        poll(handle)


def drain_dying(handle: nbd.NBD) -> None:
    """Do the same after the server died, when poll may or may not fail."""
    while handle.aio_in_flight():
        with suppress(nbd.Error):
            poll(handle)


def run_until(handle: nbd.NBD, reached: Callable[[], bool]) -> None:
    """Run the handle until a condition holds: run_until(h, h.aio_is_ready)."""
    while not reached():
        poll(handle)


def finish(handle: nbd.NBD, cookie: int) -> None:
    """Run the handle until a command has completed, and retire it; a failure raises nbd.Error."""
    while not handle.aio_command_completed(cookie):
        poll(handle)


def retired(handle: nbd.NBD) -> bool:
    """Return whether every command was retired: none is in flight or waits to be retired."""
    try:
        handle.aio_peek_command_completed()
    except nbd.Error:
        return True
    return False


def closed(handle: nbd.NBD) -> bool:
    """Return whether close() has been called."""
    try:
        handle.get_debug()
    except nbd.ClosedHandle:
        return True
    return False


def extents(handle: nbd.NBD, count: int, offset: int = 0, flags: int = 0) -> Extents:
    """Return the arguments of block_status's callback: (context, offset, entries, error)."""
    found: Extents = []

    def extent(context: str, where: int, entries: list[int], error: Any) -> int:
        found.append((context, where, list(entries), error.value))
        return 0

    handle.block_status(count, offset, extent, flags)
    return found
