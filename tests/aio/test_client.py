"""nbd.aio.Client: its coroutines do what the methods of nbd.NBD do, many at a time."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.asyncs import commands, needs_task_group, outcome, run, sent, until
from support.servers import Server, StartServer, library_has
from support.sizes import KIB, MIB
from support.waits import paused

import nbd

Client = nbd.aio.Client


def test_what_was_written_is_read(server: Server) -> None:
    data = os.urandom(100_000)

    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(data, 1234)
            return await disk.pread(len(data), 1234)

    assert run(main()) == data


def test_a_connection_may_be_awaited(server: Server) -> None:
    async def main() -> int:
        disk = await nbd.aio.connect(server.uri)
        try:
            return disk.get_size()
        finally:
            await disk.close()

    assert run(main()) == MIB


@pytest.mark.parametrize("make", [bytearray, nbd.Buffer, lambda n: memoryview(bytearray(n))])
def test_memory_of_the_caller_is_read_into(server: Server, make: Any) -> None:
    async def main() -> bytes:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(b"data" * 1024, 512)
            buffer = make(4096)
            await disk.pread_into(buffer, 512)
            return bytes(buffer)

    assert run(main()) == b"data" * 1024


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, nbd.Buffer.from_buffer])
def test_any_buffer_is_written(server: Server, make: Any) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(make(b"some data"), 0)
            return await disk.pread(9, 0)

    assert run(main()) == b"some data"


def test_zero_trim_cache_and_flush_are_done(server: Server) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(b"x" * MIB, 0)
            await disk.zero(300_000, 100)
            await disk.trim(64 * KIB, 512 * KIB)
            await disk.cache(4096, 0)
            await disk.flush()
            return await disk.pread(MIB, 0)

    read = run(main())
    assert read[:300_200] == b"x" * 100 + bytes(300_000) + b"x" * 100
    assert read[512 * KIB : 576 * KIB] == bytes(64 * KIB)


def test_a_read_larger_than_a_command_is_cut_up(nbdkit: StartServer) -> None:
    server = nbdkit("pattern", "64M")

    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri, depth=4) as disk:
            return await disk.pread(40 * MIB, 8)

    with nbd.connect(server.uri) as h:
        assert run(main())[-4096:] == h.pread(4096, 8 + 40 * MIB - 4096)


def test_block_status_calls_its_callable_as_the_handle_does(server: Server) -> None:
    reported: list[Any] = []

    def note(context: str, offset: int, entries: list[int], error: Any) -> None:
        reported.append((context, offset, list(entries), error.value))

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(b"x", 0)
            await disk.block_status(MIB, 0, note)

    run(main())
    with nbd.connect(server.uri) as h:
        h.block_status(MIB, 0, note)
    first, second = reported
    assert first == second


def test_what_the_callable_of_block_status_raises_is_the_cause(server: Server) -> None:
    class OurError(Exception):
        pass

    def extent(*_: object) -> int:
        raise OurError

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with pytest.raises(nbd.Error, match="nbd_block_status") as caught:
                await disk.block_status(MIB, 0, extent)
            assert isinstance(caught.value.__cause__, OurError)
            await disk.pread(512, 0)

    run(main())


def test_block_status_64_has_tuples(server: Server) -> None:
    missing = library_has(nbd, ["block_status_64"])
    if missing:
        pytest.skip(missing)

    async def main() -> list[Any]:
        found: list[Any] = []

        def note(context: str, offset: int, entries: list[Any], error: object) -> None:
            found.extend(entries)

        async with nbd.aio.connect(server.uri) as disk:
            await disk.block_status_64(MIB, 0, note)
        return found

    assert run(main()) == [(MIB, nbd.STATE_HOLE | nbd.STATE_ZERO)]


def test_extents_are_those_of_nbd_extents(nbdkit: StartServer) -> None:
    server = nbdkit("data", "1 @1048576 2 @5000000 3 @9000000 4", "size=16M")

    async def main(start: int = 0, end: int | None = None) -> list[nbd.Extent]:
        async with nbd.aio.connect(server.uri) as disk:
            return [extent async for extent in disk.extents(start=start, end=end)]

    with nbd.connect(server.uri) as h:
        assert run(main()) == list(nbd.extents(h))
        assert run(main(start=70_001, end=3 * MIB)) == list(
            nbd.extents(h, start=70_001, end=3 * MIB)
        )


def test_extents_of_several_contexts(qemu_nbd: StartServer, dirty_qcow2: Path) -> None:
    server = qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0")
    contexts = [nbd.CONTEXT_BASE_ALLOCATION, "qemu:dirty-bitmap:bitmap0"]

    async def main() -> list[nbd.Extents]:
        async with nbd.aio.connect(server.uri, contexts=contexts) as disk:
            return [extent async for extent in disk.extents(contexts)]

    with nbd.connect(server.uri, contexts=contexts) as h:
        assert run(main()) == list(nbd.extents(h, contexts))


def test_a_context_that_was_not_negotiated_is_refused(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, contexts=[]) as disk:
            with pytest.raises(nbd.Error, match="was not negotiated"):
                disk.extents()

    run(main())


QUESTIONS = [
    name
    for name in dir(Client)
    if name.startswith(("get_", "is_", "can_")) and name != "can_meta_context"
]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_has_the_answer_and_the_signature_of_the_handle(
    server: Server, name: str
) -> None:
    arguments = [nbd.SIZE_MINIMUM] if name == "get_block_size" else []

    def ask(disk: Any) -> Any:
        try:
            return getattr(disk, name)(*arguments)
        except nbd.Error as refused:
            return str(refused)

    async def main() -> Any:
        async with nbd.aio.connect(server.uri) as disk:
            return ask(disk)

    with nbd.connect(server.uri) as h:
        assert run(main()) == ask(h)
    assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(nbd.NBD, name))


def test_can_meta_context_is_asked(server: Server) -> None:
    async def main() -> list[bool]:
        async with nbd.aio.connect(server.uri) as disk:
            return [disk.can_meta_context(c) for c in (nbd.CONTEXT_BASE_ALLOCATION, "x:y")]

    assert run(main()) == [True, False]


@pytest.mark.parametrize("name", ["pread", "pwrite", "zero", "trim", "cache", "flush"])
def test_the_parameters_are_those_of_the_handle(name: str) -> None:
    ours, theirs = getattr(Client, name), getattr(nbd.NBD, name)
    assert inspect.iscoroutinefunction(ours)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_hundreds_of_tasks_get_their_own_data(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    image = random.Random(1).randbytes(MIB)
    places = [random.Random(n).randrange(MIB - 5000) for n in range(500)]

    async def main() -> list[bytearray]:
        async with nbd.aio.connect(server.uri, connections=3, depth=16) as disk:
            await disk.pwrite(image, 0)
            tasks = [asyncio.create_task(disk.pread(5000, at)) for at in places]
            return await asyncio.gather(*tasks)

    assert run(main()) == [image[at : at + 5000] for at in places]


def test_no_more_commands_are_in_flight_than_the_depth_allows(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "memory", "1M", "rdelay=1ms")

    async def main() -> int:
        most = 0
        async with nbd.aio.connect(server.uri, depth=5) as disk:
            reads = asyncio.gather(*(disk.pread(512, 512 * n) for n in range(100)))
            while not reads.done():
                most = max(most, commands(disk))
                await asyncio.sleep(0)
            await reads
        return most

    assert run(main()) == 5


def test_callers_get_their_turn_in_order(server: Server) -> None:
    async def main() -> list[int]:
        ended: list[int] = []
        async with nbd.aio.connect(server.uri, depth=1) as disk:

            async def read(number: int) -> None:
                await disk.pread(512, 0)
                ended.append(number)

            await asyncio.gather(*map(read, range(50)))
        return ended

    assert run(main()) == list(range(50))


@needs_task_group
def test_a_task_group_takes_the_coroutines(server: Server) -> None:
    async def main() -> list[bytearray]:
        async with nbd.aio.connect(server.uri) as disk, asyncio.TaskGroup() as group:
            tasks = [group.create_task(disk.pread(512, 512 * n)) for n in range(9)]
        return [task.result() for task in tasks]

    assert run(main()) == [bytes(512)] * 9


def test_several_connections_are_used(server: Server) -> None:
    async def main() -> list[int]:
        async with nbd.aio.connect(server.uri, connections=3) as disk:
            await until(lambda: len(disk.handles) == 3)
            with paused(server):
                reads = [asyncio.create_task(disk.pread(512, 0)) for _ in range(6)]
                await asyncio.sleep(0)
                used = [handle.aio_in_flight() for handle in disk.handles]
            await asyncio.gather(*reads)
        return used

    assert run(main()) == [2, 2, 2]


def test_one_connection_is_made_where_the_server_allows_no_more(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")

    async def main() -> int:
        async with nbd.aio.connect(server.uri, connections=3) as disk:
            return len(disk.handles)

    assert run(main()) == 1


def test_several_clients_share_a_loop(nbdkit: StartServer) -> None:
    uris = [nbdkit("pattern", f"{n}M").uri for n in range(1, 5)]

    async def size_of(uri: str) -> int:
        async with nbd.aio.connect(uri) as disk:
            await asyncio.gather(*(disk.pread(4096, 4096 * n) for n in range(50)))
            return disk.get_size()

    async def main() -> list[int]:
        return await asyncio.gather(*map(size_of, uris))

    assert run(main()) == [MIB, 2 * MIB, 3 * MIB, 4 * MIB]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda disk: disk.pread(512, MIB), "EINVAL"),
        (lambda disk: disk.pread_into(bytearray(512), MIB - 1), "EINVAL"),
        (lambda disk: disk.pwrite(b"x", MIB), "ENOSPC"),
        (lambda disk: disk.zero(2, MIB - 1), "ENOSPC"),
    ],
)
def test_a_range_past_the_end_fails(server: Server, call: Any, expected: str) -> None:
    async def main() -> Any:
        async with nbd.aio.connect(server.uri) as disk:
            return await outcome(call(disk))

    error = run(main())
    assert isinstance(error, nbd.Error)
    assert error.errno == expected


def test_an_error_of_the_server_is_raised_and_the_client_stays_usable(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=error", "memory", "1M", "error-pwrite=EIO", "error-pwrite-rate=1")

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            with pytest.raises(
                nbd.Error, match="writing 512 bytes at offset 1024 failed"
            ) as caught:
                await disk.pwrite(bytes(512), 1024)
            assert caught.value.errnum == errno.EIO
            assert await disk.pread(512, 0) == bytes(512)

    run(main())


def test_a_write_to_a_read_only_server_fails(nbdkit: StartServer) -> None:
    server = nbdkit("-r", "memory", "1M")

    async def main() -> Any:
        async with nbd.aio.connect(server.uri) as disk:
            return await outcome(disk.pwrite(b"x", 0))

    assert isinstance(run(main()), nbd.Error)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda disk: disk.pread("1", 0), TypeError),
        (lambda disk: disk.pread(-1, 0), ValueError),
        (lambda disk: disk.pread(1, 2**64), ValueError),
        (lambda disk: disk.pread(2**40, 0), nbd.Error),
        (lambda disk: disk.pwrite("text", 0), TypeError),
        (lambda disk: disk.pread_into(b"constant", 0), BufferError),
        (lambda disk: disk.flush(2**32), ValueError),
        (lambda disk: disk.zero(1, 0, -1), ValueError),
        (lambda disk: disk.block_status(512, 0, None), TypeError),
        (lambda disk: disk.block_status("1", 0, print), TypeError),
    ],
)
def test_bad_arguments_are_refused_and_take_no_place(server: Server, call: Any, kind: Any) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, depth=1) as disk:
            for _ in range(3):
                with pytest.raises(kind):
                    await call(disk)
            assert await disk.pread(1, 0) == b"\0"

    run(main())


def test_a_closed_client_refuses_calls(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            pass
        with pytest.raises(nbd.ClosedHandle, match=r"the nbd\.aio\.Client is closed"):
            await disk.pread(512, 0)
        with pytest.raises(nbd.ClosedHandle):
            disk.extents()
        with pytest.raises(nbd.ClosedHandle):
            disk.get_size()

    run(main())


def test_a_second_close_does_nothing(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.close()
            await disk.close()

    run(main())


def test_a_close_ends_waiting_calls(server: Server) -> None:
    async def main() -> list[Any]:
        async with nbd.aio.connect(server.uri, depth=2) as disk:
            with paused(server):
                tasks = [asyncio.create_task(outcome(disk.pread(512, 0))) for _ in range(5)]
                status = outcome(disk.block_status(512, 0, lambda *_: 0))
                tasks.append(asyncio.create_task(status))
                await asyncio.sleep(0)
                await disk.close()
                return await asyncio.gather(*tasks)

    ended = run(main())
    assert [type(one) for one in ended] == [nbd.ClosedHandle] * 6


def test_a_close_ends_a_call_that_was_just_admitted(server: Server) -> None:
    async def main() -> list[Any]:
        async with nbd.aio.connect(server.uri, depth=1) as disk:
            tasks = [asyncio.ensure_future(outcome(disk.pread(512, 0))) for _ in range(3)]
            tasks[0].add_done_callback(
                lambda _: closing.append(asyncio.ensure_future(disk.close()))
            )
            ended = await asyncio.gather(*tasks)
            await closing[0]
            return ended

    closing: list[asyncio.Future[None]] = []
    ended = run(main())
    assert ended[0] == bytes(512)
    assert {type(one) for one in ended[1:]} <= {bytearray, nbd.ClosedHandle}
    assert isinstance(ended[2], nbd.ClosedHandle)


def test_an_empty_range_is_read_and_written(server: Server) -> None:
    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(b"", 5)
            return await disk.pread(0, MIB)

    assert run(main()) == b""


def test_it_is_closed_when_the_body_fails(server: Server) -> None:
    disks: list[Client] = []

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            disks.append(disk)
            raise LookupError

    with pytest.raises(LookupError):
        run(main())
    assert "closed" in repr(disks[0])
    with pytest.raises(nbd.ClosedHandle):
        disks[0].handles[0].get_size()


def test_a_call_is_late_after_the_timeout(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, timeout=0.5) as disk:
            with paused(server):
                with pytest.raises(nbd.Timeout, match=r"within 0\.5 seconds"):
                    await disk.pread(512, 0)
                with pytest.raises(TimeoutError):
                    await disk.block_status(512, 0, lambda *_: 0)

        async with nbd.aio.connect(server.uri, timeout=20) as disk:
            assert await disk.pread(512, 0) == bytes(512)

    run(main())


def test_a_task_that_waits_in_the_queue_times_out_too(server: Server) -> None:
    async def main() -> None:
        async with nbd.aio.connect(server.uri, timeout=0.5, depth=1) as disk:
            with paused(server):
                ended = await asyncio.gather(*(outcome(disk.pread(512, 0)) for _ in range(3)))
            assert [type(one) for one in ended] == [nbd.Timeout] * 3

    run(main())


def test_a_slow_server_does_not_hold_up_the_loop(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "memory", "1M", "rdelay=200ms")

    async def main() -> int:
        turns = 0
        async with nbd.aio.connect(server.uri) as disk:
            read = asyncio.create_task(disk.pread(512, 0))
            while not read.done():
                turns += 1
                await asyncio.sleep(0.001)
        return turns

    assert run(main()) > 20


def test_unaligned_ranges_are_merged_where_the_server_has_blocks(nbdkit: StartServer) -> None:
    policy = "blocksize-minimum=4096", "blocksize-error-policy=error"
    server = nbdkit("--filter=blocksize-policy", "memory", "1M", *policy)

    async def main() -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            await asyncio.gather(*(disk.pwrite(b"x" * 1000, 1000 * n) for n in range(20)))
            return await disk.pread(20_001, 0)

    assert run(main()) == b"x" * 20_000 + b"\0"


def test_what_was_sent_is_there_after_a_close_and_a_flush(server: Server) -> None:
    async def write() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            write = asyncio.create_task(disk.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA))
            assert not sent(disk)()
            await write
            await disk.flush()

    run(write())
    with nbd.connect(server.uri) as h:
        assert h.pread(4096, 0) == b"x" * 4096
