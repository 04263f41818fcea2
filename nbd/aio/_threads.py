# SPDX-License-Identifier: LGPL-2.0-or-later
"""Threads for calls that an event loop cannot await; none of them delays the program's end."""

from __future__ import annotations

import atexit
from contextlib import suppress
from threading import Thread, current_thread
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable
    from typing import Any

    from nbd._binding.methods import NBD

#: How many seconds asyncio.run waits at its end for a server's process, if no timeout is set.
_MAX_END = 10.0
#: How many seconds the end of the program waits for threads that were stopped.
AT_EXIT = 0.5
_running: set[Thread] = set()


def in_thread(loop: AbstractEventLoop, function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a new thread; returns a future for its result.

    An executor is not used, because asyncio.run and the end of the program wait for its threads.
    """
    future: Future[Any] = loop.create_future()
    _start(_call, loop, future, function)
    return future


def close_in_thread(loop: AbstractEventLoop, handle: NBD, timeout: float | None) -> None:
    """Close a handle that has started its server, in a thread: libnbd waits for that process.

    Only asyncio.run waits for the thread, at its end, and for at most `timeout` seconds.
    """
    thread = _start(handle.__exit__, None, None, None)
    with suppress(RuntimeError):  # the loop is ending and accepts no work
        loop.run_in_executor(None, thread.join, _MAX_END if timeout is None else timeout)


def end_future(future: Future[Any], result: Any, failure: BaseException | None) -> None:
    """Set the result or the exception of a future; called by the event loop."""
    if future.done():  # the caller was cancelled
        return
    if isinstance(failure, StopIteration):  # futures refuse it
        failure = RuntimeError(f"StopIteration was raised: {failure}")
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _start(function: Callable[..., object], *arguments: object) -> Thread:
    thread = Thread(target=_run, args=(function, *arguments), name="nbd.aio", daemon=True)
    thread.start()
    return thread


def _run(function: Callable[..., object], *arguments: object) -> None:
    thread = current_thread()
    _running.add(thread)
    try:
        function(*arguments)
    finally:
        _running.discard(thread)


def _call(loop: AbstractEventLoop, future: Future[Any], function: Callable[[], Any]) -> None:
    result: Any = None
    failure: BaseException | None = None
    try:
        result = function()
    except BaseException as raised:
        failure = raised
    with suppress(RuntimeError):  # the loop was closed
        loop.call_soon_threadsafe(end_future, future, result, failure)
    del failure  # breaks the cycle: its traceback refers to this frame


@atexit.register
def _join_all() -> None:
    """Give threads a moment to leave libnbd before the process ends."""
    until = monotonic() + AT_EXIT
    for thread in list(_running):
        thread.join(max(0.0, until - monotonic()))
