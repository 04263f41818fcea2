"""nbd.queue.Queue: requests of any size end exactly once, with their data or an error."""

from __future__ import annotations

import errno
import gc
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, cast

import pytest
from support.queues import finished
from support.servers import StartServer
from support.signals import Stop, alarm
from support.sizes import KIB, MIB
from support.waits import orphans

import nbd
import nbd.queue
from nbd._binding.callbacks import registry

Queue = nbd.queue.Queue
LOST = {"ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN"}


def test_what_was_written_is_read(queue: Queue) -> None:
    data = os.urandom(500_000)
    queue.write(data, 12345)
    assert [one.error for one in finished(queue)] == [None]
    read = bytearray(500_000)
    request = queue.read(read, 12345)
    assert finished(queue) == [request]
    assert request.is_done
    assert read == data


def test_a_buffer_of_the_package_is_read_into(queue: Queue) -> None:
    queue.write(b"data", 512)
    finished(queue)
    buffer = nbd.Buffer(4)
    queue.read(buffer, 512)
    finished(queue)
    assert bytes(buffer) == b"data"


def test_zero_trim_cache_and_flush_are_done(queue: Queue, disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * MIB, 0)
    queue.zero(300_000, 100)
    assert [one.error for one in finished(queue)] == [None]
    assert disk.pread(300_200, 0) == b"x" * 100 + bytes(300_000) + b"x" * 100
    queue.trim(64 * KIB, 512 * KIB)
    queue.flush()
    finished(queue)
    assert disk.pread(64 * KIB, 512 * KIB) == bytes(64 * KIB)


def test_a_thousand_requests_end_once(queue: Queue) -> None:
    buffers = [bytearray(512) for _ in range(1000)]
    requests = [queue.read(buffer, 512 * i) for i, buffer in enumerate(buffers)]
    assert len(queue) == 1000
    assert sorted(map(id, finished(queue, 16))) == sorted(map(id, requests))


def test_a_wait_without_requests_returns_an_empty_list(queue: Queue) -> None:
    assert queue.wait() == []
    assert queue.wait(5, timeout=0) == []


def test_a_wait_ends_when_its_time_is_over(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    server.pause()
    with Queue(h) as queue:
        queue.read(bytearray(512), 0)
        assert queue.wait(timeout=0) == []
        assert queue.wait(timeout=0.01) == []
        server.resume()
        assert [one.error for one in queue.wait()] == [None]


def test_a_wake_ends_the_next_wait(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    server.pause()
    with Queue(h) as queue:
        request = queue.read(bytearray(512), 0)
        queue.wake()
        assert queue.wait() == []
        thread = threading.Thread(target=queue.wake)
        thread.start()
        assert queue.wait() == []
        thread.join()
        server.resume()
        assert queue.wait() == [request]


def test_several_handles_share_the_work(nbdkit: StartServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    uri = nbdkit("--filter=log", "--threads=4", "memory", "1M", f"logfile={log}").uri
    handles = [nbd.connect(uri) for _ in range(3)]
    with Queue(handles, depth=6, piece=16 * KIB) as queue:
        data = os.urandom(MIB)
        queue.write(data, 0)
        finished(queue)
        read = bytearray(MIB)
        queue.read(read, 0)
        finished(queue)
    assert read == data
    for handle in handles:
        handle.close()
    text = log.read_text()
    assert all(f"connection={i} Write" in text for i in (1, 2, 3))


@pytest.mark.parametrize("size", [MIB, MIB - 4096, 1_000_003])
def test_a_disk_with_blocks_is_as_bytes_are(nbdkit: StartServer, h: nbd.NBD, size: int) -> None:
    blocks = 4096 if size % 4096 == 0 else 1
    policy = (
        *(f"blocksize-minimum={blocks}", "blocksize-preferred=4096", "blocksize-maximum=64K"),
        "blocksize-error-policy=error",
    )
    h.connect_uri(nbdkit("--filter=blocksize-policy", "memory", str(size), *policy).uri)
    chosen = random.Random(size)
    model = bytearray(size)
    with Queue(h, depth=8) as queue:
        assert (queue.size, queue.minimum) == (size, blocks)
        for _ in range(60):
            start = chosen.randrange(size)
            count = chosen.randrange(1, min(200_000, size - start) + 1)
            middle = count // 2
            data = chosen.randbytes(middle)
            # Two adjacent writes at once, which share a block.
            queue.write(data, start)
            queue.zero(count - middle, start + middle)
            model[start : start + count] = data + bytes(count - middle)
            assert {one.error for one in finished(queue)} == {None}
            start = chosen.randrange(size)
            read = bytearray(chosen.randrange(size - start) + 1)
            queue.read(read, start)
            assert [one.error for one in finished(queue)] == [None]
            assert read == model[start : start + len(read)]


def test_a_range_past_the_end_is_an_error_of_its_request(queue: Queue) -> None:
    queue.read(bytearray(10), MIB - 5)
    queue.write(b"0123456789", MIB - 5)
    errors = [one.error for one in finished(queue)]
    assert [error and error.errno for error in errors] == ["EINVAL", "ENOSPC"]


def test_an_error_says_what_failed(nbdkit: StartServer, h: nbd.NBD) -> None:
    options = ("error=EIO", "error-pread-rate=100%")
    h.connect_uri(nbdkit("--filter=error", "memory", "1M", *options).uri)
    with Queue(h) as queue:
        queue.read(bytearray(512), 4096)
        queue.write(b"fine", 0)
        failed, fine = sorted(finished(queue), key=lambda one: one.offset, reverse=True)
    assert fine.error is None
    assert str(failed.error).startswith("reading 512 bytes at offset 4096 failed: ")
    assert failed.error is not None
    assert failed.error.errno == "EIO"


def test_zeroes_are_written_where_the_server_has_no_command_for_them(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.connect_uri(nbdkit("--filter=nozero", "memory", "1M").uri)
    assert not h.can_zero()
    h.pwrite(b"x" * 300_000, 0)
    with Queue(h) as queue:
        queue.zero(299_999, 0)
        assert [one.error for one in finished(queue)] == [None]
    assert h.pread(300_000, 0) == bytes(299_999) + b"x"


def test_a_read_only_export_is_an_error_of_each_write(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_uri(nbdkit("-r", "memory", "1M").uri)
    with Queue(h) as queue:
        queue.write(b"data", 0)
        queue.zero(512, 0)
        assert all(one.error for one in finished(queue))


def test_a_server_that_dies_ends_every_request_with_its_error(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    server.pause()
    with Queue(h, depth=8) as queue:
        requests = [queue.read(bytearray(512), 0) for _ in range(100)]
        server.kill()
        found = finished(queue)
    assert len(found) == len(requests)
    assert {one.error.errno for one in found if one.error is not None} <= LOST
    assert all(one.error for one in found)


def test_a_signal_ends_a_wait_and_everything_arrives_later(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    server.pause()
    with Queue(h) as queue:
        requests = [queue.read(bytearray(512), 512 * i) for i in range(5)]
        with alarm(), pytest.raises(Stop):
            queue.wait()
        server.resume()
        assert sorted(map(id, finished(queue))) == sorted(map(id, requests))


def test_what_is_dropped_keeps_its_memory_until_the_answer(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    server.pause()
    before = len(registry)
    buffer = bytearray(512)
    queue = Queue(h)
    queue.read(buffer, 0)
    queue.close()
    assert (orphans(h), len(registry)) == (1, before + 1)
    if sys.implementation.name == "cpython":
        with pytest.raises(BufferError):
            buffer.append(0)
    server.resume()
    h.pread(512, 0)
    del queue
    assert (orphans(h), len(registry)) == (0, before)
    buffer.append(0)


def test_a_queue_that_is_forgotten_is_dropped(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_uri(nbdkit("memory", "1M").uri)
    gc.collect()  # garbage of earlier tests
    before = len(registry)
    queue = Queue(h)
    queue.read(bytearray(512), 0)
    del queue
    gc.collect()
    h.pread(512, 0)
    assert (orphans(h), len(registry)) == (0, before)


def test_a_handle_may_be_closed_first(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    h = nbd.connect(server.uri)
    server.pause()
    queue = Queue(h)
    requests = [queue.read(bytearray(512), 0) for _ in range(40)]
    h.close()
    found = finished(queue)
    assert len(found) == len(requests)
    assert all(one.error for one in found)
    queue.close()


def test_calls_that_wait_continue_beside_a_queue(queue: Queue, disk: nbd.NBD) -> None:
    reads: list[int] = []

    def read() -> None:
        reads.extend(len(disk.pread(512, 0)) for _ in range(100))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(20):
        buffers = [bytearray(64 * KIB) for _ in range(16)]
        for i, buffer in enumerate(buffers):
            queue.read(buffer, i * 64 * KIB)
        assert len(finished(queue)) == 16
    thread.join()
    assert reads == [512] * 100


def test_one_thread_submits_while_another_waits(queue: Queue) -> None:
    found: list[nbd.queue.Request] = []
    count = 500

    def collect() -> None:
        while len(found) < count:
            found.extend(queue.wait(timeout=1))

    thread = threading.Thread(target=collect)
    thread.start()
    requests = [queue.read(bytearray(512), 0) for _ in range(count)]
    thread.join()
    assert sorted(map(id, found)) == sorted(map(id, requests))


def test_a_callback_of_the_handle_cannot_use_the_queue(queue: Queue, disk: nbd.NBD) -> None:
    errors: list[int] = []

    def inside(context: str, offset: int, entries: object, error: object) -> None:
        for call in (lambda: queue.read(bytearray(512), 0), queue.wait):
            try:
                call()
            except nbd.Error as refused:
                errors.append(refused.errnum)

    disk.block_status(512, 0, inside)
    assert errors == [errno.EDEADLK, errno.EDEADLK]
    assert len(queue) == 0


def test_a_closed_queue_says_so(queue: Queue) -> None:
    queue.close()
    queue.close()
    with pytest.raises(ValueError, match="the queue is closed"):
        queue.read(bytearray(512), 0)
    with pytest.raises(ValueError, match="the queue is closed"):
        queue.wait()


@pytest.mark.parametrize(
    ("make", "expected", "says"),
    [
        (lambda h: Queue([]), ValueError, "at least one"),
        (lambda h: Queue([h, h]), ValueError, "twice"),
        (lambda h: Queue(cast("Any", 5)), TypeError, "not iterable"),
        (lambda h: Queue(cast("Any", ["uri"])), TypeError, "nbd.NBD is needed"),
        (lambda h: Queue(h, depth=0), ValueError, "depth: 0"),
        (lambda h: Queue(h, piece=2**40), ValueError, "piece: "),
        (lambda h: Queue(nbd.NBD()), nbd.Error, "nbd_"),
    ],
)
def test_invalid_options_of_a_queue_are_reported(
    disk: nbd.NBD, make: Callable[[Any], Queue], expected: type[Exception], says: str
) -> None:
    before = len(registry)
    with pytest.raises(expected, match=says):
        make(disk)
    gc.collect()
    assert len(registry) == before


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda q: q.read(b"constant", 0), BufferError),
        (lambda q: q.read("text", 0), TypeError),
        (lambda q: q.read(bytearray(1), -1), ValueError),
        (lambda q: q.read(bytearray(1), 2**64), ValueError),
        (lambda q: q.read(bytearray(1), 1.5), TypeError),
        (lambda q: q.write("text", 0), TypeError),
        (lambda q: q.write(b"data", 0, flags=-1), ValueError),
        (lambda q: q.zero(-1, 0), ValueError),
        (lambda q: q.zero("1", 0), TypeError),
        (lambda q: q.wait(least="1"), TypeError),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_is_sent(
    queue: Queue, ask: Callable[[Any], object], expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        ask(queue)
    assert len(queue) == 0
    assert queue._shim_queue.kept == {}


def test_a_program_may_end_with_a_queue_open(nbdkit: StartServer) -> None:
    program = (
        "import nbd, nbd.queue, sys\n"
        "h = nbd.NBD(); h.connect_uri(sys.argv[1])\n"
        "queue = nbd.queue.Queue(h)\n"
        "requests = [queue.read(bytearray(512), 0) for _ in range(100)]\n"
        "class Late:\n"
        "    def __init__(self): self.queue = queue; self.itself = self\n"
        "    def __del__(self): self.queue.close()\n"
        "late = Late()\n"
    )
    server = nbdkit("memory", "1M")
    server.pause()
    done = subprocess.Popen(
        [sys.executable, "-c", program, server.uri], stderr=subprocess.PIPE, text=True
    )
    server.resume()
    assert done.communicate(timeout=60)[1] == ""
    assert done.returncode == 0


def test_the_queue_lets_go_of_buffers_that_are_done(queue: Queue) -> None:
    buffer = bytearray(512)
    queue.read(buffer, 0)
    finished(queue)
    buffer.append(0)
    assert queue._shim_queue.kept == {}
