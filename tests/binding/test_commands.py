"""Commands that wait: read, write, zero, trim, and ask for the allocation."""

from __future__ import annotations

import errno
import struct
from typing import Any, Callable

import pytest
from support.handles import extents
from support.servers import NbdServer, StartServer
from support.sizes import MIB

import nbd

HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
BASE = nbd.CONTEXT_BASE_ALLOCATION


def chunks_of(
    handle: nbd.NBD, count: int, offset: int, flags: int = 0
) -> tuple[bytes, list[tuple[bytes, int, int, int]]]:
    """Make a structured read; return the data, and the arguments of the callback."""
    found: list[tuple[bytes, int, int, int]] = []

    def chunk(view: memoryview, where: int, status: int, error: Any) -> int:
        found.append((bytes(view), where, status, error.value))
        return 0

    return bytes(handle.pread_structured(count, offset, chunk, flags)), found


def pattern(count: int, offset: int) -> bytes:
    """Return the data of nbdkit's pattern plugin: each 8 bytes are their own offset."""
    return b"".join(struct.pack(">Q", offset + i) for i in range(0, count, 8))


def test_an_empty_disk_reads_as_zeroes(disk: nbd.NBD) -> None:
    assert disk.pread(4096, MIB - 4096) == bytes(4096)


def test_what_was_written_is_read(disk: nbd.NBD) -> None:
    disk.pwrite(b"0123456789", 5000)
    assert disk.pread(12, 4999) == b"\x000123456789\0"


@pytest.mark.parametrize("count", [1, 511, 4096, 65536, 262144, 524287, MIB])
def test_writes_of_every_size_are_read(disk: nbd.NBD, count: int) -> None:
    data = bytes(i * 7 & 0xFF for i in range(256)) * (count // 256 + 1)
    disk.pwrite(data[:count], 0)
    assert disk.pread(count, 0) == data[:count]


@pytest.mark.parametrize("count", [512, 65536, 262144, 524287, MIB])
def test_what_was_read_can_be_resized(disk: nbd.NBD, count: int) -> None:
    disk.pwrite(b"\1" * count, 0)
    read = disk.pread(count, 0)
    read += b"more"
    del read[:1]
    assert read == b"\1" * (count - 1) + b"more"


def test_a_large_read(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("pattern", "64M").socket)
    data = h.pread(32 * MIB, 8 * MIB)
    assert len(data) == 32 * MIB
    assert data[:4096] == pattern(4096, 8 * MIB)
    assert data[-4096:] == pattern(4096, 40 * MIB - 4096)


def test_a_large_write(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("memory", "64M").socket)
    data = pattern(MIB, 0) * 32
    h.pwrite(data, MIB)
    assert h.pread(32 * MIB, MIB) == data


def test_the_offset_counts(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("pattern", str(1 << 62)).socket)
    for offset in (0, 512, 1 << 32, (1 << 62) - 512):
        assert h.pread(512, offset) == pattern(512, offset)


def test_the_data_of_a_server(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("data", '( "hello" @0x100 0x55 0xaa )').socket)
    assert h.pread(h.get_size(), 0) == b"hello" + bytes(251) + b"\x55\xaa"


def test_sparse_data_is_the_same_twice(nbdkit: StartServer, h: nbd.NBD) -> None:
    arguments = ["sparse-random", "4M", "seed=3", "percent=50", "runlength=65536"]
    h.connect_unix(nbdkit(*arguments).socket)
    with nbd.NBD() as other:
        other.connect_unix(nbdkit(*arguments).socket)
        assert h.pread(4 * MIB, 0) == other.pread(4 * MIB, 0) != bytes(4 * MIB)


def test_data_and_extents_of_a_sparse_disk_agree(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.add_meta_context(BASE)
    h.connect_unix(nbdkit("sparse-random", "4M", "seed=3", "percent=50", "runlength=65536").socket)
    data = h.pread(4 * MIB, 0)
    entries = extents(h, 4 * MIB)[0][2]
    assert len(entries) > 4
    where = 0
    for length, flags in zip(entries[::2], entries[1::2]):
        if flags & nbd.STATE_ZERO:
            assert data[where : where + length].count(0) == length
        where += length
    assert where == 4 * MIB


def test_zero_zeroes_its_range_alone(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 4096, 0)
    disk.zero(2048, 1024)
    assert disk.pread(4096, 0) == b"x" * 1024 + bytes(2048) + b"x" * 1024


@pytest.mark.parametrize("flag", [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA])
def test_zero_with_a_flag(disk: nbd.NBD, flag: int) -> None:
    disk.pwrite(b"x" * 512, 0)
    disk.zero(512, 0, flag)
    assert disk.pread(512, 0) == bytes(512)


def test_trim_makes_a_hole(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 65536, 0)
    disk.trim(65536, 0)
    assert extents(disk, 65536)[0][2][1] == HOLE


def test_cache_and_flush_change_no_data(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 512, 0)
    disk.cache(512, 0)
    disk.flush()
    assert disk.pread(512, 0) == b"x" * 512


def test_write_with_fua(disk: nbd.NBD) -> None:
    disk.pwrite(b"x", 0, nbd.CMD_FLAG_FUA)
    assert disk.pread(1, 0) == b"x"


def test_what_one_handle_writes_another_reads(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_unix(server.socket)
    with nbd.NBD() as other:
        other.connect_unix(server.socket)
        h.pwrite(b"shared", 0)
        h.flush()
        assert other.pread(6, 0) == b"shared"


def test_block_status_distinguishes_data_from_holes(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 32768, 65536)
    assert extents(disk, MIB) == [
        (BASE, 0, [65536, HOLE, 32768, 0, MIB - 98304, HOLE], 0),
    ]


def test_block_status_reports_where_it_begins(disk: nbd.NBD) -> None:
    assert extents(disk, 4096, 8192)[0][:2] == (BASE, 8192)


def test_block_status_with_req_one_reports_one_extent(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 32768, 65536)
    assert extents(disk, 98304, 0, nbd.CMD_FLAG_REQ_ONE)[0][2] == [65536, HOLE]


def test_block_status_without_a_meta_context_fails(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("memory", "1M").socket)
    with pytest.raises(nbd.Error):
        extents(h, MIB)


def test_a_structured_read_of_data_is_one_chunk(disk: nbd.NBD) -> None:
    disk.pwrite(b"y" * 512, 1024)
    assert chunks_of(disk, 512, 1024) == (
        b"y" * 512,
        [(b"y" * 512, 1024, nbd.READ_DATA, 0)],
    )


def test_a_structured_read_must_not_be_fragmented_with_df(disk: nbd.NBD) -> None:
    data, chunks = chunks_of(disk, MIB, 0, nbd.CMD_FLAG_DF)
    assert (len(data), len(chunks)) == (MIB, 1)


def test_a_structured_read_works_without_structured_replies(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.set_request_structured_replies(False)
    h.connect_unix(nbdkit("pattern", "1M").socket)
    data, chunks = chunks_of(h, 512, 512)
    assert data == pattern(512, 512)
    assert chunks == [(data, 512, nbd.READ_DATA, 0)]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda h: h.pread(512, MIB), id="pread"),
        pytest.param(lambda h: h.pwrite(bytes(512), MIB - 511), id="pwrite"),
        pytest.param(lambda h: h.zero(512, MIB), id="zero"),
        pytest.param(lambda h: h.trim(512, MIB), id="trim"),
        pytest.param(lambda h: h.cache(512, MIB), id="cache"),
        pytest.param(lambda h: h.block_status(512, MIB, print), id="block_status"),
    ],
)
def test_a_command_beyond_the_end_fails(
    disk: nbd.NBD, command: Callable[[nbd.NBD], object]
) -> None:
    with pytest.raises(nbd.Error) as caught:
        command(disk)
    assert caught.value.errno in ("EINVAL", "ENOSPC")
    assert disk.aio_is_ready()


def test_strict_mode_off_leaves_the_refusal_to_the_server(disk: nbd.NBD) -> None:
    disk.set_strict_mode(0)
    with pytest.raises(nbd.Error) as caught:
        disk.pread(512, MIB)
    assert "server" in caught.value.string.lower() or "command failed" in caught.value.string
    assert disk.aio_is_ready()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda h: h.pwrite(bytes(512), 0), id="pwrite"),
        pytest.param(lambda h: h.zero(512, 0), id="zero"),
        pytest.param(lambda h: h.trim(512, 0), id="trim"),
    ],
)
def test_a_read_only_server_refuses_changes(
    nbdkit: StartServer, h: nbd.NBD, command: Callable[[nbd.NBD], object]
) -> None:
    h.connect_unix(nbdkit("-r", "memory", "1M").socket)
    with pytest.raises(nbd.Error) as caught:
        command(h)
    assert caught.value.errno in ("EPERM", "EINVAL", "EROFS")


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"])
def test_an_error_of_the_server_arrives_as_it_is(
    nbdkit: StartServer, h: nbd.NBD, name: str
) -> None:
    h.connect_unix(nbdkit("memory", "1M", "--filter=error", f"error={name}", "error-rate=1").socket)
    for command in (lambda: h.pread(512, 0), lambda: h.pwrite(b"x", 0), lambda: h.trim(1, 0)):
        with pytest.raises(nbd.Error) as caught:
            command()
        assert caught.value.errnum == getattr(errno, name)


def test_the_handle_works_after_an_error_of_the_server(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M", "--filter=error", "error-pwrite=EIO", "error-pwrite-rate=1")
    h.connect_unix(server.socket)
    with pytest.raises(nbd.Error):
        h.pwrite(b"x", 0)
    assert h.pread(512, 0) == bytes(512)


def test_shutdown_closes_the_connection(disk: nbd.NBD) -> None:
    disk.shutdown()
    assert disk.aio_is_closed()


def test_a_command_after_shutdown_fails(disk: nbd.NBD) -> None:
    disk.shutdown()
    with pytest.raises(nbd.Error):
        disk.pread(512, 0)


def test_shutdown_may_abandon_what_was_not_sent(disk: nbd.NBD) -> None:
    disk.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)
    assert disk.aio_is_closed()


def test_a_second_shutdown_fails(disk: nbd.NBD) -> None:
    disk.shutdown()
    with pytest.raises(nbd.Error):
        disk.shutdown()


def test_the_server_logs_what_was_asked(nbdkit: StartServer, h: nbd.NBD, tmp_path: Any) -> None:
    log = tmp_path / "log"
    server = nbdkit("memory", "1M", "--filter=log", f"logfile={log}")
    h.connect_unix(server.socket)
    h.pwrite(bytes(512), 1024, nbd.CMD_FLAG_FUA)
    h.pread(4096, 0)
    h.close()
    assert server.stop() == 0
    text = log.read_text()
    assert "Write id=1 offset=0x400 count=0x200 fua=1" in text
    assert "Read id=2 offset=0x0 count=0x1000" in text


def test_nbd_server_reads_and_writes(nbd_server: Callable[..., NbdServer], h: nbd.NBD) -> None:
    server = nbd_server()
    h.connect_command(server.argv)
    h.pwrite(b"on disk", 512)
    assert h.pread(7, 512) == b"on disk"
    assert server.path.read_bytes()[512:519] == b"on disk"
