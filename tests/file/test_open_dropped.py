# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: a file that is dropped without closing loses no data, and never hangs."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
from support.files import BUFFERINGS
from support.programs import output_of, run_program
from support.servers import Server, StartServer
from support.sizes import KIB, MIB
from support.waits import paused

import nbd

MODES = ["r+b", "wb"]
COUNT = 40
#: Seconds; a dropped file waits for about one, and the machine may be busy.
BOUND = 20.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 4 MiB of zeroes."""
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    return path


@pytest.fixture
def slow(nbdkit: StartServer, image: Path) -> Server:
    """Return a server on the image whose writes take some time."""
    return nbdkit("--threads=4", "--filter=delay", "file", str(image), "wdelay=10ms")


def write_all(disk: Any) -> bytes:
    """Write in pieces; return everything that was written."""
    pieces = [bytes([65 + n % 26]) * 5000 for n in range(COUNT)]
    for piece in pieces:
        assert disk.write(piece) == len(piece)
    return b"".join(pieces)


class Node:
    """An object in a reference cycle."""

    def __init__(self, *kept: object) -> None:
        """Refer to itself and to other objects."""
        self.kept = [*kept, self]


def drop(*kept: list[Any]) -> None:
    """Drop the elements of lists, and finalize all garbage."""
    for one in kept:
        one.clear()
    for _ in range(3):
        gc.collect()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_what_was_written_reaches_the_disk(
    slow: Server, image: Path, buffering: int, mode: str
) -> None:
    dropped: list[Any] = [nbd.open(slow.uri, mode, buffering=buffering)]
    data = write_all(dropped[0])
    with pytest.warns(ResourceWarning, match="unclosed disk"):
        drop(dropped)
    assert image.read_bytes()[: len(data)] == data


@pytest.mark.parametrize("order", ["file first", "handle first"])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_the_order_of_finalizers_in_a_cycle_does_not_matter(
    slow: Server, image: Path, buffering: int, order: str
) -> None:
    gc.disable()
    try:
        for turn in range(5):
            h = nbd.connect(slow.uri)
            own: Any = nbd.open(h, "r+b", buffering=buffering)
            own.seek(turn * 400 * KIB)
            data = write_all(own)
            raw = own if not buffering else own.raw
            parts = [own, h, raw]
            Node(*(parts if order == "file first" else reversed(parts)))
            h.kept_by = own  # type: ignore[attr-defined]
            del h, own, raw
            with pytest.warns(ResourceWarning, match="unclosed disk"):
                drop(parts)
            start = turn * 400 * KIB
            assert image.read_bytes()[start : start + len(data)] == data
    finally:
        gc.enable()


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("form", ["plain", "cycle"])
def test_what_a_program_leaves_open_is_written_at_its_end(
    slow: Server, image: Path, buffering: int, form: str
) -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import nbd
class Node: pass
h = nbd.connect(sys.argv[1])
disk = nbd.open(h, "r+b", buffering=int(sys.argv[2]))
for _ in range(40):
    disk.write(b"x" * 5000)
if sys.argv[3] == "cycle":
    node = Node()
    node.h, node.disk, node.self, h.node = h, disk, node, node
    del h, disk, node
"""
    output_of(program, slow.uri, str(buffering), form)
    assert image.read_bytes()[:200_000] == b"x" * 200_000


@pytest.mark.parametrize("timeout", [None, 0.2, 60.0])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_server_that_hangs_does_not_stop_the_program(
    nbdkit: StartServer, unraisable: list[Any], buffering: int, timeout: float | None
) -> None:
    server = nbdkit("memory", "4M")
    dropped: list[Any] = [nbd.open(server.uri, "r+b", buffering=buffering, timeout=timeout)]
    with paused(server):
        dropped[0].write(b"x" * 100_000)
        start = time.monotonic()
        with pytest.warns(ResourceWarning, match="unclosed disk"):
            drop(dropped)
        assert time.monotonic() - start < BOUND
    assert [type(one) for one in unraisable] == [nbd.Timeout]
    assert "may be lost" in str(unraisable[0])


def test_the_end_of_a_program_does_not_wait_for_a_server_that_hangs(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "4M")
    program = """
import glob, os, sys, signal, warnings
warnings.simplefilter("ignore")
import nbd
def states(pid):
    for path in glob.glob(f"/proc/{pid}/task/*/stat"):
        with open(path) as stat:
            yield stat.read().rpartition(")")[2].split()[0]
disk = nbd.open(sys.argv[1], "r+b")
os.kill(int(sys.argv[2]), signal.SIGSTOP)
while set(states(sys.argv[2])) != {"T"}:
    pass
disk.write(b"x" * 300000)
"""
    start = time.monotonic()
    done = run_program(program, server.uri, str(server.process.pid))
    assert time.monotonic() - start < BOUND
    assert "may be lost" in done.stderr


def test_a_detached_buffer_leaves_a_file_that_can_be_dropped(slow: Server, image: Path) -> None:
    kept: list[Any] = [nbd.open(slow.uri, "r+b")]
    kept[0].write(b"abc")
    kept[0] = kept[0].detach()
    kept[0].write(b"def")
    with pytest.warns(ResourceWarning, match="unclosed disk"):
        drop(kept)
    assert image.read_bytes()[:6] == b"abcdef"
