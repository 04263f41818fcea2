"""close() never closes a descriptor of others, and closes those of the handle in time.

A number that libnbd has closed may belong to another file a moment later.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
from support.handles import closed, poll
from support.hostile import Connection, HungUp, Script, Wire
from support.programs import run_silently
from support.servers import TIMEOUT, Server, StartServer, answers_on_command
from support.usage import collect_garbage, descriptors

import nbd

FEW = 50
MANY = 200

Use = Callable[[nbd.NBD], object]

Pair = tuple[socket.socket, socket.socket]


def numbers() -> set[int]:
    """Return the numbers of the open descriptors."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor that listed the folder is closed by now
            os.fstat(int(name))
            found.add(int(name))
    return found


def connect(h: nbd.NBD, connection: Connection) -> set[int]:
    """Connect a handle, and return the numbers of its descriptors."""
    before = numbers()
    number = connection.fileno()
    h.connect_socket(number)
    return (numbers() - before) | {number}


class Strangers:
    """Pairs of connected sockets, opened until they have the wanted numbers."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def take(self, *wanted: int) -> None:
        """Open pairs until they have all of these numbers."""
        missing = set(wanted)
        while missing:
            assert len(self.pairs) < 100, f"{missing} are not free"
            self.pairs.append(socket.socketpair())
            missing -= {end.fileno() for end in self.pairs[-1]}

    def check(self) -> None:
        """Check that every pair is connected in both directions."""
        for number, (one, other) in enumerate(self.pairs):
            for source, target in (one, other), (other, one):
                message = b"%d" % number
                target.settimeout(TIMEOUT)
                source.sendall(message)
                assert target.recv(len(message)) == message


@pytest.fixture
def strangers() -> Iterator[Strangers]:
    """Return sockets that do not belong to the handle; they are closed afterwards."""
    found = Strangers()
    yield found
    for pair in found.pairs:
        for end in pair:
            end.close()


def break_protocol(wire: Wire) -> None:
    """Answer the first request with an invalid reply, and stay connected."""
    wire.negotiate()
    wire.request()
    wire.send(bytes(16))
    wire.linger()


def hang_up(wire: Wire) -> None:
    """Disconnect at the first request."""
    wire.negotiate()
    wire.request()


def serve_nothing(wire: Wire) -> None:
    """Accept a client, and answer nothing."""
    wire.negotiate()
    wire.linger()


def fail_to_read(h: nbd.NBD) -> None:
    """Read from a connection that dies."""
    with pytest.raises(nbd.Error):
        h.pread(512, 0)


# --- strangers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "use"),
    [
        pytest.param(break_protocol, fail_to_read, id="protocol error"),
        pytest.param(hang_up, fail_to_read, id="hung up"),
        pytest.param(serve_nothing, lambda h: h.shutdown(), id="shut down"),
    ],
)
def test_close_beside_a_call_whose_connection_ends_closes_no_other_descriptor(
    h: nbd.NBD, strangers: Strangers, script: Script, use: Use
) -> None:
    # libnbd calls debug callbacks after it closed its socket and before the call returns.
    taken, was_closed = threading.Event(), threading.Event()

    def debug(function: str, message: str) -> None:
        if taken.is_set():
            return
        with suppress(OSError):
            if os.fstat(number).st_ino == inode:
                return
        strangers.take(number)
        taken.set()
        was_closed.wait(TIMEOUT)

    with Connection(script) as connection:
        number = connection.fileno()
        inode = os.fstat(number).st_ino
        h.connect_socket(number)
        h.set_debug_callback(debug)
        h.set_debug(True)
        thread = threading.Thread(target=use, args=(h,))
        thread.start()
        assert taken.wait(TIMEOUT)
        h.close()
        was_closed.set()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        strangers.check()


def test_closing_a_handle_whose_connection_died_closes_no_other_descriptor(
    h: nbd.NBD, strangers: Strangers
) -> None:
    with Connection(break_protocol) as connection:
        its = connect(h, connection)
        fail_to_read(h)
        strangers.take(*(its - numbers()))
        assert strangers.pairs
        h.close()
        strangers.check()


@pytest.mark.parametrize(
    ("script", "end"),
    [
        pytest.param(serve_nothing, nbd.NBD.close, id="closed"),
        pytest.param(break_protocol, fail_to_read, id="dead"),
        pytest.param(serve_nothing, nbd.NBD.shutdown, id="shut down"),
    ],
)
def test_dropping_a_handle_whose_connection_has_ended_closes_no_other_descriptor(
    strangers: Strangers, script: Script, end: Use
) -> None:
    with Connection(script) as connection:
        h = nbd.NBD()
        its = connect(h, connection)
        end(h)
        strangers.take(*(its - numbers()))
        assert strangers.pairs
        del h
        collect_garbage()
        strangers.check()


def test_a_second_close_closes_no_other_descriptor(h: nbd.NBD, strangers: Strangers) -> None:
    with Connection(serve_nothing) as connection:
        its = connect(h, connection)
        h.close()
        strangers.take(*its)
        with pytest.raises(nbd.ClosedHandle):
            h.close()
        strangers.check()


def test_close_wakes_a_call_whose_socket_was_not_the_first_that_was_tried(
    nbdkit: StartServer, h: nbd.NBD, tmp_path: Path
) -> None:
    # If localhost has an IPv6 address, that is tried first, where no server listens.
    plugin, asked, go = answers_on_command(tmp_path)
    server = nbdkit(*plugin, tcp=True)
    h.connect_tcp("localhost", str(server.port))
    raised: list[Exception] = []

    def read() -> None:
        try:
            h.pread(512, 0)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    asked.read_text()  # the read is in flight
    h.close()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert len(raised) == 1
    go.write_text("\n")


# --- the peer ---------------------------------------------------------------------------------


def until_the_end(script: Script, ended: threading.Event) -> Script:
    """Return a script that runs another one, and reports when the connection ends."""

    def whole(wire: Wire) -> None:
        with suppress(HungUp):
            script(wire)
            wire.linger()
        ended.set()

    return whole


def negotiate_wrongly(wire: Wire) -> None:
    """Begin a handshake with an invalid greeting."""
    wire.send(bytes(18))


def misread(wire: Wire) -> None:
    """Answer the first request with an invalid reply."""
    wire.negotiate()
    wire.request()
    wire.send(bytes(16))


def die_in_poll(h: nbd.NBD) -> None:
    """Drive a read with poll until the connection dies."""
    h.aio_pread(bytearray(512), 0)
    with pytest.raises(nbd.Error):  # noqa: PT012 - one of the polls fails
        while True:
            poll(h)


def die_by_notification(h: nbd.NBD) -> None:
    """Drive a read with aio_notify_read until the connection dies."""
    h.aio_pread(bytearray(512), 0)
    while not h.aio_is_dead():
        with suppress(nbd.Error):
            h.aio_notify_read()


@pytest.mark.parametrize(
    ("script", "end"),
    [
        pytest.param(serve_nothing, nbd.NBD.close, id="closed"),
        pytest.param(serve_nothing, lambda h: h.__exit__(None, None, None), id="left"),
        pytest.param(serve_nothing, nbd.NBD.shutdown, id="shut down"),
        pytest.param(misread, fail_to_read, id="dead in a call"),
        pytest.param(misread, die_in_poll, id="dead in poll"),
        pytest.param(misread, die_by_notification, id="dead by notification"),
    ],
)
def test_the_peer_sees_the_end_of_a_connection(h: nbd.NBD, script: Script, end: Use) -> None:
    ended = threading.Event()
    with Connection(until_the_end(script, ended)) as connection:
        h.connect_socket(connection.fileno())
        end(h)
        assert ended.wait(TIMEOUT)
    assert closed(h) or h.aio_is_dead() or h.aio_is_closed()


def aio_connect(h: nbd.NBD, number: int) -> None:
    """Connect with poll."""
    h.aio_connect_socket(number)
    while True:
        poll(h)


def notified_connect(h: nbd.NBD, number: int) -> None:
    """Connect with aio_notify_read."""
    h.aio_connect_socket(number)
    while True:
        h.aio_notify_read()


@pytest.mark.parametrize("connect", [nbd.NBD.connect_socket, aio_connect, notified_connect])
def test_the_peer_sees_the_end_of_a_handshake_that_failed(
    h: nbd.NBD, connect: Callable[[nbd.NBD, int], object]
) -> None:
    ended = threading.Event()
    with Connection(until_the_end(negotiate_wrongly, ended)) as connection:
        with pytest.raises(nbd.Error):
            connect(h, connection.fileno())
        assert ended.wait(TIMEOUT)
    assert not closed(h)


def test_the_peer_sees_the_end_of_a_handle_that_is_dropped() -> None:
    ended = threading.Event()
    with Connection(until_the_end(serve_nothing, ended)) as connection:
        h = nbd.NBD()
        h.connect_socket(connection.fileno())
        del h
        collect_garbage()
        assert ended.wait(TIMEOUT)


# --- leaks ------------------------------------------------------------------------------------


def test_connections_that_are_closed_leave_no_descriptor(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    before = descriptors()
    for turn in range(MANY):
        h = nbd.NBD()
        h.connect_unix(server.socket)
        if turn % 2:
            h.pread(512, 0)
        if turn % 4:
            h.shutdown()
        h.close()
    assert descriptors() == before


def test_connections_that_are_dropped_leave_no_descriptor(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    before = descriptors()
    for _ in range(MANY):
        h = nbd.NBD()
        h.connect_unix(server.socket)
        h.pread(512, 0)
        del h
    collect_garbage()
    assert descriptors() == before


def connect_nowhere(h: nbd.NBD) -> None:
    """Connect to a socket that does not exist."""
    h.connect_unix("/nonexistent/socket")


def connect_to_nobody(h: nbd.NBD) -> None:
    """Connect to a port on which nothing listens."""
    h.connect_tcp("127.0.0.1", "1")


def connect_to_one_who_left(h: nbd.NBD) -> None:
    """Connect to a socket whose other end is closed."""
    ours, its = socket.socketpair()
    its.close()
    h.connect_socket(ours.detach())


def connect_to_garbage(h: nbd.NBD) -> None:
    """Connect to a server that sends an invalid greeting."""
    ours, its = socket.socketpair()
    with its:
        its.sendall(bytes(64))
        h.connect_socket(ours.detach())


def connect_by_hand(h: nbd.NBD) -> None:
    """Do the same with poll."""
    ours, its = socket.socketpair()
    with its:
        its.sendall(bytes(64))
        aio_connect(h, ours.detach())


@pytest.mark.parametrize(
    "connect",
    [
        connect_nowhere,
        connect_to_nobody,
        connect_to_one_who_left,
        connect_to_garbage,
        connect_by_hand,
    ],
)
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "dropped"])
def test_connects_that_fail_leave_no_descriptor(connect: Use, is_closed: bool) -> None:
    before = descriptors()
    for _ in range(MANY):
        h = nbd.NBD()
        with pytest.raises(nbd.Error):
            connect(h)
        if is_closed:
            h.close()
        del h
    collect_garbage()
    assert descriptors() == before


def test_handles_with_dead_connections_hold_no_descriptor() -> None:
    before = descriptors()
    kept = []
    for _ in range(FEW):
        with Connection(break_protocol) as connection:
            h = nbd.NBD()
            h.connect_socket(connection.fileno())
            fail_to_read(h)
            kept.append(h)
    held = descriptors()
    for h in kept:
        h.close()
    assert descriptors() == held == before


# --- other processes --------------------------------------------------------------------------


def by_unix(h: nbd.NBD, server: Server) -> None:
    """Connect to a Unix socket."""
    h.connect_unix(server.socket)


def by_uri(h: nbd.NBD, server: Server) -> None:
    """Connect to a URI."""
    h.connect_uri(server.uri)


def by_socket(h: nbd.NBD, server: Server) -> None:
    """Pass a connected socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(server.socket)
    h.connect_socket(sock.detach())


def by_command(h: nbd.NBD, server: Server) -> None:
    """Start a server on a pair of sockets."""
    h.connect_command([*server.argv, "--single"])


def by_activation(h: nbd.NBD, server: Server) -> None:
    """Start a server with a socket that listens."""
    h.connect_systemd_socket_activation(server.argv)


@pytest.mark.parametrize("connect", [by_unix, by_uri, by_socket, by_command, by_activation])
def test_descriptors_of_a_handle_are_closed_by_exec(
    nbdkit: StartServer, h: nbd.NBD, connect: Callable[[nbd.NBD, Server], None]
) -> None:
    server = nbdkit("memory", "1M")
    before = numbers()
    connect(h, server)
    h.pread(512, 0)
    its = numbers() - before
    assert h.aio_get_fd() in its
    passed_on = {fd for fd in its if not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC}
    assert passed_on == set()


FORK = """
import gc, nbd, os, sys
before = set(os.listdir("/proc/self/fd"))
h = nbd.NBD()
h.connect_unix(sys.argv[1])
h.pwrite(b"x" * 512, 0)
cookie = h.aio_pread(buffer := bytearray(512), 0)
child = os.fork()
if not child:
    {work}
    left = set(os.listdir("/proc/self/fd")) - before
    os._exit(len(left))
assert os.waitpid(child, 0)[1] == 0
while not h.aio_command_completed(cookie):
    assert h.poll(20000) == 1
assert buffer == h.pread(512, 0) == b"x" * 512
h.shutdown()
h.close()
assert set(os.listdir("/proc/self/fd")) == before
"""


@pytest.mark.parametrize(
    "work", ["h.close()", "del h; gc.collect(); gc.collect(); gc.collect()"], ids=["close", "drop"]
)
def test_a_child_gives_back_its_copies_and_the_parent_continues(
    nbdkit: StartServer, work: str
) -> None:
    run_silently(FORK.format(work=work), nbdkit("memory", "1M").socket)
