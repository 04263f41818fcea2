# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: buffer and disk appear as one file, in any order of calls."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.servers import StartServer

import nbd

#: A small buffer on a small disk, so that most calls leave the buffer or fill it.
SIZE, BUFFER = 8192, 256
COUNTS = (0, 1, 10, 100, 150, 256, 257, 400, 1000)


@pytest.fixture
def data() -> bytes:
    """Return the content of the disk, in which no part occurs twice."""
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def disk(nbdkit: StartServer, data: bytes) -> Iterator[Any]:
    """Return a file with a small buffer, on a disk with the data."""
    uri = nbdkit("memory", str(SIZE)).uri
    with nbd.open(uri, "wb") as writer:
        writer.write(data)
    with nbd.open(uri, "r+b", buffering=BUFFER) as file:
        yield file


@pytest.mark.parametrize("method", ["readinto", "readinto1"])
def test_a_read_into_memory_continues_after_the_buffered_bytes(
    disk: Any, data: bytes, method: str
) -> None:
    found, memory = b"", bytearray(150)
    while len(found) < SIZE:
        count = getattr(disk, method)(memory)
        found += memory[:count]
    assert found == data


@pytest.mark.parametrize("method", ["read", "read1", "readinto", "readinto1", "peek"])
def test_a_read_after_a_write_loses_nothing(disk: Any, data: bytes, method: str) -> None:
    disk.write(b"written")
    if method.startswith("readinto"):
        memory = bytearray(10)
        found = memory[: getattr(disk, method)(memory)]
    else:
        found = getattr(disk, method)(10)
    assert found
    assert data[7:].startswith(found)
    disk.seek(0)
    assert disk.read() == b"written" + data[7:]


@pytest.mark.parametrize("method", ["readinto", "readinto1"])
def test_a_read_into_read_only_memory_is_refused_and_moves_nothing(disk: Any, method: str) -> None:
    with pytest.raises((TypeError, BufferError)):
        getattr(disk, method)(b"1234")
    assert disk.tell() == 0


@pytest.mark.parametrize("method", ["readinto", "readinto1"])
def test_memory_of_any_item_size_is_filled(disk: Any, data: bytes, method: str) -> None:
    numbers = memoryview(bytearray(100)).cast("I")
    assert getattr(disk, method)(numbers) == 100
    assert numbers.tobytes() == data[:100]


@pytest.mark.parametrize("seed", range(20))
def test_calls_in_any_order_do_what_they_do_in_memory(disk: Any, data: bytes, seed: int) -> None:
    rand = random.Random(seed)
    memory = io.BytesIO(data)
    for _ in range(50):
        one_call(rand, disk, memory)
        assert disk.tell() == memory.tell()
    disk.seek(0)
    assert disk.read() == memory.getvalue()


def one_call(rand: random.Random, disk: Any, memory: io.BytesIO) -> None:
    """Call a method of the disk, chosen by rand, and do the same to a bytearray."""
    count = rand.choice(COUNTS)
    method = rand.choice(["read", "read1", "readinto", "readinto1", "peek", "seek", "write"])
    available = min(count, SIZE - memory.tell())
    if method == "write":
        written = rand.randbytes(available)
        assert disk.write(written) == memory.write(written)
    elif method == "seek":
        place, whence = rand.choice([(rand.randrange(SIZE), os.SEEK_SET), (available, os.SEEK_CUR)])
        assert disk.seek(place, whence) == memory.seek(place, whence)
    elif method.startswith("readinto"):
        buffer = bytearray(count)
        filled = getattr(disk, method)(buffer)
        assert buffer[:filled] == memory.read(filled)
        check_length(method, filled, available)
    else:
        found = getattr(disk, method)(count)
        assert found == memory.read(len(found))
        if method == "peek":
            memory.seek(-len(found), os.SEEK_CUR)
        else:
            check_length(method, len(found), available)


def check_length(method: str, count: int, available: int) -> None:
    """Check that a read was complete; a method whose name ends in 1 must only read something."""
    if method.endswith("1"):
        assert min(1, available) <= count <= available
    else:
        assert count == available
