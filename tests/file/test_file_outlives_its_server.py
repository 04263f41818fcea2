# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with reconnect=, on a server that is killed at random, compared with a bytearray.

The server loses what was not flushed.  What the file has flushed must be on the disk, and reads
must return what was written, whatever the server has forgotten.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import random
from typing import Any

import pytest
from support.cutting import random_limits
from support.files import read_fully
from support.forms import SOAK
from support.hostile import EXPORT_FLAGS
from support.outliving import (
    LONG,
    SEEDS,
    any_server,
    cutter,
    nothing_is_left,
    wait_until,
    watchdog,
)
from support.programs import output_of
from support.sizes import KIB, MIB
from support.volatile import READ_ONLY, volatile_server

import nbd

__all__ = ["nothing_is_left", "watchdog"]

SIZE = 256 * KIB
CALLS = 400
#: Where a server can die; "+" is after it has carried out the command, and before its reply.
PLACES = ("greet", "option", "go", "read", "read+", "write", "write+", "flush", "flush+")


class Storm:
    """Random calls on a file, each compared with a bytearray."""

    def __init__(self, disk: Any, rng: random.Random, size: int = SIZE) -> None:
        self.model = bytearray(size)
        self._disk = disk
        self._rng = rng

    def run(self, calls: int) -> None:
        """Make random calls."""
        kinds = [self._write, self._read, self._flush]
        for _ in range(calls):
            self._rng.choices(kinds, [8, 8, 1])[0](*self._range())

    def _range(self) -> tuple[int, int]:
        """Return an offset and a length: mostly small, sometimes aligned."""
        rng, size = self._rng, len(self.model)
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice([0, 1, 511, 512, 4096, rng.randrange(64 * KIB)]))
        if rng.random() < 0.3:
            offset, length = offset // 4096 * 4096, length // 4096 * 4096
        return offset, length

    def _write(self, offset: int, length: int) -> None:
        data = self._rng.randbytes(length)
        self._disk.seek(offset)
        done = 0
        while done < length:  # an unbuffered file may need more than one write
            done += self._disk.write(data[done:])
        self.model[offset : offset + length] = data

    def _read(self, offset: int, length: int) -> None:
        self._disk.seek(offset)
        found = read_fully(self._disk, length)
        assert found == self.model[offset : offset + length], (offset, length)

    def _flush(self, _offset: int, _length: int) -> None:
        self._disk.flush()


def opened(uri: Any, mode: str = "r+b", **options: Any) -> Any:
    """Open a disk with reconnect=."""
    return nbd.open(uri, mode, **{"reconnect": LONG, "timeout": LONG, **options})


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls_while_the_server_is_killed_are_those_of_a_bytearray(seed: int) -> None:
    rng = random.Random(seed)
    with volatile_server(size=SIZE, **any_server(rng)) as server:
        uri = rng.choice([server.uri, functools.partial(nbd.connect, server.uri)])
        number, buffering = rng.choice([1, 1, 4]), rng.choice([-1, 0, 4096])
        with opened(uri, connections=number, buffering=buffering) as disk:
            storm = Storm(disk, rng)
            with server.killed_at_random(rng, rng.randint(3, 10)):
                while server.kills < 3:
                    storm.run(CALLS // 10)
                storm.run(CALLS)
            disk.flush()
            assert server.disk() == storm.model
            storm.run(5)
        assert server.disk() == storm.model


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls_while_connections_are_cut_at_random_bytes_are_those_of_a_bytearray(
    seed: int,
) -> None:
    rng = random.Random(seed)
    is_tcp = bool(seed % 2)
    limit = random_limits(rng, 4 * SIZE, times=10)
    with volatile_server(size=SIZE, tcp=is_tcp, shuffles=rng.random() < 0.5) as server:
        number = rng.choice([1, 3])
        proxy = cutter(server, limit)
        with proxy, opened(proxy.uri, connections=number, buffering=4096) as disk:
            storm = Storm(disk, rng)
            while proxy.made < 5:
                storm.run(CALLS // 10)
        assert server.disk() == storm.model


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_server_that_dies_twice_at_a_certain_place_is_outlived(
    place: str, connections: int
) -> None:
    rng = random.Random(connections)
    with volatile_server(size=SIZE) as server:
        opening = functools.partial(opened, server.uri, connections=connections, buffering=4096)
        with server.restarted(place, place) as died, opening() as disk:
            storm = Storm(disk, rng)
            storm.run(CALLS // 10)
        assert server.disk() == storm.model
        assert died == [place, place]


@pytest.mark.parametrize("place", ["greet", "option", "go", "write", "write+", "flush", "flush+"])
def test_a_server_that_dies_while_it_is_connected_again_is_outlived(place: str) -> None:
    rng = random.Random(place)
    with volatile_server(size=SIZE) as server, opened(server.uri) as disk:
        storm = Storm(disk, rng)
        for _ in range(3):
            storm._write(*storm._range())
        disk.seek(0)  # empties the buffer
        with server.restarted(place, place) as died:
            storm.run(CALLS // 10)
            disk.flush()
            assert server.disk() == storm.model
        assert died == [place, place]


def test_a_server_that_dies_at_the_good_bye_is_no_error() -> None:
    with volatile_server(size=SIZE) as server, server.restarted("disconnect") as died:
        with opened(server.uri) as disk:
            disk.write(b"x" * SIZE)
        assert server.disk() == b"x" * SIZE
        wait_until(lambda: bool(died))


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_a_server_that_comes_back_with_another_size_is_not_written_to(
    size: int, connections: int
) -> None:
    with volatile_server(size=SIZE) as server:
        disk = opened(server.uri, buffering=0, connections=connections)
        disk.write(b"x" * 4096)
        server.kill()
        server.resize(size)
        server.start()
        with pytest.raises(nbd.Error, match="size") as caught:
            disk.flush()
        assert caught.value.errnum == errno.ESTALE
        with pytest.raises(nbd.Error, match="size"):
            disk.close()
        server.kill()
        assert server.disk() == bytes(size)


def test_a_server_that_comes_back_read_only_is_an_error() -> None:
    with volatile_server(size=SIZE) as server:
        disk = opened(server.uri, buffering=0)
        disk.write(b"x" * 4096)
        server.restart(flags=EXPORT_FLAGS | READ_ONLY)
        with pytest.raises(nbd.Error, match="read-only") as caught:
            disk.flush()
        assert caught.value.errnum == errno.ESTALE
        with pytest.raises(nbd.Error, match="read-only"):
            disk.close()


def test_a_server_that_does_not_come_back_is_the_first_error() -> None:
    with volatile_server(size=SIZE) as server:
        disk = opened(server.uri, buffering=0, reconnect=0.2)
        disk.write(b"x" * 4096)
        server.kill()
        with pytest.raises(nbd.Error, match=r"0\.2 seconds"):
            disk.flush()
        with pytest.raises(nbd.Error, match=r"0\.2 seconds"):
            disk.close()


#: Writes a disk again and again; prints by how many bytes the program has grown meanwhile.
WRITES = """
import gc
import sys
import nbd

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

sizes = []
with nbd.open(sys.argv[1], "r+b", reconnect=60, timeout=60) as disk:
    data = b"x" * (1 << 20)
    for _ in range(int(sys.argv[2])):
        disk.seek(0)
        for _ in range(64):
            disk.write(data)
        sizes.append(resident())
print(sizes[-1] - sizes[1])
"""


@pytest.mark.skipif(
    hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer keeps freed memory"
)
def test_what_was_written_and_not_flushed_takes_bounded_memory() -> None:
    with volatile_server(size=64 * MIB) as server:
        grown = int(output_of(WRITES, server.uri, "8" if SOAK else "4"))
        assert server.disk() == b"x" * 64 * MIB
    assert grown < 32 * MIB
