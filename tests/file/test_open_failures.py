# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with servers that fail or die: what the calls raise, and what the file still does."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any, Callable

import pytest
from support.files import BUFFERINGS
from support.servers import StartServer
from support.sizes import KIB, MIB

import nbd


class Failing:
    """A server whose commands of one kind fail as long as a file exists."""

    def __init__(self, nbdkit: StartServer, folder: Path, kind: str) -> None:
        self.trigger = folder / "fail"
        self.trigger.touch()
        option = f"error-{kind}-file={self.trigger}"
        rate = f"error-{kind}-rate=100%"
        self.uri = nbdkit("--filter=error", "memory", "4M", "error=EIO", option, rate).uri


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
