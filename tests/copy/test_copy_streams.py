"""nbd.copy with objects that only read or write, and with streams that fail or hang."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from support.servers import StartServer
from support.signals import AGAIN, SHORT
from support.sizes import KIB, MIB
from support.streams import DATA, SOON, late, stopped

import nbd
import nbd._disks.fileendpoint

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
