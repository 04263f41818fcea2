# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a call that a timeout or a signal handler stops can be repeated."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import pytest
from support.files import BUFFERINGS
from support.servers import Server, StartServer
from support.signals import SHORT, Stop, alarm
from support.sizes import MIB
from support.unowned_memory import unowned_view
from support.waits import paused

import nbd

#: More than can be written without waiting.
TOO_MUCH = 12 * MIB


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
