"""Servers that fail, stall and die: each command has one outcome, and each read is correct."""

from __future__ import annotations

import errno
import gc
import select
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import servers
from support.figures import Figure
from support.forms import SOAK
from support.hostile import BOUND, FATAL, Connection, Script, Watchdog, Wire, export_info
from support.servers import StartServer
from support.sizes import MIB
from support.usage import collect_garbage, descriptors, resident

import nbd

OPERATIONS = 10_000 if SOAK else 800
KILLS = 200 if SOAK else 10

BLOCK = 4096
BLOCKS = 256
SIZE = BLOCK * BLOCKS
LONGEST = 8  # blocks that one command covers
QUEUE = 16  # commands in flight in the asynchronous run
IN_FLIGHT = 64  # commands in flight when the server is killed

FAULTY = (
    *("--threads=16", "memory", str(SIZE)),  # so that replies arrive out of order
    *("--filter=error", "error=EIO", "error-rate=20%"),
    *("--filter=delay", "rdelay=1ms", "wdelay=1ms"),
)
STUCK = "memory", str(SIZE), "--filter=delay", "rdelay=600", "wdelay=600", "delay-extents=600"


@dataclass
class Operation:
    """A command on some blocks, and the data of a write."""

    kind: str
    first: int
    count: int
    version: int

    @property
    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(self.first, self.first + self.count)

    @property
    def offset(self) -> int:
        """The offset of the first byte."""
        return self.first * BLOCK

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self.count * BLOCK

    def data(self) -> bytes:
        """Return the data of a write."""
        return b"".join(content(block, self.version) for block in self.blocks)


def content(block: int, version: int) -> bytes:
    """Return the content of a version of a block; version 0 is zeroes."""
    if version == 0:
        return bytes(BLOCK)
    return struct.pack(">QQ", block, version) * (BLOCK // 16)


def operations(count: int) -> Iterator[Operation]:
    """Return this many operations, the same in every run."""
    random = Random(count)
    for version in range(1, count + 1):
        kind = random.choice(["read", "read", "write", "write", "zero", "trim"])
        blocks = random.randint(1, LONGEST)
        yield Operation(kind, random.randrange(BLOCKS - blocks), blocks, version)


@dataclass
class Model:
    """The possible contents of each block: a failed command may have been carried out or not."""

    versions: list[set[int]] = field(default_factory=lambda: [{0} for _ in range(BLOCKS)])
    errors: int = 0
    wrong: int = 0

    def settle(self, operation: Operation, data: bytes | bytearray | None, error: bool) -> None:
        """Record the outcome of an operation, and the data of a read."""
        self.errors += error
        for number, block in enumerate(operation.blocks):
            if operation.kind != "read":
                version = operation.version if operation.kind == "write" else 0
                kept = self.versions[block] if error else set()
                self.versions[block] = kept | {version}
            elif data is not None and not error:
                got = data[number * BLOCK : (number + 1) * BLOCK]
                held = {v for v in self.versions[block] if content(block, v) == got}
                self.wrong += 0 if held else BLOCK
                self.versions[block] = held or {0}

    def check(self, name: str, figure: Figure) -> None:
        """Record the figures; check that faults happened and corrupted nothing."""
        figure(f"{name}: commands", OPERATIONS)
        figure(f"{name}: commands that failed", self.errors)
        figure(f"{name}: wrong bytes in successful reads", self.wrong)
        assert 0.1 < self.errors / OPERATIONS < 0.3
        assert self.wrong == 0


def test_model_notices_a_wrong_byte() -> None:
    model = Model()
    model.settle(Operation("read", 0, 1, 1), b"\1" + bytes(BLOCK - 1), error=False)
    assert model.wrong == BLOCK


def test_model_takes_a_failed_write_for_either() -> None:
    for version in (0, 7):
        model = Model()
        model.settle(Operation("write", 3, 1, 7), None, error=True)
        model.settle(Operation("read", 3, 1, 8), content(3, version), error=False)
        assert (model.wrong, model.versions[3]) == (0, {version})


def execute(h: nbd.NBD, operation: Operation) -> bytearray | None:
    """Carry out an operation synchronously, and return the data of a read."""
    if operation.kind == "read":
        return h.pread(operation.length, operation.offset)
    if operation.kind == "write":
        h.pwrite(operation.data(), operation.offset)
    elif operation.kind == "zero":
        h.zero(operation.length, operation.offset)
    else:
        h.trim(operation.length, operation.offset)
    return None


def test_synchronous_commands_survive_faults(
    nbdkit: StartServer, h: nbd.NBD, figure: Figure
) -> None:
    model = Model()
    errors: set[str | None] = set()
    server = nbdkit(*FAULTY)
    h.connect_unix(server.socket)
    with Watchdog(BOUND + OPERATIONS / 10, server.kill) as watchdog:
        for operation in operations(OPERATIONS):
            try:
                data = execute(h, operation)
            except nbd.Error as error:
                model.settle(operation, None, error=True)
                errors.add(error.errno)
            else:
                model.settle(operation, data, error=False)
    assert not watchdog.late
    assert errors == {"EIO"}
    model.check("faults, synchronous", figure)


@dataclass
class Command:
    """An operation in flight."""

    operation: Operation
    retire: int | None  # the result of its completion, None without a completion
    errors: list[int] = field(default_factory=list)
    buffer: nbd.Buffer | None = None
    cookie: int = 0

    def complete(self, error: Any) -> int:
        """Completion callback."""
        self.errors.append(error.value)
        return self.retire or 0

    def issue(self, h: nbd.NBD) -> None:
        """Send the command."""
        completion = None if self.retire is None else self.complete
        operation = self.operation
        if operation.kind == "read":
            self.buffer = nbd.Buffer(operation.length)
            self.cookie = h.aio_pread(self.buffer, operation.offset, completion=completion)
        elif operation.kind == "write":
            self.buffer = nbd.Buffer.from_bytearray(bytearray(operation.data()))
            self.cookie = h.aio_pwrite(self.buffer, operation.offset, completion=completion)
        else:
            call = h.aio_zero if operation.kind == "zero" else h.aio_trim
            self.cookie = call(operation.length, operation.offset, completion=completion)

    def ended(self, h: nbd.NBD) -> bool | None:
        """Return whether the command succeeded, or None if it has not ended."""
        if self.retire == 1:
            return self.errors[0] == 0 if self.errors else None
        try:
            return True if h.aio_command_completed(self.cookie) else None
        except nbd.Error:
            return False

    def settle(self, model: Model, good: bool) -> None:
        """Check that the end was reported once and correctly."""
        if self.retire is not None:
            assert self.errors == [0 if good else errno.EIO]
        reads = self.buffer is not None and self.operation.kind == "read"
        data = bytes(self.buffer.to_bytearray()) if self.buffer and reads else None
        model.settle(self.operation, data, error=not good)


def collect(h: nbd.NBD, flying: list[Command], model: Model) -> list[Command]:
    """Record every command that has ended, and return the others."""
    left = []
    for command in flying:
        good = command.ended(h)
        if good is None:
            left.append(command)
        else:
            command.settle(model, good)
    return left


def overlaps(operation: Operation, flying: list[Command]) -> bool:
    """Return whether an operation touches blocks of a command in flight."""
    return any(
        operation.first < other.blocks.stop and other.first < operation.blocks.stop
        for other in (command.operation for command in flying)
    )


def test_asynchronous_commands_survive_faults(
    nbdkit: StartServer, h: nbd.NBD, figure: Figure
) -> None:
    model = Model()
    flying: list[Command] = []
    issued = []
    server = nbdkit(*FAULTY)
    h.connect_unix(server.socket)
    with Watchdog(BOUND + OPERATIONS / 50, server.kill) as watchdog:
        for number, operation in enumerate(operations(OPERATIONS)):
            while len(flying) >= QUEUE or overlaps(operation, flying):
                h.poll(-1)
                flying = collect(h, flying, model)
            command = Command(operation, (None, 0, 1)[number % 3])
            command.issue(h)
            flying.append(command)
            issued.append(command)
        while flying:
            h.poll(-1)
            flying = collect(h, flying, model)
    assert not watchdog.late
    assert h.aio_in_flight() == 0
    assert all(len(command.errors) == (command.retire is not None) for command in issued)
    model.check("faults, asynchronous", figure)


# --- a server that is killed ------------------------------------------------------------------


class Completion:
    """A completion callback that counts its calls and supports weak references."""

    def __init__(self, retire: int) -> None:
        """Return this value to libnbd."""
        self.retire = retire
        self.errors: list[int] = []

    def __call__(self, error: Any) -> int:
        """Record the end of the command."""
        self.errors.append(error.value)
        return self.retire


def issue(h: nbd.NBD, number: int, completion: Completion | None) -> int:
    """Send one of several kinds of command and return its cookie."""
    buffer = nbd.Buffer(BLOCK)
    offset = number * BLOCK
    commands: list[Callable[[], int]] = [
        lambda: h.aio_pread(buffer, offset, completion=completion),
        lambda: h.aio_pread_structured(buffer, offset, lambda *args: 0, completion=completion),
        lambda: h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(BLOCK)), offset, completion),
        lambda: h.aio_zero(BLOCK, offset, completion=completion),
        lambda: h.aio_trim(BLOCK, offset, completion=completion),
        lambda: h.aio_block_status(BLOCK, offset, lambda *args: 0, completion=completion),
    ]
    return commands[number % len(commands)]()


def wait_until_dead(h: nbd.NBD) -> None:
    """Drive the handle until it has noticed that the server died."""
    with suppress(nbd.Error):
        while not (h.aio_is_dead() or h.aio_is_closed()):
            h.poll(-1)


def kill_with_commands_in_flight(server: servers.Server) -> list[weakref.ref[Completion]]:
    """Kill a server before it answers, check every command; return what must be freed."""
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(server.socket)
    commands: dict[int, Completion | None] = {}
    for number in range(IN_FLIGHT):
        completion = None if number % 3 == 0 else Completion(retire=number % 2)
        commands[issue(h, number, completion)] = completion
    assert h.aio_in_flight() == IN_FLIGHT
    server.kill()
    wait_until_dead(h)
    assert h.aio_in_flight() == 0
    for cookie, completion in commands.items():
        if completion is not None:
            assert len(completion.errors) == 1
            assert completion.errors[0] != 0
        if completion is None or not completion.retire:
            with pytest.raises(nbd.Error):
                h.aio_command_completed(cookie)
    h.close()
    return [weakref.ref(completion) for completion in commands.values() if completion is not None]


def kill_times(nbdkit: StartServer, times: int) -> None:
    """Kill this many servers, and check that nothing of the commands is left."""
    freed: list[weakref.ref[Completion]] = []
    for _ in range(times):
        with nbdkit(*STUCK) as server, Watchdog(BOUND, server.kill) as watchdog:
            freed += kill_with_commands_in_flight(server)
        assert not watchdog.late
    collect_garbage()
    assert [ref for ref in freed if ref() is not None] == []


def test_killed_server_fails_each_command_once_and_leaks_nothing(
    nbdkit: StartServer, figure: Figure
) -> None:
    kill_times(nbdkit, 5)
    before = descriptors(), resident()
    kill_times(nbdkit, KILLS)
    files, grown = descriptors() - before[0], resident() - before[1]
    figure(f"kills: servers, with {IN_FLIGHT} commands in flight each", KILLS)
    figure("kills: descriptors more than before", files)
    figure("kills: MiB more than before", max(0, round(grown / MIB)))
    assert files == 0
    # PyPy's heap may be anywhere between two collections.
    assert grown < (16 if sys.implementation.name == "cpython" else 64) * MIB


def test_killed_server_fails_a_synchronous_command(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit(*STUCK)
    h.connect_unix(server.socket)
    with Watchdog(2 * BOUND, server.kill) as watchdog, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(h.pread, BLOCK, 0)
        server.kill()
        with pytest.raises(nbd.Error, match=r"^nbd_pread: ."):
            reading.result()
    assert not watchdog.late


# --- after a failed call ----------------------------------------------------------------------


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy frees objects at its next collection"
)
@pytest.mark.parametrize("method", ["pwrite", "aio_pwrite", "aio_pread"])
def test_failed_call_lets_go_of_its_buffer_at_once(h: nbd.NBD, method: str) -> None:
    buffer = bytearray(BLOCK)
    gc.disable()
    try:
        with suppress(nbd.Error):
            getattr(h, method)(buffer, 0)
        buffer.append(0)
    finally:
        gc.enable()


# The garbage collector clears the oldest objects first, so make the view before the cycle.
COLLECT_A_VIEW = """
import gc, sys, nbd

class Task:
    pass

h = nbd.NBD()
view = memoryview(bytearray(512))
task = Task()
task.self, task.view = task, view
try:
    getattr(h, sys.argv[1])(view, 0)
except nbd.Error as error:
    task.error = error
del task, view
gc.collect()
"""


@pytest.mark.parametrize("method", ["pwrite", "aio_pwrite", "aio_pread"])
def test_failed_call_with_a_memoryview_does_not_crash_the_collector(method: str) -> None:
    argv = [sys.executable, "-c", COLLECT_A_VIEW, method]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FATAL)
    assert done.returncode == 0, done.stderr


# --- a connection that is cut -----------------------------------------------------------------


def relay(path: str, limit: int) -> Script:
    """Return a script that relays to a real server until the server has sent `limit` bytes."""

    def script(wire: Wire) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            pump(wire.sock, server, limit)

    return script


def pump(client: socket.socket, server: socket.socket, limit: int) -> None:
    """Carry data in both directions, up to the limit of the server's bytes."""
    while limit > 0:
        for source in select.select([client, server], [], [])[0]:
            try:
                said = source.recv(limit if source is server else MIB)
                (client if source is server else server).sendall(said)
            except OSError:
                return
            if not said:
                return
            if source is server:
                limit -= len(said)


def cut_handshakes(server: servers.Server, prepare: Callable[[nbd.NBD], object], step: int) -> int:
    """Cut handshakes after more and more bytes; return the first limit that is enough."""
    limit = 0
    while True:
        h = nbd.NBD()
        prepare(h)
        with Connection(relay(server.socket, limit)) as peer:
            try:
                h.connect_socket(peer.fileno())
            except nbd.Error:
                assert not h.aio_is_ready()
            else:
                return limit
            finally:
                h.close()
        limit += step


def test_handshake_that_is_cut_at_any_byte_is_an_error(nbdkit: StartServer, figure: Figure) -> None:
    whole = cut_handshakes(nbdkit("null", "1M"), lambda h: h.set_full_info(True), step=1)
    assert whole > 80
    figure("cuts: handshakes that ended with an error", whole)


def test_tls_handshake_that_is_cut_is_an_error(
    nbdkit: StartServer, psk: Path, figure: Figure
) -> None:
    def prepare(h: nbd.NBD) -> None:
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_psk_file(str(psk))
        h.set_tls_username("alice")

    whole = cut_handshakes(nbdkit("null", "1M", tls="require", psk=psk), prepare, step=17)
    assert whole > 300
    figure("cuts: TLS handshakes that ended with an error", whole // 17)


def test_read_that_is_cut_anywhere_is_an_error(nbdkit: StartServer) -> None:
    server = nbdkit("null", "1M")
    handshake = cut_handshakes(server, lambda h: None, step=1)
    for limit in range(handshake, handshake + 16 + BLOCK, 97):
        h = nbd.NBD()
        with Connection(relay(server.socket, limit)) as peer:
            h.connect_socket(peer.fileno())
            with pytest.raises(nbd.Error):
                h.pread(BLOCK, 0)
            h.close()


def test_write_that_is_cut_is_an_error(h: nbd.NBD) -> None:
    def script(wire: Wire) -> None:
        wire.negotiate(info=[export_info(64 * MIB)])
        assert wire.request().count == 32 * MIB
        wire.receive(MIB)

    with Connection(script) as peer:
        h.connect_socket(peer.fileno())
        with pytest.raises(nbd.Error):
            h.pwrite(bytes(32 * MIB), 0)
        assert h.aio_in_flight() == 0
