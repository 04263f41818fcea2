"""Memory of reads and of nbd.Buffer: it is reused up to a bound, and released."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.handles import drain, finish
from support.servers import StartServer
from support.sizes import MIB

import nbd
import nbd.memory
from nbd._binding import memory, shim

FEW, MANY = 10_000, 1_000_000 if SOAK else 40_000
BLOCK = 4096
# The bound that README and set_pool_limit give.
POOL = (32 if sys.implementation.name == "pypy" else 64) * MIB
NURSERY = 4 * MIB  # PyPy's default is half of the processor's cache

# Each runs in a process of its own, since the peak of this process is that of earlier tests.
PEAK = """
import sys
import nbd

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10

h = nbd.NBD()
h.connect_uri(sys.argv[1])
"""
READ_INTO_NEW_BUFFERS = """
def read(count):
    for _ in range(count):
        while h.aio_in_flight() >= 64:
            h.poll(-1)
        h.aio_pread(nbd.Buffer(4096), 0, lambda error: 1)
    while h.aio_in_flight():
        h.poll(-1)

few, many = map(int, sys.argv[2:])
read(few)
before = peak()
read(many - few)
print(peak() - before)
"""
READ = """
before = peak()
for _ in range(600):
    h.pread(1 << 20, 0)
print(peak() - before)
"""
READ_INTO_BUFFERS = """
before = peak()
for _ in range(600):
    h.aio_pread(nbd.Buffer(1 << 20), 0, lambda error: 1)
    while h.aio_in_flight():
        h.poll(-1)
print(peak() - before)
"""
GIVE_BACK = """
import gc
import resource

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def fill(size):  # in a function, because PyPy's compiled loops keep a module's variables alive
    buffer = nbd.Buffer(size)
    for page in range(0, size, 4096):
        buffer[page] = 1
    assert resident() - before >= size

before = resident()
fill(1 << 30)
gc.collect()
print(resident() - before)
"""
KEEP_NOTHING = """
import nbd.memory
nbd.memory.set_pool_limit(0)
"""
FAIL_TO_READ = """
before = peak()
for _ in range(40):
    try:
        h.pread(8 << 20, 0)
    except nbd.Error:
        continue
    raise AssertionError
print(peak() - before)
"""

frees = pytest.mark.skipif(
    hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer keeps freed memory"
)
recycles = pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy frees memory in collections, and has no pool"
)
drops_late = pytest.mark.skipif(
    sys.implementation.name != "pypy", reason="CPython frees dropped objects at once"
)


@pytest.fixture
def pool_limit() -> Iterator[Callable[[int], None]]:
    """Return set_pool_limit; the previous limit is restored afterwards."""
    yield nbd.memory.set_pool_limit
    nbd.memory.set_pool_limit(POOL)


def pooled() -> int:
    """Return how many bytes the pool holds, in use or free."""
    return memory._pooled()


def address(buffer: nbd.Buffer) -> int:
    """Return the address of a Buffer's memory."""
    return int(shim.ffi.cast("uintptr_t", buffer._memory.pin))  # type: ignore[union-attr]


def growth(program: str, *arguments: str, nursery: int = NURSERY) -> int:
    """Return by how many bytes a program's memory grew, as the program printed it."""
    command = [sys.executable, "-W", "ignore", "-I", "-c", PEAK + program, *arguments]
    environ = {**os.environ, "PYPY_GC_NURSERY": str(nursery)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return int(done.stdout)


def test_new_buffers_without_end_need_no_more_memory_than_some(
    nbdkit: StartServer, figure: Figure
) -> None:
    grown = growth(READ_INTO_NEW_BUFFERS, nbdkit("null", "1M").uri, str(FEW), str(MANY))
    figure(f"{MANY} reads with new Buffers: peak above that of {FEW}, KiB", grown >> 10)
    assert grown <= 16 * MIB


@frees
def test_what_is_read_and_dropped_leaves_no_memory(nbdkit: StartServer) -> None:
    assert growth(READ, nbdkit("null", "1M").uri) < 64 * MIB


@frees
@drops_late
@pytest.mark.parametrize("program", [READ, READ_INTO_BUFFERS], ids=["pread", "aio_pread"])
def test_a_large_nursery_lets_pypy_take_little_more(nbdkit: StartServer, program: str) -> None:
    nursery = 64 * MIB
    grown = growth(program, nbdkit("null", "1M").uri, nursery=nursery)
    assert grown < 64 * MIB + nursery


@frees
@drops_late
def test_a_lower_bound_lets_pypy_take_less(nbdkit: StartServer) -> None:
    server = nbdkit("null", "1M")
    more = growth(READ, server.uri) - growth(KEEP_NOTHING + READ, server.uri)
    assert more > 4 * MIB


@frees
def test_reads_that_fail_leave_no_memory(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "8M", "--filter=error", "error=EIO", "error-rate=100%")
    assert growth(FAIL_TO_READ, server.uri) < 40 * 8 * MIB // 2


@frees
def test_a_large_buffer_gives_its_memory_back(nbdkit: StartServer) -> None:
    assert growth(GIVE_BACK, nbdkit("null", "1M").uri) < 16 * MIB


@recycles
def test_memory_of_a_dropped_buffer_is_used_again(pool_limit: Callable[[int], None]) -> None:
    pool_limit(POOL)  # drops memory of earlier tests from the pool

    def read_beside(others: list[nbd.Buffer]) -> set[int]:
        found = set()
        for _ in range(100):
            others.append(nbd.Buffer(BLOCK))
            found.add(address(others.pop(0)))
        return found

    assert len(read_beside([nbd.Buffer(BLOCK) for _ in range(8)])) < 20


@recycles
def test_memory_in_use_is_not_given_to_another_buffer() -> None:
    buffers = [nbd.Buffer(BLOCK) for _ in range(200)]
    assert len({address(buffer) for buffer in buffers}) == 200


@recycles
def test_the_pool_keeps_no_more_than_its_bound(pool_limit: Callable[[int], None]) -> None:
    pool_limit(MIB)
    for size in range(BLOCK, 20 * BLOCK, BLOCK):
        buffers = [nbd.Buffer(size) for _ in range(64)]
        assert len(buffers) == 64
        del buffers
    assert pooled() <= MIB
    assert bool(pooled()) is not shim.IS_FREE_THREADED


@recycles
def test_a_bound_of_zero_keeps_nothing(pool_limit: Callable[[int], None]) -> None:
    buffer = nbd.Buffer(BLOCK)
    pool_limit(0)
    del buffer
    nbd.Buffer(BLOCK)
    assert pooled() == 0


@recycles
def test_memory_that_was_given_away_is_not_used_again() -> None:
    given = [nbd.Buffer(BLOCK).to_buffer() for _ in range(20)]
    for _ in range(100):
        nbd.Buffer(BLOCK)[:] = b"x" * BLOCK
    assert given == [bytearray(BLOCK)] * 20


def test_a_negative_bound_is_refused(pool_limit: Callable[[int], None]) -> None:
    with pytest.raises(ValueError, match="size: -1"):
        pool_limit(-1)


def test_used_memory_reads_as_zeroes_in_the_next_buffer(disk: nbd.NBD) -> None:
    disk.pwrite(b"old" * 1024, 0)
    for _ in range(8):
        used = nbd.Buffer(3072)
        finish(disk, disk.aio_pread(used, 0))
        assert used[:3] == b"old"
        del used
        assert bytes(nbd.Buffer(3072)) == bytes(3072)


def test_a_failed_read_shows_nothing_of_used_memory(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("data", "size=1M", "data=(0xff)*4096").socket)
    for _ in range(8):
        used = nbd.Buffer(BLOCK)
        finish(h, h.aio_pread(used, 0))
        del used
        fresh = nbd.Buffer(BLOCK)
        with pytest.raises(nbd.Error):
            h.aio_pread(fresh, MIB)
        assert fresh.is_zero()


def test_a_read_into_used_memory_makes_no_other_call_of_libnbd(disk: nbd.NBD) -> None:
    calls: list[str] = []
    nbd.Buffer(BLOCK)  # dropped at once, so the next one may have its memory
    disk.set_debug_callback(lambda context, message: calls.append(context))
    disk.set_debug(True)
    disk.aio_pread(nbd.Buffer(BLOCK), 0)
    disk.set_debug(False)
    drain(disk)
    assert not [call for call in calls if call.startswith("nbd_get_")]


@recycles
def test_memory_that_can_still_be_seen_is_not_used_again(disk: nbd.NBD) -> None:
    buffer = nbd.Buffer(BLOCK)
    views: list[memoryview] = []
    disk.aio_pread_structured(buffer, 0, lambda view, *rest: views.append(view), lambda error: 1)
    drain(disk)
    del buffer
    for _ in range(8):
        nbd.Buffer.from_bytearray(b"x" * BLOCK)
        new = nbd.Buffer(BLOCK)
        new[:] = b"x" * BLOCK
    assert bytes(views[0]) == bytes(BLOCK)


def test_a_read_in_a_debug_callback_of_another_read_has_its_own_memory(
    disk: nbd.NBD, nbdkit: StartServer
) -> None:
    inner: list[bytearray] = []
    with nbd.NBD() as other:
        other.connect_unix(nbdkit("pattern", "1M").socket)
        pattern = other.pread(BLOCK, BLOCK)
        disk.pwrite(b"x" * BLOCK, 0)
        disk.set_debug_callback(lambda context, message: inner.append(other.pread(BLOCK, BLOCK)))
        disk.set_debug(True)
        assert disk.pread(BLOCK, 0) == b"x" * BLOCK
        disk.set_debug(False)
    assert set(map(bytes, inner)) == {bytes(pattern)}


@recycles
def test_a_finalizer_that_runs_later_shares_no_memory_with_a_new_buffer() -> None:
    shared: list[bool] = []

    class Owner:
        def __init__(self, buffer: nbd.Buffer) -> None:
            self.buffer = buffer
            self.itself = self

        def __del__(self) -> None:
            new = nbd.Buffer(BLOCK)
            shared.append(getattr(self.buffer, "_memory", None) is new._memory)

    Owner(nbd.Buffer(BLOCK))  # the buffer is the older of the two: it is finalized first
    gc.collect()
    assert shared == [False]


def test_a_buffer_whose_memory_has_no_fixed_address(disk: nbd.NBD) -> None:
    file = io.BytesIO(b"in a file" * 100)
    disk.pwrite(file.getbuffer(), 0)
    assert disk.pread(900, 0) == b"in a file" * 100
    target: Any = io.BytesIO(bytes(900))
    cookie = disk.aio_pread(target.getbuffer(), 0)
    finish(disk, cookie)
    assert target.getvalue() == b"in a file" * 100
