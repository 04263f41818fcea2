# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: an exception at any bytecode of a call keeps the position and leaks nothing."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.figures import Figure
from support.files import BUFFERINGS
from support.forms import SOAK
from support.injection import Injector, came_out, exception_of_a_destructor, places
from support.servers import StartServer
from support.signals import Stop, handling, stop
from support.sizes import KIB
from support.usage import collect_garbage

import nbd
from nbd._disks.connections import _kept

SIZE = 512 * KIB
DATA = random.Random(1).randbytes(SIZE)
#: What is dropped may wait for a collection, which takes long on PyPy: there one is for many files.
AT_A_TIME = 1 if sys.implementation.name == "cpython" else 50


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file with the data."""
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def uri(nbdkit: StartServer, image: Path) -> str:
    """Return the URI of a server on the image."""
    return nbdkit("file", str(image)).uri


@pytest.fixture(autouse=True)
def no_garbage_is_collected() -> Iterator[None]:
    """Run no finalizer of earlier tests: an exception that is raised in one is lost."""
    collect_garbage()
    gc.disable()
    yield
    gc.enable()


def readinto(disk: Any) -> bytes:
    """Read into memory of the caller."""
    memory = bytearray(3000)
    return bytes(memory[: disk.readinto(memory)])


READS: dict[str, Callable[[Any], bytes]] = {
    "read": lambda disk: disk.read(3000),
    "readinto": readinto,
    "readall": lambda disk: disk.read(),
    "read1": lambda disk: disk.read1(3000),
    "readline": lambda disk: disk.readline(),
}


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("form", ["after a jump", "in order"])
def test_a_stopped_read_moves_nothing(
    uri: str, figure: Figure, name: str, buffering: int, form: str
) -> None:
    with nbd.open(uri, buffering=buffering) as disk:
        if not buffering and name in ("read1", "readline"):
            return  # an unbuffered file has no read1, and reads a line byte by byte
        read, start = READS[name], SIZE - 5000

        def once(injector: Injector) -> None:
            disk.seek(start)
            if form == "in order":
                disk.seek(1000)
                disk.seek(start - 8000)
                while disk.tell() < start:
                    disk.read(start - disk.tell())
            found: list[bytes] = []
            error = injector.run(lambda: found.append(read(disk)))
            if injector.raised:
                assert came_out(error)
                moved.append(disk.tell() != start and not injector.at_return)
                disk.seek(start)
            data = found[0] if found else read(disk)
            assert data
            assert data == DATA[start : start + len(data)]
            assert disk.tell() == start + len(data)

        moved: list[bool] = []
        figure(f"nbd.open {buffering} {name} {form}: places of an exception", places(once))
    assert not any(moved)


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("size", [100, 300 * KIB])
def test_a_stopped_write_moves_nothing(
    uri: str, figure: Figure, image: Path, size: int, buffering: int
) -> None:
    data = b"x" * size
    with nbd.open(uri, "r+b", buffering=buffering) as disk:

        def once(injector: Injector) -> None:
            disk.seek(9000)
            found: list[int] = []
            error = injector.run(lambda: found.append(disk.write(data)))
            if injector.raised:
                assert came_out(error)
                moved.append(disk.tell() != 9000 and not injector.at_return)
                disk.seek(9000)
            assert (found[0] if found else disk.write(data)) == size
            assert disk.tell() == 9000 + size

        moved: list[bool] = []
        figure(f"nbd.open {buffering} write {size}: places of an exception", places(once))
    assert not any(moved)
    assert image.read_bytes() == DATA[:9000] + data + DATA[9000 + size :]


def sockets() -> int:
    """Return how many sockets this process has."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("given", ["URI", "handle"])
def test_a_stopped_open_or_close_leaves_nothing(
    uri: str, figure: Figure, buffering: int, given: str, unraisable: list[Any]
) -> None:
    h = nbd.connect(uri)
    source: Any = uri if given == "URI" else h
    collect_garbage()
    before, kept, turns = sockets(), set(_kept), itertools.count(1)

    def use() -> None:
        disk = nbd.open(source, "r+b", buffering=buffering)
        try:
            disk.write(b"abc")
        finally:
            disk.close()

    def once(injector: Injector) -> None:
        error = injector.run(use)
        late = exception_of_a_destructor()
        if injector.raised:
            seen = [late, *unraisable]
            assert came_out(error) or any(isinstance(one, KeyboardInterrupt) for one in seen)
        del error
        unraisable.clear()
        if not set(_kept) <= kept and next(turns) % AT_A_TIME == 0:
            collect_garbage()
            assert set(_kept) <= kept

    found = places(once, 20_000)
    collect_garbage()
    assert set(_kept) <= kept
    assert sockets() == before
    h.close()
    figure(f"nbd.open and close, {given}, {buffering}: places of an exception", found)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_signals_at_any_moment_lose_no_byte(uri: str, buffering: int) -> None:
    rounds = 5000 if SOAK else 200
    stops = 0
    rand = random.Random(buffering)
    with handling(stop), nbd.open(uri, buffering=buffering) as disk:
        for _ in range(rounds):
            start = disk.seek(rand.randrange(SIZE - 20_000))
            data = b""
            try:
                signal.setitimer(signal.ITIMER_REAL, rand.uniform(1e-5, 3e-4))
                try:
                    data = disk.read(5000)
                    end = disk.tell()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                stops += 1
                continue  # the data may have been read without being returned
            assert data == DATA[start : start + len(data)]
            assert end == start + len(data)
    assert stops
