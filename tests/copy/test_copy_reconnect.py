# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy and nbd.aio.copy with reconnect: copies that outlive their servers."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import run, until
from support.hostile import CMD_READ, CMD_WRITE, EXPORT_FLAGS, DiskServer, Request, Wire
from support.servers import StartServer, program
from support.signals import Stop, alarm, handling
from support.sizes import KIB, MIB
from support.usage import descriptors
from support.volatile import SEND_FLUSH, VolatileServer, volatile_server

import nbd

LONG = 60.0  # seconds: no outage of a test takes this long
SHORT = 0.3  # seconds
SIZE = 20 * MIB  # three requests of a copy

Copy = Callable[..., nbd.Copied]


def aio_copy(*args: Any, **kwargs: Any) -> nbd.Copied:
    """Run nbd.aio.copy in a loop of its own."""
    return run(nbd.aio.copy(*args, **kwargs))


@pytest.fixture(params=[nbd.copy, aio_copy], ids=["copy", "aio"])
def copy(request: pytest.FixtureRequest) -> Copy:
    """Return nbd.copy, and the same of nbd.aio."""
    function: Copy = request.param
    return function


@pytest.fixture
def source() -> Iterator[VolatileServer]:
    """Start the server of a source, with data and zeroes."""
    data = random.Random(32).randbytes(SIZE - 3 * MIB)
    with volatile_server(size=SIZE) as server:
        server.fill(data[: 10 * MIB] + bytes(3 * MIB) + data[10 * MIB :])
        yield server


@pytest.fixture
def target() -> Iterator[VolatileServer]:
    """Start the server of a target that is full of ones."""
    with volatile_server(size=SIZE) as server:
        server.fill(b"\1" * SIZE)
        yield server


class KillOnce:
    """A callback for progress that kills servers in the midst of the copy.

    Attributes:
        calls: What the copy has reported.
    """

    def __init__(self, *servers: VolatileServer, again: bool = True, size: int | None = None):
        self._servers = servers
        self._again = again
        self._size = size
        self.calls: list[int] = []

    @property
    def has_killed(self) -> bool:
        """Whether it has killed the servers before the end of the copy."""
        return self.calls[:1] < [SIZE]

    def __call__(self, done: int, total: int | None) -> None:
        """Kill the servers at the first call; start them again if they shall."""
        self.calls.append(done)
        if len(self.calls) > 1:
            return
        for server in self._servers:
            server.kill()
        for server in self._servers if self._again else ():
            if self._size is not None:
                server.resize(self._size)
            server.start()


class Holding(DiskServer):
    """A server that does not carry out the last of some commands of a kind, and holds its reply.

    Attributes:
        held: The connection and the request of that command, once it has arrived.
    """

    def __init__(self, folder: Path, command: int, last: int) -> None:
        self._command = command
        self._count = last
        self.held: list[tuple[Wire, Request]] = []
        super().__init__(folder, 2 * MIB)

    def _answer(self, wire: Wire, request: Request) -> None:
        self._count -= request.command == self._command
        if request.command != self._command or self._count != 0:
            super()._answer(wire, request)
            return
        if request.command == CMD_WRITE:
            wire.receive(request.count)
        self.held.append((wire, request))

    def reply(self) -> None:
        """Send the reply."""
        wire, request = self.held[0]
        wire.simple(request.cookie)


class Cutting:
    """A server of which all connections are cut at the first command of a kind."""

    def __init__(self, server: DiskServer, place: str) -> None:
        self._server = server
        self.has_cut = False
        server.stop(place, self._cut)

    def _cut(self) -> None:
        self.has_cut = True
        for sock in list(self._server._wires):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._server.resume()


@pytest.mark.parametrize("which", ["source", "target", "both"])
def test_a_copy_goes_on_when_servers_were_killed(
    source: VolatileServer, target: VolatileServer, which: str
) -> None:
    victims = {"source": [source], "target": [target], "both": [source, target]}[which]
    killer = KillOnce(*victims)
    nbd.copy(source.uri, target.uri, reconnect=LONG, progress=killer)
    assert target.disk() == source.disk()
    assert killer.has_killed


def test_an_aio_copy_goes_on_when_servers_were_killed(
    source: VolatileServer, target: VolatileServer
) -> None:
    with source.restarted("read", after=9) as read, target.restarted("write", after=9) as written:
        aio_copy(source.uri, target.uri, reconnect=LONG)
    assert target.disk() == source.disk()
    assert (read, written) == (["read"], ["write"])


def test_one_connection_is_replaced_as_well_as_several(
    source: VolatileServer, target: VolatileServer
) -> None:
    killer = KillOnce(source, target)
    nbd.copy(source.uri, target.uri, connections=1, reconnect=LONG, progress=killer)
    assert target.disk() == source.disk()


def test_what_was_zeroed_and_not_flushed_is_zeroed_again(
    target: VolatileServer,
) -> None:
    with volatile_server(size=SIZE) as source:
        nbd.copy(source.uri, target.uri, reconnect=LONG, progress=KillOnce(target))
    assert target.disk() == bytes(SIZE)


def test_a_callable_makes_the_connections_again(
    source: VolatileServer, target: VolatileServer, copy: Copy
) -> None:
    makers = partial(nbd.connect, source.uri), partial(nbd.connect, target.uri)
    with target.restarted("write", after=9) as died:
        copy(*makers, reconnect=LONG)
    assert target.disk() == source.disk()
    assert died == ["write"]


def test_only_the_ranges_are_copied_again(source: VolatileServer, target: VolatileServer) -> None:
    ranges = [(1, MIB), (9 * MIB + 100, 2 * MIB), (SIZE - 5000, 4999)]
    expected = bytearray(target.disk())
    contents = source.disk()
    for start, length in ranges:
        expected[start : start + length] = contents[start : start + length]
    nbd.copy(source.uri, target.uri, ranges=ranges, reconnect=LONG, progress=KillOnce(target))
    assert target.disk() == expected


def test_edges_of_blocks_survive_a_kill(source: VolatileServer) -> None:
    ranges = [(MIB + 100, MIB), (3 * MIB + 1, 2)]
    expected = bytearray(SIZE)
    contents = source.disk()
    for start, length in ranges:
        expected[start : start + length] = contents[start : start + length]
    with volatile_server(size=SIZE, blocks=(4096, 4096, 64 * KIB)) as target:
        killer = KillOnce(target)
        nbd.copy(source.uri, target.uri, ranges=ranges, reconnect=LONG, progress=killer)
        assert target.disk() == expected


def test_a_stream_is_written_to_a_target_that_was_killed(
    source: VolatileServer, target: VolatileServer, copy: Copy
) -> None:
    data = source.disk()
    with target.restarted("write", after=9) as died:
        copy(io.BytesIO(data), target.uri, reconnect=LONG)
    assert target.disk() == data
    assert died == ["write"]


def test_a_stream_is_read_from_a_source_that_was_killed(source: VolatileServer, copy: Copy) -> None:
    stream = io.BytesIO()
    with source.restarted("read", after=9) as died:
        copy(source.uri, stream, reconnect=LONG)
    assert stream.getvalue() == source.disk()
    assert died == ["read"]


def test_a_file_is_copied_from_a_source_that_was_killed(
    source: VolatileServer, tmp_path: Path
) -> None:
    nbd.copy(source.uri, tmp_path / "f", reconnect=LONG, progress=KillOnce(source))
    assert tmp_path.joinpath("f").read_bytes() == source.disk()


def test_a_file_is_copied_to_a_target_that_was_killed(
    source: VolatileServer, target: VolatileServer, tmp_path: Path
) -> None:
    tmp_path.joinpath("f").write_bytes(source.disk())
    nbd.copy(tmp_path / "f", target.uri, reconnect=LONG, progress=KillOnce(target))
    assert target.disk() == source.disk()


@pytest.mark.parametrize("place", ["greet", "option", "block_status", "read", "reply"])
def test_connections_of_the_source_that_are_cut_there(short_path: Path, place: str) -> None:
    with DiskServer(short_path, 2 * MIB) as server:
        cutting = Cutting(server, place)
        stream = io.BytesIO()
        nbd.copy(server.uri, stream, reconnect=LONG)
        assert stream.getvalue() == server.memory
        assert cutting.has_cut


@pytest.mark.parametrize("place", ["greet", "option", "write", "zero", "flush", "disconnect"])
def test_connections_of_the_target_that_are_cut_there(short_path: Path, place: str) -> None:
    with DiskServer(short_path, 2 * MIB) as source, DiskServer(short_path, 2 * MIB) as target:
        target.memory[:] = b"\1" * len(target.memory)
        cutting = Cutting(target, place)
        nbd.copy(source.uri, target.uri, reconnect=LONG)
        assert target.memory == source.memory
        assert cutting.has_cut


def test_progress_never_goes_back_and_bytes_are_counted_once(
    source: VolatileServer, target: VolatileServer
) -> None:
    killer = KillOnce(source, target)
    copied = nbd.copy(source.uri, target.uri, reconnect=LONG, progress=killer)
    assert killer.calls == sorted(killer.calls)
    assert killer.calls[-1] == SIZE
    assert copied.written == SIZE - 3 * MIB
    assert copied == (SIZE - 3 * MIB, 3 * MIB)


def test_a_loss_that_is_found_together_with_a_reply_is_noticed(short_path: Path) -> None:
    source, target = Holding(short_path, CMD_READ, 2), Holding(short_path, CMD_WRITE, 1)
    with source, target:

        def at_once(number: int, frame: object) -> None:
            if source.held and target.held:
                signal.setitimer(signal.ITIMER_REAL, 0)
                source.held[0][0].sock.shutdown(socket.SHUT_RDWR)
                target.reply()

        with handling(at_once):
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            copied = nbd.copy(
                *(source.uri, target.uri),
                ranges=[(0, 4 * KIB), (MIB, 4 * KIB)],
                sparse=False,
                connections=1,
                timeout=LONG / 3,
                reconnect=LONG,
            )
    assert copied == (8 * KIB, 0)


def test_a_lost_connection_is_no_bad_range(source: VolatileServer, target: VolatileServer) -> None:
    bad: list[int] = []

    def on_error(offset: int, length: int, error: nbd.Error) -> bool:
        bad.append(offset)
        return True

    killer = KillOnce(source)
    copied = nbd.copy(source.uri, target.uri, reconnect=LONG, progress=killer, on_error=on_error)
    assert (bad, copied.bad) == ([], ())
    assert target.disk() == source.disk()


def test_the_first_connection_waits_for_a_server(
    source: VolatileServer, target: VolatileServer, copy: Copy
) -> None:
    target.kill()
    starter = threading.Timer(SHORT, target.start)
    starter.start()
    copy(source.uri, target.uri, reconnect=LONG)
    starter.join()
    assert target.disk() == source.disk()


def test_without_reconnect_the_first_loss_ends_the_copy(
    source: VolatileServer, target: VolatileServer, copy: Copy
) -> None:
    target.restart(dies="write", after=3)
    with pytest.raises(nbd.Error, match=r"(writing to|zeroing) the target failed"):
        copy(source.uri, target.uri)


@pytest.mark.parametrize("which", ["source", "target"])
def test_the_first_error_and_the_time_are_raised_when_the_server_stays_away(
    source: VolatileServer, target: VolatileServer, copy: Copy, which: str
) -> None:
    victim, command = {"source": (source, "read"), "target": (target, "write")}[which]
    victim.restart(dies=command, after=3)
    with pytest.raises(nbd.Error, match=r"was lost \(.*\), .* again within 0.3 seconds") as info:
        copy(source.uri, target.uri, reconnect=SHORT)
    assert victim.uri in info.value.string
    assert info.value.errnum in (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE)


def test_a_stream_ends_with_the_first_error_when_the_server_stays_away(
    target: VolatileServer,
) -> None:
    killer = KillOnce(target, again=False)
    with pytest.raises(nbd.Error, match=r"was lost \(.*\), .* again within 0.3 seconds"):
        nbd.copy(io.BytesIO(bytes(SIZE)), target.uri, reconnect=SHORT, progress=killer)


def test_another_disk_is_refused_and_not_written(
    source: VolatileServer, target: VolatileServer
) -> None:
    killer = KillOnce(target, size=2 * SIZE)
    with pytest.raises(nbd.Error, match=f"size was {SIZE}, and is {2 * SIZE} now") as info:
        nbd.copy(source.uri, target.uri, reconnect=LONG, progress=killer)
    assert info.value.errnum == errno.ESTALE
    assert target.disk() == b"\1" * SIZE + bytes(SIZE)


def test_the_timeout_holds_during_an_outage(source: VolatileServer, target: VolatileServer) -> None:
    killer = KillOnce(target, again=False)
    with pytest.raises(nbd.Timeout):
        nbd.copy(source.uri, target.uri, reconnect=LONG, timeout=SHORT, progress=killer)


def test_a_signal_ends_a_copy_during_an_outage(
    source: VolatileServer, target: VolatileServer
) -> None:
    before = descriptors()
    killer = KillOnce(target, again=False)
    with pytest.raises(Stop), alarm(seconds=1.0):
        nbd.copy(source.uri, target.uri, reconnect=1000, progress=killer)
    assert descriptors() <= before


def test_an_aio_copy_is_cancelled_during_an_outage(
    source: VolatileServer, target: VolatileServer
) -> None:
    target.restart(dies="write", after=3)

    async def cancelled() -> None:
        task = asyncio.ensure_future(nbd.aio.copy(source.uri, target.uri, reconnect=1000))
        await until(lambda: not target.is_running)
        await asyncio.sleep(SHORT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())


def test_no_descriptor_is_left(source: VolatileServer, target: VolatileServer, copy: Copy) -> None:
    copy(source.uri, target.uri)
    before = descriptors()
    with target.restarted("write", after=9):
        copy(source.uri, target.uri, reconnect=LONG)
    assert descriptors() <= before


def test_a_line_is_logged_for_each_connection(
    source: VolatileServer, target: VolatileServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nbd"):
        nbd.copy(source.uri, target.uri, connections=1, reconnect=LONG, progress=KillOnce(target))
    assert [record.name for record in caplog.records] == ["nbd"]
    assert target.uri in caplog.text
    assert "made again" in caplog.text


def test_a_server_without_flush_is_taken_at_its_word(
    short_path: Path, source: VolatileServer
) -> None:
    with DiskServer(short_path, SIZE, flags=EXPORT_FLAGS & ~SEND_FLUSH) as target:
        cutting = Cutting(target, "write")
        nbd.copy(source.uri, target.uri, reconnect=LONG)
        assert target.memory == source.disk()
        assert cutting.has_cut
        assert "flush" not in target.seen


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["a handle", "a list of handles", "a started command"])
def test_what_cannot_be_connected_again_is_refused(
    nbdkit: StartServer, copy: Copy, side: str, kind: str
) -> None:
    server = nbdkit("memory", "1M")
    with nbd.connect(server.uri) as handle:
        what: Any = {
            "a handle": handle,
            "a list of handles": [handle],
            "a started command": [program("nbdkit"), "-s", "memory", "1M"],
        }[kind]
        sides = (what, None) if side == "source" else (io.BytesIO(), what)
        with pytest.raises(ValueError, match=f"{side}: {kind} cannot be connected again"):
            copy(*sides, reconnect=1)


def test_an_aio_client_is_refused(nbdkit: StartServer) -> None:
    async def copying() -> None:
        async with await nbd.aio.connect(nbdkit("memory", "1M").uri) as client:
            with pytest.raises(
                ValueError, match=r"source: an nbd\.aio\.Client cannot be connected"
            ):
                await nbd.aio.copy(client, None, reconnect=1)

    run(copying())


def test_a_callable_that_starts_a_server_is_refused() -> None:
    def made() -> nbd.NBD:
        handle = nbd.NBD()
        handle.connect_command([program("nbdkit"), "-s", "memory", "1M"])
        return handle

    with pytest.raises(ValueError, match="source: a started command cannot be connected again"):
        nbd.copy(made, None, reconnect=1)


@pytest.mark.parametrize(("seconds", "error"), [(-1, ValueError), ("1", TypeError)])
def test_seconds_that_are_none_are_refused(
    copy: Copy, seconds: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="reconnect"):
        copy(io.BytesIO(), None, reconnect=seconds)


def test_files_and_streams_do_not_mind_reconnect() -> None:
    stream = io.BytesIO()
    assert nbd.copy(io.BytesIO(os.urandom(KIB)), stream, reconnect=1).copied == KIB
