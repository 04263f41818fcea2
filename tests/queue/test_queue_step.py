"""nbd.queue.Queue in an event loop: fileno() becomes readable, and then step() does the work."""

from __future__ import annotations

import errno
import select
import selectors
from typing import Any

import pytest
from support.servers import TIMEOUT, StartServer
from support.sizes import MIB

import nbd
import nbd.queue

Queue = nbd.queue.Queue


def is_ready(queue: Queue, seconds: float = 0) -> bool:
    """Return whether the queue's descriptor is readable."""
    return bool(select.select([queue], [], [], seconds)[0])


def stepped(queue: Queue, count: int) -> list[nbd.queue.Request]:
    """Step as an event loop does, until this many requests are done."""
    done: list[nbd.queue.Request] = []
    while len(done) < count:
        assert is_ready(queue, TIMEOUT)
        done += queue.step()
    return done


def test_what_was_written_is_read(queue: Queue) -> None:
    data = bytes(range(250)) * 1000
    assert stepped_alone(queue, queue.write(data, 5)) is None
    read = bytearray(len(data))
    assert stepped_alone(queue, queue.read(read, 5)) is None
    assert read == data


def stepped_alone(queue: Queue, request: nbd.queue.Request) -> nbd.Error | None:
    """Step until the only request is done, and return its error."""
    assert stepped(queue, 1) == [request]
    return request.error


def test_many_requests_end_once_each(queue: Queue) -> None:
    requests = [queue.read(bytearray(4096), 4096 * i) for i in range(200)]
    done = stepped(queue, 200)
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert not queue.step()


def test_the_descriptor_is_not_ready_where_nothing_is_to_do(queue: Queue) -> None:
    stepped_alone(queue, queue.read(bytearray(4096), 0))
    assert not is_ready(queue)


def test_a_step_does_not_wait_for_a_server_that_is_stopped(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    with Queue(h) as queue:
        queue.fileno()
        server.pause()
        request = queue.read(bytearray(4096), 0)
        assert not queue.step()
        assert not is_ready(queue)
        server.resume()
        assert stepped_alone(queue, request) is None


def test_an_error_is_reported(queue: Queue) -> None:
    error = stepped_alone(queue, queue.read(bytearray(4096), 2 * MIB))
    assert error is not None
    assert error.errnum == errno.EINVAL


def test_one_descriptor_stands_for_several_connections(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    handles = [nbd.connect(server.uri) for _ in range(3)]
    with Queue(handles, depth=12) as queue, selectors.DefaultSelector() as selector:
        selector.register(queue, selectors.EVENT_READ)
        requests = [queue.read(bytearray(4096), 4096 * i) for i in range(60)]
        assert [handle.aio_in_flight() for handle in handles] == [4, 4, 4]
        while not all(request.is_done for request in requests):
            assert selector.select(TIMEOUT)
            queue.step()
    for handle in handles:
        handle.close()


def test_the_death_of_an_idle_server_is_noticed(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    with Queue(h) as queue:
        assert not is_ready(queue)
        server.kill()
        assert is_ready(queue, TIMEOUT)
        assert not queue.step()
        assert h.aio_is_dead() or h.aio_is_closed()
        assert not is_ready(queue)
        assert stepped_alone(queue, queue.flush()) is not None


def test_a_command_of_the_handle_itself_is_moved_too(queue: Queue, disk: nbd.NBD) -> None:
    queue.fileno()
    ended: list[int] = []

    def completion(error: Any) -> int:
        ended.append(error.value)
        return 1

    disk.aio_pread(nbd.Buffer(512), 0, completion)
    while not ended:
        assert is_ready(queue, TIMEOUT)
        queue.step()
    assert ended == [0]


def test_a_closed_queue_has_no_step_and_no_descriptor(queue: Queue) -> None:
    queue.close()
    with pytest.raises(ValueError, match="the queue is closed"):
        queue.step()


def test_waiting_and_stepping_may_be_mixed(queue: Queue) -> None:
    queue.fileno()
    first = queue.read(bytearray(4096), 0)
    assert queue.wait() == [first]
    stepped_alone(queue, queue.read(bytearray(4096), 0))
