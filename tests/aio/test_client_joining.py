"""Connections join a client that is already in use; one that never joins costs nothing."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import outcome, run, until
from support.hostile import FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HungUp, Wire, export_info
from support.servers import StartServer, program
from support.sizes import MIB
from support.usage import descriptors, registered

import nbd

CAN_MULTI_CONN = 0x100
FLAGS = 0x01 | CAN_MULTI_CONN


class OneAtATime:
    """A server on TCP that serves its first client, and treats the others as it is told.

    Args:
        others: A script for the other clients; None keeps them connected without a greeting.
    """

    def __init__(self, others: Callable[[Wire], None] | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._others = others
        self._kept: list[socket.socket] = []
        self.uri = f"nbd://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def clients(self) -> int:
        """How many clients have connected."""
        return len(self._kept)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._kept.append(sock)
            script = serve if self.clients == 1 else self._others
            if script is not None:
                self._threads.append(threading.Thread(target=quietly, args=(script, Wire(sock))))
                self._threads[-1].start()

    def close(self) -> None:
        """End all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for sock in self._kept:
            sock.close() if self._others is None else hang_up(sock)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for sock in self._kept:
            sock.close()


def hang_up(sock: socket.socket) -> None:
    """Wake the thread that serves a connection, by shutting the connection down."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def quietly(script: Callable[[Wire], None], wire: Wire) -> None:
    """Run a script until its client disconnects."""
    try:
        script(wire)
    except (HungUp, OSError):
        return


def serve(wire: Wire, size: int = MIB, flags: int = FLAGS) -> None:
    """Answer each read with zeroes."""
    wire.negotiate(structured=False, info=[export_info(size, flags)])
    while True:
        request = wire.request()
        wire.simple(request.cookie, payload=bytes(request.count))


@contextmanager
def one_at_a_time(others: Callable[[Wire], None] | None = None) -> Iterator[OneAtATime]:
    """Yield a OneAtATime, and close it afterwards."""
    server = OneAtATime(others)
    try:
        yield server
    finally:
        for sock in server._kept:
            hang_up(sock)
        server.close()


def test_the_others_join(nbdkit: StartServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(nbdkit("memory", "1M").uri, connections=4) as disk:
            assert len(disk.handles) == 1
            await until(lambda: len(disk.handles) == 4)
            reads = asyncio.gather(*(disk.pread(512, 512 * n) for n in range(64)))
            await asyncio.sleep(0)
            assert all(handle.aio_in_flight() for handle in disk.handles)
            await reads

    run(main())


def test_one_that_joins_is_watched(nbdkit: StartServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(nbdkit("memory", "1M").uri, connections=2) as disk:
            await until(lambda: len(disk.handles) == 2)
            disk.handles[0].close()
            await outcome(disk.pread(512, 0))  # the request may have used the first connection
            assert await asyncio.wait_for(disk.pread(512, 0), 10) == bytes(512)

    run(main())


def test_qemu_that_has_no_room_for_a_second_connection(
    qemu_nbd: StartServer, tmp_path: Path
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    server = qemu_nbd(image, "--format=raw", "--shared=2")

    async def main() -> None:
        async with nbd.aio.connect(server.uri), nbd.aio.connect(server.uri, connections=4) as disk:
            assert await asyncio.gather(*(disk.pread(512, 0) for _ in range(40)))
            assert len(disk.handles) == 1

    run(main())


def test_one_that_is_never_greeted_costs_nothing() -> None:
    async def main(server: OneAtATime) -> float:
        began = time.monotonic()
        async with nbd.aio.connect(server.uri, connections=3) as disk:
            assert await disk.pread(512, 0) == bytes(512)
            took = time.monotonic() - began
            await until(lambda: server.clients == 3)
            assert len(disk.handles) == 1
        return took

    with one_at_a_time() as server:
        run(main(server))
    before = descriptors()
    with one_at_a_time() as server:
        assert run(main(server)) < 5
    assert descriptors() == before
    assert registered() == 0


def test_one_that_is_never_greeted_is_given_up_after_the_timeout() -> None:
    async def main(server: OneAtATime) -> None:
        async with nbd.aio.connect(server.uri, connections=2, timeout=0.2) as disk:
            await until(lambda: not disk._joining)
            assert await disk.pread(512, 0) == bytes(512)
            assert len(disk.handles) == 1

    with one_at_a_time() as server:
        run(main(server))


def other_size(wire: Wire) -> None:
    """Serve a disk of another size."""
    serve(wire, 2 * MIB)


def read_only(wire: Wire) -> None:
    """Serve the same disk read-only."""
    serve(wire, MIB, FLAGS | 0x02)


def refuse(wire: Wire) -> None:
    """Disconnect in the middle of the handshake."""
    wire.greet(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
    hang_up(wire.sock)


@pytest.mark.parametrize("others", [other_size, read_only, refuse])
def test_a_connection_that_cannot_be_used_does_not_join(others: Callable[[Wire], None]) -> None:
    async def main(server: OneAtATime) -> None:
        async with nbd.aio.connect(server.uri, connections=3) as disk:
            await until(lambda: server.clients == 3 and not disk._joining)
            assert len(disk.handles) == 1
            assert await disk.pread(512, 0) == bytes(512)

    with one_at_a_time(others) as server:
        run(main(server))


def drop(clients: list[nbd.aio.Client]) -> None:
    """Drop clients, and let PyPy finalize them."""
    clients.clear()
    for _ in range(3):
        gc.collect()


def test_a_client_that_is_dropped_ends_what_would_join() -> None:
    async def main(server: OneAtATime) -> None:
        disks = [await nbd.aio.connect(server.uri, connections=2)]
        await until(lambda: server.clients == 2)
        tasks = set(disks[0]._joining)
        with pytest.warns(ResourceWarning, match=r"nbd\.aio\.Client was not closed"):
            drop(disks)
        await asyncio.wait(tasks, timeout=10)
        assert all(task.cancelled() for task in tasks)

    with one_at_a_time() as server:
        run(main(server))


def test_an_exception_of_prepare_for_another_connection_is_reported(nbdkit: StartServer) -> None:
    reported: list[dict[str, Any]] = []
    calls: list[nbd.NBD] = []

    def prepare(h: nbd.NBD) -> None:
        calls.append(h)
        if len(calls) > 1:
            raise LookupError

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(context)
        )
        async with nbd.aio.connect(
            nbdkit("memory", "1M").uri, connections=2, prepare=prepare
        ) as disk:
            await until(lambda: not disk._joining)
            assert await disk.pread(512, 0) == bytes(512)
        for _ in range(3):
            gc.collect()
        await until(lambda: reported)

    run(main())
    assert isinstance(reported[0]["exception"], LookupError)


def test_a_command_has_one_connection() -> None:
    async def main() -> int:
        command = [program("nbdkit"), "-s", "memory", "1M"]
        async with nbd.aio.connect(command, connections=3) as disk:
            return len(disk._joining) + len(disk.handles)

    assert run(main()) == 1


@pytest.mark.parametrize("count", [0, -1, 65, 10**30])
def test_the_number_of_connections_is_bounded(count: int) -> None:
    with pytest.raises(ValueError, match=f"connections: {count} is not between 1 and 64"):
        nbd.aio.connect("nbd://localhost", connections=count)
