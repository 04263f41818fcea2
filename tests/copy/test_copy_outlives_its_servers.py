# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy with reconnect=, from and to servers that are killed at random.

They lose what was not flushed.  After the copy, the target's disk has the source's content, byte by
byte, and nothing else has changed.
"""

from __future__ import annotations

import errno
import functools
import io
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from support.cutting import cutting_process, random_limits
from support.figures import Figure
from support.forms import SOAK
from support.hostile import EXPORT_FLAGS
from support.images import runs
from support.outliving import LONG, SEEDS, any_server, cutter, nothing_is_left, watchdog
from support.servers import StartServer
from support.sizes import KIB, MIB
from support.volatile import READ_ONLY, VolatileServer, volatile_server

import nbd

__all__ = ["nothing_is_left", "watchdog"]

SIZE = 512 * KIB
TARGET_SIZE = SIZE + 128 * KIB
DELAY = 0.004  # seconds at most for each command, so that a copy takes several lives
SOURCES = ("server", "server", "callable", "path", "stream")
TARGETS = ("server", "server", "callable", "path", "stream")
#: Where a source and a target can die; "+" is before the reply.
SOURCE_PLACES = ("greet", "option", "go", "read", "read+", "block_status", "block_status+")
TARGET_PLACES = ("greet", "option", "go", "write", "write+", "zero", "zero+", "flush", "flush+")
BOTH = [
    *(("source", place) for place in SOURCE_PLACES),
    *(("target", place) for place in TARGET_PLACES),
]


def copied(source: Any, target: Any, **options: Any) -> nbd.Copied:
    """Copy with reconnect=, and check that the progress never goes backwards."""
    told: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        told.append((done, total))

    reconnecting = {"reconnect": LONG, "timeout": LONG, "progress": progress}
    result = nbd.copy(source, target, **{**reconnecting, **options})
    assert told == sorted(told, key=lambda one: one[0])
    assert told[-1][0] == result.copied + result.zeroed
    return result


class Side:
    """A source or target of one kind."""

    def __init__(self, kind: str, uri: str, path: Path) -> None:
        self._kind = kind
        self._path = path
        self._stream = io.BytesIO()
        self.what: Any = uri
        if kind == "callable":
            self.what = functools.partial(nbd.connect, uri)
        elif kind == "path":
            self.what = path
        elif kind == "stream":
            self.what = self._stream

    def fill(self, server: VolatileServer, data: bytes) -> None:
        """Set the content."""
        self._path.write_bytes(data)
        self._stream.seek(0)
        self._stream.write(data)
        self._stream.seek(0)
        server.fill(data)

    def rewind(self) -> None:
        """Copy to the start of a stream."""
        self._stream.seek(0)

    def content(self, server: VolatileServer) -> bytes:
        """Return the content."""
        if self._kind == "path":
            return self._path.read_bytes()
        return self._stream.getvalue() if self._kind == "stream" else server.disk()


@contextmanager
def killed(rng: random.Random, servers: list[VolatileServer]) -> Iterator[None]:
    """Kill the servers at random inside the block."""
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.killed_at_random(rng, rng.randint(3, 10)))
        yield


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_copied_while_the_servers_are_killed_is_what_was_read(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    data = runs(rng, SIZE, 4096)
    old = rng.randbytes(TARGET_SIZE)
    kinds = rng.choice(SOURCES), rng.choice(TARGETS)
    slow: dict[str, Any] = {"delay": DELAY}
    with ExitStack() as stack:
        from_server, to_server = (
            stack.enter_context(volatile_server(size=size, **any_server(rng), **slow))
            for size in (SIZE, TARGET_SIZE)
        )
        source = Side(kinds[0], from_server.uri, tmp_path / "source")
        target = Side(kinds[1], to_server.uri, tmp_path / "target")
        source.fill(from_server, data)
        target.fill(to_server, old)
        options = {
            "connections": rng.choice([1, 2, 4]),
            "depth": rng.choice([1, 4, 16]),
            "sparse": rng.random() < 0.7,
        }
        stack.enter_context(killed(rng, [from_server, to_server]))
        for _ in range(3):
            source.rewind()
            target.rewind()
            result = copied(source.what, target.what, **options)
            assert result.copied + result.zeroed == SIZE
            rest = b"" if kinds[1] == "path" else old[SIZE:]
            assert target.content(to_server) == data + rest, kinds


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_copied_while_connections_are_cut_at_random_bytes_is_what_was_read(
    seed: int,
) -> None:
    rng = random.Random(seed)
    data = runs(rng, SIZE, 4096)
    limit = random_limits(rng, SIZE, times=10)
    with ExitStack() as stack:
        from_server, to_server = (
            stack.enter_context(volatile_server(size=SIZE, tcp=bool(seed % 2))) for _ in range(2)
        )
        from_server.fill(data)
        source = stack.enter_context(cutter(from_server, limit))
        target = stack.enter_context(cutter(to_server, limit))
        while source.made + target.made < 14:
            to_server.fill(rng.randbytes(SIZE))
            copied(source.uri, target.uri, connections=rng.choice([1, 3]), depth=4)
            assert to_server.disk() == data


@pytest.mark.parametrize(("side", "place"), BOTH)
def test_a_server_that_dies_twice_at_a_certain_place_is_outlived(side: str, place: str) -> None:
    data = runs(random.Random(place), SIZE, 4096)
    with volatile_server(size=SIZE) as from_server, volatile_server(size=SIZE) as to_server:
        from_server.fill(data)
        to_server.fill(b"x" * SIZE)
        dying = from_server if side == "source" else to_server
        with dying.restarted(place, place) as died:
            copied(from_server.uri, to_server.uri, connections=2)
        assert to_server.disk() == data
        assert died == [place, place]


@pytest.mark.parametrize("place", ["greet", "option", "go", "write", "write+", "flush", "flush+"])
def test_a_target_that_dies_while_it_is_connected_again_is_outlived(place: str) -> None:
    data = random.Random(place).randbytes(SIZE)
    with volatile_server(size=SIZE, delay=DELAY) as server:
        with server.restarted("write+", place, place, after=1) as died:
            copied(io.BytesIO(data), server.uri, connections=2)
        assert server.disk() == data
        assert died == ["write+", place, place]


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_server_that_dies_at_the_good_bye_is_no_error(side: str, tmp_path: Path) -> None:
    path = tmp_path / "path"
    path.write_bytes(b"x" * SIZE)
    with volatile_server(size=SIZE) as server, server.restarted("disconnect"):
        both = (server.uri, path) if side == "source" else (path, server.uri)
        copied(*both)
        if side == "target":
            assert server.disk() == b"x" * SIZE


@pytest.mark.parametrize("change", ["smaller", "larger", "read-only"])
def test_a_target_that_comes_back_as_another_disk_is_not_written_to(change: str) -> None:
    sizes = {"smaller": SIZE // 2, "larger": 2 * SIZE, "read-only": SIZE}
    with volatile_server(size=SIZE) as server:

        def replace() -> None:
            server.kill()
            server.resize(sizes[change])
            flags = EXPORT_FLAGS | (READ_ONLY if change == "read-only" else 0)
            server.start(flags=flags)

        with pytest.raises(nbd.Error) as caught:
            copied(Telling(b"x" * SIZE, replace), server.uri, depth=1)
        assert caught.value.errnum == errno.ESTALE
        server.kill()
        assert server.disk() == bytes(sizes[change])


class Telling(io.BytesIO):
    """A stream that calls a function once, when half of it was read."""

    def __init__(self, data: bytes, call: Callable[[], object]) -> None:
        super().__init__(data)
        self._half = len(data) // 2
        self._call = call

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most 64 KiB."""
        if self.tell() >= self._half:
            call, self._call = self._call, bool
            call()
        return super().read(64 * KIB)

    def readinto(self, buffer: Any, /) -> int:
        """Read at most 64 KiB."""
        data = self.read()
        memoryview(buffer)[: len(data)] = data
        return len(data)


def test_a_source_that_comes_back_with_another_size_is_an_error() -> None:
    with volatile_server(size=SIZE) as server:
        server.fill(b"x" * SIZE)
        server.restart(dies="read", after=1)

        def come_back() -> None:
            server.wait()
            server.resize(2 * SIZE)
            server.start(dies="")

        thread = threading.Thread(target=come_back)
        thread.start()
        with pytest.raises(nbd.Error, match="size") as caught:
            copied(server.uri, None)
        thread.join()
        assert caught.value.errnum == errno.ESTALE


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_server_that_does_not_come_back_is_the_first_error(side: str, tmp_path: Path) -> None:
    path = tmp_path / "path"
    path.write_bytes(b"x" * SIZE)
    with volatile_server(size=SIZE) as server:
        server.fill(b"y" * SIZE)
        server.restart(dies="read" if side == "source" else "write", after=1)
        both = (server.uri, path) if side == "source" else (path, server.uri)
        with pytest.raises(nbd.Error, match=r"0\.2 seconds"):
            copied(*both, reconnect=0.2)


def test_eight_connections_of_which_one_is_cut_every_moment_complete_a_copy(
    nbdkit: StartServer, short_path: Path, figure: Figure
) -> None:
    seconds = 20.0 if SOAK else 1.0
    server = nbdkit("pattern", "1G")
    rates = []
    for pause in (0.0, 0.05):
        with cutting_process(server.socket, str(short_path / "proxy"), pause) as uri:
            done, start = 0, time.monotonic()
            while time.monotonic() - start < seconds:
                done += copied(uri, None, connections=8, ranges=[(0, 256 * MIB)]).copied
            rates.append(done / (time.monotonic() - start) / MIB)
        (short_path / "proxy").unlink()
    figure("reconnect: MiB/s of 8 connections", f"{rates[0]:.0f}")
    figure("reconnect: MiB/s of 8 connections, one cut every 50 ms", f"{rates[1]:.0f}")
