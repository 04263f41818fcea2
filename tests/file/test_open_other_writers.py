# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: what a read returns after others have written to the disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

import pytest
from support.servers import Server, StartServer
from support.sizes import KIB, MIB

import nbd

BLOCK = 512


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit with an empty disk of 4 MiB."""
    return nbdkit("--threads=4", "memory", "4M")


@pytest.fixture
def other(server: Server) -> Iterator[Callable[[bytes, int], None]]:
    """Return a function that writes through another connection, and flushes."""
    with nbd.connect(server.uri) as h:

        def write(data: bytes, offset: int) -> None:
            h.pwrite(data, offset)
            h.flush()

        yield write


def test_a_block_that_is_polled_without_a_buffer_is_never_old(
    server: Server, other: Callable[[bytes, int], None]
) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        for turn in range(1, 20):
            disk.seek(0)
            assert disk.read(BLOCK) == bytes(BLOCK)
            other(bytes([turn]) * BLOCK, BLOCK)
            assert disk.read(BLOCK) == bytes([turn]) * BLOCK
            other(bytes([turn + 1]) * BLOCK, BLOCK)
            disk.seek(BLOCK)
            assert disk.read(BLOCK) == bytes([turn + 1]) * BLOCK


@pytest.mark.parametrize("count", [BLOCK, 64 * KIB])
def test_reads_in_order_without_a_buffer_see_what_was_just_written(
    server: Server, other: Callable[[bytes, int], None], count: int
) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        for turn in range(1, 20):
            other(bytes([turn]) * count, disk.tell())
            assert disk.read(count) == bytes([turn]) * count


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("buffering", [BLOCK, -1])
def test_a_seek_outside_of_the_buffer_reads_anew(
    server: Server, other: Callable[[bytes, int], None], buffering: int, mode: str
) -> None:
    with nbd.open(server.uri, mode, buffering=buffering) as disk:
        while disk.tell() < MIB:
            disk.read(64 * KIB)  # which reads ahead
        for turn in range(1, 20):
            for place in (0, MIB + 300 * KIB):  # after it, and in the part that was read ahead
                other(bytes([turn]) * BLOCK, place)
                disk.seek(place)
                assert disk.read(BLOCK) == bytes([turn]) * BLOCK
            disk.seek(MIB)
            disk.read(64 * KIB)


def test_a_seek_to_the_end_of_the_buffer_reads_anew(
    server: Server, other: Callable[[bytes, int], None]
) -> None:
    with nbd.open(server.uri, buffering=BLOCK) as disk:
        for _ in range(4):
            disk.read(BLOCK)
        other(b"\1" * BLOCK, 4 * BLOCK)
        disk.seek(4 * BLOCK)
        assert disk.read(BLOCK) == b"\1" * BLOCK


def test_a_seek_inside_the_buffer_keeps_it(
    server: Server, other: Callable[[bytes, int], None]
) -> None:
    with nbd.open(server.uri, buffering=4096) as disk:
        disk.read(BLOCK)
        other(b"\1" * 4096, 0)
        disk.seek(0)
        assert disk.read(BLOCK) == bytes(BLOCK)  # as a file of the built-in open does
