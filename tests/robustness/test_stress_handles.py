"""Many threads on handles, Buffers and callbacks: every result is right, and no callback is lost.

Without the GIL the threads run at the same time; with it they switch as often as possible.
"""

from __future__ import annotations

import gc
import threading
from contextlib import suppress
from errno import EINVAL, ENOENT
from pathlib import Path
from typing import Any

import pytest
from support.figures import Figure
from support.handles import drain, finish
from support.servers import StartServer
from support.threads import THREADS, stress
from support.usage import registered

import nbd
from nbd._binding.callbacks import next_token

BLOCK = 4096
PART = 64 * 1024  # of the disk, for each thread

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


@pytest.fixture
def handles(nbdkit: StartServer) -> list[nbd.NBD]:
    """Return a handle for each thread, all connected to one disk of 1 MiB."""
    socket = nbdkit("memory", "1M").socket
    made = [nbd.NBD() for _ in range(THREADS)]
    for handle in made:
        handle.connect_unix(socket)
    return made


def filled(number: int, turn: int) -> bytes:
    """Return a block that no other thread, and no other recent turn, writes."""
    return bytes([number, turn % 256]) * (BLOCK // 2)


def test_a_token_is_given_to_one_thread_only(figure: Figure) -> None:
    tokens: list[list[int]] = [[] for _ in range(THREADS)]

    def work(number: int, turn: int) -> None:
        if turn < 50:  # 400,000 tokens are enough, and fit in memory
            tokens[number] += [next_token() for _ in range(1000)]

    stress(work)
    found = [token for taken in tokens for token in taken]
    figure("stress: tokens", len(found))
    assert len(found) - len(set(found)) == 0


def test_each_callback_is_called_once_in_its_own_thread(
    handles: list[nbd.NBD], figure: Figure
) -> None:
    wrong: list[object] = []

    def work(number: int, turn: int) -> None:
        called: list[object] = []

        def chunk(view: memoryview, offset: int, status: int, error: Any) -> int:
            called.append((threading.get_ident(), number, offset))
            return 0

        with suppress(nbd.Error):  # a callback that was lost counts as one that failed
            handles[number].pread_structured(BLOCK, number * PART, chunk)
        if called != [(threading.get_ident(), number, number * PART)]:
            wrong.append(called)

    done = stress(work)
    figure("stress: callbacks of synchronous calls", done)
    assert len(wrong) == 0, wrong[:3]


def test_each_completion_of_one_handle_is_called_once(disk: nbd.NBD, figure: Figure) -> None:
    calls: list[dict[int, int]] = [{} for _ in range(THREADS)]  # how often, for each turn
    disk.pwrite(b"\1" * BLOCK, 0)

    def work(number: int, turn: int) -> None:
        mine = calls[number]
        mine[turn] = 0
        buffer = bytearray(BLOCK)

        def completion(error: Any) -> int:
            mine[turn] += 1
            assert error.value == 0
            return 1

        disk.aio_pread(buffer, 0, completion)
        while not mine[turn]:
            disk.poll(10)  # another thread's poll may have called it
        assert bytes(buffer) == b"\1" * BLOCK

    done = stress(work)
    drain(disk)
    counts = [count for mine in calls for count in mine.values()]
    figure("stress: completions on one handle", done)
    assert counts == [1] * done


def test_threads_on_one_handle_read_what_they_wrote(disk: nbd.NBD, figure: Figure) -> None:
    def work(number: int, turn: int) -> None:
        data = filled(number, turn)
        disk.pwrite(data, number * PART)
        assert disk.pread(BLOCK, number * PART) == data

    figure("stress: writes and reads on one handle", stress(work))


def test_threads_read_the_same_into_one_buffer(handles: list[nbd.NBD], figure: Figure) -> None:
    expected = b"".join(filled(number, 1) for number in range(THREADS))
    handles[0].pwrite(expected, 0)
    shared = nbd.Buffer(len(expected))
    for handle in handles:
        handle.set_pread_initialize(False)  # else libnbd clears the buffer at each command
        finish(handle, handle.aio_pread(shared, 0))

    def work(number: int, turn: int) -> None:
        finish(handles[number], handles[number].aio_pread(shared, 0))
        assert bytes(shared) == expected
        assert shared[number * BLOCK : (number + 1) * BLOCK] == filled(number, 1)

    figure("stress: reads into one Buffer", stress(work))


def test_the_memory_of_a_dropped_buffer_goes_to_one_thread_only(figure: Figure) -> None:
    size = 1536  # no other test uses it

    def work(number: int, turn: int) -> None:
        buffers = [nbd.Buffer(size) for _ in range(4)]
        for at, buffer in enumerate(buffers):
            buffer[:] = bytes([number * 4 + at]) * size
        for at, buffer in enumerate(buffers):
            assert bytes(buffer) == bytes([number * 4 + at]) * size

    figure("stress: Buffers of one size", 4 * stress(work))


def test_each_thread_gets_its_own_error(disk: nbd.NBD, tmp_path: Path, figure: Figure) -> None:
    def work(number: int, turn: int) -> None:
        size = disk.get_size()
        if number % 2:
            with pytest.raises(nbd.Error, match=r"nbd_pread|pread") as caught:
                disk.pread(512, size + number)
            assert caught.value.errnum == EINVAL
        else:
            missing = str(tmp_path / f"missing-{number}")
            with nbd.NBD() as handle, pytest.raises(nbd.Error) as caught:
                handle.connect_unix(missing)
            assert caught.value.errnum == ENOENT
            assert "connect" in str(caught.value)

    figure("stress: errors", stress(work))


def test_handles_are_closed_while_threads_use_them(nbdkit: StartServer, figure: Figure) -> None:
    socket = nbdkit("memory", "1M").socket
    shared = [nbd.NBD()]
    shared[0].connect_unix(socket)

    def work(number: int, turn: int) -> None:
        handle = shared[0]
        if number == 0:
            fresh = nbd.NBD()
            fresh.connect_unix(socket)
            shared[0] = fresh
            handle.close()
            return
        # A call that was running when the handle was closed may fail in its own way.
        with suppress(nbd.ClosedHandle, nbd.Error):
            assert handle.pread_structured(512, 0, lambda *chunk: 0) == bytes(512)

    figure("stress: calls while handles were closed", stress(work))
    shared[0].close()


def test_dropped_callbacks_leave_nothing(handles: list[nbd.NBD], figure: Figure) -> None:
    def work(number: int, turn: int) -> None:
        handles[number].set_debug_callback(lambda *message: 0)
        handles[number].clear_debug_callback()

    figure("stress: callbacks set and cleared", stress(work))
    gc.collect()
    assert registered() == 0
