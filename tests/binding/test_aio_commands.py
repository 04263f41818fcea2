"""Commands that do not wait: cookies, completions, and driving a handle by hand."""

from __future__ import annotations

import errno
import select
from typing import Any, Callable

import pytest
from support.handles import drain, finish, poll, retired, run_until
from support.servers import StartServer
from support.sizes import MIB

import nbd

BASE = nbd.CONTEXT_BASE_ALLOCATION

# Each command with an aio form, as a function that takes further arguments.
COMMANDS: dict[str, Callable[..., int]] = {
    "aio_pread": lambda h, *more: h.aio_pread(bytearray(512), 0, *more),
    "aio_pread_structured": lambda h, *more: h.aio_pread_structured(
        nbd.Buffer(512), 0, lambda *chunk: 0, *more
    ),
    "aio_pwrite": lambda h, *more: h.aio_pwrite(bytes(512), 0, *more),
    "aio_zero": lambda h, *more: h.aio_zero(512, 0, *more),
    "aio_trim": lambda h, *more: h.aio_trim(512, 0, *more),
    "aio_cache": lambda h, *more: h.aio_cache(512, 0, *more),
    "aio_flush": lambda h, *more: h.aio_flush(*more),
    "aio_block_status": lambda h, *more: h.aio_block_status(512, 0, lambda *extent: 0, *more),
}

every_command = pytest.mark.parametrize("name", list(COMMANDS))


@pytest.fixture
def slow(nbdkit: StartServer, h: nbd.NBD) -> nbd.NBD:
    """Return a handle whose reads are never answered, whereas writes are."""
    answering = "--threads=2", "memory", "1M"  # one thread sleeps on the read
    h.connect_unix(nbdkit(*answering, "--filter=delay", "rdelay=600").socket)
    return h


@pytest.fixture
def failing(nbdkit: StartServer, h: nbd.NBD) -> nbd.NBD:
    """Return a handle to a server on which every command fails with EIO."""
    h.add_meta_context(BASE)
    h.connect_unix(nbdkit("memory", "1M", "--filter=error", "error=EIO", "error-rate=1").socket)
    return h


@every_command
def test_a_command_without_completion_is_retired_by_its_cookie(disk: nbd.NBD, name: str) -> None:
    cookie = COMMANDS[name](disk)
    finish(disk, cookie)
    assert retired(disk)


@every_command
def test_a_completion_is_called_once_without_error(disk: nbd.NBD, name: str) -> None:
    errors: list[int] = []
    cookie = COMMANDS[name](disk, lambda error: errors.append(error.value))
    finish(disk, cookie)
    assert errors == [0]


@every_command
def test_a_completion_that_returns_1_retires_the_command(disk: nbd.NBD, name: str) -> None:
    COMMANDS[name](disk, lambda error: 1)
    drain(disk)
    assert retired(disk)


@every_command
def test_a_completion_that_returns_0_leaves_the_command(disk: nbd.NBD, name: str) -> None:
    cookie = COMMANDS[name](disk, lambda error: 0)
    drain(disk)
    assert disk.aio_peek_command_completed() == cookie
    assert disk.aio_command_completed(cookie) is True
    assert retired(disk)


@every_command
def test_a_completion_gets_the_error_of_the_server(failing: nbd.NBD, name: str) -> None:
    errors: list[int] = []

    def completion(error: Any) -> int:
        errors.append(error.value)
        return 1

    COMMANDS[name](failing, completion)
    drain(failing)
    # nbdkit's error filter leaves flush alone.
    assert errors == [0 if name == "aio_flush" else errno.EIO]


@pytest.mark.parametrize("name", ["aio_pread", "aio_pwrite", "aio_zero", "aio_trim"])
def test_the_failure_of_a_command_is_reported_with_its_cookie(failing: nbd.NBD, name: str) -> None:
    cookie = COMMANDS[name](failing)
    with pytest.raises(nbd.Error) as caught:
        finish(failing, cookie)
    assert caught.value.errnum == errno.EIO
    assert retired(failing)


@every_command
def test_a_completion_is_not_called_if_the_call_itself_fails(h: nbd.NBD, name: str) -> None:
    called: list[Any] = []
    with pytest.raises(nbd.Error):
        COMMANDS[name](h, called.append)
    assert called == []


@every_command
def test_a_completion_may_be_named(disk: nbd.NBD, name: str) -> None:
    errors: list[int] = []
    arguments: dict[str, tuple[Any, ...]] = {
        "aio_pread": (bytearray(512), 0),
        "aio_pread_structured": (bytearray(512), 0, lambda *chunk: 0),
        "aio_pwrite": (bytes(512), 0),
        "aio_flush": (),
        "aio_block_status": (512, 0, lambda *extent: 0),
    }
    method = getattr(disk, name)
    given = arguments.get(name, (512, 0))
    finish(disk, method(*given, completion=lambda error: errors.append(error.value), flags=0))
    assert errors == [0]


def test_a_buffer_is_filled_when_the_command_completes(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 512, 0)
    buf = bytearray(1024)
    finish(disk, disk.aio_pread(memoryview(buf)[256:768], 0))
    assert buf == bytes(256) + b"x" * 512 + bytes(256)


def test_commands_in_flight_are_counted(slow: nbd.NBD) -> None:
    assert slow.aio_in_flight() == 0
    for _ in range(3):
        slow.aio_pread(bytearray(512), 0)
    assert slow.aio_in_flight() == 3


def test_a_command_in_flight_is_not_completed(slow: nbd.NBD) -> None:
    cookie = slow.aio_pread(bytearray(512), 0)
    assert slow.aio_command_completed(cookie) is False
    assert slow.aio_peek_command_completed() == 0


def test_a_later_command_may_complete_first(slow: nbd.NBD) -> None:
    first = slow.aio_pread(bytearray(512), 0)
    second = slow.aio_pwrite(bytes(512), 0)
    finish(slow, second)
    assert slow.aio_command_completed(first) is False


def test_poll_returns_0_when_the_time_is_over(slow: nbd.NBD) -> None:
    slow.aio_pread(bytearray(512), 0)
    while slow.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
        poll(slow)
    assert slow.poll(1) == 0


def test_peek_without_any_command_is_an_error(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        disk.aio_peek_command_completed()


def test_cookie_zero_is_an_error(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.aio_command_completed(0)
    assert caught.value.errnum == errno.EINVAL


def test_a_cookie_that_was_never_given_is_not_completed(disk: nbd.NBD) -> None:
    assert disk.aio_command_completed(1 << 40) is False


def test_a_cookie_is_answered_once(disk: nbd.NBD) -> None:
    cookie = disk.aio_flush()
    finish(disk, cookie)
    assert disk.aio_command_completed(cookie) is False


def test_the_descriptor_is_unknown_before_connecting(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        h.aio_get_fd()


def test_an_idle_handle_waits_to_read(disk: nbd.NBD) -> None:
    assert disk.aio_get_direction() == nbd.AIO_DIRECTION_READ


def run_by_hand(handle: nbd.NBD, reached: Callable[[], bool]) -> None:
    """Drive a handle as a program with an event loop of its own does."""
    poller = select.poll()
    wanted = {
        nbd.AIO_DIRECTION_READ: select.POLLIN,
        nbd.AIO_DIRECTION_WRITE: select.POLLOUT,
        nbd.AIO_DIRECTION_BOTH: select.POLLIN | select.POLLOUT,
    }
    while not reached():
        poller.register(handle.aio_get_fd(), wanted[handle.aio_get_direction()])
        events = poller.poll(20_000)
        assert events, "nothing happened"
        if events[0][1] & select.POLLIN:
            handle.aio_notify_read()
        elif events[0][1] & select.POLLOUT:
            handle.aio_notify_write()


def test_a_loop_of_ones_own_connects_and_reads(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.aio_connect_unix(nbdkit("memory", "1M").socket)
    run_by_hand(h, h.aio_is_ready)
    cookie = h.aio_pwrite(b"x" * MIB, 0)
    run_by_hand(h, lambda: h.aio_command_completed(cookie))
    buf = bytearray(MIB)
    cookie = h.aio_pread(buf, 0)
    run_by_hand(h, lambda: h.aio_command_completed(cookie))
    assert buf == b"x" * MIB


def test_many_commands_in_flight(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("pattern", "1M").socket)
    buffers = {offset: nbd.Buffer(4096) for offset in range(0, MIB, 4096)}
    errors: list[int] = []

    def completion(error: Any) -> int:
        errors.append(error.value)
        return 1

    for offset, buf in buffers.items():
        h.aio_pread(buf, offset, completion)
    drain(h)
    assert errors == [0] * 256
    assert b"".join(buf.to_bytearray() for buf in buffers.values()) == h.pread(MIB, 0)


def test_many_buffers_that_are_dropped(disk: nbd.NBD) -> None:
    for offset in range(0, MIB, 4096):
        disk.aio_pwrite(bytearray(b"z" * 4096), offset, lambda error: 1)
        disk.aio_pread(nbd.Buffer(4096), offset, lambda error: 1)
    drain(disk)
    assert disk.pread(MIB, 0) == b"z" * MIB


def test_aio_block_status_reports_the_extents(disk: nbd.NBD) -> None:
    found: list[Any] = []
    finish(
        disk,
        disk.aio_block_status(
            MIB, 0, lambda context, offset, entries, error: found.append((context, list(entries)))
        ),
    )
    assert found == [(BASE, [MIB, nbd.STATE_HOLE | nbd.STATE_ZERO])]


def test_aio_pread_structured_reports_the_chunks(disk: nbd.NBD) -> None:
    found: list[Any] = []
    buf = nbd.Buffer(512)
    finish(
        disk,
        disk.aio_pread_structured(
            buf,
            1024,
            lambda view, offset, status, error: found.append((len(view), offset, status)),
        ),
    )
    assert found == [(512, 1024, nbd.READ_DATA)]
    assert buf.is_zero()


def test_aio_disconnect_closes(disk: nbd.NBD) -> None:
    disk.aio_disconnect()
    run_until(disk, disk.aio_is_closed)
    assert not disk.aio_is_dead()


def test_the_states_of_a_connection(nbdkit: StartServer, h: nbd.NBD) -> None:
    states = ["created", "connecting", "negotiating", "ready", "processing", "closed", "dead"]

    def current() -> list[str]:
        return [state for state in states if getattr(h, f"aio_is_{state}")()]

    assert current() == ["created"]
    h.set_opt_mode(True)
    h.aio_connect_unix(nbdkit("memory", "1M").socket)
    assert current() == ["connecting"]
    run_until(h, h.aio_is_negotiating)
    h.opt_go()
    assert current() == ["ready"]
    h.shutdown()
    assert current() == ["closed"]
