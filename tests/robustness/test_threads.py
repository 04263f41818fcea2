"""Threads: many on one handle, many handles, and a waiting call that delays no other call."""

from __future__ import annotations

import gc
import os
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.handles import drain, finish
from support.hostile import Connection, Wire
from support.servers import StartServer, answers_on_command

import nbd

THREADS = 16
ROUNDS = 20
SECONDS = 60  # for which the threads run in the long form
CLOSES = 40 if SOAK else 5
BLOCK = 4096


@pytest.fixture
def hurried() -> Iterator[None]:
    """Let the interpreter switch threads as often as possible."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def turns() -> Iterator[int]:
    """Count turns: a few in the short form, for a minute in the long form."""
    end = time.monotonic() + SECONDS
    turn = 0
    while time.monotonic() < end if SOAK else turn < ROUNDS:
        yield turn
        turn += 1


def in_threads(work: Callable[[int], None]) -> None:
    """Run work(0), work(1), ... in parallel, and raise what they raise."""
    raised: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            start.wait(20)
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    assert not any(thread.is_alive() for thread in threads)
    if raised:
        raise raised[0]


def exercise(handle: nbd.NBD, number: int) -> int:
    """Write, read and query a thread's own part of the disk; return how often."""
    where = number * BLOCK
    done = 0
    for turn in turns():
        data = bytes([(number * 16 + turn) % 256]) * BLOCK
        handle.pwrite(data, where)
        assert handle.pread(BLOCK, where) == data
        chunks: list[tuple[bytes, int]] = []

        def chunk(view: memoryview, offset: int, status: int, error: Any) -> int:
            chunks.append((bytes(view), offset))  # noqa: B023 - called before the next turn
            return 0

        assert handle.pread_structured(BLOCK, where, chunk) == data
        assert chunks == [(data, where)]
        done += 3
    return done


def test_threads_on_one_handle(disk: nbd.NBD, figure: Figure) -> None:
    done: list[int] = []
    in_threads(lambda number: done.append(exercise(disk, number)))
    assert disk.aio_in_flight() == 0
    figure(f"threads: commands by {THREADS} on one handle, data right", sum(done))


def test_threads_on_a_handle_each(nbdkit: StartServer, figure: Figure) -> None:
    server = nbdkit("memory", "1M")
    done: list[int] = []

    def work(number: int) -> None:
        with nbd.NBD() as handle:
            handle.connect_unix(server.socket)
            done.append(exercise(handle, number))

    in_threads(work)
    figure(f"threads: commands by {THREADS} on as many handles, data right", sum(done))


def test_threads_open_and_close_handles(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")

    def work(number: int) -> None:
        for _ in range(5):
            with nbd.NBD() as handle:
                handle.connect_unix(server.socket)
                assert handle.pread(512, number * BLOCK) == bytes(512)

    in_threads(work)


def test_threads_with_commands_in_flight(nbdkit: StartServer) -> None:
    server = nbdkit("pattern", "1M")
    whole = None

    def work(number: int) -> None:
        with nbd.NBD() as handle:
            handle.connect_unix(server.socket)
            buffers = [nbd.Buffer(BLOCK) for _ in range(64)]
            errors: list[int] = []

            def completion(error: Any) -> int:
                errors.append(error.value)
                return 1

            for i, buf in enumerate(buffers):
                handle.aio_pread(buf, i * BLOCK, completion)
            drain(handle)
            assert errors == [0] * 64
            assert b"".join(bytes(buf) for buf in buffers) == whole

    with nbd.NBD() as handle:
        handle.connect_unix(server.socket)
        whole = bytes(handle.pread(64 * BLOCK, 0))
    in_threads(work)


def test_one_thread_issues_and_another_polls(disk: nbd.NBD) -> None:
    done: list[int] = []
    issued = threading.Semaphore(0)

    def completion(error: Any) -> int:
        done.append(error.value)
        return 1

    def issue() -> None:
        for i in range(64):
            disk.aio_pwrite(bytes([i]) * BLOCK, i * BLOCK, completion)
            issued.release()

    thread = threading.Thread(target=issue)
    thread.start()
    for _ in range(64):
        assert issued.acquire(timeout=20)
        drain(disk)
    thread.join(20)
    drain(disk)
    assert done == [0] * 64
    assert disk.pread(1, 63 * BLOCK) == b"\x3f"


def test_a_waiting_call_holds_up_no_other_thread(
    nbdkit: StartServer, h: nbd.NBD, tmp_path: Path
) -> None:
    # Through two named pipes, this thread lets the server answer the read.
    plugin, asked, go = answers_on_command(tmp_path)
    h.connect_unix(nbdkit(*plugin).socket)
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(bytes(h.pread(512, 0))))
    with open(os.open(asked, os.O_RDONLY | os.O_NONBLOCK), "rb") as waiting:
        thread.start()
        assert select.select([waiting], [], [], 20)[0]
    assert result == []
    go.write_text("go\n")
    thread.join(20)
    assert result == [bytes(512)]


def test_exceptions_of_callbacks_stay_in_their_threads(disk: nbd.NBD) -> None:
    def work(number: int) -> None:
        for _ in range(ROUNDS):
            mine = ValueError(number)

            def chunk(*arguments: Any) -> None:
                raise mine  # noqa: B023 - called before the next turn

            with pytest.raises(nbd.Error) as caught:
                disk.pread_structured(512, 0, chunk)
            assert caught.value.__cause__ is mine

    in_threads(work)


@pytest.mark.usefixtures("hurried")
def test_each_call_raises_the_exceptions_of_its_own_callbacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised, reported = Counter[int](), Counter[int]()
    monkeypatch.setattr(
        "sys.unraisablehook", lambda args: reported.update([args.exc_value.args[0]])
    )

    def work(number: int) -> None:
        def fail(*message: str) -> None:
            raised[number] += 1
            raise ValueError(number)

        with nbd.NBD() as handle:
            handle.set_debug_callback(fail)
            handle.set_debug(True)
            for _ in range(20 * ROUNDS):
                handle.get_handle_name()
                assert reported[number] == raised[number]
            handle.clear_debug_callback()

    in_threads(work)
    assert sum(raised.values()) >= THREADS * 20 * ROUNDS


@pytest.mark.usefixtures("hurried")
def test_threads_make_buffers_of_more_sizes_than_are_kept() -> None:
    def work(number: int) -> None:
        for turn in range(50 * ROUNDS):
            size = 512 * (1 + (number + turn) % 11)
            assert len(nbd.Buffer(size)) == size

    in_threads(work)


# Calls that wait in a thread while another thread closes the handle.
WAITS: dict[str, Callable[[nbd.NBD], object]] = {
    "pread": lambda h: h.pread(512, 0),
    "pread_structured": lambda h: h.pread_structured(512, 0, lambda *chunk: 0),
    "pwrite": lambda h: h.pwrite(bytes(512), 0),
    "flush": lambda h: h.flush(),
    "poll": lambda h: finish(h, h.aio_pread(bytearray(512), 0)),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_closing_in_another_thread_is_an_exception_and_no_crash(
    nbdkit: StartServer, figure: Figure, wait: Callable[[nbd.NBD], object]
) -> None:
    server = nbdkit("memory", "1M")
    for _ in range(CLOSES):
        handle = nbd.NBD()
        handle.connect_unix(server.socket)

        def work(number: int, handle: nbd.NBD = handle) -> None:
            if number == 0:
                handle.close()
            # A call that was running when the handle was closed may fail in its own way.
            with pytest.raises(nbd.ClosedHandle):  # noqa: PT012
                while True:
                    with suppress(nbd.Error):
                        wait(handle)

        in_threads(work)
    figure(f"threads: handles closed while {THREADS - 1} other threads used them", CLOSES)


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_closing_wakes_a_thread_that_waits_for_ever(
    figure: Figure, wait: Callable[[nbd.NBD], object]
) -> None:
    for _ in range(CLOSES):
        asked = threading.Event()

        def silence(wire: Wire, asked: threading.Event = asked) -> None:
            wire.negotiate()
            wire.request()
            asked.set()
            wire.linger()

        with Connection(silence) as peer, ThreadPoolExecutor(1) as pool:
            handle = nbd.NBD()
            handle.connect_socket(peer.fileno())
            waiting = pool.submit(wait, handle)
            assert asked.wait(20)
            handle.close()
            with pytest.raises((nbd.Error, nbd.ClosedHandle)):
                waiting.result(20)
    figure("threads: waiting calls that close() ended with an exception", CLOSES)


def test_threads_leave_nothing(disk: nbd.NBD) -> None:
    def work(number: int) -> None:
        for _ in range(ROUNDS):
            disk.pread_structured(512, 0, lambda *chunk: 0)

    in_threads(work)
    gc.collect()
    assert len(nbd._binding.callbacks.registry) == 0


def test_a_thread_that_looks_at_a_buffer_sees_no_old_byte_while_another_reads_into_it(
    disk: nbd.NBD, hurried: None
) -> None:
    size, old = 1600, 0xA5  # no other test uses this size, so the pool has blocks full of old bytes
    disk.pwrite(b"\1" * size, 0)
    with ThreadPoolExecutor(1) as other:
        for _ in range(20 * ROUNDS):
            for used in [nbd.Buffer(size) for _ in range(4)]:
                used[:] = bytes([old]) * size
            buffer = nbd.Buffer(size)
            seen = other.submit(bytes, buffer)
            cookie = disk.aio_pread(buffer, 0)
            assert old not in seen.result()
            finish(disk, cookie)
            assert bytes(buffer) == b"\1" * size


def test_a_thread_that_reaps_does_not_take_the_command_that_another_waits_for(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.connect_unix(nbdkit("memory", "1M").socket)
    over = threading.Event()
    stolen: list[int] = []

    def reap() -> None:
        while not over.is_set():
            with suppress(nbd.Error):
                cookie = h.aio_peek_command_completed()
                if cookie and h.aio_command_completed(cookie):
                    stolen.append(cookie)

    thread = threading.Thread(target=reap)
    thread.start()
    for _ in range(20_000):
        assert h.pread(512, 0) == bytes(512)
    over.set()
    thread.join()
    assert stolen == []
