# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a disk behaves like a binary file of the built-in open."""

from __future__ import annotations

import errno
import gc
import io
import os
import pickle
import random
import threading
from array import array
from pathlib import Path
from typing import Any, Callable, cast

import pytest
from support.files import BUFFERINGS, raw_of, read_fully
from support.logs import Logged
from support.programs import output_of, run_program
from support.servers import Server, StartServer
from support.sizes import KIB, MIB

import nbd

POLICY = (
    "blocksize-minimum=4096",
    "blocksize-preferred=4096",
    "blocksize-maximum=256K",
    "blocksize-error-policy=error",
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 3 MiB and some bytes, so that its size is no multiple of 512."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(3 * MIB + 77))
    return path


@pytest.fixture
def logged(nbdkit: StartServer, tmp_path: Path, image: Path) -> Logged:
    """Return a server on the image that logs its requests."""
    return Logged(nbdkit, tmp_path / "log", "file", str(image))


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("options", [(), ("--filter=blocksize-policy", *POLICY)])
def test_it_does_what_a_file_of_the_built_in_open_does(
    nbdkit: StartServer, tmp_path: Path, buffering: int, options: tuple[str, ...]
) -> None:
    path, size = tmp_path / "same", 2 * MIB
    path.write_bytes(bytes(size))
    rand = random.Random(buffering)
    uri = nbdkit(*options[:1], "memory", str(size), *options[1:]).uri
    with nbd.open(uri, "r+b", buffering=buffering) as disk, path.open("r+b") as file:
        for _ in range(300):
            where = rand.choice([rand.randrange(size), size, file.tell()])
            assert disk.seek(where) == file.seek(where)
            count = rand.choice([1, 100, 4096, 65536, 300_000])
            if rand.random() < 0.4:
                data = rand.randbytes(min(count, size - where))
                assert disk.write(data) == file.write(data)
            else:
                assert read_fully(disk, count) == file.read(count)
            assert disk.tell() == file.tell()
        disk.seek(0)
        file.seek(0)
        assert disk.read() == file.read()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_all_of_a_disk_is_read_in_order(nbdkit: StartServer, image: Path, buffering: int) -> None:
    with nbd.open(nbdkit("file", str(image)).uri, buffering=buffering) as disk:
        assert b"".join(iter(lambda: disk.read(10_000), b"")) == image.read_bytes()


@pytest.mark.parametrize("mode", ["rb", "br", "r+b", "rb+", "+br", "wb", "bw", "w+b"])
def test_letters_of_a_mode_come_in_any_order(server: Server, mode: str) -> None:
    with nbd.open(server.uri, mode) as disk:
        assert (disk.readable(), disk.writable(), disk.seekable()) == (
            "r" in mode or "+" in mode,
            "w" in mode or "+" in mode,
            True,
        )


@pytest.mark.parametrize("mode", ["r", "w", "rt", "", "+"])
def test_a_text_mode_is_refused_with_advice(mode: str) -> None:
    with pytest.raises(ValueError, match="add b, as in 'rb'"):
        nbd.open("nbd://nowhere.invalid", mode)


@pytest.mark.parametrize("mode", ["ab", "xb", "b", "rwb", "rbb", "rb++", "rbt"])
def test_another_mode_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="is not 'rb', 'r\\+b', 'wb' or 'w\\+b'"):
        nbd.open("nbd://nowhere.invalid", mode)


@pytest.mark.parametrize("buffering", [1, -2])
def test_a_size_of_a_buffer_that_cannot_be_is_refused(buffering: int) -> None:
    with pytest.raises(ValueError, match="buffering"):
        nbd.open("nbd://nowhere.invalid", buffering=buffering)


def test_a_file_is_of_the_class_of_io_that_its_mode_needs(server: Server) -> None:
    kinds: dict[str, type] = {
        "rb": io.BufferedReader,
        "wb": io.BufferedWriter,
        "r+b": io.BufferedRandom,
    }
    for mode, kind in kinds.items():
        with nbd.open(server.uri, mode) as disk, nbd.open(server.uri, mode, buffering=0) as raw:
            assert isinstance(disk, kind)
            assert isinstance(raw, io.RawIOBase)


def test_opening_for_writing_keeps_what_is_there(server: Server) -> None:
    with nbd.open(server.uri, "wb") as disk:
        disk.write(b"abcdef")
    with nbd.open(server.uri, "wb") as disk:
        disk.write(b"xy")
    with nbd.open(server.uri) as disk:
        assert disk.read(7) == b"xycdef\0"


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_for_reading_cannot_be_written(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, buffering=buffering) as disk, pytest.raises(io.UnsupportedOperation):
        disk.write(b"x")


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_for_writing_cannot_be_read(server: Server, buffering: int) -> None:
    with (
        nbd.open(server.uri, "wb", buffering=buffering) as disk,
        pytest.raises(io.UnsupportedOperation),
    ):
        disk.read(1)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_read_past_the_end_is_short(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, buffering=buffering) as disk:
        assert disk.seek(-3, os.SEEK_END) == MIB - 3
        assert [disk.read(10), disk.read(10), disk.read()] == [b"\0\0\0", b"", b""]
        assert disk.seek(5 * MIB) == 5 * MIB
        assert disk.read(10) == b""


def test_seek_counts_from_the_start_the_position_and_the_end(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        assert disk.seek(100) == 100
        assert disk.seek(-1, os.SEEK_CUR) == 99
        assert disk.seek(1, os.SEEK_END) == MIB + 1
        assert disk.tell() == MIB + 1


def test_seek_before_the_start_is_an_oserror_and_moves_nothing(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        disk.seek(7)
        with pytest.raises(nbd.DiskError) as caught:
            disk.seek(-8, os.SEEK_CUR)
        assert caught.value.errno == errno.EINVAL
        assert disk.tell() == 7


def test_an_unknown_whence_is_refused(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk, pytest.raises(ValueError, match="whence: 9"):
        disk.seek(0, 9)


def test_a_write_past_the_end_is_refused_as_a_whole(server: Server) -> None:
    with nbd.open(server.uri, "r+b", buffering=0) as disk:
        disk.seek(-2, os.SEEK_END)
        with pytest.raises(nbd.DiskError) as caught:
            disk.write(b"abc")
        assert caught.value.errno == errno.ENOSPC
        assert disk.read(2) == b"\0\0"


def test_lines_and_peek_work(server: Server) -> None:
    with nbd.open(server.uri, "r+b") as disk:
        disk.write(b"one\ntwo\n")
        disk.seek(0)
        assert cast("io.BufferedReader", disk).peek(3)[:3] == b"one"
        assert [next(disk), next(disk)] == [b"one\n", b"two\n"]


def test_readinto_fills_memory_of_any_item_size(server: Server) -> None:
    numbers = memoryview(bytearray(b"\xff" * 16)).cast("I")
    with nbd.open(server.uri, buffering=0) as disk:
        assert cast("Any", disk).readinto(numbers) == 16
    assert numbers.tolist() == [0, 0, 0, 0]


def test_readinto_refuses_read_only_memory(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        with pytest.raises((TypeError, BufferError)):
            cast("Any", disk).readinto(b"1234")
        assert disk.tell() == 0


def test_a_closed_file_says_so(server: Server) -> None:
    disk = nbd.open(server.uri, "r+b", buffering=0)
    disk.close()
    disk.close()
    assert disk.closed
    calls: list[Callable[[], object]] = [
        disk.tell,
        disk.readable,
        disk.writable,
        disk.seekable,
        disk.flush,
        disk.read,
        lambda: disk.read(1),
        lambda: disk.write(b"x"),
        lambda: disk.seek(0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed file"):
            call()


def test_name_and_repr_show_what_was_opened(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk:
        assert disk.name == server.uri
        assert repr(disk) == f"<nbd.DiskFile of {server.uri!r}, mode 'rb', at 0>"
    assert repr(disk).endswith("closed>")


def test_the_name_of_a_command_is_text() -> None:
    command = ["nbdkit", "-s", "memory", "1M"]
    with nbd.open(command) as disk:
        assert disk.name == repr(command)
        assert len(disk.read()) == MIB


def test_it_cannot_be_pickled(server: Server) -> None:
    with nbd.open(server.uri, buffering=0) as disk, pytest.raises(TypeError, match="open it again"):
        pickle.dumps(disk)


def test_a_handle_that_was_given_stays_open(disk: nbd.NBD) -> None:
    with nbd.open(disk, "r+b") as file:
        file.write(b"abc")
    assert disk.pread(3, 0) == b"abc"


def test_a_handle_of_its_own_is_closed(server: Server) -> None:
    with nbd.open(server.uri) as disk:
        handle = raw_of(disk)._ours[0]
    with pytest.raises(nbd.ClosedHandle):
        handle.get_size()


def test_several_connections_give_the_same_bytes(nbdkit: StartServer, image: Path) -> None:
    with nbd.open(nbdkit("file", str(image)).uri, connections=3) as disk:
        assert len(raw_of(disk)._ours) == 3
        assert disk.read() == image.read_bytes()


def test_one_connection_is_made_where_the_server_allows_no_more(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")
    with nbd.open(server.uri, "r+b", connections=3) as disk:
        assert len(raw_of(disk)._ours) == 1


@pytest.mark.parametrize("connections", [0, -1])
def test_a_number_of_connections_below_one_is_refused(server: Server, connections: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 64"):
        nbd.open(server.uri, connections=connections)


def test_several_connections_to_a_handle_are_refused(disk: nbd.NBD) -> None:
    with pytest.raises(ValueError, match="need a URI"):
        nbd.open(disk, connections=2)


def test_a_read_elsewhere_asks_for_no_more_than_it_needs(logged: Logged) -> None:
    with nbd.open(logged.uri, buffering=0) as disk:
        for offset in (MIB, 5000, 2 * MIB):
            disk.seek(offset)
            disk.read(100)
    assert logged.reads() == [(MIB, 100), (5000, 100), (2 * MIB, 100)]


def test_a_buffer_is_not_filled_for_a_jump(logged: Logged) -> None:
    with nbd.open(logged.uri) as disk:
        disk.seek(MIB)
        disk.read(100)
    assert logged.reads() == [(MIB, 32 * KIB)]


def test_reading_in_order_reads_ahead_each_byte_once(logged: Logged) -> None:
    with nbd.open(logged.uri) as disk:
        while disk.read(50_000):
            pass
    reads = sorted(logged.reads())
    ends = [offset + count for offset, count in reads]
    assert [offset for offset, _ in reads[1:]] == ends[:-1]
    assert max(count for _, count in reads) == 256 * KIB


def test_reading_ahead_grows_while_the_server_is_slow(nbdkit: StartServer, tmp_path: Path) -> None:
    logged = Logged(nbdkit, tmp_path / "log", "--filter=delay", "null", "24M", "rdelay=20ms")
    with nbd.open(logged.uri) as disk:
        while disk.read(64 * KIB):
            pass
    assert 8 <= logged.max_at_once() <= 32


def test_read_ahead_is_bounded_by_what_was_read_in_order(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    logged = Logged(nbdkit, tmp_path / "log", "null", "32M")
    wanted = 0
    with nbd.open(logged.uri, buffering=4096) as disk:
        for offset in range(0, 32 * MIB, MIB):
            disk.seek(offset)
            for _ in range(8):
                wanted += len(disk.read(4096))
    fetched = sum(count for _, count in logged.reads())
    assert fetched <= 2 * wanted


def test_a_large_read_goes_straight_to_the_callers_memory(server: Server) -> None:
    if nbd._binding.memory.BOUNCES:
        pytest.skip("PyPy: memory of the caller moves, so bytes are copied")
    memory = bytearray(MIB)
    with nbd.open(server.uri, buffering=0) as disk:
        cast("Any", disk).readinto(memory)
        assert not raw_of_window(disk)


def raw_of_window(disk: Any) -> int:
    """Return how many pieces are read ahead."""
    return len(disk._ahead)


def test_memory_is_bounded_whatever_the_size_of_the_disk() -> None:
    program = """
import resource, nbd
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with nbd.open(["nbdkit", "-s", "null", "600M"], "r+b") as disk:
    disk.read(65536)
    before = peak()
    while disk.read(65536): pass
    disk.seek(0)
    for _ in range(6000): disk.write(bytes(100000))
print((peak() - before) // 1024)
"""
    printed = output_of(program)
    assert int(printed) < 256  # of 600; AddressSanitizer keeps freed memory for a while


def test_a_read_sees_what_was_written_before_it(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "--threads=16", "memory", "1M", "wdelay=20ms")
    with nbd.open(server.uri, "r+b", buffering=0) as disk:
        for offset in (0, 300_000, 600_000):
            disk.seek(offset)
            disk.write(b"new" * 100)
        disk.seek(600_000)
        assert disk.read(6) == b"newnew"


def test_reading_ahead_sees_what_is_being_written(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "--threads=16", "memory", "1M", "wdelay=20ms")
    with nbd.open(server.uri, "r+b", buffering=0) as disk:
        disk.read(1000)  # the next read, at 1000, reads ahead
        disk.seek(300_000)
        disk.write(b"new")
        disk.seek(1000)
        data = read_fully(disk, 400_000)
        assert data[299_000:299_003] == b"new"


def test_a_write_drops_what_was_read_ahead(server: Server) -> None:
    with nbd.open(server.uri, "r+b", buffering=0) as disk:
        for _ in range(4):
            disk.read(1000)
        disk.seek(10_000)
        disk.write(b"new")
        disk.seek(4000)
        assert read_fully(disk, 7000)[6000:6003] == b"new"


def test_flush_reaches_the_disk_of_the_server(logged: Logged) -> None:
    with nbd.open(logged.uri, "r+b") as disk:
        disk.write(b"abc")
        disk.flush()
        assert len(logged.lines("Flush")) == 1


def test_close_flushes_what_was_written(logged: Logged, image: Path) -> None:
    with nbd.open(logged.uri, "wb") as disk:
        disk.write(b"abc")
    assert len(logged.lines("Flush")) == 1
    assert image.read_bytes()[:3] == b"abc"


def test_nothing_is_flushed_if_nothing_was_written(logged: Logged) -> None:
    with nbd.open(logged.uri, "r+b") as disk:
        disk.read(10)
        disk.flush()
    assert not logged.lines("Flush")


def test_a_server_without_flush_is_not_asked_for_it(nbdkit: StartServer) -> None:
    read = "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none"
    server = nbdkit("eval", "get_size=echo 65536", read, "pwrite=cat >/dev/null")
    with nbd.open(server.uri, "r+b") as disk:
        assert not raw_of(disk)._can_flush
        disk.write(b"abc")
        disk.flush()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_that_is_dropped_warns_and_is_closed(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, buffering=buffering) as other:
        other.read(1)
    dropped: list[Any] = [nbd.open(server.uri, buffering=buffering)]
    handle = (dropped[0].raw if buffering else dropped[0])._ours[0]

    def drop() -> None:
        dropped.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed disk"):
        drop()
    with pytest.raises(nbd.ClosedHandle):
        handle.get_size()


@pytest.mark.parametrize("mode", ["rb", "r+b", "wb"])
def test_a_program_may_end_with_files_open(nbdkit: StartServer, mode: str) -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import nbd
disk = nbd.open(sys.argv[2], sys.argv[1])
for _ in range(40):
    disk.read(65536) if disk.readable() else disk.write(bytes(65536))
"""
    output_of(program, mode, nbdkit("memory", "40M").uri)


def test_threads_that_read_the_same_file_get_each_byte_once(
    nbdkit: StartServer, image: Path
) -> None:
    parts: list[bytes] = []
    with nbd.open(nbdkit("file", str(image)).uri, buffering=0) as disk:

        def read() -> None:
            parts.extend(iter(lambda: disk.read(32 * KIB), b""))

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    data = image.read_bytes()
    assert sum(map(len, parts)) == len(data)
    assert sorted(b"".join(parts)) == sorted(data)


@pytest.mark.parametrize("size", [100, 2 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["B", "i"])
@pytest.mark.parametrize("method", ["readinto", "write"])
def test_memory_of_the_caller_can_be_resized_at_once(
    nbdkit: StartServer, image: Path, method: str, kind: str, size: int
) -> None:
    with nbd.open(nbdkit("file", str(image)).uri, "r+b", buffering=0) as disk:
        for buffer in (array(kind, bytes(size)), bytearray(size)):
            disk.seek(0)
            getattr(disk, method)(buffer)
            buffer.extend(buffer[:1])


def test_import_of_nbd_does_not_load_it() -> None:
    done = run_program("import sys, nbd; print([m for m in sys.modules if 'file' in m])")
    assert "nbd._binding" not in done.stdout


def test_what_a_program_leaves_in_a_buffer_is_written_at_its_end(
    nbdkit: StartServer, image: Path
) -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import nbd
disk = nbd.open(sys.argv[1], "wb")
disk.write(b"written late")
"""
    output_of(program, nbdkit("file", str(image)).uri)
    assert image.read_bytes()[:12] == b"written late"


def test_the_child_of_a_fork_leaves_the_disk_alone(nbdkit: StartServer, image: Path) -> None:
    program = """
import os, sys
import nbd
with nbd.open(sys.argv[1], "r+b") as disk:
    disk.write(b"parent")
    child = os.fork()
    if not child:
        try:
            disk.raw.write(b"child")
        except ValueError as reason:
            assert "open it again after a fork" in str(reason)
            disk.close()
            sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    disk.write(b" goes on")
"""
    output_of(program, nbdkit("file", str(image)).uri)
    assert image.read_bytes()[:14] == b"parent goes on"
