"""nbd.aio.connect with reconnect=: a lost connection delays commands, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any

import pytest
from support.asyncs import outcome, run, until
from support.mortal import MortalServer
from support.servers import TIMEOUT, StartServer, program, short_folder
from support.signals import handling
from support.sizes import MIB
from support.usage import descriptors, registered

import nbd

LONG = float(TIMEOUT)


@pytest.fixture
def server() -> Iterator[MortalServer]:
    """A server that can be killed."""
    folder = short_folder()
    made = MortalServer(folder)
    with made:
        yield made
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()


def drop(disks: list[nbd.aio.Client]) -> None:
    """Drop clients, and let PyPy finalize them."""
    disks.clear()
    for _ in range(3):
        gc.collect()


def is_replaced(disk: nbd.aio.Client, before: tuple[nbd.NBD, ...]) -> bool:
    """Return whether a client has other connections than before."""
    return disk.handles != before


async def settled(disk: nbd.aio.Client) -> None:
    """Wait until no connection is being made."""
    await until(lambda: not disk._joining)


def test_a_command_after_a_loss_is_only_delayed(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            before = disk.handles
            server.restart()
            assert await disk.pread(4, 0) == b"data"
            await settled(disk)
            assert len(disk.handles) == 1
            assert disk.handles != before

    run(main())


def test_commands_in_flight_are_sent_again(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop("read")
            reads = [asyncio.ensure_future(disk.pread(4, 128 << 10)) for _ in range(8)]
            await until(server.stopped.is_set)
            server.restart()
            assert await asyncio.gather(*reads) == [b"data"] * 8

    run(main())


def test_a_large_read_goes_on_after_half_a_reply(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop("reply")
            read = asyncio.ensure_future(disk.pread(MIB, 0))
            await until(server.stopped.is_set)
            server.restart()
            assert await read == server.memory

    run(main())


def test_what_was_not_flushed_is_written_again(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            await disk.pwrite(b"first" * 100, 3)
            await disk.pwrite(b"second" * 100, 200)
            await disk.zero(1000, 70000)
            expected = bytes(server.memory)
            server.restart()
            assert server.memory != expected
            await disk.flush()
            assert server.stable == expected

    run(main())


@pytest.mark.parametrize("what", ["read", "write", "zero", "trim", "cache", "flush"])
def test_a_server_that_is_killed_by_a_command(server: MortalServer, what: str) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            await disk.pwrite(b"x", 5)
            server.stop(what, server.restart)
            commands = {"read": disk.pread(512, 0), "write": disk.pwrite(b"y", 1)}
            commands["flush"] = disk.flush()
            for name in ("zero", "trim", "cache"):
                commands[name] = getattr(disk, name)(512, 512)
            await asyncio.gather(*commands.values())
            await disk.flush()
            assert server.stable[1] == ord("y")
            assert server.stable[5] == ord("x")

    run(main())


@pytest.mark.parametrize("method", ["block_status", "extents"])
def test_block_status_is_asked_again(server: MortalServer, method: str) -> None:
    async def main() -> list[Any]:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop("block_status", server.restart)
            if method == "extents":
                return [one async for one in disk.extents()]
            told: list[Any] = []
            await disk.block_status(MIB, 0, lambda *args: told.append(args[:3]))
            return told

    found = run(main())
    assert len(found) == (16 if method == "extents" else 1)


def test_extents_can_be_asked_for_without_a_connection(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.kill()
            await until(lambda: disk._joining)
            extents = disk.extents(start=1)
            first = asyncio.ensure_future(extents.__anext__())
            await asyncio.sleep(0)
            server.start()
            assert (await first).offset == 1

    run(main())


def test_a_server_that_shuts_down_is_left_for_the_next(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.shuts_down = True
            read = asyncio.ensure_future(disk.pread(4, 0))
            asked = asyncio.ensure_future(disk.block_status(512, 0, lambda *_: None))
            await until(lambda: server.greeted > 1)
            server.shuts_down = False
            assert await read == b"data"
            await asked

    run(main())


def test_an_idle_client_connects_again_by_itself(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.cut()
            await until(lambda: server.greeted == 2)
            await settled(disk)
            assert disk.handles[0].aio_is_ready()

    run(main())


def test_several_connections_go_on_while_one_is_made_again(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, connections=4, reconnect=LONG) as disk:
            await until(lambda: len(disk.handles) == 4)
            for number in range(20):
                server.cut_one(number)
                assert await disk.pread(MIB, 0) == server.memory
            await settled(disk)
            assert len({*disk.handles}) == 4
            assert all(handle.aio_is_ready() for handle in disk.handles)

    run(main())


def test_the_answers_about_the_disk_are_known_without_a_connection(server: MortalServer) -> None:
    names = [name for name in dir(nbd.NBD) if hasattr(nbd.aio.Client, name)]
    names = [name for name in names if name.startswith(("get_", "is_", "can_"))]
    arguments: dict[str, list[Any]] = {"get_block_size": [0], "can_meta_context": ["other"]}

    def answers(disk: nbd.aio.Client) -> list[Any]:
        found = []
        for name in names:
            try:
                found.append(getattr(disk, name)(*arguments.get(name, [])))
            except nbd.Error as refusal:
                found.append(str(refusal))
        return [*found, disk.can_meta_context("base:allocation")]

    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            before = answers(disk)
            server.stop("reply", server.kill)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(512, 0), 0.1)
            await until(lambda: disk._joining)
            assert disk.handles[0].aio_is_dead()
            assert answers(disk) == before

    run(main())


def test_a_timeout_holds_during_an_outage(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG, timeout=0.05) as disk:
            server.kill()
            for awaited in (
                disk.pread(4, 0),
                disk.pwrite(b"late", 8),
                disk.flush(),
                disk.block_status(512, 0, lambda *_: None),
            ):
                with pytest.raises(nbd.Timeout):
                    await awaited
            assert not disk._waiting
            server.start()
            await settled(disk)
            for _ in range(100):
                if await outcome(disk.pread(4, 0)) == b"data":
                    break
            assert server.memory[8:12] == b"data"  # the write is not made after its timeout

    run(main())


def test_a_cancelled_command_is_not_sent_again(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop("write", server.kill)
            write = asyncio.ensure_future(disk.pwrite(b"cancelled", 0))
            await until(lambda: "write" in server.seen)
            write.cancel()
            await asyncio.wait({write})
            assert write.cancelled()
            server.start()
            await disk.flush()
            assert server.seen.count("write") == 1
            assert not disk._waiting
            assert not disk._queue.kept

    run(main())


def test_many_commands_that_are_cancelled_in_an_outage_free_their_places(
    server: MortalServer,
) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, depth=2, reconnect=LONG) as disk:
            server.kill()
            tasks = [asyncio.ensure_future(disk.pwrite(bytes(9), 9 * n)) for n in range(50)]
            await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await until(lambda: not disk._waiting)
            assert not disk._queue.kept
            server.start()
            assert await disk.pread(4, 0) == b"data"

    run(main())


def test_closing_in_an_outage_ends_at_once_and_leaves_nothing(server: MortalServer) -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        disk = await nbd.aio.connect(server.uri, connections=2, reconnect=1000)
        await until(lambda: len(disk.handles) == 2)
        server.kill()
        read = asyncio.ensure_future(disk.pread(512, 0))
        asked = asyncio.ensure_future(disk.block_status(512, 0, lambda *_: None))
        await until(lambda: len(disk._joining) == 2)
        await asyncio.wait_for(disk.close(), LONG)
        assert [type(await outcome(one)) for one in (read, asked)] == [nbd.ClosedHandle] * 2
        assert asyncio.all_tasks() == before

    run(main())
    server.start()
    before = descriptors()
    run(main())
    assert descriptors() <= before
    assert registered() == 0


def test_closing_while_a_server_that_is_silent_is_connected(server: MortalServer) -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        disk = await nbd.aio.connect(server.uri, reconnect=1000)
        server.stop("greet")
        server.cut()
        await until(server.stopped.is_set)
        await asyncio.wait_for(disk.close(), LONG)
        assert asyncio.all_tasks() == before

    run(main())


def test_a_client_that_is_dropped_in_an_outage_ends_its_tasks(server: MortalServer) -> None:
    async def main() -> None:
        disks = [await nbd.aio.connect(server.uri, reconnect=1000)]
        server.kill()
        await until(lambda: disks[0]._joining)
        tasks = set(disks[0]._joining)
        with pytest.warns(ResourceWarning, match=r"nbd\.aio\.Client was not closed"):
            drop(disks)
        await asyncio.wait(tasks, timeout=LONG)
        assert all(task.cancelled() for task in tasks)

    run(main())
    assert registered() == 0


def test_the_first_error_is_raised_when_the_time_is_over(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=0.1) as disk:
            server.kill()
            commands = [disk.pread(4, 0), disk.flush(), disk.block_status(512, 0, print)]
            found: list[Any] = await asyncio.gather(*commands, return_exceptions=True)
            found += [await outcome(disk.pread(4, 0)), await outcome(disk.flush())]
            found += [await outcome(disk.block_status(512, 0, print))]
            assert {type(one) for one in found} == {nbd.Error}
            assert len({str(one) for one in found}) == 1
            assert "0.1 seconds" in str(found[0])
            assert found[0].errno in ("ENOTCONN", "ECONNRESET", "EPIPE")

    run(main())


def test_another_disk_is_refused_and_never_written(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            await disk.pwrite(b"x", 0)
            server.kill()
            server.start(size=2 * MIB)
            with pytest.raises(nbd.Error) as raised:
                await disk.pwrite(b"y", 1)
            assert raised.value.errno == "ESTALE"
            with pytest.raises(nbd.Error) as raised:
                await disk.flush()
            assert raised.value.errno == "ESTALE"

    run(main())
    assert server.memory == bytes(2 * MIB)
    assert server.greeted == 2


def test_a_connection_that_is_not_made_again_is_left_out(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, connections=2, reconnect=0.1) as disk:
            await until(lambda: len(disk.handles) == 2)
            server.refuse()
            server.cut_one(1)
            await until(lambda: len(disk.handles) == 1)
            assert await disk.pread(4, 0) == b"data"

    run(main())


@pytest.mark.parametrize("at", ["greet", "option"])
def test_a_server_that_is_killed_while_it_is_connected_again(server: MortalServer, at: str) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop(at, server.restart)
            server.cut()
            assert await disk.pread(4, 0) == b"data"

    run(main())


@pytest.mark.parametrize("at", ["greet", "option"])
def test_the_first_connection_is_tried_again_if_it_is_lost(server: MortalServer, at: str) -> None:
    async def main() -> None:
        server.stop(at, server.restart)
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            assert await disk.pread(4, 0) == b"data"

    run(main())


def test_the_first_connection_is_tried_again_while_it_is_refused(server: MortalServer) -> None:
    async def main() -> None:
        server.kill()
        connecting = asyncio.ensure_future(outcome(nbd.aio.connect(server.uri, reconnect=LONG)))
        await asyncio.sleep(0.03)
        server.start()
        disk = await connecting
        assert await disk.pread(4, 0) == b"data"
        await disk.close()

    run(main())


def test_an_export_that_the_first_server_does_not_have_is_not_tried_again(
    nbdkit: StartServer,
) -> None:
    only = ["exportname-strict=true", "exportname=disk"]
    socket = nbdkit("--filter=exportname", "memory", "1M", *only).socket

    async def main() -> None:
        with pytest.raises(nbd.Error, match="export"):
            await nbd.aio.connect(f"nbd+unix:///other?socket={socket}", reconnect=1000)

    run(main())


def test_prepare_is_called_for_each_connection(server: MortalServer) -> None:
    prepared: list[nbd.NBD] = []

    async def main() -> None:
        connecting = nbd.aio.connect(server.uri, reconnect=LONG, prepare=prepared.append)
        async with connecting as disk:
            server.restart()
            await disk.flush()

    run(main())
    assert len(prepared) == len({*prepared}) >= 2


def test_an_exception_of_prepare_ends_the_outage(server: MortalServer) -> None:
    prepared: list[nbd.NBD] = []

    def prepare(h: nbd.NBD) -> None:
        prepared.append(h)
        if len(prepared) > 1:
            raise LookupError

    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG, prepare=prepare) as disk:
            server.restart()
            with pytest.raises(nbd.Error) as raised:
                await disk.flush()
            assert isinstance(raised.value.__cause__, LookupError)

    run(main())


def test_each_reconnect_is_one_line_in_the_log(
    server: MortalServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            await disk.flush()
            assert "nbd" not in {record.name for record in caplog.records}
            server.restart()
            await disk.flush()

    with caplog.at_level(logging.DEBUG):
        run(main())
    records = [record for record in caplog.records if record.name != "asyncio"]
    assert [(record.name, record.levelno) for record in records] == [("nbd", logging.WARNING)]
    assert server.uri in records[0].getMessage()


def test_a_command_line_cannot_be_reconnected() -> None:
    with pytest.raises(ValueError, match=r"uri: .* cannot be connected again; pass a URI"):
        nbd.aio.connect([program("nbdkit"), "-s", "memory", "1M"], reconnect=1)


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_the_seconds_are_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="reconnect"):
        nbd.aio.connect("nbd://localhost", reconnect=seconds)


def test_without_reconnect_a_loss_is_an_error(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            server.restart()
            for _ in range(2):
                assert isinstance(await outcome(disk.pread(4, 0)), nbd.Error)

    run(main())
    assert server.greeted == 1


def test_an_idle_client_outlives_any_number_of_losses(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=0.2) as disk:
            for _ in range(6):
                await asyncio.sleep(0.05)
                before = disk.handles
                server.cut()
                await until(partial(is_replaced, disk, before))
            assert await disk.pread(4, 0) == b"data"

    run(main())


def test_a_server_that_always_drops_its_clients_is_given_up(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=0.2) as disk:
            server.drops = True
            for _ in range(2):
                with pytest.raises(nbd.Error, match=r"0\.2 seconds"):
                    await disk.pread(4, 0)

    run(main())
    assert server.greeted > 2


def test_a_connection_that_the_caller_has_closed_is_made_again(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            disk.handles[0].close()
            assert await asyncio.wait_for(disk.pread(4, 0), LONG) == b"data"

    run(main())


def test_ctrl_c_ends_a_program_in_an_outage(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=1000) as disk:
            server.kill()
            asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGINT)
            await disk.pread(4, 0)

    # A suite that runs in the background may ignore the signal.
    with handling(signal.default_int_handler, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert registered() == 0


def test_a_client_goes_on_after_a_signal_handler_has_ended_an_attempt(
    server: MortalServer,
) -> None:
    prepared: list[nbd.NBD] = []

    def prepare(h: nbd.NBD) -> None:
        prepared.append(h)
        if len(prepared) == 2:
            raise KeyboardInterrupt

    async def connected() -> nbd.aio.Client:
        return await nbd.aio.connect(server.uri, reconnect=LONG, prepare=prepare)

    loop = asyncio.new_event_loop()
    disk = loop.run_until_complete(connected())
    server.cut()
    read = loop.create_task(disk.pread(4, 0))
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(read)
    assert loop.run_until_complete(read) == b"data"
    loop.run_until_complete(disk.close())
    loop.close()


def test_a_client_whose_tasks_were_cancelled_fails_instead_of_waiting(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=1000) as disk:
            server.kill()
            await until(lambda: disk._joining)
            for task in disk._joining:
                task.cancel()
            for _ in range(2):
                assert isinstance(await outcome(disk.pread(4, 0)), nbd.Error)

    run(main())


def test_a_copy_of_a_client_fails_and_the_client_goes_on(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, reconnect=LONG) as disk:
            server.stop("read", server.restart)
            assert isinstance(await outcome(nbd.aio.copy(disk, None)), nbd.Error)
            assert await disk.pread(4, 0) == b"data"

    run(main())


def test_a_connection_that_joins_during_an_outage_serves(server: MortalServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, connections=3, reconnect=LONG) as disk:
            server.restart()
            assert await disk.pread(4, 0) == b"data"
            await settled(disk)
            assert len(disk.handles) == 3
            assert await disk.pread(MIB, 0) == server.memory

    run(main())


def storm(server: MortalServer, chance: random.Random) -> Coroutine[Any, Any, None]:
    """Read and write in many tasks, while the server is killed; check every byte."""
    model = bytearray(server.stable)
    page = 4096

    async def use(disk: nbd.aio.Client, start: int) -> None:
        for _ in range(10):
            offset, count = start + chance.randrange(page - 600), chance.randrange(1, 600)
            place, what = slice(offset, offset + count), chance.random()
            if what < 0.5:
                content = bytes(chance.getrandbits(8) for _ in range(count))
                await disk.pwrite(content, offset)
                model[place] = content
            elif what < 0.6:
                await disk.zero(count, offset)
                model[place] = bytes(count)
            elif what < 0.7:
                await disk.flush()
            else:
                assert await disk.pread(count, offset) == model[place]

    async def kill(times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(0.02 * chance.random())
            server.kill()
            await asyncio.sleep(0.01 * chance.random())
            server.start()

    async def main() -> None:
        connections = chance.choice([1, 2, 4])
        async with nbd.aio.connect(server.uri, connections=connections, reconnect=LONG) as disk:
            users = (use(disk, page * number) for number in range(16))
            await asyncio.gather(kill(chance.randrange(3, 8)), *users)
            await disk.flush()
            assert server.stable == model

    return main()


@pytest.mark.parametrize("seed", range(8))
def test_a_storm_of_tasks_writes_what_it_would_without_kills(
    server: MortalServer, seed: int
) -> None:
    run(storm(server, random.Random(seed)))
