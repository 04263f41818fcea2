"""Signal handlers that run while a call waits: what they may do, and what the call raises."""

from __future__ import annotations

import os
import threading
import time
import traceback
from types import FrameType
from typing import Any, Callable

import pytest
from support.figures import Figure, pass_on
from support.forks import forks
from support.forms import SOAK
from support.programs import output_of
from support.servers import TIMEOUT, Server, StartServer
from support.signals import SHORT, Stop, alarm
from support.usage import registered
from support.waits import BLOCK, orphans, paused, reap

import nbd


@pytest.fixture
def server(nbdkit: StartServer) -> Server:
    """Return an nbdkit whose reads take some time."""
    return nbdkit("memory", "1M", "--filter=delay", "rdelay=200ms", "--threads=8")


@pytest.fixture
def slow(server: Server, h: nbd.NBD) -> nbd.NBD:
    """Return a handle connected to it; its disk begins with bytes of 7."""
    h.connect_unix(server.socket)
    h.pwrite(bytes([7]) * BLOCK, 0)
    return h


class Handler:
    """A signal handler that acts, and records whether it was called."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.calls = 0
        self.result: object = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.calls += 1
        self.result = self.act()


def raise_stop() -> None:
    """Raise Stop."""
    raise Stop


def test_a_wait_continues_after_a_handler_that_does_not_raise(slow: nbd.NBD) -> None:
    handler = Handler(lambda: None)
    with alarm(handler):
        assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK
    assert handler.calls == 1


def test_a_handler_may_use_the_same_handle(slow: nbd.NBD) -> None:
    handler = Handler(lambda: (slow.get_size(), slow.pread(4, 0), slow.aio_in_flight()))
    with alarm(handler):
        assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK
    assert handler.result == (1 << 20, bytes([7]) * 4, 0) or handler.result == (
        1 << 20,
        bytes([7]) * 4,
        1,
    )
    assert registered() == 0


def test_a_handler_may_use_another_handle(nbdkit: StartServer, slow: nbd.NBD) -> None:
    with nbd.NBD() as other:
        other.connect_unix(nbdkit("pattern", "1M").socket)
        handler = Handler(lambda: other.pread(8, 8))
        with alarm(handler):
            assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK
    assert handler.result == bytes([0, 0, 0, 0, 0, 0, 0, 8])


def test_a_handler_may_close_the_handle(slow: nbd.NBD) -> None:
    with alarm(Handler(slow.close)), pytest.raises((nbd.Error, nbd.ClosedHandle)):
        slow.pread(BLOCK, 0)
    assert registered() == 0


def test_a_handler_may_set_the_timeout_of_later_calls(server: Server, slow: nbd.NBD) -> None:
    with alarm(Handler(lambda: slow.settimeout(0.01))):
        assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK
    with paused(server), pytest.raises(nbd.Timeout):
        slow.pread(BLOCK, 0)


@forks
def test_a_handler_may_fork(slow: nbd.NBD) -> None:
    def fork() -> int:
        child = os.fork()
        if child == 0:
            os._exit(0)
        return os.waitpid(child, 0)[1]

    handler = Handler(fork)
    with alarm(handler):
        assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK
    assert handler.result == 0


@forks
def test_a_child_that_a_handler_forked_does_not_take_the_reply(slow: nbd.NBD) -> None:
    parent = os.getpid()
    handler = Handler(lambda: os.fork())
    try:
        with alarm(handler):
            data = slow.pread(BLOCK, 0)
    except BaseException:
        if os.getpid() == parent:
            raise
        os._exit(7)
    if os.getpid() != parent:
        os._exit(0)
    assert data == bytes([7]) * BLOCK
    assert isinstance(handler.result, int)
    assert os.waitstatus_to_exitcode(os.waitpid(handler.result, 0)[1]) == 7


def test_the_exception_of_a_handler_is_raised_unchanged(server: Server, slow: nbd.NBD) -> None:
    with paused(server), alarm(Handler(raise_stop)), pytest.raises(Stop) as caught:
        slow.pread(BLOCK, 0)
    assert caught.value.__cause__ is None
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "pread" in names
    assert names[-1] == "raise_stop"


def test_it_is_raised_although_a_callback_has_raised_too(
    server: Server, slow: nbd.NBD, unraisable: list[Any]
) -> None:
    def chunk(*arguments: object) -> None:
        raise LookupError("in the chunk")

    def read_in_vain() -> None:
        while True:
            with pytest.raises(nbd.Error):
                slow.pread_structured(BLOCK, 0, chunk)

    with alarm(Handler(raise_stop), 0.3), pytest.raises(Stop):
        read_in_vain()
    assert unraisable == []


def test_a_thread_that_waits_for_another_threads_call_is_stopped_too(
    server: Server, slow: nbd.NBD
) -> None:
    with paused(server):
        slow.aio_pread(bytearray(BLOCK), 0, lambda error: 1)
        thread = threading.Thread(target=lambda: slow.poll(-1))
        thread.start()
        with alarm(Handler(raise_stop)), pytest.raises(Stop):
            slow.pread(BLOCK, 0)
    thread.join()
    reap(slow)
    assert slow.pread(BLOCK, 0) == bytes([7]) * BLOCK


def test_a_signal_while_another_thread_waits_runs_in_the_main_thread(
    server: Server, slow: nbd.NBD
) -> None:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(bytes(slow.pread(BLOCK, 0))))
    thread.start()
    with alarm(Handler(raise_stop), 0.02), pytest.raises(Stop):
        time.sleep(TIMEOUT)
    thread.join()
    assert found == [bytes([7]) * BLOCK]


STORM = """
import ctypes, gc, os, resource, signal, sys, threading, time, nbd

PACKAGE = os.path.dirname(nbd.__file__) + os.sep
KEEPS_FREED = hasattr(ctypes.CDLL(None), "__asan_init")  # AddressSanitizer keeps up to 256 MiB
orphans = nbd._binding.shim.lib.nbdshim_orphans
SIZES = [512, 4096, 65536, 300_000]
SECONDS = float(sys.argv[2])
wrong, signals, stopped = [], 0, 0

class Interrupt(KeyboardInterrupt):
    pass

def handler(number, frame):
    global signals
    signals += 1
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return  # its weak references have callbacks, which cannot raise
        if frame.f_code.co_filename.startswith(PACKAGE):
            if frame.f_code.co_name.startswith("_keep"):
                return  # two signals within microseconds: cffi drops an exception in its `onerror`
            raise Interrupt
        frame = frame.f_back

def connected(number):
    h = nbd.NBD()
    h.connect_unix(sys.argv[1])
    h.pwrite(bytes([number]) * SIZES[-1], number << 20)
    return h

def exercise(h, number, buffer):
    global stopped
    end = time.monotonic() + SECONDS
    turn = 0
    while time.monotonic() < end:
        turn += 1
        size = SIZES[turn % len(SIZES)]
        try:
            if turn % 3 == 0:
                h.pwrite(bytes([number]) * size, number << 20)
            elif turn % 3 == 1:
                if h.pread(size, number << 20) != bytes([number]) * size:
                    wrong.append("data")
            else:
                h.pread_into(buffer, number << 20)
                if bytes(buffer) != bytes([number]) * 4096:
                    wrong.append("data in a buffer")
        except Interrupt:
            stopped += 1
        except BaseException as error:
            wrong.append(error)
            raise

def settle(h):
    while orphans(h._h):
        h.poll(-1)

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

handles = [connected(number) for number in range(1, 5)]
buffers = [nbd.Buffer(4096) for _ in handles]
exercise_once, SECONDS = SECONDS, 0.3
exercise(handles[0], 1, buffers[0])
SECONDS = exercise_once
before = resident()
threads = [
    threading.Thread(target=exercise, args=(handles[number], number + 1, buffers[number]))
    for number in (1, 2, 3)
]
for thread in threads:
    thread.start()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
exercise(handles[0], 1, buffers[0])
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(0.01)
for thread in threads:
    thread.join()
for h in handles:
    settle(h)
while nbd._binding.errors.pending:
    try:
        handles[0].get_size()
    except Interrupt:
        stopped += 1
gc.collect(); gc.collect()
assert wrong == [], wrong
assert [orphans(h._h) for h in handles] == [0, 0, 0, 0]
assert nbd._binding.callbacks.registry == {}, len(nbd._binding.callbacks.registry)
for number, h in enumerate(handles, 1):
    assert h.pread(SIZES[-1], number << 20) == bytes([number]) * SIZES[-1]
    h.close()
assert stopped > 0
grown = resident() - before
limit = 64 << 20 if sys.implementation.name == "cpython" else 256 << 20  # PyPy frees late
assert KEEPS_FREED or grown < limit, grown
print(f"storm beside threads, signals: {signals}")
print(f"storm beside threads, calls that were stopped: {stopped}")
print(f"storm beside threads, MiB more than before: {grown / (1 << 20):.1f}")
"""


def test_a_storm_of_signals_beside_threads_leaves_no_orphan_and_right_data(
    nbdkit: StartServer, figure: Figure
) -> None:
    server = nbdkit("memory", "16M", "--threads=4")
    printed = output_of(STORM, server.socket, "10" if SOAK else "1")
    pass_on(printed, figure)


def test_a_signal_that_arrives_while_connecting_stops_it(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    h = nbd.NBD()
    with paused(server), alarm(Handler(raise_stop), SHORT), pytest.raises(Stop):
        h.connect_uri(server.uri)
    assert h.pread(4, 0) == bytes(4)
    assert orphans(h) == 0
    h.close()


def test_a_handle_that_is_dropped_meanwhile_does_not_take_what_a_handler_raised(
    server: Server, slow: nbd.NBD, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = nbd._binding.errors._failure

    def drop_another(*arguments: Any) -> Any:
        nbd.NBD().__del__()
        return settle(*arguments)

    monkeypatch.setattr(nbd._binding.errors, "_failure", drop_another)
    with paused(server), alarm(Handler(raise_stop)), pytest.raises(Stop):
        slow.pread(BLOCK, 0)
