"""Run coroutines in an event loop of their own, in debug mode, and fail on unhandled errors."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Coroutine
from typing import Any, Callable, TypeVar

import pytest

import nbd
from support.servers import TIMEOUT

Result = TypeVar("Result")
Loop = asyncio.AbstractEventLoop


needs_task_group = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="asyncio.TaskGroup and timeout are new in Python 3.11"
)


def run(
    coroutine: Coroutine[Any, Any, Result], new_loop: Callable[[], Loop] = asyncio.new_event_loop
) -> Result:
    """Run a coroutine to its end; fail if an exception in the loop was handled by no code."""
    try:
        loop = new_loop()
    except BaseException:  # such as a skip
        coroutine.close()
        raise
    loop.set_debug(True)
    problems: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))
    try:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 3 * TIMEOUT))
    finally:
        loop.run_until_complete(wind_up(loop))
        loop.close()
        gc.collect()  # asyncio reports an exception that was never retrieved when it is collected
        assert not problems


async def wind_up(loop: Loop) -> None:
    """Cancel the remaining tasks of a loop and shut it down, as asyncio.run does."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def until(reached: Callable[[], object]) -> None:
    """Run the loop until a condition holds."""
    for _ in range(TIMEOUT * 1000):
        if reached():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it was not reached")


def commands(disk: nbd.aio.Client) -> int:
    """Return how many commands are in flight in libnbd."""
    return sum(handle.aio_in_flight() for handle in disk.handles)


def sent(disk: nbd.aio.Client) -> Callable[[], object]:
    """Return a condition for `until`: at least one command was sent."""
    return lambda: commands(disk) > 0


async def outcome(awaited: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, or the exception that it raised."""
    try:
        return await awaited
    except Exception as raised:
        return raised
