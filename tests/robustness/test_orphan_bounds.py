"""A handle keeps a bounded number of abandoned commands for a server that hangs.

README promises at most 64 commands and 64 MiB.
"""

from __future__ import annotations

import os

import pytest
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
    """Let AddressSanitizer, if the suite runs under it, release freed memory at once."""
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
    assert int(done.stdout) < (MAX_BYTES >> 20) + 40  # instead of 300 MiB, or 1 GiB


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
    assert int(done.stdout) < 40  # instead of 8 MiB for each
