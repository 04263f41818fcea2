"""Threads and signal handlers that use one queue or one file at the same time.

No call waits longer than its timeout, and every request is reported exactly once.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.hostile import Watchdog
from support.servers import Server, StartServer
from support.signals import Stop, handling
from support.sizes import KIB
from support.usage import registered
from support.waits import paused, reap

import nbd
from nbd.queue import Queue, Request

ROUNDS = 50_000 if SOAK else 6_000
LONG = 60.0  # seconds; a call that waits for another thread's wait would take this long


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit whose disk has its own offsets as content."""
    return nbdkit("pattern", "1M", "--threads=4")


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run a function in another thread; an exception in it fails the test."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(LONG)
    assert not thread.is_alive()
    assert failures == []


def inside(queue: Queue) -> None:
    """Wait until another thread is waiting in the queue."""
    lock: Any = queue._lock
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not lock.acquire(blocking=False):
            time.sleep(0.05)  # the thread holds the lock, and will soon sleep in C
            return
        lock.release()
        time.sleep(0.001)
    pytest.fail("no thread waits")


# --- waiting ----------------------------------------------------------------------------------


def test_a_wait_is_as_long_as_it_says_while_another_thread_waits(
    server: Server, h: nbd.NBD, figure: Figure
) -> None:
    h.connect_unix(server.socket)
    with paused(server), Queue(h) as queue:
        queue.read(nbd.Buffer(512), 0)
        with beside(lambda: queue.wait(timeout=LONG)):
            inside(queue)
            start = time.monotonic()
            assert queue.wait(timeout=1) == []
            took = time.monotonic() - start
            queue.wake()
    figure("seconds of wait(timeout=1) beside another one", f"{took:.2f}")
    assert 0.95 < took < LONG / 3


def test_a_step_does_not_wait_for_a_thread_that_waits(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    with paused(server), Queue(h) as queue:
        queue.read(nbd.Buffer(512), 0)
        with beside(lambda: queue.wait(timeout=LONG)):
            inside(queue)
            start = time.monotonic()
            for _ in range(10):
                assert queue.step() == []
            took = time.monotonic() - start
            queue.wake()
    assert took < LONG / 3


def test_a_look_does_not_wait_for_a_thread_that_waits(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    with paused(server), Queue(h) as queue:
        queue.read(nbd.Buffer(512), 0)
        with beside(lambda: queue.wait(timeout=LONG)):
            inside(queue)
            start = time.monotonic()
            assert queue.wait(timeout=0) == []
            took = time.monotonic() - start
            queue.wake()
    assert took < LONG / 3


def test_a_wait_with_a_timeout_ends_while_another_thread_waits_for_ever(
    server: Server, h: nbd.NBD
) -> None:
    h.connect_unix(server.socket)
    with Queue(h) as queue:
        with paused(server):
            request = queue.read(nbd.Buffer(512), 0)
            with beside(queue.wait):
                inside(queue)
                start = time.monotonic()
                assert queue.wait(timeout=0.2) == []
                assert time.monotonic() - start < LONG / 3
                server.resume()
        assert request.is_done


@pytest.mark.parametrize("way", ["close", "wake"])
def test_a_thread_that_waits_is_ended_by_another(server: Server, h: nbd.NBD, way: str) -> None:
    h.connect_unix(server.socket)
    ended: list[object] = []

    def work() -> None:
        try:
            ended.append(queue.wait())
        except ValueError as reason:
            ended.append(str(reason))

    with paused(server), Queue(h) as queue:
        queue.read(nbd.Buffer(512), 0)
        with beside(work):
            inside(queue)
            getattr(queue, way)()
    assert len(ended) == 1
    assert ended == [[]] if way == "wake" else str(ended[0]).startswith("the queue is closed")


# --- each request once ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["raises", "waits"])
def test_each_read_is_whole_when_a_signal_handler(
    server: Server, h: nbd.NBD, way: str, unraisable: list[Any]
) -> None:
    armed = [False]

    def handler(number: int, frame: FrameType | None) -> None:
        if way == "waits":
            queue.wait(1, 0)
        elif armed[0]:  # not after the wait
            armed[0] = False
            raise Stop

    h.connect_unix(server.socket)
    expected = h.pread(64 * KIB, 0)
    until = time.monotonic() + (60 if SOAK else 2)
    with Queue(h, depth=4) as queue, handling(handler):
        while time.monotonic() < until:
            memory = [bytearray(64 * KIB) for _ in range(8)]
            requests = [queue.read(one, 0) for one in memory]
            while not all(request.is_done for request in requests):
                with suppress(Stop):
                    armed[0] = True
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001))
                    queue.wait(1, 10)
                    armed[0] = False
            assert [request.error for request in requests] == [None] * 8
            assert [one == expected for one in memory] == [True] * 8
    assert {type(one) for one in unraisable} <= {Stop}  # PyPy: in a finalizer of another test


class Reports:
    """How many times each request was reported."""

    def __init__(self) -> None:
        self.counted: Counter[int] = Counter()
        self.requests: list[Request] = []

    def add(self, finished: list[Request]) -> None:
        """Count the requests that a wait has returned."""
        for request in finished:
            self.counted[id(request)] += 1

    def check(self) -> None:
        """Fail unless each request was reported exactly once."""
        assert [one for one in self.requests if not one.is_done] == []
        assert {self.counted[id(one)] for one in self.requests} == {1}
        assert len(self.counted) == len(self.requests)


def work_off(
    queue: Queue, reports: Reports, rounds: int, wait: Callable[[], list[Request]]
) -> None:
    """Make requests, and wait until all of them are done."""
    made = 0
    until = time.monotonic() + 60
    while made < rounds:
        number = min(random.randrange(1, 12), rounds - made)
        memory = [nbd.Buffer(512) for _ in range(number)]
        requests = [queue.read(one, 512 * at) for at, one in enumerate(memory)]
        reports.requests += requests
        made += number
        while not all(request.is_done for request in requests):
            assert time.monotonic() < until, f"{len(queue)} requests are never reported"
            reports.add(wait())
        for at, one in enumerate(memory):
            assert bytes(one.to_bytearray())[:8] == (512 * at).to_bytes(8, "big")


@contextmanager
def storm(handle: Callable[[], object]) -> Iterator[None]:
    """Call a function in a signal handler, at random moments."""
    is_inside = is_over = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal is_inside
        if is_over:
            return
        if not is_inside:
            is_inside = True
            try:
                handle()
            finally:
                is_inside = False
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.001))

    with handling(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            yield
        finally:
            is_over = True


@pytest.mark.parametrize("timeout", [0, 0.0005, None], ids=["look", "half a ms", "for ever"])
def test_a_handler_may_wait_inside_a_wait(
    server: Server, h: nbd.NBD, figure: Figure, timeout: float | None
) -> None:
    h.connect_unix(server.socket)
    reports, waits = Reports(), 0
    with Queue(h, depth=4) as queue, Watchdog(60, server.kill):

        def handle() -> None:
            nonlocal waits
            waits += 1
            reports.add(queue.wait(1, timeout))

        with storm(handle):
            # A handler may get the last requests after the caller checked, hence the timeout.
            work_off(queue, reports, ROUNDS, lambda: queue.wait(2, 0.01))
        assert len(queue) == 0
    reports.check()
    figure("waits of signal handlers inside a wait", waits)
    assert waits > 20
    assert registered() == 0


def test_a_handler_may_wait_inside_a_step(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    reports = Reports()
    queue = Queue(h, depth=4)
    with queue, Watchdog(60, server.kill), storm(lambda: reports.add(queue.wait(1, 0.0005))):
        work_off(queue, reports, ROUNDS, queue.step)
    reports.check()


def test_threads_that_wait_beside_a_handler_get_each_request_once(
    server: Server, h: nbd.NBD
) -> None:
    h.connect_unix(server.socket)
    reports, lock, is_over = Reports(), threading.Lock(), False
    gathered: list[list[Request]] = []

    def work() -> None:
        while not is_over:
            found = queue.wait(1, 0.01)
            with lock:
                gathered.append(found)

    queue = Queue(h, depth=4)
    handled = storm(lambda: reports.add(queue.wait(1, 0.0005)))
    with queue, Watchdog(60, server.kill), beside(work), beside(work), handled:
        try:
            work_off(queue, reports, ROUNDS, lambda: queue.wait(2, 0.01))
        finally:
            is_over = True
    for found in gathered:
        reports.add(found)
    reports.check()


def test_an_exception_of_a_handler_loses_no_request(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    is_armed, stopped = False, 0

    def handler(number: int, frame: FrameType | None) -> None:
        if is_armed:
            raise Stop

    with handling(handler), Queue(h, depth=4) as queue, Watchdog(60, server.kill):
        for _ in range(ROUNDS // 4):
            memory = [nbd.Buffer(512) for _ in range(4)]
            requests = [queue.read(one, 512 * at) for at, one in enumerate(memory)]
            until = time.monotonic() + 20
            while not all(request.is_done for request in requests):
                assert time.monotonic() < until, f"{len(queue)} requests are never reported"
                try:
                    try:
                        is_armed = True
                        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00003, 0.0005))
                        queue.wait(4, 0.05)
                    finally:
                        is_armed = False
                except Stop:
                    stopped += 1
        assert len(queue) == 0
    assert stopped
    assert registered() == 0


# --- one file, closed by several threads at once ----------------------------------------------


@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "dirty"])
@pytest.mark.parametrize("buffering", [0, -1], ids=["unbuffered", "buffered"])
def test_threads_may_close_one_file_at_once(
    nbdkit: StartServer, buffering: int, dirty: bool
) -> None:
    server = nbdkit("memory", "1M", "--threads=4")
    for number in range(30):
        file: Any = nbd.open(server.uri, "r+b", buffering=buffering)
        data = bytes([number + 1]) * 4096
        if dirty:
            file.write(data)
        ready = threading.Barrier(4)
        failures: list[BaseException] = []

        def close(file: Any = file, ready: Any = ready, failures: Any = failures) -> None:
            ready.wait()
            try:
                file.close()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert failures == []
        assert file.closed
        if dirty:
            with nbd.open(server.uri) as again:
                assert again.read(4096) == data
    assert registered() == 0


def test_threads_may_close_one_queue_at_once(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    for _ in range(30):
        queue = Queue(h)
        for at in range(8):
            queue.read(nbd.Buffer(512), 512 * at)
        with beside(queue.close), beside(queue.close), beside(queue.close):
            queue.close()
    reap(h)
    assert registered() == 0


@pytest.mark.parametrize("buffering", [0, -1], ids=["unbuffered", "buffered"])
def test_a_file_may_be_closed_while_another_thread_reads(server: Server, buffering: int) -> None:
    for _ in range(10):
        file: Any = nbd.open(server.uri, buffering=buffering)
        started = threading.Event()

        def read(file: Any = file, started: threading.Event = started) -> None:
            while True:
                file.seek(0)
                assert file.read(8) == bytes(8)
                started.set()

        def read_until_it_is_closed(read: Callable[[], None] = read) -> None:
            with pytest.raises(ValueError, match="closed"):
                read()

        with beside(read_until_it_is_closed):
            assert started.wait(20)
            file.close()
    assert registered() == 0
