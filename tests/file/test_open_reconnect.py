# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open with reconnect: a lost connection delays calls, and loses nothing."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from support.cutting import random_limits
from support.files import BUFFERINGS
from support.hostile import DiskServer, HungUp, Request, Wire
from support.injection import Injector, came_out, exception_of_a_destructor, places
from support.outliving import LONG, cutter, nothing_is_left, wait_until, watchdog
from support.programs import output_of
from support.servers import TIMEOUT
from support.signals import Stop, alarm
from support.sizes import KIB, MIB
from support.usage import collect_garbage
from support.volatile import VolatileServer

import nbd
from nbd._disks.background import running

__all__ = ["nothing_is_left", "watchdog"]

SIZE = 1 * MIB
#: Seconds after which a file gives up.
BRIEF = 0.3
#: A program whose connection is cut, and which does not configure logging.
_PROGRAM = """
import os, socket, sys, time, nbd
with nbd.open(sys.argv[1], reconnect=60, buffering=0) as disk:
    disk.read(1)
    [handle] = disk._ours
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as sock:
        sock.shutdown(socket.SHUT_RDWR)
    disk.read(1)
    until = time.monotonic() + 20
    while "logging" not in sys.modules and time.monotonic() < until:
        time.sleep(0.01)
print("logging" in sys.modules)
"""


@pytest.fixture
def volatile(short_path: Path) -> Iterator[VolatileServer]:
    """Return a server that loses what was not flushed."""
    with VolatileServer(short_path, SIZE) as server:
        yield server


def opened(server: Any, mode: str = "r+b", **options: Any) -> Any:
    """Open the disk of a server, with reconnect."""
    return nbd.open(server.uri, mode, **{"reconnect": LONG, **options})


def threads_end() -> None:
    """Wait until no thread of the package runs."""
    wait_until(lambda: not running)


def repeat(call: Callable[[], object]) -> None:
    """Call until nbd.Timeout is not raised any more: the machine may be busy."""
    done = False
    while not done:
        with suppress(nbd.Timeout):
            call()
            done = True


# What is only a delay.


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_read_goes_through_a_kill(volatile: VolatileServer, buffering: int) -> None:
    volatile.fill(b"x" * SIZE)
    with opened(volatile, "rb", buffering=buffering) as disk:
        assert disk.read(512) == b"x" * 512
        volatile.restart()
        disk.seek(SIZE // 2)
        assert disk.read(512) == b"x" * 512


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_what_was_acknowledged_and_not_flushed_is_written_again(
    volatile: VolatileServer, buffering: int
) -> None:
    with opened(volatile, buffering=buffering) as disk:
        for place in range(4):
            disk.write(bytes([65 + place]) * 128 * KIB)
        disk.seek(0)
        assert disk.read(1) == b"A"  # all were acknowledged
        volatile.restart()
        disk.flush()
        volatile.kill()
        expected = b"".join(bytes([65 + place]) * 128 * KIB for place in range(4))
        assert volatile.disk()[: len(expected)] == expected
        volatile.start()


def test_the_last_of_overlapping_writes_wins(volatile: VolatileServer) -> None:
    with opened(volatile, buffering=0) as disk:
        for letter in b"ABCDE":
            disk.seek(0)
            disk.write(bytes([letter]) * 4096)
        disk.seek(2048)
        disk.read(1)
        volatile.restart()
        disk.flush()
    assert volatile.disk()[:4096] == b"E" * 4096


def test_close_goes_through_a_kill(volatile: VolatileServer) -> None:
    disk = opened(volatile)
    disk.write(b"z" * SIZE)
    volatile.restart()
    disk.close()
    assert volatile.disk() == b"z" * SIZE


def test_an_idle_file_connects_again_at_its_next_call(volatile: VolatileServer) -> None:
    with opened(volatile, buffering=0) as disk:
        disk.write(b"a" * 512)
        disk.flush()
        for _ in range(3):
            volatile.restart()
            disk.seek(0)
            assert disk.read(512) == b"a" * 512


def test_a_server_that_is_away_for_a_while_is_waited_for(volatile: VolatileServer) -> None:
    with opened(volatile, buffering=0) as disk:
        volatile.kill()
        starting = threading.Timer(0.2, volatile.start)
        starting.start()
        try:
            disk.write(b"b" * 512)
            disk.flush()
        finally:
            starting.join()
    assert volatile.disk()[:512] == b"b" * 512


def test_a_callable_makes_the_connection_again(volatile: VolatileServer) -> None:
    connect = partial(nbd.connect, volatile.uri, timeout=TIMEOUT)
    with nbd.open(connect, "r+b", reconnect=LONG, buffering=0) as disk:
        disk.write(b"c" * 512)
        volatile.restart()
        disk.flush()
    assert volatile.disk()[:512] == b"c" * 512


def test_a_cut_connection_is_made_again_at_any_byte(volatile: VolatileServer) -> None:
    model = bytearray(SIZE)
    limits = random_limits(random.Random(32), 64 * KIB, 20)
    with cutter(volatile, limits) as proxy, opened(proxy, buffering=0) as disk:
        for number in range(60):
            at = number * 7919 % (SIZE - 8 * KIB)
            data = bytes([number + 1]) * (1 + number * 131 % (8 * KIB))
            disk.seek(at)
            disk.write(data)
            model[at : at + len(data)] = data
            disk.seek(at)
            assert disk.read(len(data)) == data
        disk.flush()
        assert proxy.made > 1
    assert volatile.disk() == model


def test_each_of_two_connections_is_replaced(volatile: VolatileServer) -> None:
    rng = random.Random(1)
    with cutter(volatile) as proxy, opened(proxy, connections=2, buffering=0) as disk:
        wait_until(lambda: bool(disk.seek(0) or disk.read(1)) and proxy.made == 2)
        for number in range(20):
            disk.seek(number * 32 * KIB)
            disk.write(bytes([number + 1]) * 32 * KIB)
            disk.seek(0)
            assert disk.read(1) == b"\1"
            if number % 4 == 3:
                proxy.cut_one(rng)
        disk.flush()
        assert proxy.made > 2
    expected = b"".join(bytes([number + 1]) * 32 * KIB for number in range(20))
    assert volatile.disk()[: len(expected)] == expected


# What is refused.


def test_a_handle_is_refused(server: Any) -> None:
    with nbd.connect(server.uri) as handle:
        with pytest.raises(ValueError, match="source: a handle cannot be connected again"):
            nbd.open(handle, reconnect=1)
        with pytest.raises(ValueError, match="source: a list of handles cannot be connected"):
            nbd.open([handle], reconnect=1)
        assert handle.get_size() == SIZE  # it is still open


def test_a_command_is_refused_and_not_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source: a started command cannot be connected again"):
        nbd.open(["touch", str(tmp_path / "started")], reconnect=1)
    assert not (tmp_path / "started").exists()


def test_a_callable_that_starts_a_server_is_refused() -> None:
    start = partial(nbd.connect, ["nbdkit", "-s", "memory", "1M"])
    with pytest.raises(ValueError, match="source: a started command cannot be connected again"):
        nbd.open(start, reconnect=1)


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_what_is_no_number_of_seconds_is_refused(server: Any, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^reconnect"):
        nbd.open(server.uri, reconnect=seconds)


def test_what_is_no_number_is_refused(server: Any) -> None:
    with pytest.raises(TypeError, match=r"^reconnect"):
        nbd.open(server.uri, reconnect="5")  # type: ignore[arg-type]


# When it is over.


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_the_first_error_is_raised_with_how_long_was_tried(
    volatile: VolatileServer, buffering: int
) -> None:
    with opened(volatile, "rb", reconnect=BRIEF, buffering=buffering) as disk:
        volatile.kill()
        with pytest.raises(nbd.DiskError) as caught:
            disk.read(512)
    text = str(caught.value)
    assert f"nbd.open: the connection to {volatile.uri} was lost (" in text
    assert f"could not be made again within {BRIEF:g} seconds" in text
    assert caught.value.errnum in (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_later_calls_raise_it_too(volatile: VolatileServer, buffering: int) -> None:
    disk = opened(volatile, reconnect=BRIEF, buffering=buffering)
    volatile.kill()
    with pytest.raises(nbd.DiskError, match="could not be made again"):
        disk.read(512)
    volatile.start()  # too late
    with pytest.raises(nbd.DiskError, match="could not be made again"):
        disk.read(512)
    with pytest.raises(nbd.DiskError, match="could not be made again"):
        disk.write(b"d" * MIB)
    with suppress(nbd.DiskError):  # which a buffer raises that cannot be written
        disk.close()
    assert disk.closed
    assert volatile.disk()[:512] == bytes(512)


def test_zero_seconds_gives_up_at_once(volatile: VolatileServer) -> None:
    with opened(volatile, "rb", reconnect=0) as disk:
        volatile.kill()
        with pytest.raises(nbd.DiskError, match="within 0 seconds"):
            disk.read(512)


def test_a_server_that_accepts_and_never_answers_is_given_up(short_path: Path) -> None:
    class Dropping(DiskServer):
        def _answer(self, wire: Wire, request: Request) -> None:
            raise HungUp

    with Dropping(short_path) as server:
        disk = opened(server, "rb", reconnect=BRIEF)
        with disk, pytest.raises(nbd.DiskError, match="could not be made again"):
            disk.read(512)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_a_disk_of_another_size_is_never_written_to(volatile: VolatileServer, size: int) -> None:
    disk = opened(volatile, buffering=0)
    disk.write(b"e" * 512)
    disk.read(1)
    volatile.kill()
    os.truncate(volatile.options.path, size)
    volatile.start()
    with pytest.raises(nbd.DiskError, match=f"its size was {SIZE}, and is {size} now") as caught:
        disk.flush()
    assert caught.value.errnum == errno.ESTALE
    with pytest.raises(nbd.DiskError, match="to another disk"):
        disk.close()
    volatile.kill()
    assert volatile.disk() == bytes(size)


def test_a_callable_that_raises_ends_it_with_its_reason(volatile: VolatileServer) -> None:
    calls: list[Any] = [partial(nbd.connect, volatile.uri), partial(int, "no connection")]
    with nbd.open(lambda: calls.pop(0)(), reconnect=LONG) as disk:
        volatile.restart()
        with pytest.raises(nbd.DiskError, match="raised ValueError: invalid literal"):
            disk.read(512)


# What stops a wait meanwhile.


def test_a_timeout_leaves_the_file_usable(volatile: VolatileServer) -> None:
    with opened(volatile, buffering=0, timeout=0.2) as disk:
        disk.write(b"f" * 512)
        disk.seek(0)
        disk.read(512)
        volatile.kill()
        with pytest.raises(nbd.Timeout):
            disk.read(512)
        volatile.start()
        for call in (lambda: disk.seek(0), lambda: disk.read(512), disk.flush):
            repeat(call)
    assert volatile.disk()[:512] == b"f" * 512


def test_a_signal_ends_the_wait_and_the_file_stays_usable(volatile: VolatileServer) -> None:
    with opened(volatile, buffering=0) as disk:
        disk.write(b"g" * 512)
        disk.seek(0)
        disk.read(512)
        volatile.kill()
        with alarm(), pytest.raises(Stop):
            disk.read(512)
        volatile.start()
        disk.seek(0)
        assert disk.read(512) == b"g" * 512
        disk.flush()
    assert volatile.disk()[:512] == b"g" * 512


def test_an_exception_at_any_place_leaves_the_file_usable(
    volatile: VolatileServer, unraisable: list[Any]
) -> None:
    written: dict[str, bytes] = {}
    with cutter(volatile) as proxy, opened(proxy, buffering=0) as disk:

        def write() -> None:
            disk.seek(0)
            disk.write(written["now"])
            disk.flush()

        def once(injector: Injector) -> None:
            written["now"] = injector.left.to_bytes(2, "big") * 16
            proxy.cut()
            error = injector.run(write)
            late = exception_of_a_destructor()  # of the lost handle
            seen = [error, late, *unraisable]
            assert any(map(came_out, seen)) == injector.raised
            unraisable.clear()
            write()
            disk.seek(0)
            assert disk.read(32) == written["now"]

        assert places(once) > 1
        assert len(disk._ours) == 1


def test_a_signal_that_leaves_the_block_closes_the_file(volatile: VolatileServer) -> None:
    disk = opened(volatile)
    volatile.kill()
    with alarm(), pytest.raises(Stop), disk:
        disk.read(512)
    assert disk.closed
    threads_end()


def test_a_file_is_closed_while_another_thread_waits(volatile: VolatileServer) -> None:
    disk = opened(volatile, "rb", buffering=0, timeout=0.5)
    volatile.kill()
    raised: list[BaseException] = []

    def read() -> None:
        try:
            disk.read(512)
        except BaseException as error:
            raised.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    disk.close()
    reading.join()
    assert isinstance(raised[0], (nbd.Timeout, ValueError))
    threads_end()


# The first connection.


def test_the_first_connection_waits_for_a_server_that_is_starting(
    volatile: VolatileServer,
) -> None:
    volatile.kill()
    os.unlink(str(volatile.options.address))
    starting = threading.Timer(0.1, volatile.start)
    starting.start()
    try:
        with opened(volatile, "rb") as disk:
            assert disk.read(1) == b"\0"
    finally:
        starting.join()


def test_the_first_connection_is_given_up_after_the_time(volatile: VolatileServer) -> None:
    volatile.kill()
    with pytest.raises(nbd.Error) as caught:
        opened(volatile, reconnect=BRIEF)
    assert caught.value.errnum == errno.ECONNREFUSED


def test_the_first_connection_goes_through_cuts_in_the_handshake(
    volatile: VolatileServer,
) -> None:
    limits = list(range(0, 120, 10))
    with cutter(volatile, lambda: limits.pop() if limits else None) as proxy:
        with opened(proxy, "rb") as disk:
            assert disk.read(1) == b"\0"
        assert not limits


def test_an_export_that_does_not_exist_is_an_error_at_once(volatile: VolatileServer) -> None:
    made: list[None] = []

    def connect() -> nbd.NBD:
        made.append(None)
        return nbd.connect(f"nbd+unix:///other?socket={volatile.options.address}")

    with pytest.raises(nbd.Error, match="no export named"):
        nbd.open(connect, reconnect=LONG)
    assert len(made) == 1


# What is said, and what is left.


def test_one_line_is_logged_for_each_new_connection(
    volatile: VolatileServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), opened(volatile, buffering=0) as disk:
        disk.read(1)
        assert not caplog.records
        volatile.restart()
        disk.read(1)
        wait_until(lambda: bool(caplog.records))
    assert [record.name for record in caplog.records] == ["nbd"]
    assert caplog.records[0].levelno == logging.WARNING
    assert f"nbd.open: the connection to {volatile.uri} was lost" in caplog.text


def test_a_program_without_logging_prints_nothing(volatile: VolatileServer) -> None:
    assert output_of(_PROGRAM, volatile.uri) == "True\n"  # nothing is on standard error


def test_neither_threads_nor_descriptors_are_left(volatile: VolatileServer) -> None:
    connect = partial(nbd.connect, volatile.uri, timeout=TIMEOUT)
    for source in (volatile.uri, connect):
        disk: Any = nbd.open(source, "r+b", reconnect=LONG, connections=2, buffering=0)
        with disk:
            for _ in range(3):
                disk.write(b"h")
                volatile.restart()
                disk.flush()
            assert len(disk._ours) <= 2
            assert disk.maker == volatile.uri or len(disk.maker._given) <= 2
    threads_end()


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_that_is_dropped_is_closed_though_its_callable_refers_to_it(
    volatile: VolatileServer, buffering: int, is_lost: bool
) -> None:
    class Owner:
        disk: Any = None

        def connect(self) -> nbd.NBD:
            return nbd.connect(volatile.uri, timeout=TIMEOUT)

    owner: Any = Owner()
    owner.disk = nbd.open(owner.connect, "r+b", reconnect=LONG, buffering=buffering)
    owner.disk.read(1)
    if is_lost:
        volatile.restart()
        owner.disk.seek(SIZE // 2)
        owner.disk.read(1)
    is_there = weakref.ref(owner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        owner = None
        collect_garbage()
        gc.collect()
    assert is_there() is None
    threads_end()
