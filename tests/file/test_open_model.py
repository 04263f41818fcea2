# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open compared with a bytearray: random calls, buffers, connections and other writers.

For each byte it is known what a read may return: the byte on the disk or, inside io's buffer, an
older value. Reads fill a buffer, so that no byte in it is older than the last seek outside of it;
the same holds for what was read ahead.
"""

from __future__ import annotations

import errno
import io
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.forms import SOAK
from support.servers import StartServer
from support.sizes import KIB

import nbd

ROUNDS = 1000 if SOAK else 24
CALLS = 60
#: Rounds of one test: few, so that a failure is quick to reproduce.
SHARE = 8
BUFFERINGS = (0, 2, 100, 512, 4096, 10_000, -1)
BLOCKS = ((1, 4096), (512, 4096), (4096, 65536), (65536, 65536))
MODES = ("rb", "r+b", "wb", "w+b")


class Model:
    """The content of the disk, and the older values that a read may still return for a byte.

    Attributes:
        now: The content of the disk, including what was written through the file.
        at: The position of the file.
    """

    def __init__(self, data: bytes) -> None:
        """Begin with the content of the disk."""
        self.now = bytearray(data)
        self.at = 0
        self._older: dict[int, set[int]] = {}

    def write(self, data: bytes) -> None:
        """Write through the file at its position: later reads must return this."""
        end = self.at + len(data)
        self.now[self.at : end] = data
        for place in range(self.at, end):
            self._older.pop(place, None)
        self.at = end

    def write_by_other(self, data: bytes, at: int) -> None:
        """Write through another connection."""
        for place in range(at, at + len(data)):
            self._older.setdefault(place, set()).add(self.now[place])
        self.now[at : at + len(data)] = data

    def read_anew(self) -> None:
        """Accept no older values from now on."""
        self._older.clear()

    def check(self, found: bytes, wanted: int, *, is_whole: bool) -> None:
        """Check the result of a read at the position, and advance the position."""
        available = max(0, min(wanted, len(self.now) - self.at))
        assert len(found) == available if is_whole else min(1, available) <= len(found) <= available
        if self.now[self.at : self.at + len(found)] != found:
            for place, value in enumerate(found, self.at):
                assert value in {self.now[place], *self._older.get(place, ())}, place
        self.at += len(found)


class Round:
    """One file with random settings, and calls on it."""

    def __init__(self, rand: random.Random, nbdkit: StartServer) -> None:
        """Choose the settings, and start the server."""
        self.rand = rand
        self.minimum, preferred = rand.choice(BLOCKS)
        self.size = 65536 * rand.randrange(1, 12)
        self.mode = rand.choice(MODES)
        self.buffering = rand.choice(BUFFERINGS)
        self.connections = rand.choice((1, 1, 4))
        self.server = nbdkit(
            "--threads=4",
            "--filter=blocksize-policy",
            "memory",
            str(self.size),
            f"blocksize-minimum={self.minimum}",
            f"blocksize-preferred={preferred}",
            "blocksize-maximum=32M",
            "blocksize-error-policy=error",
        )

    def __str__(self) -> str:
        """Return the settings, for the message of a failure."""
        kept = ("mode", "buffering", "connections", "minimum", "size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in kept)

    def run(self) -> None:
        """Make the calls, and compare each result."""
        rand = self.rand
        data = rand.randbytes(self.size)
        with nbd.connect(self.server.uri) as self.other, nbd.queue.Queue(self.other) as self.queue:
            self.write_directly(data, 0)
            self.model = Model(data)
            with nbd.open(
                self.server.uri, self.mode, buffering=self.buffering, connections=self.connections
            ) as self.disk:
                for _ in range(CALLS):
                    self.one_call()
                    assert self.disk.tell() == self.model.at
            found = bytearray(self.size)
            self.finish(self.queue.read(found, 0))
            assert found == self.model.now

    def write_directly(self, data: bytes, at: int) -> None:
        """Write through the other connection, and flush."""
        self.finish(self.queue.write(data, at))
        self.finish(self.queue.flush())

    def finish(self, request: Any) -> None:
        """Wait for a request of the other connection."""
        while not request.is_done:
            self.queue.wait()
        assert request.error is None

    def one_call(self) -> None:
        """Make one call, chosen by rand."""
        rand, model = self.rand, self.model
        calls: list[Callable[[], None]] = [self.seek, self.seek, self.others, self.odd]
        if self.disk.readable():
            calls += [self.read, self.read, self.read_in_order, self.line, self.peek]
        if self.disk.writable():
            calls += [self.write, self.write, self.flush]
        if rand.random() < 0.1:
            calls = [self.write_past_end] if self.disk.writable() else [self.seek_to_end]
        if not self.buffering:
            model.read_anew()  # each read returns the current content of the disk
        rand.choice(calls)()

    def count(self) -> int:
        """Return how much to read or write."""
        return self.rand.choice((0, 1, 17, 512, 1000, 4096, 10_000, 70_000, 300_000))

    def seek(self) -> None:
        """Seek, sometimes to the current position."""
        rand, model, disk = self.rand, self.model, self.disk
        place = rand.choice([rand.randrange(self.size), model.at, max(0, model.at - 600), 0])
        how = rand.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: model.at, os.SEEK_END: self.size}[how]
        before = model.at
        assert disk.seek(place - origin, how) == place
        model.at = place
        reach = 256 * KIB if self.buffering == -1 else self.buffering
        if how == os.SEEK_END or abs(place - before) > reach:  # certainly outside of the buffer
            model.read_anew()

    def seek_to_end(self) -> None:
        """Seek to the end or past it, and read nothing there."""
        where = self.size + self.rand.choice([0, 1, 5000])
        assert self.disk.seek(where) == where
        assert not self.disk.readable() or self.disk.read(10) == b""
        self.model.at = self.disk.seek(0, os.SEEK_END)
        self.model.read_anew()

    def read(self) -> None:
        """Read with one of the methods that read."""
        disk, count = self.disk, self.count()
        method = self.rand.choice(["read", "readinto", "read1", "readinto1", "read all"])
        if method.endswith("1") and not self.buffering:
            method = method[:-1]
        is_whole = bool(self.buffering) and not method.endswith("1")
        if method == "read all":
            self.model.check(disk.read(), self.size, is_whole=True)
        elif method.startswith("readinto"):
            memory = bytearray(count)
            filled = getattr(disk, method)(memory)
            self.model.check(bytes(memory[:filled]), count, is_whole=is_whole)
            memory.append(0)  # it is not pinned
        else:
            self.model.check(getattr(disk, method)(count), count, is_whole=is_whole)

    def read_in_order(self) -> None:
        """Read sequentially, so that the file reads ahead."""
        step = self.rand.choice([700, 4096, 50_000])
        for _ in range(self.rand.randrange(12)):
            found = self.disk.read(step)
            self.model.check(found, step, is_whole=bool(self.buffering))
            if self.rand.random() < 0.1:
                self.others()
            if not self.buffering:
                self.model.read_anew()

    def line(self) -> None:
        """Read a line, which may be cut short."""
        most = self.rand.choice([10, 100])
        found = self.disk.readline(most)
        assert b"\n" not in found[:-1]
        available = max(0, self.size - self.model.at)
        assert len(found) == min(most, available) or found.endswith(b"\n")
        self.model.check(found, len(found), is_whole=True)

    def peek(self) -> None:
        """Peek, which does not change the position."""
        if not self.buffering or not hasattr(self.disk, "peek"):
            return
        found = self.disk.peek(10)
        before = self.model.at
        assert found or before >= self.size
        self.model.check(found, len(found), is_whole=True)
        self.model.at = before

    def write(self) -> None:
        """Write data that fits."""
        data = self.rand.randbytes(min(self.count(), max(0, self.size - self.model.at)))
        assert self.disk.write(data) == len(data)
        self.model.write(data)

    def write_past_end(self) -> None:
        """Write more than fits: the write is refused and changes nothing."""
        self.model.at = self.disk.seek(self.size - 3)
        with pytest.raises(OSError, match="the disk ends at") as caught:
            self.disk.write(b"0123456789")
        assert caught.value.errno == errno.ENOSPC

    def flush(self) -> None:
        """Flush, which makes the data visible to others."""
        self.disk.flush()
        found = bytearray(self.size)
        self.finish(self.queue.read(found, 0))
        assert found == self.model.now

    def others(self) -> None:
        """Write through another connection, outside of the file's buffered writes."""
        if self.disk.writable():
            self.disk.flush()
        at = self.rand.randrange(self.size)
        data = self.rand.randbytes(min(self.rand.choice([1, 512, 5000]), self.size - at))
        self.write_directly(data, at)
        self.model.write_by_other(data, at)

    def odd(self) -> None:
        """Make a call that is refused."""
        with pytest.raises(io.UnsupportedOperation):
            self.disk.truncate(10)
        with pytest.raises(OSError, match=r"before the start|[Ii]nvalid"):
            self.disk.seek(-1)
        if not self.disk.readable():
            with pytest.raises(io.UnsupportedOperation):
                self.disk.read(1)
        if not self.disk.writable():
            with pytest.raises(io.UnsupportedOperation):
                self.disk.write(b"1")


@pytest.mark.parametrize("first", range(0, ROUNDS, SHARE))
def test_a_file_behaves_like_a_bytearray(nbdkit: StartServer, first: int) -> None:
    for seed in range(first, first + SHARE):
        turn = Round(random.Random(seed), nbdkit)
        try:
            turn.run()
        except BaseException as error:
            error.args = (f"seed {seed}: {turn}: {error}",)
            raise
        finally:
            turn.server.kill()
