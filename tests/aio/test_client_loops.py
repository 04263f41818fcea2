"""nbd.aio in every kind of event loop, and clients that are not closed."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import sys
import threading
import warnings
from typing import Any, Callable

import pytest
from support.asyncs import Loop, commands, outcome, run, sent, until
from support.servers import TIMEOUT, Server, StartServer
from support.usage import collect_garbage, descriptors, registered
from support.waits import paused

import nbd

Client = nbd.aio.Client
LOST = {"ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN"}


class Subclass(asyncio.SelectorEventLoop):
    """A program's own event loop, over select()."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())


def uvloop() -> Loop:
    """Make a uvloop event loop, if uvloop is installed."""
    if sys.implementation.name == "pypy":
        pytest.skip("uvloop is for CPython only")
    return pytest.importorskip("uvloop").new_event_loop()  # type: ignore[no-any-return]


LOOPS = [asyncio.new_event_loop, Subclass, uvloop]


async def work(uri: str) -> None:
    """Use a client in many ways, with commands that are cancelled and commands that fail."""
    async with nbd.aio.connect(uri, connections=2, depth=8) as disk:
        await disk.pwrite(b"x" * 65536, 0)
        reads = [asyncio.ensure_future(disk.pread(4096, 4096 * n)) for n in range(16)]
        reads[3].cancel()
        late = asyncio.ensure_future(outcome(disk.pread(512, 2**40)))
        await asyncio.wait(reads)
        assert [one.cancelled() for one in reads].count(True) <= 1
        assert all(one.result() == b"x" * 4096 for one in reads if not one.cancelled())
        assert isinstance(await late, nbd.Error)
        assert [tuple(e)[2] async for e in disk.extents()] == [0, 3]
        copied = await nbd.aio.copy(disk, ["nbdkit", "-s", "memory", "1M"])
        assert sum(copied) == 1 << 20


@pytest.mark.parametrize("new_loop", LOOPS)
def test_any_loop_of_asyncio_is_served(server: Server, new_loop: Callable[[], Loop]) -> None:
    run(work(server.uri), new_loop)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_server_that_is_killed_fails_all_that_waits(
    server: Server, new_loop: Callable[[], Loop]
) -> None:
    async def main() -> list[Any]:
        async with nbd.aio.connect(server.uri, depth=4) as disk:
            server.pause()
            tasks = [asyncio.ensure_future(outcome(disk.pread(512, 0))) for _ in range(9)]
            status = outcome(disk.block_status(512, 0, lambda *_: 0))
            tasks.append(asyncio.ensure_future(status))
            await until(sent(disk))
            server.kill()
            ended = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)
            ended.append(await asyncio.wait_for(outcome(disk.pread(512, 0)), TIMEOUT))
            ended.append(await asyncio.wait_for(outcome(disk.flush()), TIMEOUT))
            return ended

    ended = run(main(), new_loop)
    assert len(ended) == 12
    assert {one.errno for one in ended} <= LOST


def test_one_of_two_connections_may_be_lost(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")

    async def main() -> None:
        async with nbd.aio.connect(server.uri, connections=2) as disk:
            await until(lambda: len(disk.handles) == 2)
            await asyncio.gather(*(disk.pread(512, 0) for _ in range(9)))
            disk.handles[0].close()
            for _ in range(9):
                assert await disk.pread(512, 0) == bytes(512)
                await disk.block_status(512, 0, lambda *_: 0)

    run(main())


def test_a_server_that_was_stopped_continues(server: Server) -> None:
    async def main() -> list[bytearray]:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                reads = asyncio.gather(*(disk.pread(512, 0) for _ in range(99)))
                await asyncio.sleep(0.05)
                assert not reads.done()
            return await reads

    assert run(main()) == [bytes(512)] * 99


@pytest.mark.parametrize("new_loop", LOOPS)
def test_an_idle_client_does_not_keep_the_loop_busy(
    server: Server, new_loop: Callable[[], Loop]
) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pread(512, 0)
            server.kill()  # the end of the connection is noticed once
            await until(lambda: not select.select([disk._fd], [], [], 0)[0])
            await asyncio.sleep(0.01)
            assert not select.select([disk._fd], [], [], 0)[0]

    run(main(), new_loop)


def test_use_from_another_loop_is_refused(server: Server) -> None:
    disks: list[Client] = []

    async def connect() -> None:
        disks.append(await nbd.aio.connect(server.uri))

    async def use() -> None:
        for call in (disks[0].pread(1, 0), disks[0].flush(), disks[0].close()):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await call
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            disks[0].extents()
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await nbd.aio.copy(disks[0], ["nbdkit", "-s", "memory", "1M"])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(connect())
    run(use())
    loop.run_until_complete(disks[0].close())
    loop.close()


def test_use_from_another_thread_is_refused(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:

            def elsewhere() -> None:
                with pytest.raises(RuntimeError, match="belongs to another event loop"):
                    disk.pread(512, 0).send(None)

            await asyncio.get_running_loop().run_in_executor(None, elsewhere)

    run(main())


def drop(server: Server) -> None:
    """Use a client in the running loop of this thread, and drop it."""

    async def main() -> int:
        disk = await nbd.aio.connect(server.uri)
        await disk.pread(512, 0)
        return disk._fd

    async def whole() -> None:
        fd = await main()
        collect_garbage()
        await asyncio.sleep(0.01)
        collect_garbage()
        assert not asyncio.get_running_loop().remove_reader(fd)

    run(whole())


def test_a_client_that_is_dropped_is_a_resource_warning_and_leaves_nothing(server: Server) -> None:
    drop_quietly(server)
    before = descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drop(server)
    assert [w.category for w in caught if "nbd.aio.Client" in str(w.message)] == [ResourceWarning]
    caught.clear()  # a ResourceWarning keeps its object alive
    collect_garbage()
    assert descriptors() == before
    assert registered() == 0


def drop_quietly(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drop(server)


def test_a_loop_may_be_closed_with_commands_in_flight(server: Server) -> None:
    async def main() -> None:
        disk = await nbd.aio.connect(server.uri, depth=4)
        server.pause()
        for _ in range(9):
            task = asyncio.ensure_future(disk.pread(4096, 0))
            task._log_destroy_pending = False  # type: ignore[attr-defined] # it is what this test does
            tasks.append(task)
        await until(sent(disk))

    tasks: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        tasks.clear()
        for _ in range(10):  # a finalizer may drop further objects
            collect_garbage()
    assert registered() == 0


def test_a_forked_child_leaves_the_parents_client_alone(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with paused(server):
                reads = [asyncio.ensure_future(disk.pread(4096, 0)) for _ in range(9)]
                await until(sent(disk))
                child = os.fork()
                if child == 0:
                    os._exit(_in_the_child(disk))
            assert await asyncio.gather(*reads) == [bytes(4096)] * 9
            _, status = os.waitpid(child, 0)
            assert status == 0
            assert await disk.pread(512, 0) == bytes(512)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about fork beside threads
        run(main())


def _in_the_child(disk: Client) -> int:
    """Use the client, which must be refused, and drop it; return the exit status."""
    warnings.simplefilter("ignore")
    asyncio._set_running_loop(None)
    try:
        disk.pread(512, 0).send(None)
    except RuntimeError:
        disk.__del__()
        return 0
    except BaseException:
        return 1
    return 2


def test_a_handle_may_be_used_by_another_thread_meanwhile(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            stop = threading.Event()

            def elsewhere() -> int:
                count = 0
                while not stop.is_set():
                    assert disk.handles[0].pread(512, 0) == bytes(512)
                    count += 1
                return count

            beside = asyncio.get_running_loop().run_in_executor(None, elsewhere)
            try:
                for _ in range(100):
                    await asyncio.gather(*(disk.pread(4096, 4096 * n) for n in range(20)))
            finally:
                stop.set()
            assert await beside > 0
            assert commands(disk) == 0

    run(main())
