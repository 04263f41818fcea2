# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open on a disk with unreadable sectors: only these are lost."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
from support.files import read_fully
from support.servers import StartServer

import nbd

SECTOR = 4096
COUNT = 256
BAD = (17, 100, 101)
DATA = random.Random(1).randbytes(COUNT * SECTOR)
BUFFERINGS = [0, SECTOR, -1]


@pytest.fixture(params=["1", "512", "4096"])
def uri(request: pytest.FixtureRequest, nbdkit: StartServer, tmp_path: Path) -> str:
    """Return the URI of a disk with bad sectors; the parameter is its minimum block size."""
    return rescued(nbdkit, tmp_path, [(n * SECTOR, SECTOR) for n in BAD], request.param)


def rescued(
    nbdkit: StartServer, folder: Path, bad: list[tuple[int, int]], minimum: str = "1"
) -> str:
    """Return the URI of the data with unreadable ranges, given as (offset, size)."""
    image, ranges = folder / "image", folder / "map"
    image.write_bytes(DATA)
    lines, at = ["# Mapfile", "0x0 ? 1"], 0
    for offset, size in bad:
        lines.append(f"{at:#x} {offset - at:#x} +")
        lines.append(f"{offset:#x} {size:#x} -")
        at = offset + size
    lines.append(f"{at:#x} {len(DATA) - at:#x} +")
    ranges.write_text("\n".join(lines) + "\n")
    filters = ["--filter=blocksize-policy", "--filter=ddrescue"]
    policy = [f"blocksize-minimum={minimum}", "blocksize-preferred=4096", "blocksize-maximum=32M"]
    options = [f"ddrescue-mapfile={ranges}", *policy, "blocksize-error-policy=error"]
    return nbdkit(*filters, "--threads=4", "file", str(image), *options).uri


def sector(number: int) -> bytes:
    """Return the content of a sector."""
    return DATA[number * SECTOR : (number + 1) * SECTOR]


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("order", ["in order", "backwards", "in any order"])
def test_each_sector_that_is_good_is_read(uri: str, buffering: int, order: str) -> None:
    numbers = list(range(COUNT))
    if order == "backwards":
        numbers.reverse()
    elif order == "in any order":
        random.Random(2).shuffle(numbers)
    lost, errors = [], set()
    with nbd.open(uri, buffering=buffering) as disk:
        for number in numbers:
            disk.seek(number * SECTOR)
            try:
                assert read_fully(disk, SECTOR) == sector(number)
            except nbd.DiskError as reason:
                lost.append(number)
                errors.add(reason.errno)
    assert errors == {errno.EIO}
    assert sorted(lost) == list(BAD)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_reading_on_without_a_seek_loses_the_bad_ones_only(uri: str, buffering: int) -> None:
    lost = []
    with nbd.open(uri, buffering=buffering) as disk:
        for number in range(COUNT):
            try:
                assert read_fully(disk, SECTOR) == sector(number)
            except nbd.DiskError:
                assert disk.tell() == number * SECTOR
                lost.append(number)
                disk.seek((number + 1) * SECTOR)
    assert lost == list(BAD)


def read_until_error(disk: Any, method: str, found: list[bytes]) -> None:
    """Read until a read fails."""
    while True:
        memory = bytearray(512)
        part = disk.read1(512) if method == "read1" else memory[: disk.readinto(memory)]
        assert part
        found.append(bytes(part))


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("method", ["readinto", "read1"])
def test_other_reads_stop_where_the_bad_sector_begins(
    nbdkit: StartServer, tmp_path: Path, buffering: int, method: str
) -> None:
    uri = rescued(nbdkit, tmp_path, [(20 * SECTOR + 512, 512)])
    found: list[bytes] = []
    disk: Any
    with nbd.open(uri, buffering=buffering) as disk:
        if not hasattr(disk, method):
            return  # an unbuffered file has no read1
        with pytest.raises(nbd.DiskError) as caught:
            read_until_error(disk, method, found)
    assert b"".join(found) == DATA[: 20 * SECTOR + 512]
    assert "offset 82432 failed" in caught.value.string


@pytest.mark.parametrize("size", [1, 512, 700, 5000, 3 << 20])
def test_a_read_without_a_buffer_returns_the_bytes_before_a_bad_sector(
    nbdkit: StartServer, tmp_path: Path, size: int
) -> None:
    bad = 50 * SECTOR + 1024
    uri = rescued(nbdkit, tmp_path, [(bad, 512)])
    with nbd.open(uri, buffering=0) as disk:
        for start in (bad - 1, bad - 600, bad - SECTOR, bad - 30 * SECTOR):
            disk.seek(start)
            data = disk.read(size)
            assert 1 <= len(data) <= min(size, bad - start)
            assert data == DATA[start : start + len(data)]
            assert read_fully(disk, bad - disk.tell()) == DATA[start + len(data) : bad]
            text = f"reading {min(size, len(DATA) - bad)} bytes at offset {bad} failed"
            with pytest.raises(nbd.DiskError, match=text):
                disk.read(size)
            assert disk.tell() == bad


def test_an_error_of_a_write_names_what_was_written_and_the_place(nbdkit: StartServer) -> None:
    fails = "pwrite=cat >/dev/null; if [ $4 -ge 524288 ]; then echo EIO no >&2; exit 1; fi"
    server = nbdkit("eval", "get_size=echo 4194304", "pread=head -c $3 /dev/zero", fails)
    disk = nbd.open(server.uri, "r+b", buffering=0)
    disk.seek(1000)
    disk.write(bytes(1 << 20))
    with pytest.raises(nbd.DiskError) as caught:
        disk.flush()
    disk.close()
    text = "writing 1048576 bytes at offset 1000 failed at offset 525288: Input/output error"
    assert caught.value.string == text
