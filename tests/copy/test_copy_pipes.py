"""nbd.copy with FIFOs, pipes, sockets and terminals: every wait can be stopped."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import socket
import subprocess
import sys
import threading
import time
import tty
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import run, until
from support.programs import run_program
from support.servers import StartServer
from support.sizes import KIB, MIB
from support.streams import DATA, SOON, late, reading, stopped, writing

import nbd

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
