# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with servers that fail, die or are late, and calls that a signal stops."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import pytest
from support.files import BUFFERINGS
from support.servers import Server, StartServer
from support.signals import SHORT, Stop, alarm
from support.sizes import KIB, MIB
from support.unowned_memory import unowned_view
from support.waits import paused

import nbd

#: More than can be written without waiting.
TOO_MUCH = 12 * MIB


class Failing:
    """A server whose commands of one kind fail as long as a file exists."""

    def __init__(self, nbdkit: StartServer, folder: Path, kind: str) -> None:
        self.trigger = folder / "fail"
        self.trigger.touch()
        option = f"error-{kind}-file={self.trigger}"
        rate = f"error-{kind}-rate=100%"
        self.uri = nbdkit("--filter=error", "memory", "4M", "error=EIO", option, rate).uri


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 20 MiB."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(20 * MIB))
    return path


@contextmanager
def stopped(server: Server, way: str) -> Iterator[None]:
    """Expect a call to be stopped while the server answers nothing."""
    kind: type[BaseException] = nbd.Timeout if way == "timeout" else Stop
    with paused(server), ExitStack() as stack:
        if way == "signal":
            stack.enter_context(alarm())
        with pytest.raises(kind):
            yield


def timeout_of(way: str) -> float | None:
    """Return the timeout of a file whose calls are stopped; flushing a file may take long."""
    return 20 * SHORT if way == "timeout" else None


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_read_that_fails_is_an_oserror_and_an_error_of_nbd(
    nbdkit: StartServer, tmp_path: Path, buffering: int
) -> None:
    with nbd.open(Failing(nbdkit, tmp_path, "pread").uri, buffering=buffering) as disk:
        for kind in (OSError, nbd.Error, nbd.DiskError):
            with pytest.raises(kind) as caught:
                disk.read(100)
            assert caught.value.errno == errno.EIO  # type: ignore[attr-defined]


def test_an_error_names_operation_size_offset_and_reason(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    with nbd.open(Failing(nbdkit, tmp_path, "pread").uri, buffering=0) as disk:
        disk.seek(4096)
        with pytest.raises(nbd.DiskError) as caught:
            disk.read(65536)
    text = str(caught.value)
    assert text == "reading 65536 bytes at offset 4096 failed: Input/output error (EIO)"
    assert (caught.value.errnum, caught.value.strerror) == (errno.EIO, os.strerror(errno.EIO))


def test_an_error_can_be_pickled() -> None:
    error = nbd.DiskError("writing failed", errno.ENOSPC)
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), twin.args, twin.errno) == (nbd.DiskError, error.args, errno.ENOSPC)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_read_works_once_the_server_does(
    nbdkit: StartServer, tmp_path: Path, buffering: int
) -> None:
    server = Failing(nbdkit, tmp_path, "pread")
    with nbd.open(server.uri, buffering=buffering) as disk:
        with pytest.raises(nbd.DiskError):
            disk.read(10)
        server.trigger.unlink()
        assert disk.tell() == 0
        assert disk.read(10) == bytes(10)


def test_what_arrived_before_an_error_is_read_first(nbdkit: StartServer) -> None:
    bad = "[ $(($3 + $4)) -gt 524288 ]"
    fails = f"pread=if {bad}; then echo EIO no >&2; exit 1; fi; head -c $3 /dev/zero"
    server = nbdkit("eval", "get_size=echo 1048576", fails)
    with nbd.open(server.uri, buffering=0) as disk:
        disk.seek(512 * KIB - 5)
        assert len(disk.read(50_000)) == 5
        with pytest.raises(nbd.DiskError) as caught:
            disk.read(50_000)
    assert "offset 524288" in caught.value.string


@pytest.mark.parametrize("way", ["write", "flush", "close"])
def test_the_error_of_a_write_is_raised_once(nbdkit: StartServer, tmp_path: Path, way: str) -> None:
    server = Failing(nbdkit, tmp_path, "pwrite")
    disk = nbd.open(server.uri, "r+b", buffering=0)
    assert disk.write(b"a" * 512) == 512
    disk.seek(0)
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: disk.write(b"b" * 512),
        "flush": disk.flush,
        "close": disk.close,
    }
    with pytest.raises(nbd.DiskError) as caught:
        calls[way]()
    assert caught.value.errno == errno.EIO
    server.trigger.unlink()
    disk.close()
    assert disk.closed


#: A disk of 1 MiB on which one kind of command fails.
PLUGIN = {
    "get_size": "echo 1048576",
    "pread": "head -c $3 /dev/zero",
    "pwrite": "cat >/dev/null",
    "flush": "exit 0",
}


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("mode", ["r+b", "wb"])
@pytest.mark.parametrize("command", ["pwrite", "flush"])
def test_close_closes_if_it_cannot_flush(
    nbdkit: StartServer, buffering: int, mode: str, command: str
) -> None:
    plugin = {**PLUGIN, command: "echo EIO it is broken >&2; exit 1"}
    uri = nbdkit("eval", *(f"{name}={script}" for name, script in plugin.items())).uri
    disk: Any = nbd.open(uri, mode, buffering=buffering)
    handle = (disk.raw if buffering else disk)._ours[0]
    disk.write(b"abc")
    with pytest.raises(nbd.DiskError) as caught:
        disk.close()
    assert caught.value.errno == errno.EIO
    assert disk.closed
    with pytest.raises(nbd.ClosedHandle):
        handle.get_size()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_server_that_dies_is_an_error_and_the_file_can_be_closed(
    nbdkit: StartServer, buffering: int
) -> None:
    server = nbdkit("memory", "1M")
    with nbd.open(server.uri, buffering=buffering) as disk:
        disk.read(10)
        server.kill()
        disk.seek(500_000)
        with pytest.raises(nbd.DiskError) as caught:
            disk.read(10)
        assert caught.value.errno != 0


def test_flush_reports_a_server_that_dies_with_writes_in_flight(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "4M")
    disk = nbd.open(server.uri, "wb", buffering=0)
    server.pause()
    disk.write(bytes(4 * MIB))
    server.kill()
    with pytest.raises(nbd.DiskError):
        disk.flush()
    with pytest.raises(nbd.DiskError):
        disk.close()
    assert disk.closed


@pytest.mark.parametrize("mode", ["r+b", "wb"])
def test_a_read_only_export_is_not_opened_for_writing(nbdkit: StartServer, mode: str) -> None:
    with pytest.raises(OSError, match="open it with mode 'rb'") as caught:
        nbd.open(nbdkit("-r", "memory", "1M").uri, mode)
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("way", ["timeout", "signal"])
def test_a_read_that_was_stopped_can_be_made_again(
    nbdkit: StartServer, image: Path, buffering: int, way: str
) -> None:
    server = nbdkit("--threads=8", "file", str(image))
    data = image.read_bytes()
    with nbd.open(server.uri, buffering=buffering, timeout=timeout_of(way)) as disk:
        for offset, count in ((0, 1000), (MIB, 3 * MIB), (5 * MIB, 100)):
            disk.seek(offset)
            assert disk.read(1) == data[offset : offset + 1]
            offset += 10 * MIB
            disk.seek(offset)
            with stopped(server, way):
                disk.read(count)
            disk.seek(offset)
            assert disk.read(count)[:100] == data[offset : offset + 100][:count]


@pytest.mark.parametrize("way", ["timeout", "signal"])
def test_reading_ahead_continues_after_it_was_stopped(
    nbdkit: StartServer, image: Path, way: str
) -> None:
    server = nbdkit("--threads=8", "file", str(image))
    parts: list[bytes] = []
    with nbd.open(server.uri, buffering=0, timeout=timeout_of(way)) as disk:
        parts.extend(disk.read(100_000) for _ in range(20))
        with stopped(server, way):
            while True:
                parts.append(disk.read(100_000))
        # A signal may arrive between the read and the append to the list.
        disk.seek(sum(map(len, parts)))
        parts.append(disk.read())
    assert b"".join(parts) == image.read_bytes()


def test_a_read_that_timed_out_keeps_the_position(nbdkit: StartServer, image: Path) -> None:
    server = nbdkit("--threads=8", "file", str(image))
    parts: list[bytes] = []
    with nbd.open(server.uri, buffering=0, timeout=timeout_of("timeout")) as disk:
        with stopped(server, "timeout"):
            while True:
                parts.append(disk.read(100_000))
        assert disk.tell() == sum(map(len, parts))


@pytest.mark.parametrize("way", ["timeout", "signal"])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_write_that_was_stopped_can_be_made_again(
    nbdkit: StartServer, image: Path, buffering: int, way: str
) -> None:
    server = nbdkit("--threads=8", "file", str(image))
    data = random.Random(2).randbytes(TOO_MUCH)
    with nbd.open(server.uri, "r+b", buffering=buffering, timeout=timeout_of(way)) as disk:
        with stopped(server, way):
            disk.write(b"x" * TOO_MUCH)
        disk.seek(0)
        disk.write(data)
        disk.flush()
        assert image.read_bytes()[:TOO_MUCH] == data


def test_a_timeout_of_a_given_handle_is_kept(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.settimeout(20 * SHORT)
    h.connect_unix(server.socket)
    with nbd.open(h, buffering=0) as disk:
        with paused(server), pytest.raises(nbd.Timeout, match=f" {20 * SHORT:g} second"):
            disk.read(1)
        assert disk.read(1) == b"\0"


def test_a_signal_handler_cannot_use_the_file_of_the_call_it_stopped(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    with nbd.open(server.uri, buffering=0) as disk:

        def use(number: int, frame: FrameType | None) -> None:
            disk.read(1)

        with paused(server), alarm(use), pytest.raises(RuntimeError, match="signal handler"):
            disk.read(10)
        assert disk.read(10) == bytes(10)


def test_late_answers_do_not_reach_memory_without_an_owner(
    nbdkit: StartServer, image: Path
) -> None:
    memory = ctypes.create_string_buffer(2 * MIB)
    view = unowned_view(memory)
    server = nbdkit("file", str(image))
    with nbd.open(server.uri, buffering=0) as disk:
        with stopped(server, "signal"):
            disk.readinto(view)  # type: ignore[attr-defined]
        disk.read(1)
        disk.read(1)
    assert memory.raw == bytes(2 * MIB)


def test_a_large_read_that_was_stopped_ends_before_the_next_call_does(
    nbdkit: StartServer, image: Path
) -> None:
    server = nbdkit("file", str(image))
    first, second = bytearray(2 * MIB), bytearray(2 * MIB)
    with nbd.open(server.uri, buffering=0) as disk:
        with stopped(server, "signal"):
            disk.readinto(first)  # type: ignore[attr-defined]
        disk.seek(10 * MIB)
        assert disk.readinto(second) > 0  # type: ignore[attr-defined]
        after = bytes(first)
        while disk.read(MIB):
            pass
        assert first == after


def test_closing_waits_for_what_is_read_ahead(nbdkit: StartServer, h: nbd.NBD) -> None:
    """Otherwise a server may die because it cannot send a reply."""
    h.connect_uri(nbdkit("--filter=delay", "memory", "4M", "rdelay=50ms").uri)
    with nbd.open(h) as disk:
        while not h.aio_in_flight():
            assert disk.read(100_000)
    assert h.aio_in_flight() == 0


def test_closing_a_file_whose_server_hangs_does_not_wait_for_ever(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    disk = nbd.open(server.uri)
    with paused(server):
        disk.close()
    assert disk.closed
