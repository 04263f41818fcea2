"""nbd.copy and streams: every wait can be stopped, and a failed copy flushes nothing."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import run, until
from support.programs import run_program
from support.servers import StartServer
from support.signals import AGAIN, SHORT, Stop, alarm
from support.sizes import KIB, MIB

import nbd
import nbd._disks.fileendpoint

SOON = 20.0  # seconds within which a wait must end that would otherwise last for ever
DATA = random.Random(1).randbytes(3 * MIB + 77)


@contextmanager
def stopped(seconds: float = SHORT) -> Iterator[None]:
    """Stop the block by a signal after some time, and fail if it does not end soon."""
    gc.collect()  # PyPy loses exceptions in the callback of a weak reference
    began = time.monotonic()
    with alarm(seconds=seconds), pytest.raises(Stop):
        yield
    assert time.monotonic() - began < SOON


@contextmanager
def late() -> Iterator[None]:
    """Expect nbd.Timeout of the block, which has a short timeout."""
    began = time.monotonic()
    with pytest.raises(nbd.Timeout):
        yield
    assert time.monotonic() - began < SOON


@contextmanager
def reading(fd: int) -> Iterator[bytearray]:
    """Read everything from a descriptor, in a thread."""
    received = bytearray()

    def read() -> None:
        with open(fd, "rb", 0) as file, suppress(OSError):  # EIO: the end of a terminal
            for part in iter(lambda: file.read(MIB), b""):
                received.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield received
    finally:
        thread.join()


@contextmanager
def writing(fd: int, data: bytes, parts: int = 7) -> Iterator[None]:
    """Write data to a descriptor in parts, in a thread."""

    def write() -> None:
        size = len(data) // parts + 1
        with open(fd, "wb", 0) as file:
            for at in range(0, len(data), size):
                rest = memoryview(data)[at : at + size]
                while rest:
                    rest = rest[file.write(rest) :]

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# Results of an object's `write` method.


class Sink:
    """An object with its own write method, which keeps the objects that it is given."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        """Answer each write with a function of the size of its data."""
        self.parts: list[Any] = []
        self.answer = answer

    def write(self, data: Any) -> Any:
        """Take as much as the answer says."""
        answer = self.answer(len(data))
        self.parts.append(data[:answer] if isinstance(answer, int) else data)
        return answer


@pytest.mark.parametrize(
    "answer",
    [lambda size: None, lambda size: size, lambda size: min(size, 100_001)],
    ids=["None", "all", "some"],
)
def test_an_object_may_keep_what_it_is_given(
    nbdkit: StartServer, answer: Callable[[int], Any]
) -> None:
    uri = nbdkit("memory", "4M").uri
    nbd.copy(io.BytesIO(DATA), uri)
    for source in (io.BytesIO(DATA + bytes(4 * MIB - len(DATA))), uri):
        sink = Sink(answer)
        nbd.copy(source, sink)
        assert b"".join(sink.parts)[: len(DATA)] == DATA
        assert sum(map(len, sink.parts)) == 4 * MIB


class Full(io.RawIOBase):
    """An object that accepts nothing at the moment."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int | None:
        return None


@pytest.mark.parametrize(
    ("sink", "kind", "text"),
    [
        (Full(), BlockingIOError, "make it blocking"),
        (Sink(lambda size: 0), OSError, "took 0 of"),
        (Sink(lambda size: -1), OSError, "took -1 of"),
        (Sink(lambda size: size + 1), OSError, "of 1000 bytes"),
        (Sink(lambda size: "all"), TypeError, "what its write"),
    ],
    ids=["nothing", "0", "-1", "too much", "str"],
)
def test_a_write_that_makes_no_sense_is_an_error(
    sink: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        nbd.copy(io.BytesIO(b"x" * 1000), sink)


class Source:
    """An object with only a read method."""

    def __init__(self, *answers: Any) -> None:
        """Return these results, one for each read; an exception is raised."""
        self.answers = list(answers)

    def read(self, size: int) -> Any:
        """Return the next result."""
        answer = self.answers.pop(0) if self.answers else b""
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_an_object_may_return_any_bytes(nbdkit: StartServer) -> None:
    again = bytearray(b"x" * 100)
    source = Source(b"a", again, memoryview(b"cde")[1:], b"y" * 2 * MIB)
    target = Sink(lambda size: size)
    assert nbd.copy(source, target).copied == 2 * MIB + 103
    again[:] = b"z" * 100
    assert b"".join(target.parts) == b"a" + b"x" * 100 + b"de" + b"y" * 2 * MIB


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ("text", TypeError, "source: its read.. has returned str"),
        (5, TypeError, "source: its read.. has returned int"),
        (None, BlockingIOError, "make it blocking"),
    ],
)
def test_a_read_that_makes_no_sense_is_an_error(
    nbdkit: StartServer, answer: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        nbd.copy(Source(answer), nbdkit("memory", "1M").uri)


# A failed copy flushes nothing, and raises the exception.


@pytest.mark.parametrize("kind", [KeyboardInterrupt, LookupError, OSError])
def test_an_exception_of_the_source_is_raised_and_nothing_is_flushed(
    nbdkit: StartServer, tmp_path: Path, kind: type[BaseException]
) -> None:
    error = kind("mine")
    log = tmp_path / "log"
    uri = nbdkit("--filter=log", "memory", "8M", f"logfile={log}").uri
    with pytest.raises(kind) as raised:
        nbd.copy(Source(b"x" * MIB, error), uri)
    assert raised.value is error
    assert " Write " in log.read_text()
    assert " Flush " not in log.read_text()


def test_a_copy_that_is_done_has_flushed_if_it_was_asked_to(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    uri = nbdkit("--filter=log", "memory", "8M", f"logfile={log}").uri
    nbd.copy(io.BytesIO(DATA), uri, flush=False)
    assert " Flush " not in log.read_text()
    nbd.copy(io.BytesIO(DATA), uri)
    assert " Flush " in log.read_text()


@contextmanager
def hung(nbdkit: StartServer, direction: str) -> Iterator[tuple[Any, Any, Callable[..., None]]]:
    """Yield source and target of a copy of a stream, and a `progress` that stops the server."""
    server = nbdkit("memory", "16M")
    paused: list[bool] = []

    def pause(done: int, total: int | None) -> None:
        if paused:
            return
        paused.append(True)
        server.pause()
        # PyPy imports a module to read a file, and runs a callback when the lock of that import is
        # collected.  An exception of a signal handler is lost there, so the signal is sent later.
        timer = signal.setitimer(signal.ITIMER_REAL, 0)
        if any(timer):
            for _ in range(3):  # the finalizers of the first collection leave garbage as well
                gc.collect()
            signal.setitimer(signal.ITIMER_REAL, SHORT, AGAIN)

    pair = (io.BytesIO(bytes(16 * MIB)), server.uri)
    if direction == "from":
        pair = (server.uri, Sink(lambda size: size))  # type: ignore[assignment]
    try:
        yield (*pair, pause)
    finally:
        server.resume()


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_signal_ends_the_copy_of_a_stream_and_a_server_that_hangs(
    nbdkit: StartServer, direction: str, timeout: float | None
) -> None:
    with hung(nbdkit, direction) as (source, target, pause), stopped(AGAIN):
        nbd.copy(source, target, sparse=False, progress=pause, timeout=timeout)


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_timeout_ends_the_copy_of_a_stream_and_a_server_that_hangs(
    nbdkit: StartServer, direction: str
) -> None:
    with hung(nbdkit, direction) as (source, target, pause), late():
        nbd.copy(source, target, sparse=False, progress=pause, timeout=0.3)


def test_an_exception_of_the_source_is_raised_while_the_server_hangs(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "8M")

    class Pausing(Source):
        def read(self, size: int) -> Any:
            if not self.answers:
                server.pause()
                raise LookupError
            return super().read(size)

    began = time.monotonic()
    with pytest.raises(LookupError):
        nbd.copy(Pausing(b"x" * MIB), server.uri)
    assert time.monotonic() - began < SOON
    server.resume()


def test_a_slow_stream_does_not_make_the_server_time_out(nbdkit: StartServer) -> None:
    class Slow(Source):
        def read(self, size: int) -> Any:
            time.sleep(0.3)
            return super().read(size)

    data = b"x" * 300 * KIB
    uri = nbdkit("memory", "8M").uri
    assert nbd.copy(Slow(data, data, data), uri, timeout=0.2).copied == 3 * len(data)


def test_a_slow_server_does_not_time_out_while_it_answers(nbdkit: StartServer) -> None:
    uri = nbdkit("--filter=delay", "memory", "8M", "wdelay=100ms").uri
    assert nbd.copy(io.BytesIO(DATA), uri, timeout=0.5).copied == len(DATA)


def test_an_error_of_the_server_names_its_side_and_the_offset(nbdkit: StartServer) -> None:
    options = ("--filter=error", "memory", "8M", "error=EPERM", "error-rate=1")
    with pytest.raises(nbd.Error, match="writing to the target failed at offset 0: ") as failed:
        nbd.copy(io.BytesIO(DATA), nbdkit(*options).uri)
    assert failed.value.errno == "EPERM"
    with pytest.raises(nbd.Error, match="reading the source failed at offset 0: "):
        nbd.copy(nbdkit(*options).uri, io.BytesIO(), sparse=False)


def test_a_stream_that_is_longer_than_the_disk_is_an_error(nbdkit: StartServer) -> None:
    with pytest.raises(nbd.Error, match="has 1048576 bytes and the source has more") as full:
        nbd.copy(Source(DATA), nbdkit("memory", "1M").uri)
    assert full.value.errno == "ENOSPC"
    assert nbd.copy(Source(DATA[:MIB]), nbdkit("memory", "1M").uri).copied == MIB


# Unreadable parts.

BAD = [(512 * KIB, 4 * KIB), (MIB + 4 * KIB, 8 * KIB)]


def with_holes(data: bytes) -> bytes:
    """Return the data with zeroes in the bad ranges."""
    whole = bytearray(data)
    for start, length in BAD:
        whole[start : start + length] = bytes(length)
    return bytes(whole)


def ask(calls: list[tuple[int, int]], answer: bool) -> Callable[[int, int, nbd.Error], bool]:
    """Return an on_error that records its calls."""

    def on_error(offset: int, length: int, error: nbd.Error) -> bool:
        assert error.errnum == errno.EIO
        calls.append((offset, length))
        return answer

    return on_error


def test_a_stream_gets_zeroes_for_what_a_disk_cannot_read(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(DATA)
    (tmp_path / "map").write_text(
        f"0x0 +\n0x0 {BAD[0][0]:#x} +\n{BAD[0][0]:#x} {BAD[0][1]:#x} -\n"
        f"{sum(BAD[0]):#x} {BAD[1][0] - sum(BAD[0]):#x} +\n{BAD[1][0]:#x} {BAD[1][1]:#x} -\n"
        f"{sum(BAD[1]):#x} {len(DATA) - sum(BAD[1]):#x} +\n"
    )
    options = ("file", str(tmp_path / "image"), f"ddrescue-mapfile={tmp_path / 'map'}")
    uri = nbdkit("--filter=ddrescue", *options).uri
    for target in (io.BytesIO(), io.BytesIO()):
        calls: list[tuple[int, int]] = []
        copied = nbd.copy(uri, target, sparse=False, on_error=ask(calls, True))
        assert target.getvalue() == with_holes(DATA)
        assert calls == BAD
        assert copied.bad == tuple(BAD)
        assert copied == (len(DATA) - 12 * KIB, 12 * KIB)
    target = io.BytesIO()
    with pytest.raises(nbd.Error, match=f"reading the source failed at offset {BAD[0][0]}: "):
        nbd.copy(uri, target, sparse=False, on_error=ask([], False))
    assert target.getvalue() == DATA[: len(target.getvalue())]


def test_a_stream_gets_zeroes_for_what_a_file_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    path.write_bytes(DATA)

    def read_at(fd: int, view: memoryview, offset: int) -> int:
        if any(start < offset + len(view) and offset < start + size for start, size in BAD):
            raise OSError(errno.EIO, "bad sector")
        data = os.pread(fd, len(view), offset)
        view[: len(data)] = data
        return len(data)

    monkeypatch.setattr(nbd._disks.fileendpoint, "_read_at", read_at)
    monkeypatch.setattr(nbd._disks.fileendpoint, "is_of_system", lambda reason: True)
    target, calls = io.BytesIO(), list[tuple[int, int]]()
    assert nbd.copy(path, target, on_error=ask(calls, True)).bad == tuple(BAD)
    assert (target.getvalue(), calls) == (with_holes(DATA), BAD)
    with pytest.raises(nbd.Error, match=f"reading the source failed at offset {BAD[0][0]}: "):
        nbd.copy(path, io.BytesIO())


# FIFOs.


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Return a FIFO that no process has opened."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("direction", ["from", "to"])
def test_a_fifo_without_another_side_is_waited_for_until_the_timeout(
    nbdkit: StartServer, fifo: Path, direction: str
) -> None:
    uri = nbdkit("memory", "1M").uri
    pair = (fifo, uri) if direction == "from" else (uri, fifo)
    with late():
        nbd.copy(*pair, timeout=0.3)
    with stopped():
        nbd.copy(*pair)


def test_a_fifo_may_be_opened_late(nbdkit: StartServer, fifo: Path) -> None:
    uri = nbdkit("memory", "4M").uri
    command = 'sleep 0.3; cat > "$0"'
    with subprocess.Popen(["sh", "-c", command, fifo], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        with writing(os.dup(writer.stdin.fileno()), DATA):
            writer.stdin.close()
            assert nbd.copy(fifo, uri).copied == len(DATA)
    command = 'sleep 0.3; exec cat "$0"'
    with subprocess.Popen(["sh", "-c", command, fifo], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        with reading(os.dup(reader.stdout.fileno())) as received:
            nbd.copy(uri, str(fifo))
        assert received == DATA + bytes(4 * MIB - len(DATA))


@pytest.mark.parametrize("direction", ["from", "to"])
def test_a_program_ends_after_a_copy_of_a_fifo_was_cancelled(
    nbdkit: StartServer, fifo: Path, direction: str
) -> None:
    program = """
import asyncio, sys
import nbd
async def main():
    pair = sys.argv[1:]
    try:
        await asyncio.wait_for(nbd.aio.copy(*pair), 0.3)
    except asyncio.TimeoutError:
        print("cancelled")
asyncio.run(main())
"""
    pair = [str(fifo), nbdkit("memory", "1M").uri]
    began = time.monotonic()
    done = run_program(program, *(pair if direction == "from" else pair[::-1]))
    assert (done.stdout, done.stderr) == ("cancelled\n", "")
    assert time.monotonic() - began < SOON


# Pipes, sockets and terminals.


def a_pipe(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a pipe, and its buffered file."""
    read, write = os.pipe()
    return (write, open(read, "rb")) if is_source else (read, open(write, "wb"))


def a_raw_pipe(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a pipe, and its unbuffered file."""
    other, file = a_pipe(is_source)
    return other, file.detach()


def a_pipe_that_does_not_wait(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a pipe, and its file, whose descriptor is non-blocking."""
    other, file = a_pipe(is_source)
    os.set_blocking(file.fileno(), False)
    return other, file


def a_socket(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a socket pair, and a buffered file of a socket."""
    ours, other = socket.socketpair()
    with ours:
        return other.detach(), ours.makefile("rb" if is_source else "wb")


def a_raw_socket(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a socket pair, and an unbuffered file of a socket."""
    ours, other = socket.socketpair()
    with ours:
        return other.detach(), ours.makefile("rb" if is_source else "wb", buffering=0)


def a_terminal(is_source: bool) -> tuple[int, Any]:
    """Return the other side of a terminal, and its file."""
    other, ours = pty.openpty()
    tty.setraw(ours)
    return other, open(ours, "rb" if is_source else "wb", 0)


KINDS = [a_pipe, a_raw_pipe, a_pipe_that_does_not_wait, a_socket, a_raw_socket, a_terminal]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
Kind = Callable[[bool], "tuple[int, Any]"]


@pytest.mark.parametrize("kind", KINDS[:-1], ids=lambda kind: kind.__name__)
def test_what_a_channel_sends_is_copied(nbdkit: StartServer, kind: Kind) -> None:
    uri = nbdkit("memory", "4M").uri
    other, file = kind(True)
    with file, writing(other, DATA):
        assert nbd.copy(file, uri).copied == len(DATA)
    with nbd.connect(uri) as disk:
        assert disk.pread(len(DATA), 0) == DATA


def test_typed_input_is_copied_up_to_its_end(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "1M").uri
    other, ours = pty.openpty()
    with open(other, "wb", 0) as keyboard, open(ours, "rb", 0) as terminal:
        keyboard.write(b"some\ntext\n\x04")  # Ctrl-D
        assert nbd.copy(terminal, uri).copied == len(b"some\ntext\n")
    with nbd.connect(uri) as disk:
        assert disk.pread(10, 0) == b"some\ntext\n"


@kinds
@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_channel_gets_everything(nbdkit: StartServer, kind: Kind, is_sparse: bool) -> None:
    data = DATA[:MIB] + bytes(MIB)
    uri = nbdkit("memory", "2M").uri
    nbd.copy(io.BytesIO(data[:MIB]), uri)
    other, file = kind(False)
    with reading(other) as received, file:
        nbd.copy(uri, file, sparse=is_sparse)
        if kind is not a_pipe_that_does_not_wait:
            file.write(b"after")
            file.flush()
    assert received == data + (b"" if kind is a_pipe_that_does_not_wait else b"after")


@kinds
def test_a_channel_that_sends_nothing_is_waited_for_until_the_timeout(
    nbdkit: StartServer, kind: Kind
) -> None:
    uri = nbdkit("memory", "1M").uri
    other, file = kind(True)
    with open(other, "wb", 0), file:
        with late():
            nbd.copy(file, uri, timeout=0.2)
        with stopped():
            nbd.copy(file, uri)
        assert os.get_blocking(file.fileno()) == (kind is not a_pipe_that_does_not_wait)


@kinds
def test_a_channel_that_takes_nothing_is_waited_for_until_the_timeout(
    nbdkit: StartServer, kind: Kind
) -> None:
    uri = nbdkit("memory", "4M").uri
    other, file = kind(False)
    with open(other, "rb", 0):
        with late():
            nbd.copy(uri, file, timeout=0.2)
        with stopped():
            nbd.copy(uri, file)
        assert os.get_blocking(file.fileno()) == (kind is not a_pipe_that_does_not_wait)
        file.close()


@pytest.mark.parametrize("kind", [a_pipe, a_pipe_that_does_not_wait, a_socket])
def test_what_the_buffer_of_a_source_has_comes_first(nbdkit: StartServer, kind: Kind) -> None:
    uri = nbdkit("memory", "1M").uri
    other, file = kind(True)
    with open(other, "wb", 0) as sink, file:
        sink.write(b"line\n" + DATA[:1000])
        assert file.readline() == b"line\n"
        with late():  # the bytes are in the buffer, and the descriptor has none left
            nbd.copy(file, uri, timeout=0.2)
        sink.write(b"line\nmore")
        assert file.readline() == b"line\n"
        sink.close()
        assert nbd.copy(file, uri).copied == 4
    with nbd.connect(uri) as disk:
        assert disk.pread(4, 0) == b"more"


@pytest.mark.parametrize("kind", [a_pipe, a_socket])
def test_the_rest_of_a_buffer_is_copied_when_the_descriptor_has_ended(
    nbdkit: StartServer, kind: Kind
) -> None:
    uri = nbdkit("memory", "1M").uri
    other, file = kind(True)
    with file:
        with open(other, "wb", 0) as sink:
            sink.write(b"line\n" + DATA[:1000])
        assert file.readline() == b"line\n"
        assert nbd.copy(file, uri).copied == 1000
    with nbd.connect(uri) as disk:
        assert disk.pread(1000, 0) == DATA[:1000]


@pytest.mark.parametrize("kind", [a_pipe, a_pipe_that_does_not_wait, a_socket])
def test_what_the_buffer_of_a_channel_has_is_sent_first(nbdkit: StartServer, kind: Kind) -> None:
    uri = nbdkit("memory", "1M").uri
    other, file = kind(False)
    with reading(other) as received, file:
        file.write(b"before")
        nbd.copy(uri, file)
    assert received == b"before" + bytes(MIB)


def test_a_full_pipe_takes_no_more_of_a_buffer_until_the_timeout(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "1M").uri
    read, write = os.pipe()
    with open(read, "rb", 0) as other, open(write, "wb", 64 * KIB) as file:
        os.set_blocking(write, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * KIB)
        os.set_blocking(write, True)
        file.write(b"before")
        with late():
            nbd.copy(uri, file, timeout=0.2)
        other.read(1 << 20)
        file.flush()
        assert other.read(100) == b"before"


def test_a_broken_pipe_is_reported(nbdkit: StartServer) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", 0) as file, pytest.raises(BrokenPipeError, match="the target failed"):
        nbd.copy(nbdkit("memory", "1M").uri, file)


def test_a_copy_of_a_pipe_that_is_cancelled_ends_without_more_bytes(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "4M").uri

    async def cancelled(kind: Kind, is_source: bool) -> None:
        other, file = kind(is_source)
        with open(other, "wb" if is_source else "rb", 0), file:
            pair = (file, uri) if is_source else (uri, file)
            copying = asyncio.ensure_future(nbd.aio.copy(*pair))
            await until(threads)
            await asyncio.sleep(0.1)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
            began = time.monotonic()
            await until(lambda: not threads())
            assert time.monotonic() - began < SOON

    def threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("nbd.aio.copy")]

    for kind in (a_pipe, a_socket):
        for is_source in (True, False):
            run(cancelled(kind, is_source))


def test_a_pipe_of_another_process_stays_blocking(nbdkit: StartServer) -> None:
    program = "import nbd, sys; nbd.copy(sys.argv[1], sys.stdout.buffer)"
    reader = ["python3", "-c", "import os, time; time.sleep(.3); print(os.get_blocking(1))"]
    uri = nbdkit("memory", "4M").uri
    with subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" "$2"; shift 2; "$@"', sys.executable, program, uri, *reader],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == bytes(4 * MIB) + b"True\n"
    assert process.returncode == 0
