# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.aio.connect with reconnect=: storms of tasks on a server that is killed at random.

The server loses what was not flushed.  Each task has a region of its own, which it compares with a
bytearray while it runs.  At the end the disk is compared with all of them.
"""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest
from support.asyncs import run
from support.cutting import random_limits
from support.hostile import EXPORT_FLAGS
from support.outliving import LONG, SEEDS, any_server, cutter, nothing_is_left, watchdog
from support.sizes import KIB
from support.volatile import READ_ONLY, VolatileServer, volatile_server

import nbd

__all__ = ["nothing_is_left", "watchdog"]

TASKS = 8
REGION = 32 * KIB  # of a task
SIZE = TASKS * REGION
FUA = nbd.CMD_FLAG_FUA
#: Where a server can die; "+" is after it has carried out the command, and before its reply.
PLACES = (
    *("greet", "option", "go", "read", "read+", "write", "write+", "zero", "zero+"),
    *("flush", "flush+", "block_status", "block_status+"),
)


def connecting(server: Any, **options: Any) -> Any:
    """Connect with reconnect=."""
    return nbd.aio.connect(
        server, **{"reconnect": LONG, "timeout": LONG, "prepare": with_status, **options}
    )


def with_status(handle: nbd.NBD) -> None:
    """Have block status negotiated."""
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


class Storm:
    """Tasks with random commands."""

    def __init__(self, disk: nbd.aio.Client, rng: random.Random, has_status: bool = True) -> None:
        self.model = bytearray(SIZE)
        self._disk = disk
        self._rng = rng
        self._weights = [8, 8, 2, 1, int(has_status)]

    async def run(self, calls: int) -> None:
        """Make this many calls in each task."""
        await asyncio.gather(*(self._task(start, calls) for start in range(0, SIZE, REGION)))

    async def _task(self, start: int, calls: int) -> None:
        kinds = [self._write, self._read, self._zero, self._flush, self._status]
        for _ in range(calls):
            offset = start + self._rng.randrange(REGION)
            length = self._rng.choice([1, 511, 512, 4096, self._rng.randrange(1, REGION)])
            length = min(length, start + REGION - offset)
            if self._rng.random() < 0.3:  # in whole blocks
                offset, length = offset // 4096 * 4096, 4096
            await self._rng.choices(kinds, self._weights)[0](offset, length)

    async def _write(self, offset: int, length: int) -> None:
        data = self._rng.randbytes(length)
        await self._disk.pwrite(data, offset, self._rng.choice([0, 0, 0, FUA]))
        self.model[offset : offset + length] = data

    async def _read(self, offset: int, length: int) -> None:
        found = await self._disk.pread(length, offset)
        assert found == self.model[offset : offset + length], (offset, length)

    async def _zero(self, offset: int, length: int) -> None:
        await self._disk.zero(length, offset)
        self.model[offset : offset + length] = bytes(length)

    async def _flush(self, _offset: int, _length: int) -> None:
        await self._disk.flush()

    async def _status(self, offset: int, length: int) -> None:
        start, stop = offset // 4096 * 4096, -(-(offset + length) // 4096) * 4096
        at = start
        async for extent in self._disk.extents(start=start, end=stop):
            assert extent.offset == at
            at += extent.length
        assert at == stop


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_while_the_server_is_killed_is_that_of_a_bytearray(seed: int) -> None:
    rng = random.Random(seed)

    async def main(server: VolatileServer) -> None:
        async with connecting(server.uri, connections=rng.choice([1, 1, 4])) as disk:
            storm = Storm(disk, rng, server.options.structured)
            with server.killed_at_random(rng, rng.randint(3, 10)):
                while server.kills < 3:
                    await storm.run(5)
                await storm.run(20)
                await disk.flush()
                assert server.disk() == storm.model
            await storm.run(1)
            await disk.flush()
        assert server.disk() == storm.model

    with volatile_server(size=SIZE, **any_server(rng)) as server:
        run(main(server))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_while_connections_are_cut_at_random_bytes_is_that_of_a_bytearray(
    seed: int,
) -> None:
    rng = random.Random(seed)

    async def main(server: VolatileServer) -> None:
        with cutter(server, random_limits(rng, SIZE, times=10)) as proxy:
            async with connecting(proxy.uri, connections=rng.choice([1, 3])) as disk:
                storm = Storm(disk, rng)
                while proxy.made < 5:
                    await storm.run(5)
                await disk.flush()
            assert server.disk() == storm.model

    with volatile_server(size=SIZE, tcp=bool(seed % 2), shuffles=rng.random() < 0.5) as server:
        run(main(server))


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_server_that_dies_twice_at_a_certain_place_is_outlived(
    place: str, connections: int
) -> None:
    rng = random.Random(place)

    async def main(server: VolatileServer) -> None:
        with server.restarted(place, place) as died:
            async with connecting(server.uri, connections=connections) as disk:
                storm = Storm(disk, rng)
                while len(died) < 2:
                    await storm.run(5)
                await disk.flush()
                assert server.disk() == storm.model

    with volatile_server(size=SIZE) as server:
        run(main(server))


@pytest.mark.parametrize("change", ["smaller", "larger", "read-only"])
def test_a_server_that_comes_back_as_another_disk_is_not_written_to(change: str) -> None:
    sizes = {"smaller": SIZE // 2, "larger": 2 * SIZE, "read-only": SIZE}

    async def main(server: VolatileServer) -> None:
        async with connecting(server.uri) as disk:
            await disk.pwrite(b"x" * 4096, 0)
            server.kill()
            server.resize(sizes[change])
            server.start(flags=EXPORT_FLAGS | (READ_ONLY if change == "read-only" else 0))
            writes = [disk.pwrite(b"y" * 4096, offset) for offset in range(0, REGION, 4096)]
            for outcome in await asyncio.gather(*writes, return_exceptions=True):
                assert isinstance(outcome, nbd.Error)
                assert outcome.errnum == errno.ESTALE

    with volatile_server(size=SIZE) as server:
        run(main(server))
        server.kill()
        assert server.disk() == bytes(sizes[change])


def test_commands_can_be_cancelled_while_the_server_is_dead() -> None:
    async def main(server: VolatileServer) -> None:
        async with connecting(server.uri) as disk:
            await disk.pwrite(b"x", 0)
            server.kill()
            write = asyncio.ensure_future(disk.pwrite(b"y", 1))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(1, 0), 0.05)
            write.cancel()
            with pytest.raises(asyncio.CancelledError):
                await write
            server.start()
            assert await disk.pread(1, 0) == b"x"
            await disk.flush()
            assert server.disk()[:1] == b"x"

    with volatile_server(size=SIZE) as server:
        run(main(server))


def test_a_client_whose_server_stays_dead_can_be_closed() -> None:
    async def main(server: VolatileServer) -> None:
        async with connecting(server.uri) as disk:
            await disk.pread(1, 0)
            server.kill()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.pread(1, 0), 0.05)

    with volatile_server(size=SIZE) as server:
        run(main(server))
