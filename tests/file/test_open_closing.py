# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: closing a file whose server hangs, by several threads, and after a fork."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.files import BUFFERINGS
from support.programs import run_program
from support.servers import StartServer
from support.signals import Stop, alarm
from support.sizes import MIB
from support.usage import collect_garbage, descriptors
from support.waits import paused

import nbd

#: Seconds; closing waits for about one, and the machine may be busy.
BOUND = 20.0
BLOCKED = 12 * MIB  # more than can be written without waiting

CALLS: dict[str, Callable[[Any], object]] = {
    "write": lambda disk: disk.write(bytes(BLOCKED)),
    "flush": lambda disk: (disk.write(b"abc"), disk.flush()),
    "close": lambda disk: (disk.write(b"abc"), disk.close()),
    "read": lambda disk: (disk.write(b"abc"), disk.seek(MIB), disk.read(1)),
    "leave": lambda disk: disk.write(b"abc"),
}


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("name", CALLS)
def test_one_signal_leaves_a_with_block_whose_server_hangs(
    nbdkit: StartServer, figure: Callable[[str, object], None], name: str, buffering: int
) -> None:
    server = nbdkit("memory", "16M")
    began: list[float] = []

    def handler(number: int, frame: FrameType | None) -> None:
        began.append(time.monotonic())
        raise Stop

    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    with paused(server):
        with alarm(handler), pytest.raises(Stop) as caught, disk:
            CALLS[name](disk)
        late = time.monotonic() - began[0]
    assert caught.value.__context__ is sys.exc_info()[1]  # PyPy may have left one there
    assert len(began) == 1
    assert disk.closed
    assert late < BOUND
    figure(f"with nbd.open, {name}: milliseconds from the signal to the end", f"{late * 1000:.0f}")


def flush_and_close(disk: Any, how: str) -> None:
    """Flush, and close in one of the usual ways."""
    if how == "finally":
        try:
            CALLS["flush"](disk)
        finally:
            disk.close()
    elif how == "closing":
        with contextlib.closing(disk):
            CALLS["flush"](disk)
    else:
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk)
            CALLS["flush"](disk)


@pytest.mark.parametrize("how", ["finally", "closing", "ExitStack"])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_other_ways_to_close_keep_the_first_exception(
    nbdkit: StartServer, buffering: int, how: str
) -> None:
    server = nbdkit("memory", "16M")
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    with paused(server), pytest.raises(Stop), alarm():
        flush_and_close(disk, how)
    assert disk.closed


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_with_block_raises_the_timeout_inside_it(nbdkit: StartServer, buffering: int) -> None:
    server = nbdkit("memory", "16M")
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering, timeout=0.3)
    with paused(server), pytest.raises(nbd.Timeout, match="try again") as caught, disk:
        CALLS["read"](disk)
    assert caught.value.__context__ is sys.exc_info()[1]  # PyPy may have left one there
    assert disk.closed


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_close_says_that_data_may_be_lost(nbdkit: StartServer, buffering: int) -> None:
    server = nbdkit("memory", "16M")
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    start = time.monotonic()
    with paused(server):
        with alarm(), pytest.raises(Stop):
            CALLS["read"](disk)
        with pytest.raises(nbd.Timeout, match="may be lost"):
            disk.close()
    assert disk.closed
    assert time.monotonic() - start < BOUND


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_handler_of_an_older_exception_is_told_that_data_may_be_lost(
    nbdkit: StartServer, buffering: int
) -> None:
    server = nbdkit("memory", "16M")
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    with paused(server):
        try:
            raise LookupError("which has nothing to do with the disk")
        except LookupError:
            with alarm(), pytest.raises(Stop):
                CALLS["read"](disk)
            with pytest.raises(nbd.Timeout, match="may be lost"):
                disk.close()
    assert disk.closed


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("name", ["flush", "read"])
def test_close_flushes_if_the_server_works_again(
    nbdkit: StartServer, tmp_path: Path, name: str, buffering: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * MIB))
    server = nbdkit("file", str(image))
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    with paused(server), alarm(), pytest.raises(Stop):
        CALLS[name](disk)
    disk.close()
    assert image.read_bytes()[:3] == b"abc"


def write_and_raise(disk: Any, data: bytes, kind: type[BaseException]) -> None:
    """Write, and leave the `with` block by an exception."""
    with disk:
        disk.write(data)
        raise kind


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_another_exception_in_a_with_block_loses_nothing(
    nbdkit: StartServer, tmp_path: Path, buffering: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    server = nbdkit("--filter=delay", "file", str(image), "wdelay=20ms")
    for kind in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        data = kind.__name__.encode()
        with pytest.raises(kind):
            write_and_raise(nbd.open(server.uri, "r+b", buffering=buffering), data, kind)
        assert image.read_bytes()[: len(data)] == data


@pytest.mark.parametrize("mode", ["rb", "r+b", "wb"])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_several_threads_can_close_a_file_at_once(
    nbdkit: StartServer, buffering: int, mode: str
) -> None:
    server = nbdkit("--threads=4", "memory", "1M")
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def close(disk: Any) -> None:
        barrier.wait()
        try:
            disk.close()
        except BaseException as error:
            failures.append(error)

    for _ in range(20):
        disk: Any = nbd.open(server.uri, mode, buffering=buffering)
        disk.write(b"abc") if mode != "rb" else disk.read(3)
        threads = [threading.Thread(target=close, args=[disk]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert disk.closed
    assert failures == []


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_use_while_another_thread_closes_says_that_it_is_closed(
    nbdkit: StartServer, buffering: int
) -> None:
    server = nbdkit("--threads=4", "memory", "1M")
    calls: list[Callable[[Any], object]] = [
        lambda disk: disk.read(1000),
        lambda disk: disk.write(b"x" * 1000),
        lambda disk: disk.seek(random.randrange(MIB // 2)),
        lambda disk: disk.flush(),
        lambda disk: disk.tell(),
    ]
    texts: set[str] = set()

    def use(disk: Any, call: Callable[[Any], object], started: threading.Event) -> None:
        while True:
            started.set()
            try:
                call(disk)
                disk.seek(0)
            except ValueError as error:
                texts.add(str(error))
                return

    for call in 15 * calls:
        disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
        started = threading.Event()
        thread = threading.Thread(target=use, args=[disk, call, started])
        thread.start()
        started.wait()
        disk.close()
        thread.join()
    assert texts
    assert all("closed file" in text for text in texts), texts


def test_a_closed_file_keeps_no_memory(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "32M")
    disk: Any = nbd.open(server.uri, "r+b")
    disk.write(bytes(9 * MIB))
    disk.seek(0)
    disk.read(10 * MIB)
    raw = disk.raw
    disk.close()
    kept = [value for value in vars(raw).values() if hasattr(value, "_free")]
    assert kept == []
    assert raw._connections is None


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_closing_closes_the_descriptors(nbdkit: StartServer, buffering: int) -> None:
    server = nbdkit("--threads=4", "memory", "1M")
    files = []
    with nbd.open(server.uri):
        pass  # objects that are made only once
    collect_garbage()
    before = descriptors()
    for _ in range(20):
        disk = nbd.open(server.uri, "r+b", buffering=buffering, connections=2)
        disk.write(b"abc")
        disk.close()
        files.append(disk)
    assert descriptors() <= before


def test_the_child_of_a_fork_can_end_while_a_thread_of_the_parent_had_the_file(
    nbdkit: StartServer,
) -> None:
    program = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
import nbd
disks = [nbd.open(sys.argv[1], "r+b", buffering=n) for n in (0, 1000, -1)]
def use(disk):
    while not is_over:
        disk.seek(0)
        disk.write(b"abc")
        disk.read(100)
is_over = False
threads = [threading.Thread(target=use, args=[disk], daemon=True) for disk in disks]
for thread in threads:
    thread.start()
for turn in range(20):
    child = os.fork()
    if not child:
        if turn % 2:
            for disk in disks:
                disk.close()
        sys.exit()
    until = time.monotonic() + 20
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert time.monotonic() < until, "the child hangs"
        time.sleep(0.001)
is_over = True
for thread in threads:
    thread.join()
for disk in disks:
    disk.close()
print("done")
"""
    done = run_program(program, nbdkit("--threads=4", "memory", "1M").uri)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_closed_handle_of_the_caller_is_an_error_and_not_a_hang(nbdkit: StartServer) -> None:
    h = nbd.connect(nbdkit("memory", "1M").uri)
    disk = nbd.open(h, "r+b", buffering=0)
    disk.write(b"abc")
    h.close()
    with pytest.raises(nbd.DiskError):
        disk.close()
    assert disk.closed


def test_a_signal_handler_cannot_close_the_file_of_the_call_it_stopped(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    collect_garbage()  # PyPy loses what a handler raises in a finalizer of an earlier test's object
    for buffering in BUFFERINGS:
        with nbd.open(server.uri, "r+b", buffering=buffering) as disk:
            with (
                paused(server),
                alarm(lambda *_: disk.close()),
                pytest.raises(RuntimeError, match="signal handler"),
            ):
                disk.read(10)
            assert not disk.closed
            disk.seek(0)
            assert disk.read(10) == bytes(10)


def test_closing_waits_for_what_is_read_ahead(nbdkit: StartServer, h: nbd.NBD) -> None:
    """Otherwise a server may die because it cannot send a reply."""
    h.connect_uri(nbdkit("--filter=delay", "memory", "4M", "rdelay=50ms").uri)
    with nbd.open(h) as disk:
        while not h.aio_in_flight():
            assert disk.read(100_000)
    assert h.aio_in_flight() == 0


def test_closing_a_file_whose_server_hangs_does_not_wait_for_ever(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    disk = nbd.open(server.uri)
    with paused(server):
        disk.close()
    assert disk.closed
