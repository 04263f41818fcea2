"""Abandoned commands: what they keep, how many there may be, and how they end."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from contextlib import suppress
from typing import Any, Callable

import pytest
from support.hostile import Watchdog
from support.servers import Server, StartServer
from support.sizes import MIB
from support.unowned_memory import unowned_view
from support.usage import registered
from support.waits import BLOCK, orphans, paused, reap

import nbd

MOST = 64


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit with a disk of 64 MiB."""
    return nbdkit("memory", "64M")


@pytest.fixture
def disk(server: Server, h: nbd.NBD) -> nbd.NBD:
    """Return a handle connected to it."""
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(server.socket)
    return h


def give_up(h: nbd.NBD, call: Callable[[], object], seconds: float = 0.01) -> None:
    """Make a call that times out."""
    h.settimeout(seconds)
    with pytest.raises(nbd.Timeout):
        call()
    h.settimeout(None)


def test_a_view_without_an_owner_is_read_into(disk: nbd.NBD) -> None:
    memory = ctypes.create_string_buffer(b"x" * BLOCK, BLOCK)
    view = unowned_view(memory)
    disk.pwrite(b"disk" * (BLOCK // 4), 0)
    disk.pread_into(view, 0)
    assert memory.raw == b"disk" * (BLOCK // 4)


def test_a_late_answer_does_not_reach_a_view_without_an_owner(
    server: Server, disk: nbd.NBD
) -> None:
    memory = ctypes.create_string_buffer(b"x" * BLOCK, BLOCK)
    view = unowned_view(memory)
    with paused(server):
        give_up(disk, lambda: disk.pread_into(view, 0))
    reap(disk)
    assert memory.raw == b"x" * BLOCK


def test_a_late_write_does_not_read_a_view_without_an_owner(server: Server, disk: nbd.NBD) -> None:
    size = 8 * MIB  # more than the socket holds
    memory = ctypes.create_string_buffer(b"x" * size, size)
    view = unowned_view(memory)
    with paused(server):
        give_up(disk, lambda: disk.pwrite(view, 0))
        ctypes.memset(memory, 0, size)
    reap(disk)
    assert disk.pread(size, 0) == b"x" * size


def test_a_queue_does_not_read_into_a_view_without_an_owner(disk: nbd.NBD) -> None:
    memory = ctypes.create_string_buffer(BLOCK)
    view = unowned_view(memory)
    with nbd.queue.Queue(disk) as queue:
        with pytest.raises(BufferError, match="read into a bytearray"):
            queue.read(view, 0)
        assert len(queue) == 0


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy copies the data of a write")
def test_a_write_that_was_stopped_pins_the_buffer_until_the_answer(
    server: Server, disk: nbd.NBD
) -> None:
    data = bytearray(b"x" * BLOCK)
    with paused(server):
        give_up(disk, lambda: disk.pwrite(data, 0))
        with pytest.raises(BufferError):
            data.append(0)
    reap(disk)
    gc.collect()
    data.append(0)
    assert disk.pread(BLOCK, 0) == b"x" * BLOCK


@pytest.mark.parametrize("make", [bytearray, nbd.Buffer])
def test_a_read_into_a_buffer_that_was_stopped_never_spoils_what_others_have(
    server: Server, disk: nbd.NBD, make: Callable[[int], Any]
) -> None:
    disk.pwrite(b"\xff" * MIB, 0)
    with paused(server):
        for _ in range(4):
            give_up(disk, lambda: disk.pread_into(make(MIB), 0))
        fresh = [bytearray(MIB) for _ in range(8)]
        clean = [nbd.Buffer(MIB) for _ in range(8)]
    reap(disk)
    assert not any(map(any, fresh))
    assert all(buffer.is_zero() for buffer in clean)


def test_a_read_that_was_stopped_never_spoils_what_others_have(
    server: Server, disk: nbd.NBD
) -> None:
    disk.pwrite(b"\xff" * MIB, 0)
    with paused(server):
        for _ in range(8):
            give_up(disk, lambda: disk.pread(MIB, 0))
        fresh = [bytearray(MIB) for _ in range(16)]
    reap(disk)
    assert not any(map(any, fresh))
    assert registered() == 0


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h, seen: h.pread_structured(BLOCK, 0, seen), id="chunk"),
        pytest.param(lambda h, seen: h.block_status(MIB, 0, seen), id="extent"),
    ],
)
def test_the_callback_of_a_command_that_was_stopped_is_not_called(
    server: Server, disk: nbd.NBD, call: Callable[..., object]
) -> None:
    seen: list[object] = []
    with paused(server):
        give_up(disk, lambda: call(disk, lambda *arguments: seen.append(arguments)))
    reap(disk)
    assert seen == []
    call(disk, lambda *arguments: seen.append(arguments))
    assert len(seen) == 1
    assert registered() == 0


def test_orphans_are_bounded_and_the_next_command_waits_for_room(
    server: Server, disk: nbd.NBD
) -> None:
    with paused(server):
        for _ in range(MOST + 10):
            give_up(disk, lambda: disk.pread(BLOCK, 0), 0.001)
        assert orphans(disk) == MOST
        assert registered() == MOST
    assert disk.pread(BLOCK, 0) == bytes(BLOCK)
    reap(disk)
    assert registered() == 0


def test_orphans_are_bounded_by_their_bytes(server: Server, disk: nbd.NBD) -> None:
    with paused(server):
        for _ in range(6):
            give_up(disk, lambda: disk.pread(32 * MIB, 0), 0.001)
        assert orphans(disk) == 2
    assert disk.pread(BLOCK, 0) == bytes(BLOCK)


def test_closing_waits_for_no_orphan_and_lets_go_of_all(server: Server, disk: nbd.NBD) -> None:
    with paused(server):
        for _ in range(8):
            give_up(disk, lambda: disk.pwrite(bytes(BLOCK), 0))
        with Watchdog(10, server.resume) as watchdog:
            disk.close()
        assert not watchdog.late
    assert registered() == 0


def test_a_handle_that_is_dropped_lets_go_of_its_orphans(server: Server) -> None:
    handles = [nbd.NBD()]
    handles[0].connect_unix(server.socket)
    with paused(server):
        give_up(handles[0], lambda: handles[0].pread(BLOCK, 0))
    handles.clear()
    assert registered() == 0


def test_a_server_that_dies_ends_the_orphans(server: Server, disk: nbd.NBD) -> None:
    server.pause()
    for _ in range(8):
        give_up(disk, lambda: disk.pread(BLOCK, 0))
    server.kill()
    with pytest.raises(nbd.Error, match=r"^nbd_pread: "):
        disk.pread(BLOCK, 0)
    assert orphans(disk) == 0
    assert registered() == 0


def test_orphans_are_not_seen_as_commands_of_the_caller(server: Server, disk: nbd.NBD) -> None:
    with paused(server):
        give_up(disk, lambda: disk.pread(BLOCK, 0))
    reap(disk)
    assert disk.aio_in_flight() == 0
    with pytest.raises(nbd.Error):
        disk.aio_peek_command_completed()


def test_threads_that_give_up_leave_the_others_their_answers(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.connect_unix(nbdkit("memory", "1M", "--filter=delay", "rdelay=2ms").socket)
    h.pwrite(bytes([7]) * 65536, 0)
    h.settimeout(0.001)
    wrong: list[object] = []
    late: list[int] = []

    def read() -> None:
        for _ in range(50):
            try:
                if h.pread(BLOCK, 0) != bytes([7]) * BLOCK:
                    wrong.append("data")
            except nbd.Timeout:
                late.append(1)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    h.settimeout(None)
    assert wrong == []
    assert late
    reap(h)
    assert h.pread(BLOCK, 0) == bytes([7]) * BLOCK
    assert registered() == 0


def test_a_command_that_was_stopped_is_done_all_the_same(server: Server, disk: nbd.NBD) -> None:
    with paused(server):
        give_up(disk, lambda: disk.pwrite(b"late" * 128, 0))
    assert disk.pread(BLOCK, 0) == b"late" * 128


def test_a_traceback_keeps_no_buffer_pinned(server: Server, disk: nbd.NBD) -> None:
    with paused(server):
        disk.settimeout(0.01)
        with suppress(nbd.Timeout):
            disk.pread(BLOCK, 0)
        disk.settimeout(None)
    reap(disk)
    assert registered() == 0
