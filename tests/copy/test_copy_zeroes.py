# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy finds zeroes in the data that it reads: equal contents, exact counts, sparse targets."""

from __future__ import annotations

import copy
import filecmp
import io
import os
import pickle
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable

import pytest
from support import servers
from support.forms import SOAK
from support.images import covered, overlaid, runs, write_sparse, zero_bytes
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd

GRANULARITIES = [512, 4096, 65536]
SPARSE = [*GRANULARITIES, True, False]
SEEDS = 10 if SOAK else 1  # for each granularity
SIZE = 600 * KIB + 777  # more than two requests, and no multiple of a block
TARGET_SIZE = 768 * KIB
BEFORE = 100  # bytes before the position of a file object
BLOCKS = ("blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")


class Source:
    """A source of one kind, for one image after the other."""

    def __init__(self, kind: str, path: Path, nbdkit: StartServer) -> None:
        self._kind = kind
        self._path = path
        self._stack = ExitStack()
        path.write_bytes(bytes(SIZE))
        if kind in ("nbdkit", "noextents"):
            filters = ["--filter=noextents"] if kind == "noextents" else []
            self._uri = nbdkit("--threads=4", *filters, "file", str(path)).uri

    def holding(self, data: bytes, rng: random.Random) -> Any:
        """Return the source, with this content."""
        if self._kind == "BytesIO":
            return io.BytesIO(data)
        if self._kind == "pipe":
            return self._pipe(data)
        if self._kind == "file object":
            write_sparse(self._path, data, rng, before=b"x" * BEFORE)
            file = self._stack.enter_context(self._path.open("rb"))
            file.seek(BEFORE)
            return file
        write_sparse(self._path, data, rng)
        return self._path if self._kind == "path" else self._uri

    def _pipe(self, data: bytes) -> Any:
        read, write = os.pipe()
        source = self._stack.enter_context(os.fdopen(read, "rb", 0))

        def send() -> None:
            with open(write, "wb") as file:
                file.write(data)

        thread = threading.Thread(target=send)
        thread.start()
        self._stack.callback(thread.join)
        return source

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


class Target:
    """A target of one kind that is filled with other data before each copy."""

    def __init__(self, kind: str, path: Path, nbdkit: StartServer, qemu_nbd: StartServer) -> None:
        self._kind = kind
        self._path = path
        self._stack = ExitStack()
        self._old = random.Random(0).randbytes(TARGET_SIZE)
        self._uri = ""
        if kind in ("path", "file object"):
            return
        path.write_bytes(bytes(TARGET_SIZE))
        if kind == "qcow2":
            servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(TARGET_SIZE))
            self._uri = qemu_nbd(path, "--format=qcow2").uri
        elif kind == "memory":
            self._uri = nbdkit("--threads=4", "memory", str(TARGET_SIZE)).uri
        else:
            filters = {"nozero": ["--filter=nozero"], "blocks": ["--filter=blocksize-policy"]}
            options = BLOCKS if kind == "blocks" else ()
            file = ("file", str(path))
            self._uri = nbdkit("--threads=4", *filters.get(kind, []), *file, *options).uri
        self._handle = self._stack.enter_context(nbd.connect(self._uri))

    def filled(self) -> Any:
        """Return the target, which has old data, or is a path where no file is."""
        if self._kind == "path":
            self._path.unlink(missing_ok=True)
            return self._path
        if self._kind == "file object":
            self._path.write_bytes(self._old)
            file = self._stack.enter_context(self._path.open("r+b"))
            file.seek(BEFORE)
            return file
        for at in range(0, TARGET_SIZE, 64 * KIB):
            self._handle.pwrite(self._old[at : at + 64 * KIB], at)
        return self._uri

    def check(self, data: bytes) -> None:
        """Compare the content with that of the source, and what surrounds it with the old data."""
        before = b""
        if self._kind in ("path", "file object"):
            content = self._path.read_bytes()
        else:
            parts = range(0, TARGET_SIZE, 64 * KIB)
            content = b"".join(bytes(self._handle.pread(64 * KIB, at)) for at in parts)
        if self._kind == "file object":
            before = self._old[:BEFORE]
        after = b"" if self._kind == "path" else self._old[len(before) + len(data) :]
        assert content == before + data + after
        if SOAK:
            self._compare_by_qemu(content)

    def _compare_by_qemu(self, content: bytes) -> None:
        """Have qemu-img compare the target with a file of what it should contain."""
        expected = self._path.with_name("expected")
        expected.write_bytes(content)
        target = self._uri or str(self._path)
        compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw")
        assert "identical" in servers.run(*compare, str(expected), target)

    def close(self) -> None:
        """Close files and handles."""
        self._stack.close()


SOURCES = ["nbdkit", "noextents", "path", "file object", "BytesIO", "pipe"]
TARGETS = ["path", "file object", "file", "memory", "nozero", "blocks", "qcow2"]

Make = Callable[[str], Any]


@pytest.fixture
def source_of(nbdkit: StartServer, tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes a source of a kind."""
    with ExitStack() as stack:

        def make(kind: str) -> Source:
            made = Source(kind, tmp_path / "source", nbdkit)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def target_of(nbdkit: StartServer, qemu_nbd: StartServer, tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes a target of a kind."""
    with ExitStack() as stack:

        def make(kind: str) -> Target:
            made = Target(kind, tmp_path / "target", nbdkit, qemu_nbd)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("target_kind", TARGETS)
@pytest.mark.parametrize("source_kind", SOURCES)
def test_random_zeroes_are_copied_exactly(
    source_of: Make, target_of: Make, source_kind: str, target_kind: str
) -> None:
    source, target = source_of(source_kind), target_of(target_kind)
    for seed in range(SEEDS):
        for block in GRANULARITIES:
            rng = random.Random(f"{source_kind} {target_kind} {block} {seed}")
            data = runs(rng, SIZE, block)
            result = nbd.copy(source.holding(data, rng), target.filled(), sparse=block)
            target.check(data)
            assert sum(result) == SIZE, (seed, block)


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("target_kind", TARGETS)
def test_granularity_does_not_change_the_content(
    source_of: Make, target_of: Make, target_kind: str, sparse: int
) -> None:
    rng = random.Random(int(sparse))
    data = runs(rng, SIZE, 4096)
    source, target = source_of("nbdkit"), target_of(target_kind)
    result = nbd.copy(source.holding(data, rng), target.filled(), sparse=sparse, flush=False)
    target.check(data)
    assert sum(result) == SIZE


def test_a_copy_to_qcow2_is_identical_for_qemu_img(
    nbdkit: StartServer, qemu_nbd: StartServer, tmp_path: Path
) -> None:
    raw, disk = tmp_path / "raw", tmp_path / "qcow2"
    raw.write_bytes(runs(random.Random(1), 2 * MIB, 65536))
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "2M")
    with qemu_nbd(disk, "--format=qcow2") as server:
        nbd.copy(nbdkit("--filter=noextents", "file", str(raw)).uri, server.uri)
        server.stop()
    identical = servers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(disk))
    assert "identical" in identical


# Counts.


def allocated(tmp_path: Path, block: int, size: int = SIZE) -> tuple[Path, bytes]:
    """Return an image that has zeroes and no holes, and its content."""
    data = runs(random.Random(block), size, block)
    path = tmp_path / "allocated"
    path.write_bytes(data)
    return path, data


def counts(result: nbd.Copied) -> tuple[int, int, int, int]:
    """Return all numbers of a result."""
    return result.copied, result.zeroed, result.read, result.written


@pytest.mark.parametrize("sparse", [*GRANULARITIES, True])
@pytest.mark.parametrize("target_kind", ["path", "file object", "file", "memory", "qcow2"])
def test_exactly_the_blocks_of_zeroes_are_not_written(
    nbdkit: StartServer, target_of: Make, tmp_path: Path, target_kind: str, sparse: int
) -> None:
    block = 4096 if sparse is True else sparse
    path, data = allocated(tmp_path, block)
    zeroes = zero_bytes(data, block)
    assert 0 < zeroes < SIZE
    target = target_of(target_kind)
    uri = nbdkit("--filter=noextents", "file", str(path)).uri
    result = nbd.copy(uri, target.filled(), sparse=sparse)
    assert counts(result) == (SIZE - zeroes, zeroes, SIZE, SIZE - zeroes)
    target.check(data)


@pytest.mark.parametrize("source_kind", ["path", "file object", "BytesIO", "pipe"])
def test_zeroes_are_found_in_every_kind_of_source(
    nbdkit: StartServer, source_of: Make, target_of: Make, source_kind: str
) -> None:
    class Always(random.Random):
        def random(self) -> float:  # so that no block is a hole
            return 0.0

    data = runs(random.Random(5), SIZE, 4096)
    zeroes = zero_bytes(data, 4096)
    source, target = source_of(source_kind), target_of("memory")
    result = nbd.copy(source.holding(data, Always()), target.filled())
    assert counts(result) == (SIZE - zeroes, zeroes, SIZE, SIZE - zeroes)
    target.check(data)


@pytest.mark.parametrize("sparse", [True, False])
def test_zeroes_that_a_server_sends_as_holes_are_zeroes(
    qemu_nbd: StartServer, target_of: Make, tmp_path: Path, sparse: bool
) -> None:
    disk = tmp_path / "qcow2"
    data = runs(random.Random(9), 512 * KIB, 65536)
    servers.run("qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(len(data)))
    target = target_of("memory")
    with qemu_nbd(disk, "--format=qcow2") as server:
        nbd.copy(io.BytesIO(data), server.uri)
        with nbd.NBD() as source:  # without base:allocation, so that the copy reads everything
            source.connect_uri(server.uri)
            result = nbd.copy(source, target.filled(), sparse=sparse)
    zeroes = zero_bytes(data, 4096) if sparse else 0
    assert counts(result) == (len(data) - zeroes, zeroes, len(data), len(data) - zeroes)
    target.check(data)


def test_blocks_are_not_smaller_than_those_of_the_target(
    nbdkit: StartServer, target_of: Make, tmp_path: Path
) -> None:
    size = 512 * KIB
    path, data = allocated(tmp_path, 512, size)
    assert zero_bytes(data, 512) > zero_bytes(data, 4096)
    data = data[: 256 * KIB] + bytes(8 * KIB) + data[264 * KIB :]
    path.write_bytes(data)
    zeroes = zero_bytes(data, 4096)
    target = target_of("blocks")
    uri = nbdkit("--filter=noextents", "file", str(path)).uri
    result = nbd.copy(uri, target.filled(), sparse=512)
    assert counts(result) == (size - zeroes, zeroes, size, size - zeroes)
    target.check(data)


def test_a_target_without_a_zero_command_is_sent_the_zeroes(
    nbdkit: StartServer, target_of: Make, tmp_path: Path
) -> None:
    path, data = allocated(tmp_path, 4096)
    target = target_of("nozero")
    result = nbd.copy(path, target.filled())
    assert (result.read, result.written) == (SIZE, SIZE)
    assert sum(result) == SIZE
    target.check(data)


def test_without_sparse_zeroes_are_data(
    nbdkit: StartServer, target_of: Make, tmp_path: Path
) -> None:
    path, data = allocated(tmp_path, 4096)
    for sparse in (False, 0):
        target = target_of("memory")
        result = nbd.copy(nbdkit("file", str(path)).uri, target.filled(), sparse=sparse)
        assert counts(result) == (SIZE, 0, SIZE, SIZE)
        target.check(data)


def test_holes_are_not_read(nbdkit: StartServer, tmp_path: Path) -> None:
    path, target = tmp_path / "source", tmp_path / "target"
    with path.open("wb") as file:
        file.truncate(MIB)
        file.seek(64 * KIB)
        file.write(b"x" * 64 * KIB + bytes(128 * KIB))  # data, and zeroes that are no hole
    for source in (nbdkit("file", str(path)).uri, path):
        result = nbd.copy(source, target)
        assert counts(result) == (64 * KIB, MIB - 64 * KIB, 192 * KIB, 64 * KIB)
        assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("sparse", [MIB, 32 * MIB])
def test_a_block_may_be_larger_than_a_request(
    nbdkit: StartServer, tmp_path: Path, sparse: int
) -> None:
    data = bytearray(3 * MIB + 100)
    data[2 * MIB - 1] = 1
    path, target = tmp_path / "source", tmp_path / "target"
    path.write_bytes(data)
    zeroes = zero_bytes(bytes(data), sparse)
    assert zeroes == (2 * MIB + 100 if sparse == MIB else 0)
    for source in (nbdkit("--filter=noextents", "file", str(path)).uri, path):
        result = nbd.copy(source, target, sparse=sparse)
        assert result.zeroed == zeroes
        assert target.read_bytes() == data


@pytest.mark.parametrize("sparse", [4 * MIB, 32 * MIB])
def test_a_block_may_be_larger_than_what_is_copied_at_once(tmp_path: Path, sparse: int) -> None:
    data = bytearray(40 * MIB)
    data[5 * MIB] = 1
    path, target = tmp_path / "source", tmp_path / "target"
    path.write_bytes(data)
    result = nbd.copy(path, target, sparse=sparse, flush=False)
    assert counts(result) == (sparse, 40 * MIB - sparse, 40 * MIB, sparse)
    assert filecmp.cmp(path, target, shallow=False)


@pytest.mark.parametrize("size", [24 * MIB + 512, 23 * MIB + 4096 + 1, 25 * MIB - 1000])
def test_requests_begin_at_whole_blocks_whatever_the_size(
    nbdkit: StartServer, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbd._disks import copy as copying

    monkeypatch.setattr(copying, "_MIN_RANGE", 512 * KIB)
    monkeypatch.setattr(copying, "processors", lambda: 3)
    log = tmp_path / "log"
    source = nbdkit("--threads=8", "--filter=log", "pattern", str(size), f"logfile={log}").uri
    target = nbdkit("--threads=8", "memory", "32M").uri
    assert sum(nbd.copy(source, target, connections=3)) == size
    places = re.findall(r" Read id=\d+ offset=0x([0-9a-f]+) ", log.read_text())
    assert len(places) >= size // (256 * KIB)
    assert {int(place, 16) % 4096 for place in places} == {0}


@pytest.mark.parametrize("last", [1, 511, 4095])
def test_the_last_part_of_a_block_counts_as_a_block(
    nbdkit: StartServer, target_of: Make, tmp_path: Path, last: int
) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"x" * 64 * KIB + bytes(last))
    target = target_of("memory")
    result = nbd.copy(path, target.filled())
    assert counts(result) == (64 * KIB, last, 64 * KIB + last, 64 * KIB)
    target.check(path.read_bytes())


@pytest.mark.parametrize("source_kind", ["noextents", "BytesIO"])
def test_a_disk_of_zeroes_is_not_written_at_all(
    nbdkit: StartServer, source_of: Make, tmp_path: Path, source_kind: str
) -> None:
    log = tmp_path / "log"
    old = tmp_path / "old"
    old.write_bytes(b"x" * MIB)
    uri = nbdkit("--filter=log", "file", str(old), f"logfile={log}").uri
    source = source_of(source_kind).holding(bytes(SIZE), random.Random(0))
    assert counts(nbd.copy(source, uri)) == (0, SIZE, SIZE, 0)
    assert old.read_bytes() == bytes(SIZE) + b"x" * (MIB - SIZE)
    assert " Write " not in log.read_text()


def test_the_result_keeps_its_numbers() -> None:
    result = nbd.copy(io.BytesIO(bytes(8192) + b"x" * 4096), io.BytesIO())
    copies: list[Any] = [copy.copy(result), pickle.loads(pickle.dumps(result))]
    for again in copies:
        assert again == result
        assert counts(again) == counts(result)
    assert repr(result) == f"Copied(copied={result.copied}, zeroed={result.zeroed})"
    assert result.read == 12288


def test_a_bad_sector_among_zeroes_is_counted_as_zeroed(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    path, mapfile, target = (tmp_path / name for name in ("source", "map", "target"))
    path.write_bytes(b"x" * 64 * KIB + bytes(64 * KIB) + b"y" * 128 * KIB)
    mapfile.write_text("0x0 +\n0x0 0x18000 +\n0x18000 0x1000 -\n0x19000 0x27000 +\n")
    uri = nbdkit("--filter=ddrescue", "file", str(path), f"ddrescue-mapfile={mapfile}").uri
    result = nbd.copy(uri, target, on_error=lambda offset, length, error: True)
    assert result.bad == ((96 * KIB, 4 * KIB),)
    assert (result, result.written) == ((192 * KIB, 64 * KIB), 192 * KIB)
    assert target.read_bytes() == path.read_bytes()


def test_an_error_of_zeroing_a_block_of_zeroes_names_the_offset(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"x" * 64 * KIB + bytes(64 * KIB) + b"x" * 64 * KIB)
    bad = nbdkit("--filter=error", "memory", "1M", "error=EPERM", "error-zero-rate=100%").uri
    text = "zeroing the target failed at offset 65536: Operation not permitted"
    with pytest.raises(nbd.Error, match=text) as failed:
        nbd.copy(path, bad)
    assert failed.value.errno == "EPERM"


def alternating(tmp_path: Path, size: int) -> Path:
    """Return an image in which each block of data is followed by a block of zeroes."""
    path = tmp_path / "alternating"
    path.write_bytes((b"x" * 4096 + bytes(4096)) * (size // 8192))
    return path


@pytest.mark.parametrize("depth", [1, None, 200])
def test_each_block_may_need_a_command_of_its_own(
    nbdkit: StartServer, tmp_path: Path, depth: int | None
) -> None:
    path, target = alternating(tmp_path, 4 * MIB), tmp_path / "target"
    target.write_bytes(b"\xff" * 4 * MIB)
    source = nbdkit("--threads=4", "--filter=noextents", "file", str(path)).uri
    result = nbd.copy(source, nbdkit("--threads=4", "file", str(target)).uri, depth=depth)
    assert counts(result) == (2 * MIB, 2 * MIB, 4 * MIB, 2 * MIB)
    assert target.read_bytes() == path.read_bytes()


def test_a_target_that_dies_between_blocks_of_zeroes_ends_the_copy(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    target = nbdkit("--filter=delay", "memory", "64M", "delay-zero=2ms")

    def kill(done: int, total: int | None) -> None:
        target.kill()

    with pytest.raises(nbd.Error, match="target failed") as failed:
        nbd.copy(alternating(tmp_path, 16 * MIB), target.uri, progress=kill)
    assert failed.value.errno in ("ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN")


def test_a_target_that_hangs_at_blocks_of_zeroes_ends_the_copy_by_its_timeout(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    target = nbdkit("--filter=delay", "memory", "64M", "delay-zero=2ms")

    def pause(done: int, total: int | None) -> None:
        target.pause()

    with pytest.raises(nbd.Timeout):
        nbd.copy(alternating(tmp_path, 16 * MIB), target.uri, progress=pause, timeout=1)
    target.resume()


@pytest.mark.parametrize("seed", range(5))
def test_zero_commands_that_fail_at_random_end_the_copy(
    nbdkit: StartServer, tmp_path: Path, seed: int
) -> None:
    path = alternating(tmp_path, 4 * MIB)
    options = ("error=EIO", "error-zero-rate=5%")
    target = nbdkit("--threads=4", "--filter=error", "memory", "8M", *options).uri
    with pytest.raises(nbd.Error, match="zeroing the target failed at offset") as failed:
        nbd.copy(path, target, depth=4**seed)
    assert failed.value.errno == "EIO"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Return a block device of 8 MiB, if this user can make one."""
    losetup = servers.program("losetup")
    path = tmp_path / "device"
    path.write_bytes(b"\xff" * 8 * MIB)
    done = subprocess.run([losetup, "-f", "--show", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this user cannot make a loop device: {done.stderr.strip()}")
    try:
        yield Path(done.stdout.strip())
    finally:
        subprocess.run([losetup, "-d", done.stdout.strip()], check=True)


@pytest.mark.parametrize("size", [8 * MIB, 5 * MIB + 777])
def test_old_data_of_a_block_device_becomes_zero(device: Path, tmp_path: Path, size: int) -> None:
    path, data = allocated(tmp_path, 4096, size)
    result = nbd.copy(path, device)
    zeroes = zero_bytes(data, 4096)
    assert (result, result.read) == ((size - zeroes, zeroes), size)
    assert device.read_bytes() == data + b"\xff" * (8 * MIB - size)


def test_ranges_of_a_block_device_are_copied(device: Path, tmp_path: Path) -> None:
    path, data = allocated(tmp_path, 4096, MIB)
    ranges = [(100, 5000), (70_000, 100_000), (MIB - 1, 1)]
    assert sum(nbd.copy(path, device, ranges=ranges)) == covered(ranges)
    assert device.read_bytes() == overlaid(b"\xff" * 8 * MIB, data, ranges)


# Space.


@pytest.fixture(scope="module")
def full_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image of 64 MiB without holes, of which 8 MiB are data."""
    path = tmp_path_factory.mktemp("full") / "image"
    with path.open("wb") as file:
        for start in range(8):
            file.write(bytes(start * 4096) + random.Random(start).randbytes(MIB))
            file.write(bytes(7 * MIB - start * 4096))
    assert occupied(path) >= 64 * MIB
    return path


def occupied(path: Path) -> int:
    """Return how many bytes a file occupies on its file system."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("source_kind", ["nbdkit", "noextents", "path", "stream"])
def test_a_new_file_occupies_no_more_than_the_data(
    nbdkit: StartServer, full_image: Path, tmp_path: Path, source_kind: str
) -> None:
    target = tmp_path / "target"
    with full_image.open("rb") as file:
        source: Any = full_image
        if source_kind == "stream":
            source = io.BytesIO(file.read())
        elif source_kind != "path":
            filters = ["--filter=noextents"] if source_kind == "noextents" else []
            source = nbdkit("--threads=8", *filters, "file", str(full_image)).uri
        result = nbd.copy(source, target, flush=False)
    assert counts(result) == (8 * MIB, 56 * MIB, 64 * MIB, 8 * MIB)
    assert target.stat().st_size == 64 * MIB
    assert abs(occupied(target) - 8 * MIB) < MIB
    assert filecmp.cmp(full_image, target, shallow=False)


def test_old_data_of_an_open_file_gives_its_space_back(full_image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with target.open("w+b") as file:
        for _ in range(64):
            file.write(b"x" * MIB)
        file.seek(0)
        nbd.copy(full_image, file, flush=False)
    assert filecmp.cmp(full_image, target, shallow=False)
    assert occupied(target) < 9 * MIB


def test_a_new_file_occupies_what_it_does_with_nbdcopy(
    nbdkit: StartServer, full_image: Path, tmp_path: Path
) -> None:
    nbdcopy = servers.program("nbdcopy")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    uri = nbdkit("--threads=8", "file", str(full_image)).uri
    nbd.copy(uri, ours)
    subprocess.run([nbdcopy, uri, str(theirs)], check=True, timeout=servers.TIMEOUT)
    assert abs(occupied(ours) - occupied(theirs)) < MIB


# Progress.


@pytest.mark.parametrize("target_kind", ["path", "memory", "nozero"])
@pytest.mark.parametrize("source_kind", ["noextents", "path", "BytesIO"])
def test_progress_includes_the_zeroes(
    source_of: Make, target_of: Make, source_kind: str, target_kind: str
) -> None:
    calls: list[tuple[int, int | None]] = []
    data = runs(random.Random(7), SIZE, 65536)
    source, target = source_of(source_kind), target_of(target_kind)
    result = nbd.copy(
        source.holding(data, random.Random(7)),
        target.filled(),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert result.zeroed > 0 or target_kind == "nozero"
    assert calls == sorted(calls)
    assert calls[-1] == (SIZE, SIZE)


def test_progress_is_never_more_than_the_total(
    nbdkit: StartServer, full_image: Path, tmp_path: Path
) -> None:
    calls: list[int] = []
    uri = nbdkit("--threads=8", "--filter=delay", "file", str(full_image), "rdelay=5ms").uri
    nbd.copy(uri, tmp_path / "target", flush=False, progress=lambda done, _: calls.append(done))
    assert len(calls) > 1
    assert calls == sorted(calls)
    assert calls[-1] == 64 * MIB


# Bad values.


WRONG_VALUES = (1, 256, 511, 513, 1000, 4095, 12288, 64 * MIB, 2**31, 2**64, 10**30, -1, -4096)
WRONG_TYPES: tuple[Any, ...] = (None, 4096.0, "4096", b"", [], (4096,))


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        *((value, ValueError) for value in WRONG_VALUES),
        *((value, TypeError) for value in WRONG_TYPES),
    ],
    ids=repr,
)
def test_a_wrong_granularity_is_refused(
    tmp_path: Path, sparse: Any, expected: type[Exception]
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(expected, match="sparse"):
        nbd.copy(tmp_path / "source", tmp_path / "target", sparse=sparse)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("sparse", [2**power for power in range(9, 26)])
def test_every_power_of_two_is_taken(tmp_path: Path, sparse: int) -> None:
    data = bytes(1000) + b"x" * 1000 + bytes(70_000) + b"x"
    (tmp_path / "source").write_bytes(data)
    result = nbd.copy(tmp_path / "source", tmp_path / "target", sparse=sparse, flush=False)
    assert (tmp_path / "target").read_bytes() == data
    assert result.zeroed == zero_bytes(data, sparse)


# target_is_zero.


@pytest.mark.parametrize("source_kind", ["nbdkit", "noextents", "path", "BytesIO", "pipe"])
def test_zeroes_are_not_sent_to_a_target_that_is_zero(
    nbdkit: StartServer, source_of: Make, tmp_path: Path, source_kind: str
) -> None:
    log, target = tmp_path / "log", tmp_path / "target"
    target.write_bytes(bytes(MIB))
    uri = nbdkit("--threads=4", "--filter=log", "file", str(target), f"logfile={log}").uri
    data = runs(random.Random(3), SIZE, 4096)
    source = source_of(source_kind).holding(data, random.Random(3))
    result = nbd.copy(source, uri, target_is_zero=True)
    zeroes = zero_bytes(data, 4096)
    assert (result, result.written) == ((SIZE - zeroes, zeroes), SIZE - zeroes)
    assert target.read_bytes() == data + bytes(MIB - SIZE)
    text = log.read_text()
    assert " Write " in text
    assert " Zero " not in text
    assert " Trim " not in text


def test_zeroes_reach_a_target_that_is_not_zero(
    nbdkit: StartServer, source_of: Make, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    uri = nbdkit("--filter=log", "memory", "1M", f"logfile={log}").uri
    nbd.copy(source_of("noextents").holding(bytes(SIZE), random.Random(0)), uri)
    assert " Zero " in log.read_text()


def test_a_target_without_a_zero_command_is_not_sent_zeroes_either(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    path, data = allocated(tmp_path, 4096)
    target = tmp_path / "target"
    target.write_bytes(bytes(SIZE))
    uri = nbdkit("--filter=nozero", "file", str(target)).uri
    zeroes = zero_bytes(data, 4096)
    result = nbd.copy(path, uri, target_is_zero=True)
    assert counts(result) == (SIZE - zeroes, zeroes, SIZE, SIZE - zeroes)
    assert target.read_bytes() == data


def test_an_open_file_that_is_said_to_be_zero_is_not_punched(tmp_path: Path) -> None:
    path, data = allocated(tmp_path, 4096)
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * SIZE)  # which is not zero, so that the skipped blocks show
    with target.open("r+b") as file:
        nbd.copy(path, file, target_is_zero=True)
    expected = bytearray(data)
    for at in range(0, SIZE, 4096):
        if not any(data[at : at + 4096]):
            expected[at : at + 4096] = b"\xff" * len(data[at : at + 4096])
    assert target.read_bytes() == expected


def test_without_sparse_a_target_that_is_zero_is_written_everywhere(
    nbdkit: StartServer, target_of: Make, tmp_path: Path
) -> None:
    path, data = allocated(tmp_path, 4096)
    target = target_of("memory")
    result = nbd.copy(path, target.filled(), sparse=False, target_is_zero=True)
    assert counts(result) == (SIZE, 0, SIZE, SIZE)
    target.check(data)


def test_a_path_with_old_data_becomes_zero_where_the_source_is(tmp_path: Path) -> None:
    path, data = allocated(tmp_path, 4096)
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * MIB)
    result = nbd.copy(path, target)
    assert result.written == SIZE - zero_bytes(data, 4096)
    assert target.read_bytes() == data


@pytest.mark.parametrize("given", [False, True])
def test_bad_sectors_of_a_disk_become_zeroes_of_a_target_that_is_zero(
    nbdkit: StartServer, tmp_path: Path, given: bool
) -> None:
    path, mapfile, target = (tmp_path / name for name in ("source", "map", "target"))
    path.write_bytes(b"x" * 256 * KIB)
    mapfile.write_text("0x0 +\n0x0 0x18000 +\n0x18000 0x1000 -\n0x19000 0x27000 +\n")
    uri = nbdkit("--filter=ddrescue", "file", str(path), f"ddrescue-mapfile={mapfile}").uri
    target.write_bytes(bytes(256 * KIB))
    with target.open("r+b") as file:
        result = nbd.copy(uri, file, target_is_zero=given, on_error=lambda *failed: True)
    assert result == (252 * KIB, 4 * KIB)
    expected = b"x" * 96 * KIB + bytes(4 * KIB) + b"x" * 156 * KIB
    assert target.read_bytes() == expected
