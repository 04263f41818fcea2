"""A coroutine in an event loop of its own, in asyncio's debug mode: nothing goes wrong unseen."""

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
    """Run a coroutine to its end; fail if the loop was told of an error that nobody has caught."""
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
        gc.collect()  # then asyncio tells of exceptions that nobody has seen
        assert not problems


async def wind_up(loop: Loop) -> None:
    """End what is left in a loop, as asyncio.run does."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def until(reached: Callable[[], object]) -> None:
    """Let the loop go on until something is reached."""
    for _ in range(TIMEOUT * 1000):
        if reached():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it was not reached")


def commands(disk: nbd.aio.Client) -> int:
    """Return how many commands libnbd has."""
    return sum(handle.aio_in_flight() for handle in disk.handles)


def sent(disk: nbd.aio.Client) -> Callable[[], object]:
    """Whether at least one command was sent."""
    return lambda: commands(disk) > 0


async def outcome(awaited: Awaitable[Any]) -> Any:
    """The result, or the exception."""
    try:
        return await awaited
    except Exception as raised:
        return raised
