# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy: the content of the target, refused copies, and failures."""

from __future__ import annotations

import ctypes
import gc
import gzip
import io
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import hostile, servers
from support.programs import output_of
from support.servers import StartServer
from support.signals import Stop, alarm, handling, stop
from support.sizes import KIB, MIB
from support.waits import paused

import nbd
import nbd._disks.queue
from nbd._disks.background import running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 5 MiB and some bytes, with data, holes, and zeroes that are data."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(5 * MIB + 1234)
        for start, length in ((0, 100_000), (MIB, 1), (2 * MIB - 1, 70_000), (5 * MIB, 1234)):
            file.seek(start)
            file.write(random.Random(start).randbytes(length))
        file.seek(3 * MIB)
        file.write(bytes(128 * KIB))
    return path


@pytest.fixture
def empty(tmp_path: Path, image: Path) -> Path:
    """Return a file of the same size with other content."""
    path = tmp_path / "empty"
    path.write_bytes(b"\xff" * image.stat().st_size)
    return path


def served(nbdkit: StartServer, path: Path, *options: str) -> str:
    """Return the URI of an nbdkit on a file."""
    return nbdkit("--threads=8", "file", str(path), *options).uri


def holes_read(image: Path, result: nbd.Copied) -> bool:
    """Return whether a copy has read everything, holes included."""
    return result == (image.stat().st_size, 0)


def test_a_disk_is_copied_to_a_disk(nbdkit: StartServer, image: Path, empty: Path) -> None:
    result = nbd.copy(served(nbdkit, image), served(nbdkit, empty))
    assert empty.read_bytes() == image.read_bytes()
    assert sum(result) == image.stat().st_size
    assert result.zeroed > 3 * MIB


def test_a_disk_is_copied_to_a_new_file(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    nbd.copy(served(nbdkit, image), copied)
    assert copied.read_bytes() == image.read_bytes()


def test_a_new_file_has_holes_where_the_source_has(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    nbd.copy(served(nbdkit, image), str(copied))
    assert copied.stat().st_blocks * 512 < 2 * MIB


def test_a_file_that_was_larger_has_the_size_of_the_source(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    copied.write_bytes(b"x" * 6 * MIB)
    nbd.copy(served(nbdkit, image), copied)
    assert copied.read_bytes() == image.read_bytes()


def test_a_file_is_copied_to_a_disk(nbdkit: StartServer, image: Path, empty: Path) -> None:
    result = nbd.copy(image, served(nbdkit, empty))
    assert empty.read_bytes() == image.read_bytes()
    assert result.zeroed > 3 * MIB


def test_a_file_is_copied_to_a_file(image: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    nbd.copy(os.fsencode(image), copied)
    assert copied.read_bytes() == image.read_bytes()


def cached(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    size, page = path.stat().st_size, os.sysconf("SC_PAGESIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = ctypes.create_string_buffer(-(-size // page))
    with path.open("rb") as file:
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert libc.mincore(at, size, pages) == 0, os.strerror(ctypes.get_errno())
    assert libc.munmap(at, size) == 0
    return page * sum(state & 1 for state in pages.raw)


def test_a_copy_does_not_fill_the_cache_of_the_system(tmp_path: Path) -> None:
    target = tmp_path / "target"
    nbd.copy(["nbdkit", "-s", "--exit-with-parent", "pattern", "128M"], target)
    if cached(target) == 128 * MIB:
        kind = subprocess.run(["stat", "-f", "-c", "%T", target], capture_output=True, text=True)
        if kind.stdout.strip() in ("tmpfs", "ramfs"):
            pytest.skip(f"{tmp_path} is in memory: its files cannot leave the cache")
    assert cached(target) <= 64 * MIB


def test_a_larger_disk_keeps_what_follows(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    larger.write_bytes(b"\xff" * 6 * MIB)
    nbd.copy(image, served(nbdkit, larger))
    size = image.stat().st_size
    assert larger.read_bytes() == image.read_bytes() + b"\xff" * (6 * MIB - size)


def test_without_sparse_everything_is_read(nbdkit: StartServer, image: Path, empty: Path) -> None:
    result = nbd.copy(served(nbdkit, image), served(nbdkit, empty), sparse=False)
    assert holes_read(image, result)
    assert empty.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("lacking", ["noextents", "nozero", "noparallel", "nocache"])
def test_a_server_may_lack_something(
    nbdkit: StartServer, image: Path, empty: Path, lacking: str
) -> None:
    without = f"--filter={lacking}"
    source = nbdkit(without, "file", str(image)).uri
    target = nbdkit(without, "file", str(empty)).uri
    nbd.copy(source, target)
    assert empty.read_bytes() == image.read_bytes()


def test_a_target_may_have_no_flush(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(image.stat().st_size))
    plugin = nbdkit(
        "eval",
        f"get_size=stat -c %s {target}",
        f"pread=dd if={target} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
        f"pwrite=dd of={target} seek=$4 conv=notrunc oflag=seek_bytes status=none",
    )
    nbd.copy(image, plugin.uri)
    assert target.read_bytes() == image.read_bytes()


def test_a_handle_is_copied_and_stays_open(
    nbdkit: StartServer, image: Path, empty: Path, h: nbd.NBD
) -> None:
    h.connect_uri(served(nbdkit, image))
    with nbd.connect(served(nbdkit, empty)) as target:
        nbd.copy(h, target)
        assert target.pread(1234, 5 * MIB) == h.pread(1234, 5 * MIB)
    assert empty.read_bytes() == image.read_bytes()


def test_a_handle_cannot_be_copied_to_itself(disk: nbd.NBD) -> None:
    with pytest.raises(ValueError, match="twice"):
        nbd.copy(disk, disk)


def test_a_command_is_a_source(image: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    nbd.copy([servers.program("nbdkit"), "-s", "file", str(image)], copied)
    assert copied.read_bytes() == image.read_bytes()


def test_qcow2_is_copied_both_ways(qemu_nbd: StartServer, tmp_path: Path) -> None:
    raw, qcow2, back = (tmp_path / name for name in ("raw", "qcow2", "back"))
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
        for start in range(0, 64 * MIB, 7 * MIB):
            file.seek(start)
            file.write(os.urandom(300_000))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "64M"]
    subprocess.run(create, check=True)
    with qemu_nbd(qcow2, "--format=qcow2") as server:
        nbd.copy(raw, server.uri)
        nbd.copy(server.uri, back)
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(qcow2)]
    assert "identical" in subprocess.run(compare, check=True, capture_output=True, text=True).stdout
    assert back.read_bytes() == raw.read_bytes()


def test_a_server_has_a_block_size(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 6 * MIB)
    policy = ("blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error")
    uri = nbdkit("--filter=blocksize-policy", "file", str(target), *policy).uri
    nbd.copy(image, uri)
    size = image.stat().st_size
    assert target.read_bytes() == image.read_bytes() + b"\xff" * (6 * MIB - size)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_disk_is_copied_to_an_object(nbdkit: StartServer, image: Path, is_sparse: bool) -> None:
    target = io.BytesIO()
    result = nbd.copy(served(nbdkit, image), target, sparse=is_sparse)
    assert target.getvalue() == image.read_bytes()
    assert holes_read(image, result) != is_sparse


def test_an_object_is_copied_to_a_disk(nbdkit: StartServer, image: Path, empty: Path) -> None:
    result = nbd.copy(io.BytesIO(image.read_bytes()), served(nbdkit, empty))
    assert result.read == image.stat().st_size
    assert empty.read_bytes() == image.read_bytes()


def test_a_compressed_file_is_copied_to_a_disk(
    nbdkit: StartServer, image: Path, empty: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(image.read_bytes(), 1))
    with gzip.open(packed) as source:
        nbd.copy(source, served(nbdkit, empty))
    assert empty.read_bytes() == image.read_bytes()


def test_a_pipe_is_a_target(nbdkit: StartServer, image: Path) -> None:
    received: list[bytes] = []
    reader, writer = os.pipe()
    with open(reader, "rb") as source, open(writer, "wb") as target:
        thread = threading.Thread(target=lambda: received.append(source.read()))
        thread.start()
        nbd.copy(served(nbdkit, image), target)
        target.close()
        thread.join()
    assert received == [image.read_bytes()]


def test_open_files_are_copied_from_and_to_their_position(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "target"
    with image.open("rb") as source, path.open("w+b") as target:
        source.read(1000)
        target.write(b"before")
        nbd.copy(source, target)
        assert (source.read(), target.tell()) == (b"", 6 + image.stat().st_size - 1000)
        target.write(b"after")
    assert path.read_bytes() == b"before" + image.read_bytes()[1000:] + b"after"


def test_a_small_target_is_refused_before_anything_is_written(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"\xff" * MIB)
    with pytest.raises(nbd.Error, match="the target has 1048576 bytes") as refused:
        nbd.copy(image, served(nbdkit, small))
    assert refused.value.errno == "ENOSPC"
    assert small.read_bytes() == b"\xff" * MIB


def test_a_read_only_target_is_refused(nbdkit: StartServer, image: Path) -> None:
    with pytest.raises(nbd.Error, match="read-only") as refused:
        nbd.copy(image, nbdkit("-r", "memory", "6M").uri)
    assert refused.value.errno == "EROFS"


def test_a_file_is_not_copied_to_itself(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(ValueError, match="same file"):
        nbd.copy(image, image)
    assert image.read_bytes() == before


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nbd.copy(tmp_path / "missing", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"connections": 0}, ValueError),
        ({"depth": 0}, ValueError),
        ({"depth": "8"}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_reported(
    image: Path, tmp_path: Path, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    name = next(iter(arguments))
    with pytest.raises(expected, match=name):
        nbd.copy(image, tmp_path / "target", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"connections": 1000}, {"depth": 10**6}, {"timeout": float("inf")}, {"timeout": 1e12}],
    ids=str,
)
def test_large_numbers_are_taken(
    nbdkit: StartServer, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    uri = nbdkit("--filter=delay", "memory", "24M", "rdelay=1ms").uri
    target = tmp_path / "target"
    assert nbd.copy(uri, target, sparse=False, **arguments) == (24 * MIB, 0)


def test_an_impossible_copy_is_reported(image: Path) -> None:
    with pytest.raises(TypeError, match="target: a URI"):
        nbd.copy(image, 5)
    with pytest.raises(TypeError, match="source: a text file"):
        nbd.copy(io.StringIO("text"), image)


@pytest.mark.parametrize("side", ["source", "target"])
def test_an_error_names_the_side_and_the_offset(
    nbdkit: StartServer, image: Path, side: str
) -> None:
    failing = "error-pread-rate" if side == "source" else "error-pwrite-rate"
    bad = nbdkit("--filter=error", "memory", "6M", "error=EPERM", f"{failing}=100%").uri
    good = nbdkit("memory", "6M").uri
    pair = (bad, good) if side == "source" else (image, bad)
    with pytest.raises(nbd.Error, match=f"{side} failed at offset [0-9]+: ") as failed:
        nbd.copy(*pair, sparse=False)
    assert failed.value.errno == "EPERM"
    assert re.search(rf"\([0-9]+ bytes of {re.escape(bad)}\)", failed.value.string)


def test_an_error_of_zeroing_is_reported_as_one(nbdkit: StartServer, image: Path) -> None:
    bad = nbdkit("--filter=error", "memory", "6M", "error=EPERM", "error-zero-rate=100%").uri
    text = "zeroing the target failed at offset [0-9]+: Operation not permitted"
    with pytest.raises(nbd.Error, match=text) as failed:
        nbd.copy(image, bad)
    assert failed.value.errno == "EPERM"


def test_an_error_of_flushing_names_the_target(nbdkit: StartServer, image: Path) -> None:
    plugin = nbdkit(
        "eval", "get_size=echo 6M", "pwrite=cat >/dev/null", "zero=exit 0", "can_flush=exit 0",
        "can_zero=exit 0", "flush=echo EIO >&2; exit 1",
    )  # fmt: skip
    with pytest.raises(nbd.Error, match="flushing the target") as failed:
        nbd.copy(image, plugin.uri)
    assert plugin.uri in failed.value.string
    assert failed.value.errno == "EIO"


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_source_with_blocks_is_copied_to_a_part_of_a_file(
    nbdkit: StartServer, tmp_path: Path, is_sparse: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(4095))
    target.write_bytes(b"\xff" * 70_000)
    policy = ("blocksize-minimum=512", "blocksize-error-policy=allow")
    with nbd.NBD() as h, target.open("r+b") as file:
        h.set_strict_mode(0)  # so that the end, which is less than a block, can be read
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_uri(nbdkit("--filter=blocksize-policy", "file", str(source), *policy).uri)
        assert sum(nbd.copy(h, file, sparse=is_sparse)) == 4095
    assert target.read_bytes() == source.read_bytes() + b"\xff" * (70_000 - 4095)


def test_a_server_that_does_not_report_holes_is_read(nbdkit: StartServer, tmp_path: Path) -> None:
    uri = nbdkit("--filter=error", "pattern", "1M", "error=EIO", "error-extents-rate=100%").uri
    assert nbd.copy(uri, tmp_path / "target") == (MIB, 0)


def without_data(wire: hostile.Wire) -> None:
    """Reply to every read without sending any of its data."""
    wire.negotiate()
    while True:
        wire.chunk(wire.request(), hostile.CHUNK_NONE)


def test_a_read_whose_data_never_came_is_an_error(tmp_path: Path) -> None:
    with hostile.Connection(without_data) as server, nbd.NBD() as source:
        source.connect_socket(server.fileno())
        with pytest.raises(nbd.Error, match="reading the source failed at offset 0") as failed:
            nbd.copy(source, str(tmp_path / "target"))
    assert failed.value.errno in ("EIO", "EPROTO")  # newer versions of libnbd report the latter


@pytest.mark.parametrize("side", [0, 1])
def test_a_server_that_dies_ends_the_copy(nbdkit: StartServer, side: int) -> None:
    pair = [
        nbdkit("--filter=delay", "memory", "64M", "delay-read=5ms", "delay-write=5ms")
        for _ in range(2)
    ]
    killed = False

    def kill(done: int, total: int | None) -> None:
        nonlocal killed
        if not killed:
            killed = True
            pair[side].kill()

    with pytest.raises(nbd.Error, match=("source", "target")[side]) as failed:
        nbd.copy(pair[0].uri, pair[1].uri, sparse=False, progress=kill)
    assert failed.value.errno in ("ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN")


def test_a_server_that_hangs_ends_the_copy_by_its_timeout(nbdkit: StartServer) -> None:
    source, target = nbdkit("memory", "64M"), nbdkit("memory", "64M")

    def pause(done: int, total: int | None) -> None:
        source.pause()

    with pytest.raises(nbd.Timeout):
        nbd.copy(source.uri, target.uri, sparse=False, progress=pause, timeout=1)
    source.resume()


def test_a_signal_ends_the_copy_at_once(
    nbdkit: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = nbdkit("memory", "64M"), nbdkit("memory", "64M")
    handle = nbd.NBD()
    handle.connect_uri(target.uri)
    with paused(source), alarm(seconds=0.2), pytest.raises(Stop):
        nbd.copy(source.uri, handle)
    handle.pwrite(b"usable", 0)
    handle.close()


def test_a_signal_ends_all_threads_of_a_copy(nbdkit: StartServer) -> None:
    source, target = nbdkit("memory", "64M"), nbdkit("memory", "64M")

    def interrupt(done: int, total: int | None) -> None:
        source.pause()
        signal.raise_signal(signal.SIGALRM)

    try:
        with handling(stop), pytest.raises(Stop):
            nbd.copy(source.uri, target.uri, sparse=False, progress=interrupt)
    finally:
        source.resume()
    assert running == set()


def test_progress_counts_up_to_the_size(nbdkit: StartServer, image: Path, empty: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    nbd.copy(
        served(nbdkit, image),
        served(nbdkit, empty),
        progress=lambda done, total: calls.append((done, total)),
    )
    size = image.stat().st_size
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)
    assert {total for _, total in calls} == {size}


def test_an_exception_of_progress_ends_the_copy(
    nbdkit: StartServer, image: Path, empty: Path
) -> None:
    def refuse(done: int, total: int | None) -> None:
        raise Stop

    with pytest.raises(Stop):
        nbd.copy(served(nbdkit, image), served(nbdkit, empty), progress=refuse)


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4097])
def test_any_size_is_copied(nbdkit: StartServer, tmp_path: Path, size: int) -> None:
    source, target, copied = (tmp_path / name for name in ("source", "target", "copied"))
    source.write_bytes(os.urandom(size))
    target.write_bytes(bytes(size))
    nbd.copy(served(nbdkit, source), copied)
    assert copied.read_bytes() == source.read_bytes()
    if size:
        nbd.copy(source, served(nbdkit, target))
        assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("target", ["disk", "file", "stream"])
def test_memory_is_bounded_whatever_the_size_of_the_copy(
    nbdkit: StartServer, tmp_path: Path, target: str
) -> None:
    program = f"""
import resource, sys
import nbd
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
with open("/dev/null", "wb", buffering=0) as null:
    nbd.copy({nbdkit("pattern", "600M").uri!r}, null if sys.argv[1:] == ["-"] else sys.argv[1])
print((peak() - before) // 1024)
"""
    targets = {"disk": nbdkit("null", "600M").uri, "file": str(tmp_path / "copy"), "stream": "-"}
    printed = output_of(program, targets[target])
    assert int(printed) < 256  # of 600


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy frees objects at its next collection"
)
def test_a_copy_that_has_failed_leaves_no_queue_to_the_garbage_collector(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    uri = served(nbdkit, image, "--filter=error", "error=EIO", "error-rate=100%")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(nbd.Error):
            nbd.copy(uri, tmp_path / "copied", connections=4)
        left = [one for one in gc.get_objects() if isinstance(one, nbd._disks.queue.ShimQueue)]
    finally:
        gc.enable()
    assert left == []


def test_several_connections_are_made_where_the_server_allows(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    uri = nbdkit(
        "--filter=log", "--filter=delay", "memory", "64M", "rdelay=5ms", f"logfile={log}"
    ).uri
    nbd.copy(uri, tmp_path / "copied", connections=3, sparse=False)
    assert log.read_text().count(" Connect ") == 3
