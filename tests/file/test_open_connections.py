# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with several connections: the first is enough, and the others may never join."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.files import BUFFERINGS, raw_of
from support.hostile import CMD_READ, SIZE, HungUp, Wire, export_info
from support.programs import run_program
from support.servers import StartServer
from support.sizes import MIB
from support.usage import collect_garbage, descriptors

import nbd
import nbd._disks.connections

BOUND = 20.0  # seconds until a call counts as hung
#: HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN
FLAGS = 0x01 | 0x04 | 0x100


def in_use(raw: Any) -> int:
    """Return how many connections have joined."""
    return len(raw._connections.ours) - len(raw._connections._joining)


@contextmanager
def greeting(tmp_sock: str, count: int, size: int = SIZE) -> Iterator[str]:
    """Serve zeroes to the first clients and never greet the others; yield the URI."""
    clients: list[socket.socket] = []

    def serve(client: socket.socket) -> None:
        wire = Wire(client)
        with suppress(HungUp):
            wire.negotiate(structured=False, info=[export_info(size, FLAGS)])
            while True:
                request = wire.request()
                data = bytes(request.count) if request.command == CMD_READ else b""
                wire.simple(request.cookie, 0, data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                clients.append(listener.accept()[0])
                if len(clients) <= count:
                    threading.Thread(target=serve, args=[clients[-1]], daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(tmp_sock)
        listener.listen()
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"nbd+unix:///?socket={tmp_sock}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
                client.close()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_connections_that_never_come_cost_nothing(
    tmp_sock: str, buffering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd._disks.connections, "CLOSE_TIMEOUT", 60.0)
    with greeting(tmp_sock, 1) as uri:
        collect_garbage()
        before = descriptors()
        start = time.monotonic()
        with nbd.open(uri, buffering=buffering, connections=4) as disk:
            raw = raw_of(disk)
            data = b"".join(iter(lambda: disk.read(100_000), b""))
            assert len(data) == SIZE
            assert in_use(raw) == 1
        assert time.monotonic() - start < BOUND  # one goodbye would take 60 s
        # The server's descriptor of each connection is in this process as well.
        assert descriptors() <= before + 4


def test_a_program_can_end_while_connections_are_made(tmp_sock: str) -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import nbd
disk = nbd.open(sys.argv[1], connections=4)
print(len(disk.read()))
"""
    with greeting(tmp_sock, 1) as uri:
        start = time.monotonic()
        done = run_program(program, uri)
        assert time.monotonic() - start < BOUND
    assert (done.stdout, done.stderr) == (f"{SIZE}\n", "")


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_the_others_join_while_the_file_is_used(
    nbdkit: StartServer, tmp_path: Path, buffering: int
) -> None:
    log = tmp_path / "log"
    filters = "--filter=log", "--filter=delay", "--threads=8"
    server = nbdkit(*filters, "memory", "8M", "rdelay=1ms", f"logfile={log}")
    with nbd.open(server.uri, buffering=buffering, connections=4) as disk:
        raw = raw_of(disk)
        until = time.monotonic() + 20
        while in_use(raw) < 4:
            disk.seek(0)
            assert len(disk.read(MIB)) > 0
            assert time.monotonic() < until
        before = log.read_text()
        disk.seek(0)
        memory = bytearray(8 * MIB)
        disk.readinto(memory)  # type: ignore[attr-defined]
        lines = log.read_text()[len(before) :].splitlines()
    used = {line.split("connection=")[1].split()[0] for line in lines if " Read id=" in line}
    assert len(used) == 4


def test_one_long_read_lets_the_others_join(nbdkit: StartServer) -> None:
    server = nbdkit("--threads=8", "--filter=delay", "memory", "64M", "rdelay=5ms")
    with nbd.open(server.uri, buffering=0, connections=4) as disk:
        assert len(disk.read()) == 64 * MIB
        assert in_use(disk) == 4


def test_a_refused_connection_is_not_used(tmp_sock: str) -> None:
    with greeting(tmp_sock, 1) as uri, nbd.open(uri, buffering=0, connections=3) as disk:
        raw: Any = disk
        waiting = list(raw._connections._joining)
        assert len(waiting) == 2
        Path(tmp_sock).unlink()
        raw._connections.add(uri, 1)
        assert raw._connections._joining == waiting
        assert len(disk.read(1000)) == 1000


def test_a_connection_to_another_export_does_not_join(tmp_sock: str) -> None:
    with greeting(tmp_sock, 9) as uri, nbd.open(uri, buffering=0, connections=1) as disk:
        raw: Any = disk
        Path(tmp_sock).unlink()
        with greeting(tmp_sock, 9, 2 * SIZE) as other:
            raw._connections.add(other, 1)
            while raw._connections._joining[0].aio_is_connecting():
                raw._connections._joining[0].poll(-1)  # so it joins before the first request
            until = time.monotonic() + 20
            while raw._connections._joining:
                disk.seek(0)
                assert len(disk.read()) == SIZE
                assert time.monotonic() < until
            assert len(raw._connections.queue._shim_queue._handles) == 1


@pytest.mark.parametrize("number", [65, 1000])
def test_more_connections_than_a_queue_takes_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"connections: {number} is not between 1 and 64"):
        nbd.open("nbd://nowhere.invalid", connections=number)


def test_the_largest_number_of_connections_works(nbdkit: StartServer) -> None:
    with nbd.open(nbdkit("--threads=4", "memory", "1M").uri, connections=64) as disk:
        assert len(disk.read()) == MIB


@pytest.mark.parametrize("timeout", [float("inf"), 1e12, 3600])
def test_a_timeout_may_be_as_long_as_one_likes(nbdkit: StartServer, timeout: float) -> None:
    with nbd.open(nbdkit("memory", "1M").uri, "r+b", timeout=timeout) as disk:
        disk.write(b"abc")
        disk.flush()
        disk.seek(0)
        assert disk.read(3) == b"abc"


@pytest.mark.parametrize("size", [2**63, 2**64 - 512])
def test_an_export_that_is_too_large_is_refused_as_get_size_does(tmp_sock: str, size: int) -> None:
    with greeting(tmp_sock, 9, size) as uri:
        with nbd.connect(uri) as h, pytest.raises(nbd.Error) as first:
            h.get_size()
        with pytest.raises(nbd.Error) as second:
            nbd.open(uri)
    assert second.value.args == first.value.args


def test_a_line_that_is_slow_but_never_pauses_causes_no_timeout(tmp_sock: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(tmp_sock)
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            wire = Wire(client)
            with suppress(HungUp), client:
                wire.negotiate(structured=False, info=[export_info(SIZE, FLAGS)])
                request = wire.request()
                wire.simple(request.cookie)
                for _ in range(16):
                    time.sleep(0.05)
                    wire.send(bytes(request.count // 16))
                wire.linger()

        thread = threading.Thread(target=serve)
        thread.start()
        with nbd.open(f"nbd+unix:///?socket={tmp_sock}", buffering=0, timeout=0.3) as disk:
            assert len(disk.read(4096)) == 4096
        thread.join()
