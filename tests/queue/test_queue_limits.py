"""nbd.queue.Queue at its limits: large numbers, small servers, many connections, late replies."""

from __future__ import annotations

import errno
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable

import pytest
from support.hostile import (
    CMD_READ,
    CMD_WRITE,
    INFO_BLOCK_SIZE,
    SIZE,
    Connection,
    Request,
    Wire,
    export_info,
)
from support.queues import finished
from support.servers import StartServer
from support.signals import handling
from support.sizes import KIB, MIB

import nbd
import nbd.queue

CMD_ZERO, EINVAL = 6, 22
Queue = nbd.queue.Queue


@contextmanager
def connected(h: nbd.NBD, script: Callable[[Wire], None]) -> Iterator[nbd.NBD]:
    """Connect a handle to a scripted server."""
    with Connection(script) as connection:
        h.connect_socket(connection.fileno())
        yield h
        h.close()


class SmallServer:
    """A server that refuses zeroes above its maximum block size, and records its requests."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.zeroed: list[tuple[int, int]] = []
        self.refused = 0

    def __call__(self, wire: Wire) -> None:
        sizes = struct.pack(">HIII", INFO_BLOCK_SIZE, 1, 4096, self.maximum)
        wire.negotiate(structured=False, info=[export_info(), sizes])
        while True:
            request = wire.request()
            assert request.command == CMD_ZERO
            if request.count > self.maximum:
                self.refused += 1
                wire.simple(request.cookie, EINVAL)
            else:
                self.zeroed.append((request.offset, request.count))
                wire.simple(request.cookie)


def test_zeroes_are_cut_where_the_server_bounds_them(h: nbd.NBD) -> None:
    server = SmallServer(64 * KIB)
    with connected(h, server), Queue(h) as queue:
        queue.zero(300_000, 1000)
        queue.zero(200_000, 400_000)
        assert [one.error for one in finished(queue)] == [None, None]
        queue.zero(SIZE // 4, SIZE * 3 // 4)
        assert [one.error for one in finished(queue)] == [None]
    covered = bytearray(SIZE)
    for offset, count in server.zeroed:
        assert not any(covered[offset : offset + count])
        covered[offset : offset + count] = b"z" * count
    expected = bytearray(SIZE)
    for start, length in ((1000, 300_000), (400_000, 200_000), (SIZE * 3 // 4, SIZE // 4)):
        expected[start : start + length] = b"z" * length
    assert covered == expected
    assert server.refused == 2  # then the queue knows the limit


def test_an_error_names_the_request_and_the_place(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_uri(nbdkit("--filter=error", "memory", "4M", "error-pread-rate=0").uri)
    size = 2 * MIB
    with Queue(h) as queue:
        queue.write(bytes(size), 3 * MIB)  # past the end
        (failed,) = finished(queue)
    assert failed.error is not None
    assert failed.error.string.startswith(f"writing {size} bytes at offset {3 * MIB} failed: ")

    def fail_at_one_mib(wire: Wire) -> None:
        wire.negotiate(structured=False, info=[export_info(4 * MIB)])
        while True:
            request = wire.request()
            is_bad = request.offset == MIB
            wire.simple(request.cookie, 5 if is_bad else 0, b"" if is_bad else bytes(request.count))

    with connected(nbd.NBD(), fail_at_one_mib) as other, Queue(other) as queue:
        queue.read(bytearray(size), 100)
        queue.read(bytearray(size), MIB - 256 * KIB)
        reasons = [str(one.error) for one in finished(queue)]
    assert reasons == [
        "None",
        f"reading {size} bytes at offset {MIB - 256 * KIB} failed at offset {MIB}: "
        f"{os.strerror(errno.EIO)} (EIO)",
    ]


def test_too_many_handles_are_refused(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    handles = [nbd.NBD() for _ in range(65)]
    for handle in handles:
        handle.connect_unix(server.socket)
    with pytest.raises(ValueError, match="at most 64"):
        Queue(handles)
    Queue(handles[:64]).close()
    for handle in handles:
        handle.close()


@pytest.mark.parametrize("timeout", [float("inf"), 1e12, 1e300, sys.maxsize])
@pytest.mark.parametrize("least", [1, sys.maxsize, 2**31])
def test_any_number_may_be_waited_for(disk: nbd.NBD, timeout: float, least: int) -> None:
    with Queue(disk) as queue:
        request = queue.read(bytearray(512), 0)
        assert queue.wait(least, timeout) == [request]


def test_a_time_that_is_not_a_number_is_refused(disk: nbd.NBD) -> None:
    with Queue(disk) as queue, pytest.raises(ValueError, match="nan"):
        queue.wait(1, float("nan"))


def test_one_wait_reports_more_requests_than_one_call_of_c_does(disk: nbd.NBD) -> None:
    with Queue(disk) as queue:
        requests = [queue.read(bytearray(1), n) for n in range(1000)]
        assert sorted(queue.wait(1000), key=lambda one: one.offset) == requests


def test_a_large_export_is_refused_at_once(h: nbd.NBD) -> None:
    def offer(wire: Wire) -> None:
        wire.negotiate(structured=False, info=[export_info(2**63)])
        wire.linger()

    with connected(h, offer), pytest.raises(nbd.Error):
        Queue(h)


class LateServer:
    """A disk that delays its replies to writes until it is told to give them, newest first."""

    def __init__(self) -> None:
        self.disk = bytearray(SIZE)
        self.is_late = True
        self.late: list[tuple[Request, bytes]] = []
        self.arrived = threading.Event()
        self._wire: Wire

    def __call__(self, wire: Wire) -> None:
        wire.negotiate(structured=False)
        self._wire = wire
        while True:
            request = wire.request()
            if request.command == CMD_WRITE:
                self._write(request, wire.receive(request.count))
            elif request.command == CMD_READ:
                stop = request.offset + request.count
                wire.simple(request.cookie, payload=bytes(self.disk[request.offset : stop]))
            else:
                wire.simple(request.cookie)

    def _write(self, request: Request, data: bytes) -> None:
        self.late.append((request, data))
        self.arrived.set()
        if not self.is_late:
            self.give()

    def give(self) -> None:
        """Carry out the writes, the newest first, and reply."""
        self.is_late = False
        while self.late:
            request, data = self.late.pop()
            self.disk[request.offset : request.offset + len(data)] = data
            self._wire.simple(request.cookie)


def test_a_write_after_one_that_timed_out_is_what_is_read(h: nbd.NBD) -> None:
    server = LateServer()
    with connected(h, server):
        h.settimeout(0.05)
        with pytest.raises(nbd.Timeout):
            h.pwrite(b"old!", 0)
        with pytest.raises(nbd.Timeout):
            h.pwrite(b"mid!", 0)
        h.settimeout(10)
        giving = threading.Timer(0.1, server.give)
        giving.start()
        h.pwrite(b"new!", 0)
        giving.join()
        assert h.pread(4, 0) == b"new!"
    assert server.disk[:4] == b"new!"


def test_a_read_after_a_write_that_timed_out_waits_for_it(h: nbd.NBD) -> None:
    server = LateServer()
    with connected(h, server):
        h.settimeout(0.05)
        with pytest.raises(nbd.Timeout):
            h.pwrite(b"new!", 0)
        with pytest.raises(nbd.Timeout):
            h.pread(4, 2)
        assert h.pread(4, 4) == bytes(4)
        h.settimeout(10)
        giving = threading.Timer(0.1, server.give)
        giving.start()
        assert h.pread(4, 0) == b"new!"
        giving.join()


def test_a_write_of_a_queue_after_one_that_timed_out_is_what_is_read(h: nbd.NBD) -> None:
    server = LateServer()
    with connected(h, server):
        h.settimeout(0.05)
        with pytest.raises(nbd.Timeout):
            h.pwrite(b"old!", 0)
        with Queue(h) as queue:
            queue.write(b"new!", 0)
            assert queue.wait(1, 0.1) == []
            giving = threading.Timer(0.1, server.give)
            giving.start()
            assert [one.error for one in finished(queue)] == [None]
            giving.join()
    assert server.disk[:4] == b"new!"


def test_a_wait_in_a_signal_handler_reports_each_request_once(disk: nbd.NBD) -> None:
    reported: list[nbd.queue.Request] = []

    def handler(number: int, frame: FrameType | None) -> None:
        reported.extend(queue.wait(1, 0))

    with Queue(disk, depth=4) as queue, handling(handler):
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        requests: list[Any] = []
        until = time.monotonic() + 2
        while time.monotonic() < until:
            requests += [queue.read(bytearray(512), 512 * n) for n in range(8)]
            while not all(request.is_done for request in requests):
                reported.extend(queue.wait(1, 10))
        signal.setitimer(signal.ITIMER_REAL, 0)
        reported.extend(queue.wait(1, 0))
        assert len(queue) == 0
    assert len(reported) == len(requests)
    assert set(map(id, reported)) == set(map(id, requests))


def test_a_wait_for_another_threads_turn_counts(h: nbd.NBD) -> None:
    with connected(h, LateServer()), Queue(h) as queue:
        queue.write(b"never", 0)
        began = time.monotonic()
        other = threading.Thread(target=queue.wait, args=(1, 60))
        other.start()
        while queue._lock.acquire(blocking=False):
            queue._lock.release()
            time.sleep(0.001)
        assert queue.step() == []  # a step does not wait
        assert queue.wait(1, 0.1) == []
        assert time.monotonic() - began < 20
        queue.wake()
        other.join()
