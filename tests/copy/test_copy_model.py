"""nbd.copy compared with bytes: every kind of source and target, with random content and options.

A round that fails prints its seed: `replay(seed, folder)` repeats the round.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import socket
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable

import pytest
from support import hostile, images, servers
from support.forms import SOAK
from support.sizes import KIB, MIB

import nbd

GROUPS = 4
ROUNDS = 250 if SOAK else 15  # of each group
BLOCK = 512
CONTEXT = 1
ZERO_FLAGS = 3  # a hole that reads as zeroes
SEND_WRITE_ZEROES = 0x40

CMD_WRITE_ZEROES = 6


class MemoryDisk:
    """A scripted server of some bytes that returns few extents at once, and replies out of order.

    Each of its replies is one that a correct server may send.
    """

    def __init__(self, rng: random.Random, content: bytes) -> None:
        """Serve this content."""
        self.content = bytearray(content)
        self._rng = rng
        self._has_zero = rng.random() < 0.5
        self._late: list[Callable[[], None]] = []

    def __call__(self, wire: hostile.Wire) -> None:
        """Serve a client, as the script of a hostile.Connection."""
        flags = hostile.EXPORT_FLAGS
        if not self._has_zero:
            flags &= ~SEND_WRITE_ZEROES
        info = [hostile.export_info(len(self.content), flags)]
        wire.negotiate(contexts=[(CONTEXT, b"base:allocation")], info=info)
        try:
            while True:
                self._answer(wire, wire.request())
                if not self._is_more(wire) or self._rng.random() < 0.3:
                    self._send_late()
        finally:
            self._send_late()

    def _is_more(self, wire: hostile.Wire) -> bool:
        """Return whether another request has already arrived."""
        try:
            return bool(wire.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _send_late(self) -> None:
        self._rng.shuffle(self._late)
        while self._late:
            self._late.pop()()

    def _answer(self, wire: hostile.Wire, request: hostile.Request) -> None:
        place = slice(request.offset, request.offset + request.count)
        kind, payload = hostile.CHUNK_NONE, b""
        if request.command == hostile.CMD_WRITE:
            self.content[place] = wire.receive(request.count)
        elif request.command == CMD_WRITE_ZEROES:
            self.content[place] = bytes(request.count)
        elif request.command == hostile.CMD_READ:
            kind = hostile.CHUNK_OFFSET_DATA
            payload = hostile.data(request.offset, bytes(self.content[place]))
        elif request.command == hostile.CMD_BLOCK_STATUS:
            kind, payload = hostile.CHUNK_BLOCK_STATUS, self._extents(request)
        self._late.append(lambda: wire.chunk(request, kind, payload))

    def _extents(self, request: hostile.Request) -> bytes:
        """Return a few extents from an offset on, perhaps beyond the requested range."""
        entries: list[int] = []
        at = request.offset
        for _ in range(self._rng.randint(1, 3)):
            if at >= len(self.content):
                break
            length = self._rng.choice([BLOCK, 8 * KIB, 100 * KIB, MIB])
            part = self.content[at : at + length]
            entries += [len(part), 0 if any(part) else ZERO_FLAGS]
            at += len(part)
        return hostile.extents(CONTEXT, *entries)


class Giver:
    """An object with only a read method, which returns any number of bytes in any type."""

    def __init__(self, rng: random.Random, data: bytes) -> None:
        """Provide this data."""
        self._rng = rng
        self._file = io.BytesIO(data)
        self._again = bytearray()

    def read(self, size: int) -> Any:
        """Return at least one byte, unless the end is reached."""
        data = self._file.read(self._rng.randint(1, size))
        kind = self._rng.choice([bytes, bytearray, memoryview])
        if kind is memoryview:
            self._again[:] = data  # the object that it returned before is overwritten
            return memoryview(bytes(self._again))
        return kind(data)


class Taker:
    """An object with only a write method, which accepts any part of the data and keeps it."""

    def __init__(self, rng: random.Random) -> None:
        """Begin empty."""
        self._rng = rng
        self._parts: list[Any] = []

    def write(self, data: Any) -> int | None:
        """Accept some bytes; None means all of them."""
        count = self._rng.choice([None, len(data), self._rng.randint(1, len(data))])
        self._parts.append(data[:count])
        return count

    @property
    def content(self) -> bytes:
        """Return all bytes that were accepted."""
        return b"".join(self._parts)


class Round:
    """One copy, and its expected result."""

    def __init__(self, seed: int, folder: Path, stack: ExitStack) -> None:
        """Derive every choice from the seed."""
        self.rng = random.Random(seed)
        self.folder = folder
        self.stack = stack
        self.data = self.content(self.size())
        self.checks: list[Callable[[], None]] = []
        self.bad: list[tuple[int, int]] = []
        self.options: dict[str, Any] = {}

    def size(self) -> int:
        """Return a random size, sometimes an odd one."""
        large = 5 * MIB if self.rng.random() < 0.2 else 400 * KIB
        return self.rng.choice(
            [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 4095, 4096, 4097, 256 * KIB, MIB]
            + 8 * [self.rng.randint(0, large)]
            + 2 * [self.rng.randint(1, large // 4096) * 4096]
        )

    def content(self, size: int) -> bytes:
        """Return data and zeroes, in parts of any size."""
        whole = bytearray(size)
        at = 0
        while at < size:
            length = self.rng.choice([1, 100, BLOCK, 4096, 10_000, 64 * KIB, 300 * KIB])
            if self.rng.random() < 0.6:
                part = self.rng.randbytes(min(length, size - at))
                whole[at : at + len(part)] = part
            at += length
        return bytes(whole)

    def file(self, name: str, content: bytes) -> Path:
        """Return a file in which some of the zeroes are holes."""
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(len(content))
            for at in range(0, len(content), 4096):
                part = content[at : at + 4096]
                if any(part) or self.rng.random() < 0.2:
                    file.seek(at)
                    file.write(part)
        return path

    def after(self, check: Callable[[], None]) -> None:
        """Add a check to be made after the copy."""
        self.checks.append(check)

    def expect(self, actual: Callable[[], Any], expected: bytes) -> None:
        """Compare bytes after the copy."""

        def check() -> None:
            data = bytes(actual())
            assert len(data) == len(expected)
            differing = next((i for i in range(len(data)) if data[i] != expected[i]), None)
            assert differing is None, f"first at byte {differing}"

        self.after(check)

    # Servers.

    def nbdkit(self, path: Path, *options: str) -> servers.Server:
        """Return a server on a file, which ends with the round."""
        filters = [one for one in options if one.startswith("--")]
        others = [one for one in options if not one.startswith("--")]
        argv = servers.nbdkit_argv([*filters, "file", str(path), *others], None, None, None)
        argv[argv.index("--threads=1")] = "--threads=4"
        return self.stack.enter_context(servers.Server(argv, servers.short_folder()))

    def lacking(self, *possible: str) -> list[str]:
        """Return filters that each remove a feature of a server."""
        return [f"--filter={one}" for one in possible if self.rng.random() < 0.25]

    def blocks(self, path: Path) -> str:
        """Return the URI of a server with a minimum block size, for a multiple of it."""
        least = self.rng.choice([512, 4096])
        policy = f"blocksize-minimum={least}", "blocksize-maximum=64K"
        options = ("--filter=blocksize-policy", "blocksize-error-policy=error", *policy)
        argv = servers.nbdkit_argv(["file", str(path), *options], None, None, None)
        return self.stack.enter_context(servers.Server(argv, servers.short_folder())).uri

    def connected(self, uri: str) -> nbd.NBD:
        """Return a handle that the caller owns."""
        return self.stack.enter_context(nbd.connect(uri))

    def scripted(self, disk: MemoryDisk) -> nbd.NBD:
        """Return a handle connected to a scripted server."""
        server = self.stack.enter_context(hostile.Connection(disk, bound=60))
        handle = self.stack.enter_context(nbd.NBD())
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.connect_socket(server.fileno())
        return handle

    # Sources.

    def source_uri(self) -> Any:
        path = self.file("source", self.data)
        if self.data and len(self.data) % 4096 == 0 and self.rng.random() < 0.7:
            return self.blocks(path)
        return self.nbdkit(path, *self.lacking("noextents", "noparallel")).uri

    def source_command(self) -> Any:
        path = self.file("source", self.data)
        return [servers.program("nbdkit"), "-s", "--exit-with-parent", "file", str(path)]

    def source_handle(self) -> Any:
        return self.connected(self.source_uri())

    def source_scripted(self) -> Any:
        return self.scripted(MemoryDisk(random.Random(self.rng.random()), self.data))

    def source_damaged(self) -> Any:
        """Return a disk with unreadable sectors: the copy continues with zeroes."""
        whole = bytearray(self.data)
        path = self.file("source", self.data)
        lines, at = ["0x0 +"], 0
        while at < len(whole):
            length = min(BLOCK * self.rng.randint(1, 500), len(whole) - at)
            is_bad = length % BLOCK == 0 and self.rng.random() < 0.3
            lines.append(f"{at:#x} {length:#x} {'-' if is_bad else '+'}")
            if is_bad:
                whole[at : at + length] = bytes(length)
                self.bad.append((at, length))
            at += length
        mapfile = self.folder / "map"
        mapfile.write_text("\n".join(lines) + "\n")
        self.options["on_error"] = lambda offset, length, error: True
        self.data = bytes(whole)
        server = self.nbdkit(path, "--filter=ddrescue", f"ddrescue-mapfile={mapfile}")
        return server.uri

    def source_path(self) -> Any:
        path = self.file("source", self.data)
        return self.rng.choice([str(path), path, os.fsencode(path)])

    def source_raw(self) -> Any:
        return self._opened_source("rb", 0)

    def source_buffered(self) -> Any:
        return self._opened_source("rb", self.rng.choice([-1, 100]))

    def source_unflushed(self) -> Any:
        """Return a file some of whose data is only in the object's buffer."""
        start = self.rng.randint(0, 5000)
        whole = self.rng.randbytes(start) + self.data
        path = self.file("source", self.content(len(whole)))
        file = self.stack.enter_context(path.open("r+b", self.rng.choice([-1, 100, 64 * KIB])))
        if self.rng.random() < 0.8:
            file.read(1)  # within its buffer, seek does not flush
            file.seek(0)
        file.write(whole)
        file.seek(start)
        self.after(lambda: self._is_at(file, len(whole)))
        return file

    def source_direct(self) -> Any:
        whole, start = self._behind_something()
        fd = _direct(self.file("source", whole), os.O_RDONLY)
        file = self.stack.enter_context(os.fdopen(fd, "rb", 0))
        file.seek(start)
        return file

    def source_pipe(self) -> Any:
        read, write = os.pipe()
        buffering = self.rng.choice([0, -1])
        file = self.stack.enter_context(os.fdopen(read, "rb", buffering))
        self._in_thread(lambda: _write_all(write, b"line\n" + self.data))
        assert file.readline() == b"line\n"
        return file

    def source_socket(self) -> Any:
        ours, other = socket.socketpair()
        self._in_thread(lambda: _write_all(other.detach(), self.data))
        with ours:
            return self.stack.enter_context(ours.makefile("rb", self.rng.choice([0, -1])))

    def source_memory(self) -> Any:
        whole, start = self._behind_something()
        file = io.BytesIO(whole)
        file.seek(start)
        return file

    def source_packed(self) -> Any:
        packed = io.BytesIO(gzip.compress(self.data, 1))
        return self.stack.enter_context(gzip.GzipFile(fileobj=packed))

    def source_disk_file(self) -> Any:
        if not self.data:
            return io.BytesIO()
        uri = self.nbdkit(self.file("source", self.data)).uri
        return self.stack.enter_context(nbd.open(uri, buffering=self.rng.choice([0, -1])))

    def source_object(self) -> Any:
        return Giver(self.rng, self.data)

    def _behind_something(self) -> tuple[bytes, int]:
        """Return the data after other bytes, and its offset."""
        start = self.rng.choice([0, 0, 1, 512, 4096, self.rng.randint(0, 9000)])
        return self.rng.randbytes(start) + self.data, start

    def _opened_source(self, mode: str, buffering: int) -> Any:
        whole, start = self._behind_something()
        file = self.stack.enter_context(self.file("source", whole).open(mode, buffering))
        if self.rng.random() < 0.5:
            file.seek(start)
        else:
            file.read(start)
        self.after(lambda: self._is_at(file, len(whole)))
        return file

    def _is_at(self, file: Any, place: int) -> None:
        assert file.tell() == place
        assert file.read(10) == b""

    def _in_thread(self, work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        self.stack.callback(thread.join)

    # Targets.

    def target_uri(self) -> Any:
        size = self._size_of_target()
        old = self.content(size) if self.rng.random() < 0.5 else self.rng.randbytes(size)
        path = self.file("target", old)
        self.expect(path.read_bytes, self.data + old[len(self.data) :])
        if size and size % 4096 == 0 and self.rng.random() < 0.7:
            return self.blocks(path)
        return self.nbdkit(path, *self.lacking("nozero", "noextents", "noparallel")).uri

    def target_command(self) -> Any:
        uri = self.target_uri()
        path = self.folder / "target"
        assert uri
        return [servers.program("nbdkit"), "-s", "--exit-with-parent", "file", str(path)]

    def target_handle(self) -> Any:
        return self.connected(self.target_uri())

    def target_scripted(self) -> Any:
        old = self.content(self._size_of_target())
        disk = MemoryDisk(random.Random(self.rng.random()), old)
        self.expect(lambda: disk.content, self.data + old[len(self.data) :])
        return self.scripted(disk)

    def target_path(self) -> Any:
        path = self.folder / "target"
        if self.rng.random() < 0.6:
            self.file("target", self.content(self.size()))
        self.expect(path.read_bytes, self.data)
        return self.rng.choice([str(path), path, os.fsencode(path)])

    def target_raw(self) -> Any:
        return self._opened_target("r+b", 0)

    def target_buffered(self) -> Any:
        return self._opened_target(self.rng.choice(["r+b", "w+b"]), -1)

    def target_unflushed(self) -> Any:
        """Return a file whose object has bytes in its buffer, written or read."""
        file = self._opened_target("r+b", self.rng.choice([-1, 64 * KIB]), has_check=False)
        before = self.rng.randbytes(self.rng.randint(0, 3000))
        old = (self.folder / "target").read_bytes()
        start = file.tell()
        if self.rng.random() < 0.5:
            file.seek(0)
            file.read(len(old) // 2)
            file.seek(start)
        file.write(before)
        self._check_target(file, _overwritten(old, start, before), start + len(before))
        return file

    def target_write_only(self) -> Any:
        path = self.file("target", self.content(self.size()))
        file = self.stack.enter_context(path.open("wb", self.rng.choice([0, -1])))
        file.write(b"before")

        def read() -> bytes:
            assert file.tell() == 6 + len(self.data)
            file.flush()
            return path.read_bytes()

        self.expect(read, b"before" + self.data)
        return file

    def target_appended(self) -> Any:
        old = self.content(self.size())
        path = self.file("target", old)
        flags = os.O_APPEND | os.O_WRONLY
        fd = _direct(path, flags) if self.rng.random() < 0.2 else os.open(path, flags)
        buffering = self.rng.choice([0, -1])
        file = self.stack.enter_context(os.fdopen(fd, self.rng.choice(["wb", "ab"]), buffering))
        self.expect(path.read_bytes, old + self.data)
        return file

    def target_direct(self) -> Any:
        old = self.content(self.size())
        path = self.file("target", old)
        file = self.stack.enter_context(os.fdopen(_direct(path, os.O_RDWR), "r+b", 0))
        start = self.rng.choice([0, 512, self.rng.randint(0, 9000)])
        file.seek(start)
        self.expect(path.read_bytes, _overwritten(old, start, self.data))
        return file

    def target_pipe(self) -> Any:
        read, write = os.pipe()
        return self._channel(read, self.stack.enter_context(os.fdopen(write, "wb", 0)))

    def target_buffered_pipe(self) -> Any:
        read, write = os.pipe()
        file = self.stack.enter_context(os.fdopen(write, "wb"))
        file.write(b"before")
        return self._channel(read, file, b"before")

    def target_socket(self) -> Any:
        ours, other = socket.socketpair()
        with ours:
            file = self.stack.enter_context(ours.makefile("wb", self.rng.choice([0, -1])))
        return self._channel(other.detach(), file)

    def target_memory(self) -> Any:
        old = self.content(self.size())
        file = io.BytesIO(old)
        start = self.rng.randint(0, 9000)
        file.seek(start)
        self.expect(file.getvalue, _overwritten(old, start, self.data))
        return file

    def target_object(self) -> Any:
        taker = Taker(self.rng)
        self.expect(lambda: taker.content, self.data)
        return taker

    def target_none(self) -> Any:
        return None

    def target_packed(self) -> Any:
        packed = io.BytesIO()
        file = gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1)

        def read() -> bytes:
            file.close()
            return gzip.decompress(packed.getvalue())

        self.expect(read, self.data)
        return file

    def target_disk_file(self) -> Any:
        size = max(1, self._size_of_target())
        old = self.rng.randbytes(size)
        path = self.file("target", old)
        buffering = self.rng.choice([0, -1])
        mode = self.rng.choice(["r+b", "wb"])
        file = nbd.open(self.nbdkit(path).uri, mode, buffering=buffering)
        self.stack.enter_context(file)
        self.expect(path.read_bytes, self.data + old[len(self.data) :])
        return file

    def _size_of_target(self) -> int:
        size = len(self.data)
        return size + self.rng.choice([0, 0, 1, -size % 4096, 4096, self.rng.randint(0, 100_000)])

    def _opened_target(self, mode: str, buffering: int, has_check: bool = True) -> Any:
        old = self.content(self.size())
        path = self.file("target", old)
        start = self.rng.choice([0, 1, 4096, self.rng.randint(0, 9000)])
        file = self.stack.enter_context(path.open(mode, buffering))
        file.seek(start)
        if has_check:
            self._check_target(file, b"" if "w" in mode else old, start)
        return file

    def _check_target(self, file: Any, old: bytes, start: int) -> None:
        """Compare the position and the rest of the file through the object after the copy."""

        def read() -> Any:
            assert file.tell() == start + len(self.data)
            file.seek(0)
            return file.read()

        self.expect(read, _overwritten(old, start, self.data))

    def _channel(self, other: int, file: Any, before: bytes = b"") -> Any:
        received = bytearray()
        ended = threading.Event()

        def receive() -> None:
            with open(other, "rb", 0) as sink:
                for part in iter(lambda: sink.read(MIB), b""):
                    received.extend(part)
            ended.set()

        def read() -> bytes:
            file.close()
            assert ended.wait(servers.TIMEOUT)
            return bytes(received)

        self.stack.callback(file.close)
        self._in_thread(receive)
        self.expect(read, before + self.data)
        return file


def _overwritten(old: bytes, start: int, data: bytes) -> bytes:
    """Return the content of a file after a write."""
    if not data:
        return old  # also if that is past its end
    return old[:start].ljust(start, b"\0") + data + old[start + len(data) :]


def _blocks(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Where the blocks of ranges begin."""
    return {at for start, length in ranges for at in range(start, start + length, BLOCK)}


def _write_all(fd: int, data: bytes) -> None:
    with open(fd, "wb", 0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:  # not every file system supports it
        return os.open(path, flags)


def _kinds(side: str) -> list[str]:
    return sorted(name for name in vars(Round) if name.startswith(side))


def replay(seed: int, folder: Path) -> None:
    """Run one round."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        one = Round(seed, folder, stack)
        rng = one.rng
        source, target = rng.choice(_kinds("source_")), rng.choice(_kinds("target_"))
        options = one.options
        sparse = rng.choice([False, False, True, True, 512, 4096, 65536, 32 * MIB])
        options.update(sparse=sparse, flush=rng.random() < 0.5)
        if rng.random() < 0.5:
            options.update(connections=rng.randint(1, 3), depth=rng.randint(1, 20))
        if rng.random() < 0.5:
            options["timeout"] = 30
        try:
            pair = getattr(one, source)(), getattr(one, target)()
            copied = nbd.copy(*pair, **options)
            assert sum(copied) == len(one.data)
            assert copied.copied <= copied.read
            assert one.bad or copied.read <= len(one.data)
            lost, bad = _blocks(copied.bad), _blocks(one.bad)
            assert lost <= bad if options["sparse"] else lost == bad  # holes are not read
            assert options["sparse"] or copied.zeroed == BLOCK * len(bad)
            for check in one.checks:
                check()
        except BaseException:
            print(f"seed {seed}: {len(one.data)} bytes, {source} to {target}, {options}")
            raise
    shutil.rmtree(folder)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_copy_has_the_result_of_the_same_operation_on_bytes(tmp_path: Path, group: int) -> None:
    base = int.from_bytes(os.urandom(4), "big") if SOAK else 1000 * group
    for seed in range(base, base + ROUNDS):
        replay(seed, tmp_path / "round")


@pytest.mark.parametrize("seed", range(200 if SOAK else 10))
def test_ranges_of_servers_that_reply_out_of_order_are_copied(tmp_path: Path, seed: int) -> None:
    """The extents that such a server returns may end behind a range."""
    size = 640 * KIB
    with ExitStack() as stack:
        one = Round(seed, tmp_path, stack)
        data, old = images.runs(one.rng, size, 4096), one.rng.randbytes(size)
        ranges = images.random_ranges(one.rng, size)
        target = MemoryDisk(random.Random(-seed), old)
        result = nbd.copy(
            one.scripted(MemoryDisk(random.Random(seed), data)),
            one.scripted(target),
            ranges=ranges,
            sparse=one.rng.choice([True, False, 512, 65536]),
            depth=one.rng.choice([1, 16]),
        )
    assert bytes(target.content) == images.overlaid(old, data, ranges)
    assert sum(result) == images.covered(ranges)
