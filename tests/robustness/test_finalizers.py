"""A handle whose finalizer runs while references to it exist is closed, and nothing else."""

from __future__ import annotations

import threading
from typing import Any, Callable

import pytest
from support.handles import closed
from support.hostile import Connection, Wire
from support.methods import METHODS, call_with_anything
from support.programs import output_of

import nbd

# Other handles are made all the time, so that freed memory is reused.  Each handle has a name: if
# the name changes, something wrote to memory that it does not own.
PROGRAM = """
import gc, sys, nbd

others = []

def crowd():
    for _ in range(20):
        h = nbd.NBD()
        h.set_handle_name(f"other {len(others)}")
        others.append(h)

def touch(h):
    for call in (h.get_size, h.close, lambda: h.set_handle_name("stale"), lambda: h.pread(512, 0),
                 lambda: h.aio_pread(bytearray(512), 0, print), lambda: h.poll(0)):
        try:
            call()
        except nbd.ClosedHandle:
            continue
        raise AssertionError("a finalized handle was used")

def check():
    for number, h in enumerate(others):
        assert h.get_handle_name() == f"other {number}", (number, h.get_handle_name())

def run(once):
    for _ in range(50):
        once()
        crowd()
        for _ in range(3):
            gc.collect()
        check()
    sys.exit(failures)

failures = 0
sys.unraisablehook = lambda args: globals().update(failures=repr(args.exc_value))
"""

CYCLE = """
class Disk:
    def __init__(self, h):
        self.h = h
        self.parts = [self]

    def __del__(self):
        crowd()
        if closes:
            try:
                self.h.close()
            except nbd.ClosedHandle:
                pass
        elif is_closed(self.h):
            touch(self.h)
        else:
            self.h.get_handle_name()

def is_closed(h):
    try:
        h.get_debug()
    except nbd.ClosedHandle:
        return True
    return False

run(lambda: [Disk(made()), Disk(made())])
"""

MADE = {
    "open": "def made(): return nbd.NBD()",
    "closed": "def made(): h = nbd.NBD(); h.close(); return h",
    "finalized": "def made(): h = nbd.NBD(); h.__del__(); return h",
    "initialized again": "def made(): h = nbd.NBD(); h.__init__(); h.close(); return h",
}

REVIVED = """
revived = []

class Disk(nbd.NBD):
    def __del__(self):
        super().__del__()
        revived.append(self)

def once():
    Disk()
    gc.collect()
    crowd()
    for h in revived:
        touch(h)

run(once)
"""


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("closes", ["True", "False"], ids=["closing", "using"])
def test_another_finalizer_of_a_cycle_finds_it_open_or_closed(closes: str, made: str) -> None:
    output_of(f"{PROGRAM}\ncloses = {closes}\n{made}\n{CYCLE}")


def test_a_finalizer_makes_handles_where_garbage_is_collected_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYPY_GC_NURSERY", "128K")
    output_of(f"{PROGRAM}\ncloses = True\n{MADE['open']}\n{CYCLE}")


def test_a_handle_that_revives_itself_is_closed() -> None:
    output_of(PROGRAM + REVIVED)


@pytest.mark.parametrize("name", METHODS)
def test_after_its_finalizer_was_called_by_hand_a_method_raises_closed_handle(name: str) -> None:
    handle: Any = nbd.NBD()
    handle.__del__()
    others = [nbd.NBD() for _ in range(4)]
    with pytest.raises(nbd.ClosedHandle):
        call_with_anything(handle, name)
    handle.__del__()
    assert not any(closed(other) for other in others)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h, act: h.pread_structured(512, 0, act), id="chunk"),
        pytest.param(lambda h, act: h.block_status(512, 0, act), id="extent"),
        pytest.param(lambda h, act: completed(h, act), id="completion"),
        pytest.param(lambda h, act: debugged(h, act), id="debug"),
    ],
)
def test_its_finalizer_does_nothing_in_its_own_callback(
    disk: nbd.NBD, call: Callable[[nbd.NBD, Any], object]
) -> None:
    disk.pwrite(b"right" * 100, 0)
    calls: list[int] = []

    def act(*arguments: Any) -> int:
        finalized: Any = disk
        finalized.__del__()
        calls.append(1)
        return 0

    call(disk, act)
    assert calls
    assert disk.pread(500, 0) == b"right" * 100


def completed(h: nbd.NBD, act: Callable[..., int]) -> None:
    """Read, with a completion."""
    cookie = h.aio_pread(bytearray(512), 0, act)
    while not h.aio_command_completed(cookie):
        h.poll(-1)


def debugged(h: nbd.NBD, act: Callable[..., int]) -> None:
    """Make a call, with a debug callback."""
    h.set_debug_callback(act)
    h.set_debug(True)
    h.get_size()
    h.set_debug(False)


def test_its_finalizer_in_another_thread_ends_a_call_that_waits() -> None:
    asked = threading.Event()

    def silence(wire: Wire) -> None:
        wire.negotiate()
        wire.request()
        asked.set()
        wire.linger()

    handle: Any = nbd.NBD()

    def finalize() -> None:
        assert asked.wait(20)
        handle.__del__()

    thread = threading.Thread(target=finalize)
    with Connection(silence) as peer:
        handle.connect_socket(peer.fileno())
        thread.start()
        with pytest.raises((nbd.Error, nbd.ClosedHandle)):
            handle.pread(512, 0)
        thread.join(20)
    assert closed(handle)
