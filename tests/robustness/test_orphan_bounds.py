"""What the layers keep for a server that hangs is bounded, and huge numbers are numbers.

README promises that a handle keeps at most 64 commands and 64 MiB of what nobody waits for.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import run
from support.programs import run_program
from support.servers import Server, StartServer
from support.sizes import KIB, MIB
from support.usage import registered
from support.waits import orphans, paused, reap

import nbd
from nbd.queue import Queue

MAX_ORPHANS = 64
MAX_BYTES = 64 * MIB


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit whose disk has its own offsets as content."""
    return nbdkit("pattern", "64M", "--threads=4")


@pytest.fixture
def freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have AddressSanitizer, if the suite runs under it, keep no freed memory in programs."""
    options = os.environ.get("ASAN_OPTIONS", "")
    monkeypatch.setenv("ASAN_OPTIONS", f"{options}:quarantine_size_mb=1")


def close_in_flight(handle: nbd.NBD, size: int, reads: int = 16) -> None:
    """Close a queue with reads in flight."""
    queue = Queue(handle, depth=reads)
    for at in range(reads):
        queue.read(nbd.Buffer(size), at * size)
    queue.wait(reads, 0)
    queue.close()


def test_orphans_of_queues_are_bounded(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    with paused(server):
        for _ in range(300):
            close_in_flight(h, 4 * KIB)
            assert orphans(h) <= MAX_ORPHANS
        assert registered() <= MAX_ORPHANS + 1
    with Queue(h) as queue:
        memory = nbd.Buffer(512)
        request = queue.read(memory, 4096)
        while not request.is_done:
            queue.wait()
    assert bytes(memory.to_bytearray())[:8] == (4096).to_bytes(8, "big")
    reap(h)
    assert orphans(h) == 0
    assert registered() == 0


def test_orphans_of_a_queue_and_of_its_handle_are_bounded_together(
    server: Server, h: nbd.NBD
) -> None:
    h.connect_unix(server.socket)
    with paused(server):
        for _ in range(4):
            close_in_flight(h, 4 * KIB)
        h.settimeout(0.001)
        for _ in range(30):
            with pytest.raises(nbd.Timeout):
                h.pread(512, 0)
            assert orphans(h) <= MAX_ORPHANS
        h.settimeout(None)
    assert h.pread(8, 512) == (512).to_bytes(8, "big")
    reap(h)
    assert registered() == 0


def test_orphans_of_files_over_one_handle_are_bounded(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    h.settimeout(0.005)
    with paused(server):
        for _ in range(40):
            file = nbd.open(h)
            with pytest.raises(nbd.Timeout):
                file.read(4 * MIB)
            file.close()
            assert orphans(h) <= MAX_ORPHANS
    h.settimeout(None)
    with nbd.open(h) as file:
        file.seek(4096)
        assert file.read(8) == (4096).to_bytes(8, "big")
    reap(h)
    del file
    assert registered() == 0


RESIDENT = """
import gc, os, resource, signal, sys, nbd, nbd.memory, nbd.queue
uri, pid, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
nbd.memory.set_pool_limit(0)

def resident():
    for _ in range(3):  # PyPy needs more than one to run every finalizer
        gc.collect()
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

def close_in_flight(handle):
    queue = nbd.queue.Queue(handle, depth=16)
    for at in range(16):
        memory = nbd.Buffer(size)
        memory.to_buffer()[:] = b"x" * size
        queue.read(memory, at * size)
    queue.wait(16, 0)
    queue.close()

with nbd.connect(uri) as handle:
    os.kill(pid, signal.SIGSTOP)
    close_in_flight(handle)
    before = resident()
    for _ in range(min(300, (1 << 30) // (16 * size))):
        close_in_flight(handle)
    print((resident() - before) >> 20)
    os.kill(pid, signal.SIGCONT)
"""


@pytest.mark.usefixtures("freed_at_once")
@pytest.mark.parametrize("size", [64 * KIB, 4 * MIB])
def test_what_closed_queues_keep_is_bounded(server: Server, size: int) -> None:
    done = run_program(RESIDENT, server.uri, str(server.process.pid), str(size))
    server.resume()
    assert done.stderr == ""
    assert int(done.stdout) < (MAX_BYTES >> 20) + 40  # and not 300 MiB, or 1 GiB


CLOSED_FILES = """
import gc, resource, sys, nbd, nbd.memory
uri = sys.argv[1]
nbd.memory.set_pool_limit(0)

def resident():
    for _ in range(3):  # PyPy needs more than one to run every finalizer
        gc.collect()
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

def closed():
    with nbd.open(uri, "rb") as file:
        for _ in range(64):
            file.read(256 << 10)
    return file

files = [closed()]
before = resident()
for _ in range(20):
    files.append(closed())
print((resident() - before) >> 20)
"""


@pytest.mark.usefixtures("freed_at_once")
def test_a_closed_file_that_is_referred_to_keeps_no_memory(server: Server) -> None:
    done = run_program(CLOSED_FILES, server.uri)
    assert done.stderr == ""
    assert int(done.stdout) < 40  # and not 8 MiB for each


# --- huge numbers -----------------------------------------------------------------------------

FOR_EVER = [math.inf, 1e300, 1e12, 2.0**63, sys.maxsize, 1e9]
forever = pytest.mark.parametrize("seconds", FOR_EVER)
DATA = (512).to_bytes(8, "big")


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


BAD = [math.nan, 0, -1, -math.inf]


@pytest.mark.parametrize("seconds", BAD)
def test_what_is_no_time_to_wait_is_a_value_error(
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


def test_a_queue_refuses_what_is_not_a_number_of_seconds(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    with Queue(h) as queue:
        with pytest.raises(ValueError, match="timeout: "):
            queue.wait(timeout=math.nan)
        assert queue.wait(timeout=-math.inf) == []
