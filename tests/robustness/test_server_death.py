"""A server dies: every command ends with an error, nothing hangs and nothing leaks."""

from __future__ import annotations

import gc
import socket
import threading
from typing import Any, Callable

import pytest
from support.handles import drain_dying, poll, raiser, retired
from support.servers import Server, StartServer

import nbd

STUCK = ["memory", "1M", "--filter=delay", "rdelay=600", "wdelay=600"]


@pytest.fixture
def server(nbdkit: StartServer, h: nbd.NBD) -> Server:
    """Return an nbdkit that never answers reads and writes; h is connected to it."""
    started = nbdkit(*STUCK)
    h.connect_unix(started.socket)
    return started


def test_every_completion_gets_an_error(server: Server, h: nbd.NBD) -> None:
    errors: list[int] = []

    def completion(error: Any) -> int:
        errors.append(error.value)
        return 1

    for _ in range(16):
        h.aio_pread(nbd.Buffer(4096), 0, completion)
        h.aio_pwrite(bytes(4096), 0, completion)
    server.kill()
    drain_dying(h)
    assert len(errors) == 32
    assert 0 not in errors


def test_every_cookie_reports_the_failure(server: Server, h: nbd.NBD) -> None:
    cookies = [h.aio_pread(bytearray(512), 0) for _ in range(8)]
    server.kill()
    drain_dying(h)
    for cookie in cookies:
        with pytest.raises(nbd.Error):
            h.aio_command_completed(cookie)
    assert retired(h)


def test_the_handle_is_dead_or_closed(server: Server, h: nbd.NBD) -> None:
    h.aio_pread(bytearray(512), 0, lambda error: 1)
    server.kill()
    drain_dying(h)
    assert h.aio_is_dead() or h.aio_is_closed()


def test_a_later_command_fails(server: Server, h: nbd.NBD) -> None:
    h.aio_pread(bytearray(512), 0, lambda error: 1)
    server.kill()
    drain_dying(h)
    with pytest.raises(nbd.Error):
        h.pread(512, 0)
    with pytest.raises(nbd.Error):
        h.aio_pread(bytearray(512), 0)


def test_nothing_is_left(server: Server, h: nbd.NBD) -> None:
    for _ in range(8):
        h.aio_pread_structured(bytearray(512), 0, lambda *chunk: 0, lambda error: 1)
    server.kill()
    drain_dying(h)
    h.close()
    gc.collect()
    assert len(nbd._binding.callbacks.registry) == 0


def test_close_after_a_death_with_commands_not_retired(server: Server, h: nbd.NBD) -> None:
    for _ in range(8):
        h.aio_pread(bytearray(512), 0)
    server.kill()
    h.close()
    gc.collect()
    assert len(nbd._binding.callbacks.registry) == 0


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h: h.pread(512, 0), id="pread"),
        pytest.param(lambda h: h.pwrite(bytes(512), 0), id="pwrite"),
        pytest.param(lambda h: h.pread_structured(512, 0, lambda *chunk: 0), id="structured"),
    ],
)
def test_a_call_that_waits_fails(
    server: Server, h: nbd.NBD, call: Callable[[nbd.NBD], object]
) -> None:
    failures: list[nbd.Error] = []

    def wait() -> None:
        with pytest.raises(nbd.Error) as caught:
            call(h)
        failures.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    server.kill()
    thread.join(20)
    assert len(failures) == 1


def test_a_call_after_the_death_fails(server: Server, h: nbd.NBD) -> None:
    server.kill()
    with pytest.raises(nbd.Error):
        h.pread(512, 0)


def test_a_completion_that_raises_at_the_death_is_reported(
    server: Server, h: nbd.NBD, unraisable: list[Any]
) -> None:
    raised = ValueError("mine")
    h.aio_pread(bytearray(512), 0, raiser(raised))
    server.kill()
    causes: list[Any] = []
    while h.aio_in_flight():
        try:
            poll(h)
        except nbd.Error as error:  # poll may be the call that fails
            causes.append(error.__cause__)
    assert [one for one in [*causes, *unraisable] if one is not None] == [raised]


def test_a_completion_may_stop_the_program_at_the_death(server: Server, h: nbd.NBD) -> None:
    h.aio_pread(bytearray(512), 0, raiser(KeyboardInterrupt()))
    server.kill()
    with pytest.raises(KeyboardInterrupt):
        drain_dying(h)


def test_a_buffer_of_a_failed_read_is_zero(server: Server, h: nbd.NBD) -> None:
    buf = nbd.Buffer(1 << 20)
    h.aio_pread(buf, 0, lambda error: 1)
    server.kill()
    drain_dying(h)
    assert buf.is_zero()


def test_a_server_that_hangs_up_during_the_handshake(h: nbd.NBD) -> None:
    ours, its = socket.socketpair()
    its.close()
    with pytest.raises(nbd.Error):
        h.connect_socket(ours.detach())
    assert h.aio_is_dead() or h.aio_is_closed()


def test_a_server_that_speaks_another_protocol(h: nbd.NBD) -> None:
    ours, its = socket.socketpair()
    with its:
        its.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
        with pytest.raises(nbd.Error):
            h.connect_socket(ours.detach())
    assert h.aio_is_dead()


def test_a_death_during_negotiation(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.set_opt_mode(True)
    h.connect_unix(server.socket)
    server.kill()
    with pytest.raises(nbd.Error):
        h.opt_list(lambda name, description: 0)


def test_a_death_with_an_option_in_flight(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.set_opt_mode(True)
    h.connect_unix(server.socket)
    server.kill()
    errors: list[int] = []
    with pytest.raises(nbd.Error):  # noqa: PT012 - the call or a later step may be what fails
        h.aio_opt_info(lambda error: errors.append(error.value))
        while True:
            poll(h)
    assert 0 not in errors


def test_a_subprocess_that_died(h: nbd.NBD) -> None:
    h.connect_command(["nbdkit", "-s", "--exit-with-parent", *STUCK])
    errors: list[int] = []
    h.aio_pread(bytearray(512), 0, lambda error: errors.append(error.value))
    h.kill_subprocess(9)
    drain_dying(h)
    assert len(errors) == 1
    assert errors[0] != 0
