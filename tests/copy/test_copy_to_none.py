# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy to None reads the source and discards the data."""

from __future__ import annotations

import gzip
import io
import os
import random
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import servers
from support.programs import output_of
from support.servers import StartServer
from support.sizes import KIB, MIB
from support.usage import descriptors

import nbd

SIZE = 2 * MIB + 777
DATA = random.Random(0).randbytes(256 * KIB) + bytes(512 * KIB)  # and then a hole


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file with data, with zeroes that are data, and with a hole."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(DATA)
    return path


def counts(result: nbd.Copied) -> tuple[int, int, int, int]:
    """Return all numbers of a result."""
    return result.copied, result.zeroed, result.read, result.written


KINDS = ["uri", "handle", "command", "path", "file object", "BytesIO", "gzip", "pipe"]
STREAMS = ["BytesIO", "gzip", "pipe"]


def opened(kind: str, image: Path, nbdkit: StartServer, stack: ExitStack) -> Any:
    """Return a source of a kind with the content of the image."""
    if kind in ("uri", "handle"):
        uri = nbdkit("--threads=4", "file", str(image)).uri
        return uri if kind == "uri" else stack.enter_context(nbd.connect(uri))
    if kind == "command":
        return [servers.program("nbdkit"), "-s", "--exit-with-parent", "file", str(image)]
    if kind == "path":
        return image
    if kind == "file object":
        return stack.enter_context(image.open("rb"))
    data = image.read_bytes()
    if kind == "BytesIO":
        return io.BytesIO(data)
    if kind == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data, 1))))
    read, write = os.pipe()

    def send() -> None:
        with open(write, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=send)
    thread.start()
    stack.callback(thread.join)
    return stack.enter_context(os.fdopen(read, "rb", 0))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_holes_is_read(nbdkit: StartServer, image: Path, kind: str) -> None:
    with ExitStack() as stack:
        result = nbd.copy(opened(kind, image, nbdkit, stack), None)
    data = SIZE if kind in STREAMS else len(DATA)
    assert counts(result) == (data, SIZE - data, data, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_sparse_holes_are_read(nbdkit: StartServer, image: Path, kind: str) -> None:
    with ExitStack() as stack:
        result = nbd.copy(opened(kind, image, nbdkit, stack), None, sparse=False)
    assert counts(result) == (SIZE, 0, SIZE, 0)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_server_is_asked_for_all_of_it(
    nbdkit: StartServer, image: Path, tmp_path: Path, sparse: bool
) -> None:
    log = tmp_path / "log"
    nbd.copy(nbdkit("--filter=log", "file", str(image), f"logfile={log}").uri, None, sparse=sparse)
    lines = [line for line in log.read_text().splitlines() if " Read " in line]
    lengths = [int(line.partition("count=")[2].split()[0], 16) for line in lines]
    assert sum(lengths) == (len(DATA) if sparse else SIZE)


def test_zeroes_are_not_searched_for(nbdkit: StartServer) -> None:
    uri = nbdkit("--filter=noextents", "memory", "1M").uri
    for sparse in (True, 512):
        assert counts(nbd.copy(uri, None, sparse=sparse)) == (MIB, 0, MIB, 0)


def test_an_empty_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert counts(nbd.copy(tmp_path / "empty", None)) == (0, 0, 0, 0)
    assert counts(nbd.copy(io.BytesIO(), None)) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["uri", "path", "BytesIO"])
def test_progress_ends_at_the_size(nbdkit: StartServer, image: Path, kind: str) -> None:
    calls: list[tuple[int, int | None]] = []
    with ExitStack() as stack:
        source = opened(kind, image, nbdkit, stack)
        nbd.copy(source, None, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (SIZE, SIZE)


def test_a_file_object_is_read_from_its_position_to_its_end(image: Path) -> None:
    with image.open("rb") as file:
        file.seek(1000)
        assert sum(nbd.copy(file, None)) == SIZE - 1000
        assert (file.tell(), file.read(1)) == (SIZE, b"")


@pytest.mark.parametrize("kind", ["uri", "path", "file object"])
def test_ranges_are_read(nbdkit: StartServer, image: Path, kind: str) -> None:
    ranges = [(100, 1000), (500, 1000), (128 * KIB, 64 * KIB), (MIB, 4096), (9, 0)]
    total = 1400 + 64 * KIB
    with ExitStack() as stack:
        result = nbd.copy(opened(kind, image, nbdkit, stack), None, ranges=ranges)
    assert counts(result) == (total, 4096, total, 0)


def test_an_unaligned_range_of_a_source_with_blocks_is_read(
    nbdkit: StartServer, image: Path
) -> None:
    os.truncate(image, 2 * MIB)
    policy = ("blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
    uri = nbdkit("--filter=blocksize-policy", "file", str(image), *policy).uri
    assert sum(nbd.copy(uri, None, ranges=[(1, 1), (4095, 2), (10_000, 100_000)])) == 100_003


def test_a_range_past_the_end_is_refused(nbdkit: StartServer, image: Path) -> None:
    with pytest.raises(ValueError, match=str(SIZE)):
        nbd.copy(nbdkit("file", str(image)).uri, None, ranges=[(SIZE, 1)])


def test_a_stream_has_no_ranges(image: Path) -> None:
    with pytest.raises(ValueError, match=r"stream|in order"):
        nbd.copy(io.BytesIO(b"data"), None, ranges=[(0, 1)])


def test_a_read_that_fails_ends_the_copy(nbdkit: StartServer) -> None:
    uri = nbdkit("--filter=error", "pattern", "1M", "error=EIO", "error-pread-rate=100%").uri
    with pytest.raises(nbd.Error, match="reading the source failed at offset ") as failed:
        nbd.copy(uri, None)
    assert failed.value.errno == "EIO"


def test_a_disk_that_cannot_be_read_in_places_is_verified(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    path, mapfile = tmp_path / "image", tmp_path / "map"
    path.write_bytes(random.Random(0).randbytes(MIB))
    mapfile.write_text("0x0 +\n0x0 0x18000 +\n0x18000 0x1000 -\n0x19000 0xe7000 +\n")
    uri = nbdkit("--filter=ddrescue", "file", str(path), f"ddrescue-mapfile={mapfile}").uri
    calls: list[tuple[int, int, str | None]] = []

    def note(offset: int, length: int, error: nbd.Error) -> bool:
        calls.append((offset, length, error.errno))
        return True

    result = nbd.copy(uri, None, on_error=note)
    assert calls == [(0x18000, 0x1000, "EIO")]
    assert result.bad == ((0x18000, 0x1000),)
    assert (result, result.written) == ((MIB - 0x1000, 0x1000), 0)
    with pytest.raises(nbd.Error, match="at offset 98304: "):
        nbd.copy(uri, None)
    with pytest.raises(nbd.Error, match="at offset 98304: "):
        nbd.copy(uri, None, on_error=lambda *failed: False)


def test_a_server_that_dies_ends_the_copy(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "memory", "64M", "rdelay=5ms")

    def kill(done: int, total: int | None) -> None:
        server.kill()

    with pytest.raises(nbd.Error, match="source failed") as failed:
        nbd.copy(server.uri, None, sparse=False, progress=kill)
    assert failed.value.errno in ("ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN")


def test_a_server_that_hangs_ends_the_copy_by_its_timeout(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "64M")

    def pause(done: int, total: int | None) -> None:
        server.pause()

    with pytest.raises(nbd.Timeout):
        nbd.copy(server.uri, None, sparse=False, progress=pause, timeout=1)
    server.resume()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * MIB)

    def shrink(done: int, total: int | None) -> None:
        os.truncate(path, 100)

    with pytest.raises(nbd.Error, match="become shorter"):
        nbd.copy(path, None, progress=shrink)


@pytest.mark.parametrize("connections", [1, 4])
def test_several_connections_read_the_same(nbdkit: StartServer, connections: int) -> None:
    uri = nbdkit("--threads=8", "pattern", "64M").uri
    result = nbd.copy(uri, None, connections=connections)
    assert counts(result) == (64 * MIB, 0, 64 * MIB, 0)


def test_the_memory_does_not_grow_with_the_disk(nbdkit: StartServer) -> None:
    program = """
import resource, sys
import nbd
nbd.copy(sys.argv[1], None, ranges=[(0, 16 << 20)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nbd.copy(sys.argv[1], None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(output_of(program, nbdkit("--threads=8", "pattern", "512M").uri))
    assert grown < 128 * KIB  # in KiB


def test_nothing_stays_open(nbdkit: StartServer, image: Path) -> None:
    uri = nbdkit("--threads=4", "file", str(image)).uri
    nbd.copy(uri, None)
    before = descriptors()
    for source in (uri, image):
        nbd.copy(source, None)
    assert descriptors() == before


@pytest.mark.parametrize("target", [None, "path"])
def test_a_source_is_needed(tmp_path: Path, target: Any) -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="source"):
        nbd.copy(nothing, target and tmp_path / "target")
    assert not (tmp_path / "target").exists()
