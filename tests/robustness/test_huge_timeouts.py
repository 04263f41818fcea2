"""A huge or infinite timeout waits for ever, and a value that is no timeout is refused."""

from __future__ import annotations

import asyncio
import io
import math
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import run
from support.hostile import Wire
from support.servers import Server, StartServer, listening_unix
from support.sizes import MIB

import nbd
from nbd.queue import Queue

FOR_EVER = [math.inf, 1e300, 1e12, 2.0**63, sys.maxsize, 1e9]
forever = pytest.mark.parametrize("seconds", FOR_EVER)
DATA = (512).to_bytes(8, "big")
BAD = [math.nan, 0, -1, -math.inf]
HUGE = [float("inf"), 1e12, 1e300, 10**15]


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit whose disk has its own offsets as content."""
    return nbdkit("pattern", "64M", "--threads=4")


@forever
def test_a_huge_timeout_of_a_queue(server: Server, h: nbd.NBD, seconds: float) -> None:
    h.connect_unix(server.socket)
    with Queue(h) as queue:
        request = queue.read(nbd.Buffer(512), 0)
        assert queue.wait(timeout=seconds) == [request]
        assert queue.wait(timeout=seconds) == []


@pytest.mark.parametrize("least", [sys.maxsize, 2**31, 2**63, 2**64, 10**30, 1000])
def test_a_huge_number_of_requests_to_wait_for(server: Server, h: nbd.NBD, least: int) -> None:
    h.connect_unix(server.socket)
    with Queue(h) as queue:
        requests = [queue.read(nbd.Buffer(512), 512 * at) for at in range(20)]
        found = queue.wait(least)
        assert set(found) == set(requests)


@forever
def test_a_huge_timeout_of_a_file(server: Server, seconds: float) -> None:
    with nbd.open(server.uri, timeout=seconds, retry_for=seconds) as file:
        file.seek(512)
        assert file.read(8) == DATA


@forever
def test_a_huge_timeout_of_a_handle(server: Server, h: nbd.NBD, seconds: float) -> None:
    h.settimeout(seconds)
    h.connect_unix(server.socket)
    assert h.pread(8, 512) == DATA
    with nbd.open(h) as file:
        file.seek(512)
        assert file.read(8) == DATA
    with nbd.connect(server.uri, timeout=seconds, retry_for=seconds) as other:
        assert other.pread(8, 512) == DATA


@forever
def test_a_huge_timeout_of_a_copy(
    nbdkit: StartServer, h: nbd.NBD, tmp_path: Path, seconds: float
) -> None:
    small = nbdkit("pattern", "1M", "--threads=4")
    stream = io.BytesIO()
    assert sum(nbd.copy(small.uri, tmp_path / "copy", timeout=seconds)) == MIB
    assert sum(nbd.copy(small.uri, stream, timeout=seconds)) == MIB
    assert (tmp_path / "copy").read_bytes() == stream.getvalue()
    assert stream.getvalue()[512:520] == DATA


@forever
def test_a_huge_timeout_of_a_client(server: Server, tmp_path: Path, seconds: float) -> None:
    async def main() -> None:
        connecting = nbd.aio.connect(server.uri, timeout=seconds, retry_for=seconds, depth=1)
        async with connecting as disk:
            found = await asyncio.gather(disk.pread(8, 512), disk.pread(8, 512))
            assert list(found) == [DATA, DATA]
        await nbd.aio.copy(server.uri, tmp_path / "copy", timeout=seconds)

    run(main())


@pytest.mark.parametrize("seconds", BAD)
def test_a_timeout_that_is_not_positive_is_a_value_error(
    server: Server, tmp_path: Path, seconds: float
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: nbd.open(server.uri, timeout=seconds),
        lambda: nbd.connect(server.uri, timeout=seconds),
        lambda: nbd.copy(server.uri, tmp_path / "copy", timeout=seconds),
        lambda: nbd.aio.connect(server.uri, timeout=seconds),
        lambda: run(nbd.aio.copy(server.uri, tmp_path / "copy", timeout=seconds)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^(timeout|seconds): "):
            call()


def test_a_queue_refuses_a_timeout_that_is_not_a_number(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    with Queue(h) as queue:
        with pytest.raises(ValueError, match="timeout: "):
            queue.wait(timeout=math.nan)
        assert queue.wait(timeout=-math.inf) == []


@pytest.mark.parametrize("seconds", HUGE)
def test_huge_and_infinite_numbers_are_for_ever(nbdkit: StartServer, seconds: Any) -> None:
    async def main() -> None:
        async with nbd.aio.connect(uri, timeout=seconds, retry_for=seconds) as disk:
            assert await disk.pread(512, 0) == bytes(512)
            await disk.block_status(512, 0, lambda *_: 0)

    uri = nbdkit("memory", "1M", tcp=True).uri.replace("127.0.0.1", "localhost")
    run(main())
    with nbd.connect(uri, timeout=seconds, retry_for=seconds) as h:
        assert h.pread(512, 0) == bytes(512)


@pytest.mark.parametrize("seconds", HUGE)
def test_an_infinite_retry_ends_when_the_server_comes(tmp_sock: str, seconds: Any) -> None:
    async def main() -> int:
        connecting = asyncio.ensure_future(
            nbd.aio.connect(f"nbd+unix:///?socket={tmp_sock}", retry_for=seconds).__aenter__()
        )
        await asyncio.sleep(0.05)
        with listening_unix(Path(tmp_sock)) as listener, server_on(listener):
            disk = await connecting
            size = disk.get_size()
            await disk.close()
            return size

    assert run(main()) == MIB


@contextmanager
def server_on(listener: socket.socket) -> Iterator[None]:
    """Serve one client of a socket."""

    def accept() -> None:
        sock, _ = listener.accept()
        with sock:
            try:
                Wire(sock).negotiate(structured=False)
                Wire(sock).linger()
            except Exception:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("-inf")])
@pytest.mark.parametrize("option", ["timeout", "retry_for"])
def test_other_numbers_of_seconds_are_refused(option: str, seconds: float) -> None:
    options: Any = {option: seconds}
    for connect in (nbd.connect, nbd.aio.connect):
        with pytest.raises(ValueError, match="is not more than 0"):
            connect("nbd://localhost", **options)
