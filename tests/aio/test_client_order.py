"""A cancelled write never overwrites a later write to the same place, however late it is."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import pytest
from support.asyncs import outcome, run, until
from support.hostile import (
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    HungUp,
    Request,
    Wire,
    export_info,
)
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd

CMD_WRITE_ZEROES = 6


class Late:
    """A server that carries out commands only when told to, the newest first."""

    def __init__(self) -> None:
        self.disk = bytearray(MIB)
        self.waiting: list[tuple[Request, bytes]] = []
        self.is_free = False
        self._changed = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"nbd://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def release(self) -> None:
        """Carry out the waiting commands, the newest first; later ones are carried out at once."""
        with self._changed:
            self.is_free = True
            while self.waiting:
                self._do(*self.waiting.pop())

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._wire = Wire(sock)
        with sock:
            try:
                self._wire.negotiate(structured=False, info=[export_info(MIB)])
                while True:
                    request = self._wire.request()
                    is_write = request.command == CMD_WRITE
                    data = self._wire.receive(request.count) if is_write else b""
                    with self._changed:
                        if self.is_free:
                            self._do(request, data)
                        else:
                            self.waiting.append((request, data))
            except (HungUp, OSError):
                return

    def _do(self, request: Request, data: bytes) -> None:
        part = slice(request.offset, request.offset + request.count)
        payload = b""
        if request.command == CMD_READ:
            payload = bytes(self.disk[part])
        elif request.command in (CMD_TRIM, CMD_WRITE_ZEROES):
            self.disk[part] = bytes(request.count)
        elif request.command != CMD_FLUSH:
            self.disk[part] = data
        self._wire.simple(request.cookie, payload=payload)

    def close(self) -> None:
        """End the thread."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def late() -> Iterator[Late]:
    """Yield a Late server, and close it afterwards."""
    server = Late()
    try:
        yield server
    finally:
        server.close()


CALLS: dict[str, Callable[[nbd.aio.Client], Any]] = {
    "pwrite": lambda disk: disk.pwrite(b"old" * 1024, 4096),
    "zero": lambda disk: disk.zero(3072, 4096),
    "trim": lambda disk: disk.trim(3072, 4096),
}


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_written_after_a_stopped_write_stays(name: str, how: str) -> None:
    async def main(server: Late) -> None:
        options: Any = {"timeout": 0.3} if how == "timeout" else {}
        async with nbd.aio.connect(server.uri, **options) as disk:
            first = asyncio.ensure_future(CALLS[name](disk))
            await until(lambda: server.waiting)
            if how == "cancelled":
                first.cancel()
            with pytest.raises((asyncio.CancelledError, nbd.Timeout)):
                await first
            second = asyncio.ensure_future(disk.pwrite(b"new!" * 256, 4096))
            elsewhere = asyncio.ensure_future(disk.pread(512, 65536))
            await until(lambda: len(server.waiting) > 1)
            assert [request.command for request, _ in server.waiting[1:]] == [CMD_READ]
            server.release()
            await asyncio.gather(second, elsewhere)
            assert await disk.pread(1024, 4096) == b"new!" * 256

    with late() as server:
        run(main(server))
        assert server.disk[4096:5120] == b"new!" * 256


def test_a_read_behind_a_stopped_write_sees_it_whole() -> None:
    async def main(server: Late) -> bytearray:
        async with nbd.aio.connect(server.uri) as disk:
            first = asyncio.ensure_future(disk.pwrite(b"x" * 4096, 0))
            await until(lambda: server.waiting)
            first.cancel()
            await asyncio.wait([first])
            read = asyncio.ensure_future(disk.pread(4096, 0))
            await asyncio.sleep(0.05)
            server.release()
            return await read

    with late() as server:
        assert run(main(server)) == b"x" * 4096


def test_random_calls_do_what_they_do_to_a_bytearray(nbdkit: StartServer) -> None:
    chance = random.Random(11)
    model = bytearray(256 * KIB)

    async def step(disk: nbd.aio.Client) -> None:
        at = chance.randrange(len(model))
        count = min(chance.choice([1, 100, 512, 4096, 50_000]), len(model) - at)
        which = chance.randrange(6)
        if which == 0:
            model[at : at + count] = bytes(count)
            await disk.zero(count, at)
        elif which == 1:
            buffer = nbd.Buffer(count)
            await disk.pread_into(buffer, at)
            assert bytes(buffer) == model[at : at + count]
        elif which < 4:
            data = chance.randbytes(count)
            stopped = chance.random() < 0.3
            task = asyncio.ensure_future(disk.pwrite(data, at))
            if stopped:
                await asyncio.sleep(chance.random() * 0.002)
                task.cancel()
            ended = await asyncio.gather(task, return_exceptions=True)
            if isinstance(ended[0], asyncio.CancelledError):
                data = chance.randbytes(count)  # the retry, with different data
                await disk.pwrite(data, at)
            model[at : at + count] = data
        else:
            assert await disk.pread(count, at) == model[at : at + count]

    async def main(uri: str) -> None:
        async with nbd.aio.connect(uri, connections=3, depth=8) as disk:
            for _ in range(300):
                await step(disk)
            assert await disk.pread(len(model), 0) == model
            assert await outcome(disk.pread(1, len(model))) is not None

    policy = ("blocksize-minimum=512", "blocksize-error-policy=error")
    filters = ("--filter=blocksize-policy", "--filter=delay")
    for options in (("memory", "256K"), (*filters, "memory", "256K", *policy, "wdelay=1ms")):
        model[:] = bytes(len(model))
        run(main(nbdkit(*options, "--threads=8").uri))
