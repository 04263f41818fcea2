"""Cancelled tasks end at once, their commands become orphans, and the client stays usable."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any, Callable

import pytest
from support.asyncs import commands, needs_task_group, outcome, run, sent, until
from support.figures import Figure
from support.servers import Server, StartServer, children, program
from support.sizes import KIB, MIB
from support.usage import collect_garbage, descriptors, registered, resident
from support.waits import paused

import nbd

Client = nbd.aio.Client


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return a server with an empty disk of 64 MiB."""
    return nbdkit("memory", "64M")


async def cancelled(task: asyncio.Task[Any]) -> bool:
    """Cancel a task, run the loop once, and return whether the task has ended."""
    task.cancel()
    await asyncio.sleep(0)
    return task.cancelled()


async def settled(disk: Client) -> None:
    """Wait until no command is in flight."""
    await until(lambda: commands(disk) == 0)


CALLS: dict[str, Callable[[Client], Any]] = {
    "pread": lambda disk: disk.pread(4096, 0),
    "pread_into": lambda disk: disk.pread_into(nbd.Buffer(4096), 0),
    "pwrite": lambda disk: disk.pwrite(bytes(4096), 0),
    "zero": lambda disk: disk.zero(4096, 0),
    "trim": lambda disk: disk.trim(4096, 0),
    "flush": lambda disk: disk.flush(),
    "block_status": lambda disk: disk.block_status(4096, 0, lambda *_: 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_cancelled_call_ends_at_once_and_the_client_stays_usable(
    server: Server, name: str
) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                task = asyncio.create_task(CALLS[name](disk))
                await until(sent(disk))
                assert await cancelled(task)
                assert commands(disk) == 1
            await settled(disk)
            return await disk.pread(512, 0)

    assert run(main()) == bytes(512)
    assert registered() == 0


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy reads into a bounce buffer")
def test_an_orphan_keeps_its_buffer_until_the_answer(server: Server) -> None:
    async def main() -> None:
        buffer = bytearray(4096)
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                task = asyncio.create_task(disk.pread_into(buffer, 0))
                await until(sent(disk))
                await cancelled(task)
                with pytest.raises(BufferError):
                    buffer.append(0)
            await settled(disk)
            buffer.append(0)

    run(main())


def test_a_cancelled_read_keeps_its_place_until_the_answer(server: Server) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri, depth=1) as disk:
            with paused(server):
                first = asyncio.create_task(disk.pread(512, 0))
                await until(sent(disk))
                second = asyncio.create_task(disk.pread(512, 0))
                await cancelled(first)
                assert commands(disk) == 1
            return await second

    assert run(main()) == bytes(512)


def test_a_task_that_is_cancelled_in_the_queue_does_not_delay_the_next(server: Server) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri, depth=1) as disk:
            with paused(server):
                tasks = [asyncio.create_task(disk.pread(512, 0)) for _ in range(3)]
                await until(sent(disk))
                assert await cancelled(tasks[1])
            await tasks[0]
            return await tasks[2]

    assert run(main()) == bytes(512)


def test_a_task_that_is_cancelled_when_admitted_passes_its_turn_on(server: Server) -> None:
    async def main() -> Any:
        async with nbd.aio.connect(server.uri, depth=1) as disk:
            tasks = [asyncio.create_task(disk.pread(512, 0)) for _ in range(30)]
            tasks[0].add_done_callback(lambda _: [task.cancel() for task in tasks[1:29]])
            await asyncio.wait(tasks)
            return await outcome(tasks[29])

    assert run(main()) == bytes(512)


def test_the_rest_of_a_large_request_is_not_sent(server: Server) -> None:
    async def main() -> int:
        async with nbd.aio.connect(server.uri, depth=2) as disk:
            with paused(server):
                task = asyncio.create_task(disk.pwrite(b"x" * (32 * MIB), 0))
                await until(sent(disk))
                await cancelled(task)
            await settled(disk)
            await disk.flush()
            return len((await disk.pread(32 * MIB, 0)).rstrip(b"\0"))

    assert run(main()) <= 2 * 256 * KIB


def test_a_late_extent_is_not_reported(server: Server) -> None:
    reported: list[Any] = []

    def note(*_: object) -> None:
        reported.append(0)

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                task = asyncio.create_task(disk.block_status(4096, 0, note))
                await until(sent(disk))
                await cancelled(task)
            await settled(disk)

    run(main())
    assert reported == []


def test_wait_for_ends_a_call(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server), pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(512, 0), 0.02)
            assert await asyncio.wait_for(disk.pread(512, 0), 20) == bytes(512)

    run(main())


@needs_task_group
def test_asyncio_timeout_ends_a_call(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await disk.pread(512, 0)
            assert await disk.pread(512, 0) == bytes(512)

    run(main())


@needs_task_group
def test_a_task_group_cancels_the_others_when_one_fails(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server), pytest.raises(ExceptionGroup):  # noqa: F821 - new in 3.11
                await _read_together(disk, [0] * 9 + [2**40])
            await settled(disk)
            assert await disk.pread(512, 0) == bytes(512)

    run(main())


async def _read_together(disk: Client, places: list[int]) -> None:
    async with asyncio.TaskGroup() as group:
        for at in places:
            group.create_task(disk.pread(512, at))


def test_a_connect_that_is_cancelled_leaves_nothing_behind(server: Server) -> None:
    async def main() -> None:
        with paused(server):
            for _ in range(5):
                task = asyncio.ensure_future(_connected(server.uri))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(main())
    before = descriptors()
    run(main())
    assert descriptors() == before


async def _connected(uri: str | list[str]) -> None:
    async with nbd.aio.connect(uri):
        pytest.fail("it was connected")


def test_a_command_that_is_cancelled_while_it_starts_is_ended(tmp_path: Any) -> None:
    async def main() -> None:
        slow = ["sh", "-c", f"sleep 0.5; exec {program('nbdkit')} -s memory 1M"]
        task = asyncio.ensure_future(_connected(slow))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = set(children())
    run(main())
    assert set(children()) <= before


def test_a_client_that_is_closed_with_orphans_in_flight_leaves_nothing(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                tasks = [asyncio.create_task(disk.pread(4096, 0)) for _ in range(20)]
                await until(sent(disk))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await disk.close()

    run(main())
    assert registered() == 0


#: Delayed replies, and occasional errors.
UNRELIABLE = (
    "--filter=error",
    "--filter=delay",
    "memory",
    "1M",
    "rdelay=1ms",
    "wdelay=1ms",
    "error-pread=EIO",
    "error-pread-rate=5%",
    "error-pwrite=ENOSPC",
    "error-pwrite-rate=5%",
)


class Storm:
    """Ten thousand tasks on eight clients, many of which are cancelled at random moments."""

    TASKS, CLIENTS = 10_000, 8

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._random = random.Random(7)
        self.resident_at_half = 0
        self.ended: dict[str, int] = {"data": 0, "error": 0, "cancelled": 0}

    async def run(self) -> None:
        async with nbd.aio.connect(self._uri, connections=2) as writer:
            while isinstance(await outcome(writer.pwrite(b"x" * MIB, 0)), nbd.Error):
                continue
        disks = [await nbd.aio.connect(self._uri, depth=32) for _ in range(self.CLIENTS)]
        try:
            for part in range(10):
                if part == 5:
                    collect_garbage()
                    self.resident_at_half = resident()
                tasks = [self._task(disks[n % self.CLIENTS]) for n in range(self.TASKS // 10)]
                await asyncio.wait(tasks)
                for task in tasks:
                    self._count(task)
            for disk in disks:
                await settled(disk)
        finally:
            for disk in disks:
                await disk.close()

    def _task(self, disk: Client) -> asyncio.Task[Any]:
        at = self._random.randrange(MIB - 4096)
        call = disk.pwrite(b"x" * 512, at) if self._random.random() < 0.2 else disk.pread(4096, at)
        task = asyncio.ensure_future(call)
        if self._random.random() < 0.3:
            loop = asyncio.get_running_loop()
            loop.call_later(self._random.random() * 0.1, task.cancel)
        return task

    def _count(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.ended["cancelled"] += 1
        elif task.exception() is not None:
            assert isinstance(task.exception(), nbd.Error)
            self.ended["error"] += 1
        else:
            assert task.result() in (None, b"x" * 4096)
            self.ended["data"] += 1


def test_in_a_storm_of_tasks_each_ends_once(nbdkit: StartServer, figure: Figure) -> None:
    server = nbdkit(*UNRELIABLE, "--threads=16")
    storm, began = Storm(server.uri), time.monotonic()
    run(storm.run())
    for kind, count in storm.ended.items():
        figure(f"storm of 10,000 tasks: {kind}", str(count))
    figure("storm of 10,000 tasks: seconds", f"{time.monotonic() - began:.1f}")
    collect_garbage()
    grown = (resident() - storm.resident_at_half) / MIB
    figure("storm of 10,000 tasks: MiB more than after the first half", f"{grown:.1f}")
    assert sum(storm.ended.values()) == Storm.TASKS
    assert min(storm.ended.values()) > 0
    assert registered() == 0
    # The size of PyPy's heap depends on the last collection, and freed memory stays in it.
    assert grown < (32 if sys.implementation.name == "cpython" else 128)
