# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.copy with callables that make connections: the event loop never waits for them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from support.asyncs import outcome, run, until
from support.makers import (
    SLOW,
    Hanging,
    Maker,
    Makers,
    connected,
    makers,
    no_descriptor_is_left,
)
from support.programs import run_program
from support.servers import TIMEOUT, StartServer
from support.sizes import MIB
from support.usage import descriptors

import nbd

__all__ = ["makers", "no_descriptor_is_left"]


def test_tls_over_four_connections(makers: Makers, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = makers.server(*SLOW, f"logfile={log}")
    run(nbd.aio.copy(makers.of(server), tmp_path / "copied", connections=4, sparse=False))
    assert connected(log) == 4


def test_a_callable_is_called_in_another_thread(server: Any, tmp_path: Path) -> None:
    source, target = Maker(server.uri), Maker(server.uri)
    run(nbd.aio.copy(source, target))
    assert threading.current_thread() not in source.threads + target.threads
    assert len(source.made) == len(target.made) == 1
    assert source.all_closed()
    assert target.all_closed()


def test_the_loop_runs_while_a_callable_blocks(server: Any, tmp_path: Path) -> None:
    async def main() -> None:
        hanging = Hanging(server.uri)
        task = asyncio.create_task(nbd.aio.copy(hanging, tmp_path / "copied"))
        await until(hanging.begun.is_set)
        hanging.may_continue.set()
        assert sum(await task) == MIB

    run(main())


@pytest.mark.parametrize("other", ["uri", "callable", "handle"])
def test_cancelling_ends_a_copy_whose_callable_blocks(server: Any, other: str) -> None:
    """The other side is closed at once, and what the callable makes too late as well."""
    hanging, maker = Hanging(server.uri), Maker(server.uri)
    handle = nbd.connect(server.uri, timeout=TIMEOUT)
    source: Any = {"uri": server.uri, "callable": maker, "handle": handle}[other]

    async def main() -> None:
        before = descriptors()
        task = asyncio.create_task(nbd.aio.copy(source, hanging))
        await until(hanging.begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not hanging.ended.is_set()
        await until(lambda: descriptors() <= before)
        assert maker.all_closed()

    run(main())
    hanging.may_continue.set()
    assert handle.get_size() == MIB
    handle.close()


def test_a_program_ends_whose_callable_blocks_after_its_copy_was_cancelled() -> None:
    text = """
import asyncio, threading, nbd
begun = threading.Event()
def connect():
    begun.set()
    threading.Event().wait()
async def main():
    task = asyncio.create_task(nbd.aio.copy(connect, "/dev/null"))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([task])
    print(task.cancelled())
asyncio.run(main())
"""
    done = run_program(text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_cancelling_ends_a_copy_while_its_second_call_hangs(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    uri = nbdkit(*SLOW[1:]).uri
    hanging = Hanging(uri)
    maker = Maker(uri, then=[hanging])

    async def main() -> None:
        copying = nbd.aio.copy(maker, tmp_path / "copied", connections=2, sparse=False)
        task = asyncio.create_task(copying)
        await until(hanging.begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(maker.all_closed)

    run(main())
    assert not hanging.ended.is_set()
    hanging.may_continue.set()


def fail() -> Any:
    """Raise what no caller expects."""
    raise LookupError


async def coroutine_function() -> nbd.NBD:
    """Connect, but only for who awaits it."""
    return nbd.NBD()


def test_what_a_callable_raises_passes_through(server: Any) -> None:
    maker = Maker(server.uri)
    assert isinstance(run(outcome(nbd.aio.copy(maker, fail))), LookupError)
    assert maker.all_closed()


@pytest.mark.parametrize("function", [lambda: "nbd://localhost", coroutine_function])
def test_what_is_no_handle_is_refused(function: Any) -> None:
    error = run(outcome(nbd.aio.copy(function, "/dev/null")))
    assert isinstance(error, TypeError)
    assert "source: the callable has returned" in str(error)


def test_the_same_handle_again_ends_the_copy(nbdkit: StartServer, tmp_path: Path) -> None:
    maker = Maker(nbdkit(*SLOW[1:]).uri, then=[lambda: maker.made[0]])
    copying = nbd.aio.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    error = run(outcome(copying))
    assert isinstance(error, ValueError)
    assert "source: the callable" in str(error)
    assert maker.all_closed()


def test_lists_of_handles_are_copied_and_stay_open(nbdkit: StartServer, tmp_path: Path) -> None:
    uri = nbdkit("--threads=4", "pattern", "16M").uri
    handles = [nbd.connect(uri, timeout=TIMEOUT) for _ in range(3)]
    assert run(nbd.aio.copy(handles, tmp_path / "copied")) == (16 * MIB, 0)
    error = run(outcome(nbd.aio.copy([handles[0], uri], "/dev/null")))
    assert isinstance(error, TypeError)
    assert [h.get_size() for h in handles] == [16 * MIB] * 3
    for h in handles:
        h.close()
