# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: which bytes the server is asked for, for programs that jump or read in order."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from support.logs import Logged
from support.servers import StartServer
from support.sizes import KIB, MIB
from support.usage import collect_garbage

import nbd

SIZE = 128 * MIB
#: What is read at once after a jump for a small structure, and in order at most.
SMALL, PIECE = 32 * KIB, 256 * KIB


@pytest.fixture
def logged(nbdkit: StartServer, tmp_path: Path) -> Logged:
    """Return a server on an empty disk that logs its requests."""
    return Logged(nbdkit, tmp_path / "log", "null", str(SIZE))


def read(disk: Any, count: int) -> int:
    """Read `count` bytes; return how many were read."""
    return len(disk.read(count))


def readinto(disk: Any, count: int) -> int:
    """Read `count` bytes into memory of the caller."""
    found: int = disk.readinto(bytearray(count))
    return found


def read_by_4_kib(disk: Any, count: int) -> int:
    """Read `count` bytes in order, in small parts."""
    return sum(len(disk.read(4 * KIB)) for _ in range(count // (4 * KIB)))


def jumping(disk: Any, read: Callable[[Any, int], int], count: int, alignment: int) -> int:
    """Read at random places; return how many bytes were read."""
    rand, total = random.Random(count), 0
    for _ in range(10):
        disk.seek(rand.randrange(1, (SIZE - count) // alignment) * alignment)
        total += read(disk, count)
    return total


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("way", [read, readinto])
@pytest.mark.parametrize("alignment", [1, 4 * KIB])
@pytest.mark.parametrize(
    "count", [64 * KIB, 100_000, 256 * KIB, MIB, 3 * MIB, 3 * MIB + 100, 9 * MIB]
)
def test_a_large_read_at_a_random_place_fetches_what_it_returns(
    logged: Logged, count: int, alignment: int, way: Callable[[Any, int], int], mode: str
) -> None:
    with nbd.open(logged.uri, mode) as disk:
        wanted = jumping(disk, way, count, alignment)
    assert wanted == 10 * count
    assert logged.fetched() <= 1.25 * wanted


@pytest.mark.parametrize("count", [4 * KIB, 5000, 16 * KIB, 60_000])
@pytest.mark.parametrize("alignment", [1, 4 * KIB])
def test_a_smaller_read_at_a_random_place_fetches_at_most_twice_as_much(
    logged: Logged, count: int, alignment: int
) -> None:
    with nbd.open(logged.uri) as disk:
        wanted = jumping(disk, read, count, alignment)
    assert logged.fetched() <= 2 * wanted


@pytest.mark.parametrize("count", [64 * KIB, 300 * KIB, MIB, 5 * MIB])
def test_a_run_of_small_reads_fetches_at_most_twice_as_much(logged: Logged, count: int) -> None:
    with nbd.open(logged.uri) as disk:
        wanted = jumping(disk, read_by_4_kib, count, 512)
    assert logged.fetched() <= 2 * wanted


def test_runs_on_a_slow_server_fetch_at_most_twice_as_much(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    logged = Logged(nbdkit, tmp_path / "log", "--filter=delay", "null", str(SIZE), "rdelay=2ms")
    with nbd.open(logged.uri) as disk:
        wanted = sum(jumping(disk, read_by_4_kib, count, 512) for count in (64 * KIB, MIB))
    assert logged.fetched() <= 2 * wanted


@pytest.mark.parametrize("count", [1, 100, 4000])
def test_a_read_of_a_small_structure_fetches_what_is_beside_it(logged: Logged, count: int) -> None:
    with nbd.open(logged.uri) as disk:
        for place in (MIB, 5 * MIB):
            disk.seek(place)
            for offset in range(0, SMALL, 4000):
                disk.seek(place + offset)
                disk.read(min(count, SMALL - offset))
    assert logged.reads() == [(MIB, SMALL), (5 * MIB, SMALL)]


@pytest.mark.parametrize("name", ["readline", "peek"])
def test_a_call_that_names_no_size_fetches_little_after_a_jump(logged: Logged, name: str) -> None:
    with nbd.open(logged.uri) as disk:
        disk.read(10 * MIB)
        disk.seek(20 * MIB)
        getattr(disk, name)(10)
    assert max(logged.reads()) == (20 * MIB, SMALL)


def test_a_buffer_that_is_smaller_is_filled_after_a_jump(logged: Logged) -> None:
    with nbd.open(logged.uri, buffering=512) as disk:
        disk.seek(MIB)
        disk.read(10)
    assert logged.reads() == [(MIB, 512)]


@pytest.mark.parametrize("count", [100, 64 * KIB])
def test_the_first_read_of_a_file_is_not_a_jump(logged: Logged, count: int) -> None:
    with nbd.open(logged.uri) as disk:
        assert disk.seek(0, os.SEEK_END) == disk.seek(0, os.SEEK_END)
        disk.seek(0)
        disk.read(count)
    assert logged.reads() == [(0, PIECE)]


@pytest.mark.parametrize("count", [4 * KIB, 64 * KIB])
def test_a_program_that_seeks_to_where_it_is_fetches_nothing_twice(
    logged: Logged, count: int
) -> None:
    with nbd.open(logged.uri) as disk:
        for place in range(0, 4 * MIB, count):
            disk.seek(place)
            assert len(disk.read(count)) == count
    assert logged.reads() == [(place, PIECE) for place in range(0, 4 * MIB, PIECE)]


def test_all_of_a_large_read_is_asked_for_at_once(nbdkit: StartServer, tmp_path: Path) -> None:
    delay = "--filter=delay", "null", str(SIZE), "rdelay=200ms"
    logged = Logged(nbdkit, tmp_path / "log", *delay)
    with nbd.open(logged.uri) as disk:
        disk.seek(MIB)
        disk.read(3 * MIB)
    assert logged.max_at_once() == 12


def test_a_read_that_is_larger_than_the_buffer_asks_once(logged: Logged) -> None:
    with nbd.open(logged.uri, buffering=4096) as disk:
        for place in (5 * MIB, 2 * MIB):
            disk.seek(place)
            assert len(disk.read(60_000)) == 60_000
    assert logged.reads() == [(5 * MIB, 60_000), (2 * MIB, 60_000)]


def test_a_read_of_all_the_rest_fetches_each_byte_once(logged: Logged) -> None:
    with nbd.open(logged.uri) as disk:
        disk.seek(SIZE - 3 * MIB - 7)
        assert len(disk.read()) == 3 * MIB + 7
    assert logged.fetched() == 3 * MIB + 7


@pytest.mark.parametrize("size", [-1, None])
def test_a_read_without_a_size_fetches_the_rest_once(logged: Logged, size: int | None) -> None:
    with nbd.open(logged.uri) as disk:
        disk.seek(SIZE - MIB)
        assert len(disk.read(size)) == MIB  # type: ignore[arg-type]
    assert logged.fetched() == MIB


def test_memory_that_was_filled_is_not_kept(logged: Logged) -> None:
    class Memory(bytearray):
        pass

    disk: Any
    with nbd.open(logged.uri) as disk:
        memory = Memory(MIB)
        kept = ref(memory)
        disk.readinto(memory)
        del memory
        collect_garbage()
        assert kept() is None


def test_a_jump_after_a_long_run_reads_nothing_ahead(logged: Logged) -> None:
    with nbd.open(logged.uri) as disk:
        for _ in range(100):
            disk.read(64 * KIB)
        disk.seek(50 * MIB)
        disk.read(64 * KIB)
    assert [one for one in logged.reads() if one[0] >= 50 * MIB] == [(50 * MIB, 64 * KIB)]
