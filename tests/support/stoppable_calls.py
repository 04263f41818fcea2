"""Every call of files, queues, copies and clients that waits, at each point where it can wait.

This is a program, `python -m support.stoppable_calls FOLDER`.  It reads lines `NAME WAY` from its
standard input.  For each line it makes that call against a server that hangs, and prints the
outcome as a line of JSON.  If a call hangs, only this program hangs: test_stopped_waits.py ends it
and starts another.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import nbd
from support.forms import SOAK
from support.hostile import DiskServer
from support.servers import Server, nbdkit_argv
from support.sizes import KIB, MIB
from support.usage import collect_garbage, descriptors, registered

TIMEOUT = 0.2  # seconds that a call may wait
SETTLING = 0.03  # seconds after the server stops until the call is certainly waiting
AGAIN = 2.0  # seconds within which the threads of a call must end

#: What ends a waiting call: its timeout=, Ctrl-C (a signal whose handler raises
#: KeyboardInterrupt), a handler that raises an Exception, or asyncio; or the call ends by itself.
WAYS = ("timeout", "ctrl_c", "handler", "cancel", "wait_for", "itself")
SIGNALS = ("ctrl_c", "handler")


class Stop(Exception):
    """The exception that the signal handler of the program raises."""


@dataclass
class Outcome:
    """The outcome of a call."""

    raised: str = ""  # the name of the exception, and its errno
    errnum: int = 0
    is_ours: bool = False  # whether it is the object that the signal handler raised
    message: str = ""
    late: float | None = None  # milliseconds from the deadline or the signal to the exception
    total: float = 0.0  # until everything was closed
    signals: int = 0
    registered: int = 0
    descriptors: int = 0
    threads: list[str] = field(default_factory=list)
    unraisable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # raised by a handler in a finalizer
    failure: str = ""  # a failure of the cell itself


class Cell:
    """The servers and files of a call, and the way in which the call will be stopped."""

    def __init__(self, folder: Path, way: str) -> None:
        self.way = way
        self.timeout = TIMEOUT if way == "timeout" else None
        self.outcome = Outcome()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        self.cancelled: Callable[[], object] = bool
        self.pause: Callable[[], object] = bool
        self.resume: Callable[[], object] = bool
        self._raised: BaseException | None = None
        self._began = 0.0
        self._due: float | None = None
        self._timers: list[threading.Timer] = []

    # --- what a call needs --------------------------------------------------------------------

    def server(self, size: int = MIB, **settings: Any) -> DiskServer:
        """Start a server."""
        return self.stack.enter_context(DiskServer(self.folder, size, **settings))

    def stopping(self, at: str, size: int = MIB) -> DiskServer:
        """Start a server that stops answering at a command."""
        server = self.server(size)
        self.arm(server, at)
        return server

    def arm(self, server: DiskServer, at: str) -> None:
        """Make a server stop answering at a command, and the call be stopped after that."""
        server.stop(at, self.soon)

    def slow(self, size: int, at_once: int) -> DiskServer:
        """Start a server with a slow line, which never pauses for long."""
        server = self.server(size)
        server.line = at_once, 0.05
        self.timeout = 0.6  # a busy machine must not be late, and one reply must take longer
        return server

    def handle(self, server: DiskServer) -> nbd.NBD:
        """Connect a handle, with the timeout of the call."""
        handle = nbd.connect(server.uri)
        self.stack.callback(handle.__exit__, None, None, None)
        handle.settimeout(self.timeout)
        return handle

    def file(self, size: int = MIB) -> Path:
        """Make a file with data and holes."""
        path = self.folder / "file"
        with path.open("wb") as file:
            file.truncate(size)
            for start in range(0, size, 128 * KIB):
                file.seek(start)
                file.write(b"file" * (16 * KIB))
        return path

    def pipe(self) -> tuple[Any, Any]:
        """Make a pipe of file objects, which are closed with the cell."""
        reading, writing = os.pipe()
        ends = io.FileIO(reading, "r"), io.FileIO(writing, "w")
        for one in ends:
            self.stack.callback(one.close)
        return ends

    def fifo(self) -> Path:
        """Make a FIFO whose other side is not opened."""
        path = self.folder / "fifo"
        os.mkfifo(path)
        return path

    # --- how it is stopped --------------------------------------------------------------------

    def soon(self) -> None:
        """Stop the call shortly."""
        if self.way in ("ctrl_c", "handler", "cancel"):
            timer = threading.Timer(SETTLING, self._stop)
            timer.daemon = True
            self._timers.append(timer)
            timer.start()
        elif self.way == "timeout":
            self._due = max(self._began, time.monotonic()) + TIMEOUT
        elif self.way == "wait_for":
            self._due = self._began + TIMEOUT
        else:
            self._due = time.monotonic()

    def _stop(self) -> None:
        self._due = time.monotonic()
        if self.way == "cancel":
            self.cancelled()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        self.outcome.signals += 1
        if self.outcome.signals == 1:
            self._raised = KeyboardInterrupt() if self.way == "ctrl_c" else Stop()
            raise self._raised
        raise KeyboardInterrupt

    def begin(self) -> None:
        """Note that the call begins; the signal is sent when the server stops."""
        self._began = time.monotonic()

    def begin_without_server(self) -> None:
        """Do the same where no server reports that it has stopped."""
        self.begin()
        timer = threading.Timer(0.05, self.soon)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def begin_suspended(self) -> None:
        """Do the same with a server that is stopped right now by SIGSTOP."""
        self.pause()
        self.stack.callback(self.resume)
        self.begin_without_server()

    def ended(self) -> None:
        """Note that the call has ended, unless that was noted before."""
        if self.outcome.late is None and self._due is not None:
            self.outcome.late = 1000 * (time.monotonic() - self._due)

    def call(self, call: Callable[[], Any]) -> Any:
        """Make the call that is measured."""
        self.begin()
        try:
            return call()
        finally:
            self.ended()

    # --- what came of it ----------------------------------------------------------------------

    def run(self, function: Callable[[Cell], object]) -> Outcome:
        """Make the call, and close everything afterwards."""
        outcome = self.outcome
        usual_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        before = descriptors()
        ours = set(threading.enumerate())
        usual = signal.signal(signal.SIGINT, self.on_signal)
        try:
            try:
                self.begin()
                function(self)
            except BaseException as error:
                self.ended()
                self._note(error)
            finally:
                self.ended()
                if self._due is not None:
                    outcome.total = 1000 * (time.monotonic() - self._due)
        except BaseException:  # a late signal
            outcome.failure = traceback.format_exc()
        finally:
            signal.signal(signal.SIGINT, usual)
            for timer in self._timers:
                timer.cancel()
                timer.join()
        self._raised = None
        outcome.threads = self._left_over(ours)
        self.stack.close()
        until = time.monotonic() + AGAIN
        while True:  # daemon threads may still be finishing work of the call
            outcome.registered = registered()
            collect_garbage()
            outcome.descriptors = descriptors() - before
            if not (outcome.registered or outcome.descriptors) or time.monotonic() > until:
                break
            time.sleep(0.05)
        sys.unraisablehook = usual_hook
        return outcome

    def _note(self, error: BaseException) -> None:
        outcome = self.outcome
        outcome.raised = type(error).__name__
        outcome.errnum = getattr(error, "errnum", 0) or getattr(error, "errno", 0) or 0
        outcome.is_ours = error is self._raised
        outcome.message = f"{type(error).__name__}: {error}"
        if not isinstance(error, (nbd.Error, KeyboardInterrupt, Stop, asyncio.TimeoutError)):
            outcome.failure = traceback.format_exc()
        error.__traceback__ = None

    def _left_over(self, ours: set[threading.Thread]) -> list[str]:
        """Return the names of threads that would keep the program from exiting."""
        until = time.monotonic() + AGAIN
        left = []
        for thread in set(threading.enumerate()) - ours:
            if thread.name == "disk server" or thread.daemon:
                continue
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                left.append(thread.name)
        return left

    def _unraisable(self, arguments: Any) -> None:
        text = f"{arguments.exc_value!r} in {arguments.object!r}"
        if isinstance(arguments.exc_value, (KeyboardInterrupt, Stop)):
            self.outcome.lost.append(text)
            self.outcome.signals = 0
            self.soon()
        elif not isinstance(arguments.exc_value, ResourceWarning):
            self.outcome.unraisable.append(text)


#: By name: the call, the ways to stop it, and the expected end: the exception of that way
#: ("stopped"), or no exception ("done").
TABLE: dict[str, tuple[Callable[[Cell], object], dict[str, str]]] = {}

SYNC = {"timeout": "stopped", "ctrl_c": "stopped", "handler": "stopped"}
ASYNC = {"timeout": "stopped", "cancel": "stopped", "wait_for": "stopped", "ctrl_c": "stopped"}


def cell(
    name: str, ways: dict[str, str], **more: str
) -> Callable[[Callable[[Cell], object]], Callable[[Cell], object]]:
    """Add a function to the table."""

    def add(function: Callable[[Cell], object]) -> Callable[[Cell], object]:
        assert name not in TABLE, name
        TABLE[name] = function, {**ways, **more}
        return function

    return add


def signalled(ways: dict[str, str] = SYNC) -> dict[str, str]:
    """Return the ways of stopping a call that has no timeout."""
    return {way: end for way, end in ways.items() if way != "timeout"}


# --- nbd.connect ------------------------------------------------------------------------------

for stop in ("greet", "option"):

    @cell(f"connect, at {stop}", SYNC)
    def _(c: Cell, stop: str = stop) -> None:
        nbd.connect(c.stopping(stop).uri, timeout=c.timeout)

    @cell(f"open, at {stop}", SYNC)
    def _(c: Cell, stop: str = stop) -> None:
        nbd.open(c.stopping(stop).uri, timeout=c.timeout)


@cell("connect to a command that says nothing", SYNC)
def _(c: Cell) -> None:
    c.begin_without_server()
    nbd.connect(["sh", "-c", "cat >/dev/null"], timeout=c.timeout)


@cell("connect to a server that is not there yet", signalled())
def _(c: Cell) -> None:
    c.begin_without_server()
    nbd.connect(f"nbd+unix:///?socket={c.folder}/nothing", retry_for=600)


@cell("open with 4 connections of which 2 are greeted", {"timeout": "done", "itself": "done"})
def _(c: Cell) -> None:
    server = c.server(connections=2)
    c.begin_without_server()
    with nbd.open(server.uri, connections=4, timeout=c.timeout) as file:
        assert file.read() == server.memory


# --- nbd.open ---------------------------------------------------------------------------------

READS: dict[str, Callable[[Any], object]] = {
    "read": lambda file: file.read(),
    "read of 4 KiB": lambda file: file.read(4096),
    "readinto": lambda file: file.readinto(bytearray(300_000)),
    "readinto of 1 MiB": lambda file: file.readinto(bytearray(MIB)),
    "readline": lambda file: file.readline(100),
    "iteration": lambda file: next(iter(file)),
    "seek and read": lambda file: (file.seek(777_777), file.read(10)),
}
BUFFERED: dict[str, Callable[[Any], object]] = {
    "read1": lambda file: file.read1(100),
    "readinto1": lambda file: file.readinto1(bytearray(100)),
    "peek": lambda file: file.peek(),
}

for how, buffering in (("", -1), (" unbuffered", 0)):
    for name, read in {**READS, **({} if how else BUFFERED)}.items():

        @cell(f"open:{how} {name}", SYNC)
        def _(c: Cell, read: Callable[[Any], object] = read, buffering: int = buffering) -> None:
            server = c.server()
            with nbd.open(server.uri, buffering=buffering, timeout=c.timeout) as file:
                c.arm(server, "read")
                try:
                    c.call(lambda: read(file))
                finally:
                    server.resume()
                    file.seek(0)
                    assert file.read(4) == b"data"  # the file is still usable

    @cell(f"open:{how} read over a handle", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server()
        with nbd.open(c.handle(server), buffering=buffering) as file:
            c.arm(server, "read")
            try:
                c.call(lambda: file.read(4096))
            finally:
                server.resume()

    @cell(f"open:{how} read, in the middle of a reply", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server()
        with nbd.open(server.uri, buffering=buffering, timeout=c.timeout) as file:
            c.arm(server, "reply")
            try:
                c.call(lambda: file.read(4096))
            finally:
                server.resume()
                file.seek(0)
                assert file.read(4) == b"data"

    @cell(f"open:{how} read over a line that is slow", {"timeout": "done"})
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.slow(128 * KIB, 8 * KIB)
        with nbd.open(server.uri, buffering=buffering, timeout=c.timeout) as file:
            assert file.read() == server.memory

    @cell(f"open:{how} write over a line that is slow", {"timeout": "done"})
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.slow(4 * MIB, 64 * KIB)
        with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
            file.write(b"x" * 2 * MIB)
            file.flush()
            assert server.memory[: 2 * MIB] == b"x" * 2 * MIB

    @cell(f"open:{how} write of 12 MiB", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server(16 * MIB)
        with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
            c.arm(server, "write")
            try:
                c.call(lambda: file.write(bytes(12 * MIB)))
            finally:
                server.resume()

    @cell(f"open:{how} read of what is being written", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server()
        with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
            c.arm(server, "write")
            file.write(bytes(500_000))
            try:
                c.call(lambda: (file.seek(0), file.read(10)))
            finally:
                server.resume()

    for stop in ("write", "flush"):

        @cell(f"open:{how} flush, at {stop}", SYNC)
        def _(c: Cell, stop: str = stop, buffering: int = buffering) -> None:
            server = c.server()
            with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
                c.arm(server, stop)
                file.write(b"x" * 100)
                try:
                    c.call(file.flush)
                finally:
                    server.resume()

        @cell(f"open:{how} close, at {stop}", SYNC)
        def _(c: Cell, stop: str = stop, buffering: int = buffering) -> None:
            server = c.server()
            file = nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout)
            c.arm(server, stop)
            file.write(b"x" * 100)
            try:
                c.call(file.close)
            finally:
                assert file.closed

        @cell(f"open:{how} leaving a with block, at {stop}", SYNC)
        def _(c: Cell, stop: str = stop, buffering: int = buffering) -> None:
            server = c.server()
            with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
                c.arm(server, stop)
                file.write(b"x" * 100)

    @cell(f"open:{how} leaving a with block by an exception, with writes in flight", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server(16 * MIB)
        with nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout) as file:
            c.arm(server, "write")
            file.write(b"x" * 100)
            c.call(lambda: file.write(bytes(12 * MIB)))

    @cell(f"open:{how} leaving a with block by an exception, with reads in flight", SYNC)
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server()
        with nbd.open(server.uri, buffering=buffering, timeout=c.timeout) as file:
            c.arm(server, "read")
            c.call(lambda: file.read(4096))

    @cell(
        f"open:{how} close, at disconnect",
        {"timeout": "done", "ctrl_c": "stopped", "handler": "stopped", "itself": "done"},
    )
    def _(c: Cell, buffering: int = buffering) -> None:
        server = c.server()
        file = nbd.open(server.uri, "r+b", buffering=buffering, timeout=c.timeout)
        file.write(b"x" * 100)
        c.arm(server, "disconnect")
        try:
            c.call(file.close)
        finally:
            assert file.closed
            assert server.memory[:100] == b"x" * 100


# --- nbd.extents and Queue --------------------------------------------------------------------


@cell("extents", SYNC)
def _(c: Cell) -> None:
    server = c.server()
    handle = c.handle(server)
    c.arm(server, "block_status")
    try:
        c.call(lambda: list(nbd.extents(handle)))
    finally:
        server.resume()
        assert len(list(nbd.extents(handle))) == 16


QUEUED: dict[str, Callable[[nbd.queue.Queue], object]] = {
    "read": lambda queue: queue.read(nbd.Buffer(4096), 0),
    "reply": lambda queue: queue.read(nbd.Buffer(4096), 0),
    "write": lambda queue: queue.write(bytes(4096), 0),
    "zero": lambda queue: queue.zero(4096, 0),
    "trim": lambda queue: queue.trim(4096, 0),
    "cache": lambda queue: queue.cache(4096, 0),
    "flush": lambda queue: queue.flush(),
}

for stop, ask in QUEUED.items():

    @cell(f"Queue.wait, at {stop}", signalled(), timeout="done")
    def _(c: Cell, stop: str = stop, ask: Callable[[Any], Any] = ask) -> None:
        server = c.server()
        handle = c.handle(server)
        c.arm(server, stop)
        with nbd.queue.Queue(handle) as queue:
            request = ask(queue)
            try:
                finished = c.call(lambda: queue.wait(1, c.timeout))
                assert finished == []
            finally:
                server.resume()
                while not request.is_done:
                    queue.wait()
                assert request.error is None


@cell("Queue.close with reads in flight", {"itself": "done"})
def _(c: Cell) -> None:
    server = c.server()
    handle = c.handle(server)
    queue = nbd.queue.Queue(handle)
    c.arm(server, "read")
    for _ in range(16):
        queue.read(nbd.Buffer(4096), 0)
    queue.wait(1, 0.05)
    c.call(queue.close)


# --- nbd.copy ---------------------------------------------------------------------------------


def copying(c: Cell, source: Any, target: Any) -> nbd.Copied:
    """Copy, and note when the copy has ended."""
    return c.call(lambda: nbd.copy(source, target, timeout=c.timeout))  # type: ignore[no-any-return]


#: The other side of a copy from or to the server that stops.
SOURCES: dict[str, Callable[[Cell], Any]] = {
    "a path": lambda c: c.file(),
    "an open file": lambda c: c.stack.enter_context(c.file().open("rb")),
    "BytesIO": lambda c: io.BytesIO(b"data" * (256 * KIB)),
    "a URI": lambda c: c.server().uri,
    "a pipe": lambda c: full_pipe(c),
}
TARGETS: dict[str, Callable[[Cell], Any]] = {
    "a path": lambda c: c.folder / "target",
    "an open file": lambda c: c.stack.enter_context((c.folder / "target").open("w+b")),
    "BytesIO": lambda c: io.BytesIO(),
    "a URI": lambda c: c.server().uri,
}


def full_pipe(c: Cell) -> Any:
    """Return a pipe that a thread writes to."""
    reading, writing = c.pipe()

    def write() -> None:
        with suppress(OSError):
            for _ in range(16):
                writing.write(b"d" * 64 * KIB)
        writing.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    c.stack.callback(thread.join)
    c.stack.callback(reading.close)  # so that the thread ends
    return reading


#: When a copy disconnects, it is complete: that is bounded, and only a signal's exception ends it.
LAST = {"timeout": "done", "ctrl_c": "stopped", "itself": "done"}
BOTH = {"timeout": "stopped", "ctrl_c": "stopped"}

for other, make in TARGETS.items():
    for stop in ("greet", "option", "block_status", "read", "reply", "disconnect"):

        @cell(f"copy: a URI, at {stop}, to {other}", LAST if stop == "disconnect" else BOTH)
        def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = make) -> None:
            copying(c, c.stopping(stop).uri, make(c))

    for stop in ("block_status", "read"):

        @cell(f"copy: a handle, at {stop}, to {other}", SYNC)
        def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = make) -> None:
            server = c.server()
            with nbd.connect(server.uri) as handle:  # the handle itself has no timeout
                c.arm(server, stop)
                copying(c, handle, make(c))


for other, make in SOURCES.items():
    for stop in ("greet", "option", "write", "zero", "flush", "disconnect"):
        if stop != "zero" or other not in ("BytesIO", "a pipe"):

            @cell(f"copy: {other} to a URI, at {stop}", LAST if stop == "disconnect" else BOTH)
            def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = make) -> None:
                copying(c, make(c), c.stopping(stop).uri)

    for stop in ("write", "zero", "flush"):
        if stop != "zero" or other not in ("BytesIO", "a pipe"):

            @cell(f"copy: {other} to a handle, at {stop}", SYNC)
            def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = make) -> None:
                server = c.server()
                with nbd.connect(server.uri) as handle:
                    c.arm(server, stop)
                    copying(c, make(c), handle)


for other, make in TARGETS.items():

    @cell(f"copy: a URI over a line that is slow to {other}", {"timeout": "done"})
    def _(c: Cell, make: Callable[[Cell], Any] = make) -> None:
        server = c.slow(256 * KIB, 4 * KIB)
        assert sum(nbd.copy(server.uri, make(c), timeout=c.timeout)) == 256 * KIB


for other, make in SOURCES.items():

    @cell(f"copy: {other} to a URI over a line that is slow", {"timeout": "done"})
    def _(c: Cell, make: Callable[[Cell], Any] = make) -> None:
        source = io.BytesIO(b"data" * (512 * KIB)) if make is SOURCES["BytesIO"] else make(c)
        server = c.slow(4 * MIB, 64 * KIB)
        assert sum(nbd.copy(source, server.uri, timeout=c.timeout)) > 0


@cell("copy: a command that says nothing", BOTH)
def _(c: Cell) -> None:
    c.begin_without_server()
    nbd.copy(["sh", "-c", "cat >/dev/null"], io.BytesIO(), timeout=c.timeout)


@cell("copy: a URI of which 1 connection of 4 is greeted", {"timeout": "done", "itself": "done"})
def _(c: Cell) -> None:
    server, target = c.server(connections=1), c.server(connections=1)
    c.begin_without_server()
    nbd.copy(server.uri, target.uri, connections=4, timeout=c.timeout)
    assert target.memory == server.memory


def silent(c: Cell) -> Any:
    """Return a pipe to which nothing is written."""
    return c.pipe()[0]


def full(c: Cell) -> Any:
    """Return a full pipe from which nothing is read."""
    return c.pipe()[1]


def silent_fifo(c: Cell) -> Path:
    """Return a FIFO that is open for writing, but to which nothing is written."""
    path = c.fifo()
    c.stack.callback(os.close, os.open(path, os.O_RDWR))
    return path


BLOCKING_SOURCES = {
    "a FIFO without other side": Cell.fifo,
    "a pipe that stays empty": silent,
    "a FIFO that stays empty": silent_fifo,
}
BLOCKING_TARGETS = {
    "a FIFO without other side": Cell.fifo,
    "a pipe that is not read": full,
    "a FIFO that is not read": silent_fifo,
}

for other, make in BLOCKING_SOURCES.items():
    for kind, make_target in {
        "a URI": TARGETS["a URI"],
        "a path": TARGETS["a path"],
        "BytesIO": TARGETS["BytesIO"],
    }.items():

        @cell(f"copy: {other} to {kind}", SYNC)
        def _(c: Cell, make: Any = make, make_target: Any = make_target) -> None:
            source, target = make(c), make_target(c)
            c.begin_without_server()
            nbd.copy(source, target, timeout=c.timeout)


for other, make in BLOCKING_TARGETS.items():
    for kind, make_source in {"a URI": SOURCES["a URI"], "a path": SOURCES["a path"]}.items():

        @cell(f"copy: {kind} to {other}", SYNC)
        def _(c: Cell, make: Any = make, make_source: Any = make_source) -> None:
            source, target = make_source(c), make(c)
            c.begin_without_server()
            nbd.copy(source, target, timeout=c.timeout)


# --- asyncio ----------------------------------------------------------------------------------


def wait_for(c: Cell, coroutine: Callable[[], Any]) -> Any:
    """Run a coroutine as a program does, and stop its task in the way of the cell."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(coroutine())
        c.cancelled = lambda: loop.call_soon_threadsafe(task.cancel)
        c.begin()
        try:
            if c.way == "wait_for":
                return await asyncio.wait_for(task, TIMEOUT)
            return await task
        except asyncio.CancelledError:
            c.ended()
            if c.way == "cancel":
                raise Stop from None  # asyncio.run must not see a CancelledError
            raise
        finally:
            c.ended()

    if c.way == "ctrl_c":  # so asyncio.run behaves as in any program
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return asyncio.run(main())


for stop in ("greet", "option"):

    @cell(f"aio.connect, at {stop}", ASYNC)
    def _(c: Cell, stop: str = stop) -> None:
        server = c.stopping(stop)

        async def main() -> None:
            async with nbd.aio.connect(server.uri, timeout=c.timeout):
                pass

        wait_for(c, main)


@cell("aio.connect to a command that says nothing", ASYNC)
def _(c: Cell) -> None:
    async def main() -> None:
        c.begin_without_server()
        await nbd.aio.connect(["sh", "-c", "cat >/dev/null"], timeout=c.timeout)

    wait_for(c, main)


@cell(
    "aio.connect with 4 connections of which 2 are greeted", {"timeout": "done", "itself": "done"}
)
def _(c: Cell) -> None:
    server = c.server(connections=2)

    async def main() -> None:
        c.begin_without_server()
        async with nbd.aio.connect(server.uri, connections=4, timeout=c.timeout) as disk:
            assert await disk.pread(4, 0) == b"data"

    wait_for(c, main)


async def all_extents(disk: Any) -> None:
    """Iterate over the extents of a disk."""
    async for _ in disk.extents():
        pass


AWAITED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "pread": ("read", lambda disk: disk.pread(4096, 0)),
    "pread_into": ("read", lambda disk: disk.pread_into(nbd.Buffer(4096), 0)),
    "pwrite": ("write", lambda disk: disk.pwrite(bytes(4096), 0)),
    "zero": ("zero", lambda disk: disk.zero(4096, 0)),
    "trim": ("trim", lambda disk: disk.trim(4096, 0)),
    "cache": ("cache", lambda disk: disk.cache(4096, 0)),
    "flush": ("flush", lambda disk: disk.flush()),
    "block_status": ("block_status", lambda disk: disk.block_status(4096, 0, lambda *_: 0)),
    "extents": ("block_status", all_extents),
    "pread, in the middle of a reply": ("reply", lambda disk: disk.pread(4096, 0)),
}

for name, (stop, call) in AWAITED.items():

    @cell(f"aio: {name}", ASYNC)
    def _(c: Cell, stop: str = stop, call: Callable[[Any], Any] = call) -> None:
        server = c.server()

        async def main() -> None:
            async with nbd.aio.connect(server.uri, timeout=c.timeout) as disk:
                c.arm(server, stop)
                c.begin()
                await call(disk)

        wait_for(c, main)


@cell("aio: in line for a place", ASYNC)
def _(c: Cell) -> None:
    server = c.server()

    async def main() -> None:
        async with nbd.aio.connect(server.uri, timeout=c.timeout, depth=1) as disk:
            c.arm(server, "read")
            await asyncio.gather(disk.pread(512, 0), disk.pread(512, 0))

    wait_for(c, main)


@cell("aio: close, at disconnect", {"itself": "done"})
def _(c: Cell) -> None:
    server = c.server()

    async def main() -> None:
        async with nbd.aio.connect(server.uri, timeout=c.timeout):
            c.arm(server, "disconnect")

    wait_for(c, main)


@cell("aio: close, with commands in flight", {"itself": "done"})
def _(c: Cell) -> None:
    server = c.server()

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            c.arm(server, "read")
            reads = asyncio.gather(*(disk.pread(512, 0) for _ in range(8)), return_exceptions=True)
            await asyncio.sleep(0.02)
        assert all(isinstance(one, nbd.ClosedHandle) for one in await reads)

    wait_for(c, main)


AIO_BOTH = {"timeout": "stopped", "cancel": "stopped", "ctrl_c": "stopped"}
AIO_LAST = {"timeout": "done", "cancel": "stopped", "ctrl_c": "stopped", "itself": "done"}

for other in ("a path", "BytesIO", "a URI"):
    for stop in ("greet", "option", "block_status", "read", "disconnect"):

        @cell(
            f"aio.copy: a URI, at {stop}, to {other}",
            AIO_LAST if stop == "disconnect" else AIO_BOTH,
        )
        def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = TARGETS[other]) -> None:
            source, target = c.stopping(stop).uri, make(c)
            wait_for(c, lambda: nbd.aio.copy(source, target, timeout=c.timeout))


for other in ("a path", "BytesIO", "a pipe"):
    for stop in ("greet", "option", "write", "zero", "flush", "disconnect"):
        if stop != "zero" or other == "a path":

            @cell(
                f"aio.copy: {other} to a URI, at {stop}",
                AIO_LAST if stop == "disconnect" else AIO_BOTH,
            )
            def _(c: Cell, stop: str = stop, make: Callable[[Cell], Any] = SOURCES[other]) -> None:
                source, target = make(c), c.stopping(stop).uri
                wait_for(c, lambda: nbd.aio.copy(source, target, timeout=c.timeout))


@cell("aio.copy: a URI over a line that is slow", {"timeout": "done"})
def _(c: Cell) -> None:
    server = c.slow(256 * KIB, 4 * KIB)
    wait_for(c, lambda: nbd.aio.copy(server.uri, c.folder / "target", timeout=c.timeout))
    assert (c.folder / "target").read_bytes() == server.memory


for stop in ("block_status", "read"):

    @cell(f"aio.copy: a client, at {stop}", ASYNC)
    def _(c: Cell, stop: str = stop) -> None:
        server = c.server()

        async def main() -> None:
            async with nbd.aio.connect(server.uri) as disk:
                c.arm(server, stop)
                await nbd.aio.copy(disk, c.folder / "target", timeout=c.timeout)

        wait_for(c, main)


for stop in ("write", "zero", "flush"):

    @cell(f"aio.copy: to a client, at {stop}", ASYNC)
    def _(c: Cell, stop: str = stop) -> None:
        server = c.server()
        path = c.file()

        async def main() -> None:
            async with nbd.aio.connect(server.uri) as disk:
                c.arm(server, stop)
                await nbd.aio.copy(path, disk, timeout=c.timeout)

        wait_for(c, main)


for other, make in BLOCKING_SOURCES.items():

    @cell(f"aio.copy: {other} to a URI", ASYNC)
    def _(c: Cell, make: Any = make) -> None:
        source, target = make(c), c.server().uri

        async def main() -> None:
            c.begin_without_server()
            await nbd.aio.copy(source, target, timeout=c.timeout)

        wait_for(c, main)


for other, make in BLOCKING_TARGETS.items():

    @cell(f"aio.copy: a URI to {other}", ASYNC)
    def _(c: Cell, make: Any = make) -> None:
        source, target = c.server().uri, make(c)

        async def main() -> None:
            c.begin_without_server()
            await nbd.aio.copy(source, target, timeout=c.timeout)

        wait_for(c, main)


# --- a server that is stopped by SIGSTOP ------------------------------------------------------


def suspend(c: Cell) -> str:
    """Start an nbdkit that is stopped once the call has begun; return its URI."""
    argv = nbdkit_argv(["memory", "1M", "--threads=4"], None, None, None)
    server = Server(argv, Path(tempfile.mkdtemp(dir=c.folder)))
    c.stack.callback(server.close)
    c.pause = server.pause
    c.resume = server.resume
    return server.uri


@cell("SIGSTOP: open: read", SYNC)
def _(c: Cell) -> None:
    with nbd.open(suspend(c), timeout=c.timeout) as file:
        c.begin_suspended()
        try:
            file.read()
        finally:
            c.ended()
            c.resume()


@cell("SIGSTOP: open: leaving a with block", SYNC)
def _(c: Cell) -> None:
    with nbd.open(suspend(c), "r+b", timeout=c.timeout) as file:
        file.write(b"x" * 10)
        c.begin_suspended()


@cell("SIGSTOP: extents", SYNC)
def _(c: Cell) -> None:
    with nbd.connect(suspend(c)) as handle:
        handle.settimeout(c.timeout)
        c.begin_suspended()
        list(nbd.extents(handle))


@cell("SIGSTOP: Queue.wait", signalled())
def _(c: Cell) -> None:
    with nbd.connect(suspend(c)) as handle, nbd.queue.Queue(handle) as queue:
        c.begin_suspended()
        queue.read(nbd.Buffer(512), 0)
        queue.wait()


for other, source_make, target_make in (
    ("from a handle to a path", None, TARGETS["a path"]),
    ("from a handle to BytesIO", None, TARGETS["BytesIO"]),
    ("from a path to a handle", SOURCES["a path"], None),
    ("from BytesIO to a handle", SOURCES["BytesIO"], None),
):

    @cell(f"SIGSTOP: copy: {other}", SYNC)
    def _(c: Cell, source_make: Any = source_make, target_make: Any = target_make) -> None:
        with nbd.connect(suspend(c)) as handle:
            source = handle if source_make is None else source_make(c)
            target = handle if target_make is None else target_make(c)
            c.begin_suspended()
            nbd.copy(source, target, timeout=c.timeout)


@cell("SIGSTOP: aio: pread", ASYNC)
def _(c: Cell) -> None:
    uri = suspend(c)

    async def main() -> None:
        async with nbd.aio.connect(uri, timeout=c.timeout) as disk:
            c.begin_suspended()
            await disk.pread(512, 0)

    wait_for(c, main)


@cell("SIGSTOP: aio.copy", AIO_BOTH)
def _(c: Cell) -> None:
    uri = suspend(c)

    async def main() -> None:
        async with nbd.aio.connect(uri) as disk:
            c.begin_suspended()
            await nbd.aio.copy(disk, c.folder / "target", timeout=c.timeout)

    wait_for(c, main)


def cells() -> Iterator[tuple[str, str, str]]:
    """Yield the names of the calls, the ways to stop them, and the expected ends."""
    for name, (_, ways) in TABLE.items():
        for way, end in ways.items():
            if SOAK or not is_long(name, way):
                yield name, way, end


def is_long(name: str, way: str) -> bool:
    """Return whether only the long form tries a cell, because another is nearly the same."""
    if "copy" in name and "an open file" in name:
        return True
    if way == "handler":
        return name not in HANDLED
    return way == "wait_for" and not name.startswith("aio: pread")


#: The calls in which a handler also raises an Exception in the short form.
HANDLED = (
    "connect, at greet",
    "open: read",
    "open: unbuffered write of 12 MiB",
    "open: close, at flush",
    "extents",
    "Queue.wait, at read",
    "copy: a handle, at read, to a path",
    "copy: a URI to a FIFO without other side",
)


def outcome_of(folder: Path, name: str, way: str) -> Outcome:
    """Make one call."""
    function, _ = TABLE[name]
    return Cell(folder, way).run(function)


def main() -> None:
    """Make the calls that standard input names."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    folder = Path(sys.argv[1])
    outcome_of(folder, "open: read", "timeout")  # late imports keep descriptors open
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, way = line.rstrip("\n").rpartition(" ")
        print(json.dumps(outcome_of(folder, name, way).__dict__), flush=True)
    os._exit(0)  # the threads that remain were reported


if __name__ == "__main__":
    main()
