# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy with servers that hang, are slow or refuse connections: every wait is bounded."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Union

import pytest
from support import hostile, servers
from support.hostile import Request, Wire
from support.servers import StartServer
from support.signals import Stop, alarm
from support.sizes import KIB, MIB
from support.usage import descriptors

import nbd
from nbd._disks.background import running

#: Called before a server answers a request; it returns whether it has answered.
Before = Callable[[Wire, Request], Union[bool, None]]

SHORT = 0.3  # seconds: a timeout
SOON = 20.0  # seconds within which a wait must end that would otherwise last for ever
BOUND = 60.0  # seconds until a test fails because an event does not happen
MULTI_CONN = 0x100


def answering(
    size: int = MIB, before: Before | None = None, flags: int = hostile.EXPORT_FLAGS
) -> hostile.Script:
    """Return the script of a disk full of ones, which forgets what is written."""

    def script(wire: Wire) -> None:
        info = [hostile.export_info(size, flags)]
        wire.negotiate(contexts=[(1, b"base:allocation")], info=info)
        while True:
            request = wire.request()
            if request.command == hostile.CMD_WRITE:
                wire.receive(request.count)
            if before is not None and before(wire, request):
                continue
            if request.command == hostile.CMD_READ:
                payload = hostile.data(request.offset, b"\1" * request.count)
                wire.chunk(request, hostile.CHUNK_OFFSET_DATA, payload)
            elif request.command == hostile.CMD_BLOCK_STATUS:
                extents = hostile.extents(1, request.count, 0)
                wire.chunk(request, hostile.CHUNK_BLOCK_STATUS, extents)
            else:
                wire.chunk(request, hostile.CHUNK_NONE)

    return script


def hanging_at(command: int) -> hostile.Script:
    """Return the script of a disk that answers every command but one."""

    def hang(wire: Wire, request: Request) -> None:
        if request.command == command:
            wire.linger()

    return answering(before=hang)


@contextmanager
def listening(script: Callable[[Wire, int], None]) -> Iterator[str]:
    """Serve several connections with a script that is given their number; yield the URI."""
    socks: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket, number: int) -> None:
        with suppress(hostile.HungUp):
            script(Wire(sock), number)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                socks.append(sock)
                threads.append(threading.Thread(target=serve, args=(sock, len(socks))))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for sock in socks:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for sock in socks:
                sock.close()


@contextmanager
def handle_of(script: hostile.Script) -> Iterator[nbd.NBD]:
    """Return a handle without a timeout, connected to a script."""
    with hostile.Connection(script) as server, nbd.NBD() as h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_socket(server.fileno())
        yield h


def threads_of_copies() -> int:
    """Return how many threads of copies are left, after a moment in which others may end."""
    until = time.monotonic() + BOUND
    while running and time.monotonic() < until:
        time.sleep(0.001)
    return len(running)


@contextmanager
def soon(seconds: float = SOON) -> Iterator[None]:
    """Fail if the block takes longer than this many seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def sides(h: nbd.NBD, side: str, tmp_path: Path) -> tuple[Any, Any]:
    """Return a handle as source or target of a copy, and a file as the other side."""
    other = tmp_path / "other"
    if side == "source":
        return h, other
    other.write_bytes(b"\2" * MIB)
    return other, h


STOPS = [
    pytest.param("source", hostile.CMD_BLOCK_STATUS, id="block_status"),
    pytest.param("source", hostile.CMD_READ, id="read"),
    pytest.param("target", hostile.CMD_WRITE, id="write"),
    pytest.param("target", hostile.CMD_FLUSH, id="flush"),
]


@pytest.mark.parametrize(("side", "command"), STOPS)
def test_a_timeout_bounds_each_command(side: str, command: int, tmp_path: Path) -> None:
    with handle_of(hanging_at(command)) as h:
        source, target = sides(h, side, tmp_path)
        with soon(), pytest.raises(nbd.Timeout, match=r"nothing was copied for 0\.3 seconds"):
            nbd.copy(source, target, timeout=SHORT)


@pytest.mark.parametrize(("side", "command"), STOPS)
def test_the_timeout_of_a_handle_bounds_a_copy_that_has_none(
    side: str, command: int, tmp_path: Path
) -> None:
    with handle_of(hanging_at(command)) as h:
        h.settimeout(SHORT)
        source, target = sides(h, side, tmp_path)
        with soon(), pytest.raises(nbd.Timeout, match=r"nothing was copied for 0\.3 seconds"):
            nbd.copy(source, target)


@pytest.mark.parametrize(("side", "command"), STOPS)
def test_a_signal_ends_each_command(side: str, command: int, tmp_path: Path) -> None:
    def stop(number: int, frame: object) -> None:
        raise Stop

    with handle_of(hanging_at(command)) as h:
        source, target = sides(h, side, tmp_path)
        with soon(), alarm(stop, 0.1), pytest.raises(Stop):
            nbd.copy(source, target)


def test_a_timeout_bounds_the_greeting(tmp_path: Path) -> None:
    with listening(lambda wire, number: wire.linger()) as uri, soon(), pytest.raises(nbd.Timeout):
        nbd.copy(uri, tmp_path / "target", timeout=SHORT)


def keep(wire: Wire, number: int) -> None:
    """Answer everything, and keep the connection open after the client's disconnect."""
    with suppress(hostile.HungUp):
        answering()(wire)
    wire.linger()


@pytest.mark.parametrize("timeout", [None, SHORT])
def test_a_server_that_keeps_the_connection_is_not_waited_for(
    tmp_path: Path, timeout: float | None
) -> None:
    target = tmp_path / "target"
    before = descriptors()
    with listening(keep) as uri, soon():
        nbd.copy(uri, target, timeout=timeout)
    assert target.read_bytes() == b"\1" * MIB
    assert descriptors() == before


def test_a_command_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    nbdkit = servers.program("nbdkit")
    script = f"{nbdkit} -s --exit-with-parent pattern 1M; exec sleep 600"
    others = set(servers.children())
    try:
        with soon():
            nbd.copy(["sh", "-c", script], tmp_path / "target")
    finally:
        for process in set(servers.children()) - others:
            os.kill(process, signal.SIGKILL)
    assert threads_of_copies() == 0


def test_one_connection_is_enough_where_the_server_has_room_for_no_other(
    qemu_nbd: StartServer, tmp_path: Path
) -> None:
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(os.urandom(1 * MIB) * 32)
    before = descriptors()
    uri = qemu_nbd(image, "--format=raw", "-e", "2").uri
    with nbd.connect(uri, timeout=BOUND), soon():
        nbd.copy(uri, target, connections=4)
        assert threads_of_copies() == 0
    assert target.read_bytes() == image.read_bytes()
    assert descriptors() == before


def test_connections_of_both_sides_that_are_never_greeted_cost_nothing(tmp_path: Path) -> None:
    def script(wire: Wire, number: int) -> None:
        if number > 1:
            wire.linger()
        flags = hostile.EXPORT_FLAGS | MULTI_CONN
        answering(32 * MIB, flags=flags)(wire)

    before = descriptors()
    with listening(script) as source, listening(script) as target, soon():
        assert nbd.copy(source, target, connections=3) == (32 * MIB, 0)
        assert threads_of_copies() == 0
    assert descriptors() == before


def test_connections_join_while_the_copy_runs() -> None:
    """The first connection begins, and waits until another one is used."""
    used: set[int] = set()
    connected: set[int] = set()
    is_joined = threading.Event()
    flags = hostile.EXPORT_FLAGS | MULTI_CONN

    def script(wire: Wire, number: int) -> None:
        def wait(wire: Wire, request: Request) -> None:
            if request.command == hostile.CMD_WRITE:
                used.add(number)
                if len(used) == 2 and len(connected) == 3:
                    is_joined.set()
                if number == 1 and request.offset >= 4 * MIB:
                    is_joined.wait(BOUND)

        connected.add(number)
        answering(64 * MIB, wait, flags)(wire)

    def fast(wire: Wire, number: int) -> None:
        answering(64 * MIB, None, flags)(wire)

    with listening(fast) as source, listening(script) as target:
        assert nbd.copy(source, target, connections=3) == (64 * MIB, 0)
    assert len(used) >= 2
    assert is_joined.is_set()


def test_a_small_copy_makes_one_connection(nbdkit: StartServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    uri = nbdkit("--filter=log", "memory", "8M", f"logfile={log}").uri
    nbd.copy(uri, tmp_path / "copied", connections=3, sparse=False)
    assert log.read_text().count(" Connect ") == 1


def test_a_connection_to_another_disk_does_not_join(tmp_path: Path) -> None:
    refused = threading.Event()

    def script(wire: Wire, number: int) -> None:
        def wait(wire: Wire, request: Request) -> None:
            assert number == 1 or request.command == hostile.CMD_DISC
            if request.offset > 16 * MIB:
                refused.wait(BOUND)

        size = 32 * MIB if number == 1 else MIB
        with suppress(hostile.HungUp):
            answering(size, wait, hostile.EXPORT_FLAGS | MULTI_CONN)(wire)
        refused.set()

    with listening(script) as uri:
        assert nbd.copy(uri, tmp_path / "target", connections=2) == (32 * MIB, 0)


def trickling(wire: Wire, request: Request) -> None:
    """Send a reply in small parts, which takes longer than the timeout."""
    if request.command != hostile.CMD_READ:
        return
    head = struct.pack(
        ">IHHQIQ", hostile.STRUCTURED_REPLY_MAGIC, hostile.CHUNK_DONE,
        hostile.CHUNK_OFFSET_DATA, request.cookie, 8 + request.count, request.offset,
    )  # fmt: skip
    wire.send(head)
    for _ in range(12):
        time.sleep(SHORT / 3)
        wire.send(b"\1" * (request.count // 12))
    wire.send(b"\1" * (request.count % 12))


def test_a_slow_line_that_never_pauses_does_not_time_out(tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.negotiate(info=[hostile.export_info(64 * KIB)])
        while True:
            trickling(wire, wire.request())

    target = tmp_path / "target"
    with handle_of(script) as h:
        assert nbd.copy(h, target, timeout=SHORT) == (64 * KIB, 0)
    assert target.read_bytes() == b"\1" * 64 * KIB


def test_a_slow_progress_does_not_time_out(nbdkit: StartServer, tmp_path: Path) -> None:
    calls = 0

    def rest(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            time.sleep(2 * SHORT)

    source = nbdkit("--filter=delay", "memory", "8M", "rdelay=20ms").uri
    nbd.copy(source, tmp_path / "target", sparse=False, progress=rest, timeout=SHORT)
    assert calls >= 3


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_a_disk_that_is_too_large_is_refused_before_anything_is_written(
    tmp_path: Path, side: str, size: int
) -> None:
    written: list[int] = []

    def note(wire: Wire, request: Request) -> None:
        written.append(request.command)

    def script(wire: Wire, number: int) -> None:
        answering(size, note)(wire)

    with listening(script) as uri:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(512))
        pair = (uri, target) if side == "source" else (source, uri)
        with pytest.raises(nbd.Error):
            nbd.copy(*pair, timeout=BOUND)
    assert written == []
    assert not target.exists()


def refuse_writes(wire: Wire, request: Request) -> bool:
    """Refuse every write."""
    if request.command != hostile.CMD_WRITE:
        return False
    wire.chunk(request, hostile.CHUNK_ERROR, hostile.failure(1))
    return True


def test_a_copy_that_fails_lets_replies_come() -> None:
    asked: list[int] = []
    replied: list[int] = []

    def late(wire: Wire, request: Request) -> bool:
        if request.command != hostile.CMD_READ or request.offset < 8 * MIB:
            return False
        asked.append(request.offset)
        time.sleep(0.1)
        payload = hostile.data(request.offset, b"\1" * request.count)
        wire.chunk(request, hostile.CHUNK_OFFSET_DATA, payload)
        replied.append(request.offset)
        return True

    def source(wire: Wire, number: int) -> None:
        answering(32 * MIB, late)(wire)

    target_script = answering(32 * MIB, refuse_writes)
    with (
        listening(source) as uri,
        handle_of(target_script) as target,
        pytest.raises(nbd.Error, match="writing to the target failed") as failed,
    ):
        nbd.copy(uri, target, depth=4)
    assert failed.value.errno == "EPERM"
    assert len(asked) > 2  # as many were in flight
    assert replied == asked


def test_a_copy_that_fails_does_not_wait_long_for_a_server_that_hangs() -> None:
    def hang(wire: Wire, request: Request) -> None:
        if request.command == hostile.CMD_READ and request.offset >= 8 * MIB:
            wire.linger()

    scripts = answering(32 * MIB, hang), answering(32 * MIB, refuse_writes)
    with (
        handle_of(scripts[0]) as source,
        handle_of(scripts[1]) as target,
        soon(),
        pytest.raises(nbd.Error, match="writing to the target failed"),
    ):
        nbd.copy(source, target, depth=4)
