# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with a callable that makes its connections, or with a list of handles."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from pathlib import Path
from typing import Any, Callable

import pytest
from support.files import BUFFERINGS, raw_of
from support.makers import (
    SLOW,
    Hanging,
    Maker,
    Makers,
    connected,
    makers,
    no_descriptor_is_left,
)
from support.programs import run_program
from support.servers import TIMEOUT, StartServer, program
from support.signals import Stop, alarm
from support.sizes import MIB
from support.usage import collect_garbage

import nbd
from nbd._disks.background import running

__all__ = ["makers", "no_descriptor_is_left"]


def in_use(disk: Any) -> int:
    """Return how many connections have joined."""
    return len(raw_of(disk)._connections.queue._shim_queue._handles)


def read_until(disk: Any, reached: Callable[[], bool]) -> None:
    """Read again and again, until a condition holds."""
    until = time.monotonic() + TIMEOUT
    while not reached():
        disk.seek(0)
        disk.read(4 * MIB)
        assert time.monotonic() < until


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_tls_over_four_connections(makers: Makers, tmp_path: Path, buffering: int) -> None:
    log = tmp_path / "log"
    server = makers.server("--filter=log", "memory", "8M", f"logfile={log}")
    with nbd.open(makers.of(server), "r+b", buffering=buffering, connections=4) as disk:
        read_until(disk, lambda: in_use(disk) == 4)
        disk.seek(5)
        disk.write(b"hello")
        disk.flush()
        disk.seek(5)
        assert disk.read(5) == b"hello"
    assert connected(log) == 4


def test_one_connection_is_the_default(server: Any) -> None:
    maker = Maker(server.uri)
    with nbd.open(maker) as disk:
        assert disk.read() == bytes(MIB)
    assert len(maker.made) == 1
    assert maker.all_closed()


def test_one_connection_is_made_to_a_server_that_the_callable_starts() -> None:
    calls = []

    def connect() -> nbd.NBD:
        calls.append(1)
        return nbd.connect([program("nbdkit"), "-s", "memory", "1M"], timeout=TIMEOUT)

    with nbd.open(connect, connections=4) as disk:
        assert disk.read() == bytes(MIB)
    assert calls == [1]


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_dropped_file_closes_what_the_callable_has_made(server: Any, buffering: int) -> None:
    maker = Maker(server.uri)
    disk: Any = nbd.open(maker, buffering=buffering, connections=3)
    read_until(disk, lambda: in_use(disk) == 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        disk = None
        collect_garbage()
    assert maker.all_closed()


def test_a_dropped_file_is_closed_though_its_callable_and_handles_refer_to_it(server: Any) -> None:
    class Handle(nbd.NBD):
        pass

    class Owner:
        def connect(self) -> nbd.NBD:
            made = Handle()
            made.connect_uri(server.uri)
            made.owner = self  # type: ignore[attr-defined]
            return made

    owner: Any = Owner()
    disk: Any = nbd.open(owner.connect, connections=2)
    owner.disk = disk
    read_until(disk, lambda: in_use(disk) == 2)
    is_there = weakref.ref(owner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        disk = owner = None
        collect_garbage()
        gc.collect()
    assert is_there() is None


def test_a_dropped_file_is_closed_though_a_mistake_of_its_callable_was_not_raised(
    server: Any,
) -> None:
    class Owner:
        disk: Any = None
        has_made = False

        def connect(self) -> Any:
            if self.has_made:
                return None
            self.has_made = True
            return nbd.connect(server.uri, timeout=TIMEOUT)

    owner: Any = Owner()
    owner.disk = nbd.open(owner.connect, connections=2)
    until = time.monotonic() + TIMEOUT
    while not raw_of(owner.disk)._connections._mistakes:
        assert time.monotonic() < until
        time.sleep(0.001)
    while running and time.monotonic() < until:
        time.sleep(0.001)
    is_there = weakref.ref(owner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        owner = None
        collect_garbage()
        gc.collect()
    assert is_there() is None


def fail() -> Any:
    """Raise what no caller expects."""
    raise LookupError


async def coroutine_function() -> nbd.NBD:
    """Connect, but only for who awaits it."""
    return nbd.NBD()


def test_what_the_first_call_raises_passes_through() -> None:
    with pytest.raises(LookupError):
        nbd.open(fail)


@pytest.mark.parametrize("function", [lambda: "nbd://localhost", coroutine_function, dict])
def test_what_is_no_handle_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"source: the callable has returned \w+: .*nbd\.NBD"):
        nbd.open(function)


def test_a_handle_that_is_not_connected_is_refused() -> None:
    made: list[nbd.NBD] = []

    def make() -> nbd.NBD:
        made.append(nbd.NBD())
        return made[-1]

    with pytest.raises(nbd.Error, match=r"source: .*the handle is not connected"):
        nbd.open(make)
    with pytest.raises(nbd.ClosedHandle):
        made[0].get_debug()


def test_a_file_that_cannot_be_opened_closes_the_connection(nbdkit: StartServer) -> None:
    maker = Maker(nbdkit("--readonly", "memory", "1M").uri)
    with pytest.raises(nbd.DiskError, match="read-only"):
        nbd.open(maker, "r+b")
    assert maker.all_closed()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_mistake_of_the_second_call_is_raised_once(server: Any, buffering: int) -> None:
    maker = Maker(server.uri, then=[lambda: maker.made[0]])
    with nbd.open(maker, "r+b", buffering=buffering, connections=3) as disk:
        with pytest.raises(ValueError, match=r"source: the callable .* at each call"):
            read_until(disk, lambda: False)
        disk.seek(0)
        assert disk.write(b"still usable") == 12
        disk.flush()
    assert maker.all_closed()
    with nbd.open(server.uri) as disk:
        assert disk.read(12) == b"still usable"


def test_a_further_connection_that_fails_is_left_out(server: Any) -> None:
    maker = Maker(server.uri, then=[fail])
    with nbd.open(maker, connections=3) as disk:
        read_until(disk, lambda: len(maker.threads) == 2 and not running)
        assert in_use(disk) == 1


def test_a_further_connection_to_another_export_is_left_out(
    nbdkit: StartServer, server: Any
) -> None:
    other = Maker(nbdkit("memory", "2M").uri)
    maker = Maker(server.uri, then=[other])
    with nbd.open(maker, connections=2) as disk:
        read_until(disk, lambda: bool(other.made) and other.all_closed())
        assert in_use(disk) == 1


def test_a_signal_ends_the_first_call() -> None:
    with alarm(), pytest.raises(Stop):
        nbd.open(lambda: time.sleep(TIMEOUT))  # type: ignore[arg-type, return-value]


def test_a_second_call_that_hangs_does_not_delay_close(server: Any) -> None:
    hanging = Hanging(server.uri)
    with nbd.open(Maker(server.uri, then=[hanging]), connections=2) as disk:
        assert disk.read() == bytes(MIB)
        assert hanging.begun.wait(TIMEOUT)
    assert not hanging.ended.is_set()
    hanging.may_continue.set()  # what it makes too late is closed: see no_descriptor_is_left


def test_a_program_ends_while_the_second_call_hangs(server: Any) -> None:
    text = """
import sys, threading, nbd
calls = []
def connect():
    calls.append(1)
    if len(calls) > 1:
        threading.Event().wait()
    return nbd.connect(sys.argv[1], timeout=20)
with nbd.open(connect, connections=3) as disk:
    print(len(disk.read()))
"""
    done = run_program(text, server.uri)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{MIB}\n", "")


def test_the_handle_keeps_its_timeout_unless_the_file_has_one(nbdkit: StartServer) -> None:
    uri = nbdkit("--filter=delay", "memory", "1M", "rdelay=3600").uri

    def connect() -> nbd.NBD:
        return nbd.connect(uri, timeout=0.3)

    for options, seconds in (({}, r"0\.3"), ({"timeout": 0.2}, r"0\.2")):
        disk = nbd.open(connect, **options)  # type: ignore[arg-type]
        with pytest.raises(nbd.Timeout, match=f"for {seconds} seconds"):
            disk.read(1)
        disk.close()


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_list_of_handles_is_used_and_stays_open(
    nbdkit: StartServer, tmp_path: Path, buffering: int
) -> None:
    log = tmp_path / "log"
    uri = nbdkit(*SLOW[:2], "--threads=4", "memory", "8M", "rdelay=1ms", f"logfile={log}").uri
    handles = [nbd.connect(uri, timeout=TIMEOUT) for _ in range(3)]
    with nbd.open(handles, "r+b", buffering=buffering) as disk:
        disk.write(b"hello")
        disk.seek(0)
        memory = bytearray(8 * MIB)
        disk.readinto(memory)  # type: ignore[attr-defined]
        assert memory[:5] == b"hello"
    lines = [line for line in log.read_text().splitlines() if " Read id=" in line]
    assert len({line.split("connection=")[1].split()[0] for line in lines}) == 3
    assert [h.pread(5, 0) for h in handles] == [b"hello"] * 3
    for h in handles:
        h.close()


def test_lists_that_cannot_be_used_are_refused(nbdkit: StartServer, server: Any) -> None:
    options = "--threads=4", "--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"
    alone = nbdkit(*options).uri
    uris = server.uri, server.uri, nbdkit("memory", "2M").uri, alone, alone
    first, second, other, third, fourth = (nbd.connect(uri, timeout=TIMEOUT) for uri in uris)
    with pytest.raises(ValueError, match=r"source\[1\]: the same handle is given twice"):
        nbd.open([first, first])
    with pytest.raises(ValueError, match=r"source\[1\]: it is connected to another export"):
        nbd.open([first, other])
    with pytest.raises(TypeError, match=r"source\[1\]: nbd\.NBD is needed, not str"):
        nbd.open([first, "x"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="connections: 2 need a URI or a callable"):
        nbd.open([first, second], connections=2)
    with pytest.raises(ValueError, match="can_multi_conn"):
        nbd.open([third, fourth], "r+b")
    nbd.open([third, fourth]).close()
    for h in (first, second, other, third, fourth):
        h.close()
