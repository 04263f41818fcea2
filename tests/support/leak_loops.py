"""Repeat each kind of call, callback, error and handle, and measure what each of them leaks.

This is a program, `python -m support.leak_loops GROUP SOCKET FAILING`: a new process has no free
memory in which a leak could hide.  It runs each loop in several stretches and measures the process
after each.  A leak grows in every stretch, whereas a cache fills up once and code is compiled once,
so a single stretch without growth proves that nothing leaks.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbd
from nbd._binding.handle import _open as open_handles
from support.figures import show
from support.forms import SOAK
from support.handles import drain
from support.hostile import (
    OPT_LIST,
    OPT_LIST_META,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_META_CONTEXT,
    REP_SERVER,
    Connection,
    Wire,
    counted,
)
from support.sizes import MIB
from support.usage import collect_garbage, descriptors, registered, resident

CALLS = 1_000_000 if SOAK else 2_000
STRETCHES = 4  # a loop runs at most this many times, and once if nothing leaks
SLACK = 160 << 10  # bytes by which the process may grow in a stretch without a leak
TIMEOUT = 1800  # seconds until a scripted server ends by itself
BATCH = 64  # commands in flight
NAMES = 1000  # exports or contexts in one reply
DROPS = 5000 if SOAK else 100  # handles that are dropped between two collections of garbage on PyPy
CONNECTED_DROPS = 200  # the same, for connected handles


@dataclass
class Kind:
    """A kind of call that is repeated."""

    name: str
    once: Callable[[], object]
    calls: int = 1  # how many calls one repetition makes
    share: int = 1  # a slow loop makes this many times fewer calls than CALLS


@dataclass
class Place:
    """The sockets of two servers: one with a disk, and one whose commands all fail."""

    disk: str
    failing: str

    def connect(self, path: str | None = None) -> nbd.NBD:
        """Return a handle that is connected to the server with a disk, or to a given one."""
        h = nbd.NBD()
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_unix(path or self.disk)
        return h


# --- callbacks --------------------------------------------------------------------------------


class Raised(Exception):
    """The exception that a callback raises."""


def nothing(*_: object) -> None:
    """Callback that returns None."""


def retire(_: object) -> int:
    """Completion callback that retires its command."""
    return 1


def fail(*_: object) -> int:
    """Callback that reports a failure."""
    return -1


def raise_it(*_: object) -> None:
    """Callback that raises."""
    raise Raised


def return_too_much(*_: object) -> int:
    """Callback that returns a number too large for a C int."""
    return 1 << 40


def change_errno(*arguments: Any) -> None:
    """Callback that sets errno to the value that it has."""
    arguments[-1].value += 0
    arguments[-1].value = 28
    arguments[-1].value = 0


# --- what to repeat ---------------------------------------------------------------------------


def raising(kind: type[BaseException], call: Callable[..., object], *args: Any) -> partial[None]:
    """Return a function that makes a call which must raise."""
    return partial(expect, kind, call, *args)


def expect(kind: type[BaseException], call: Callable[..., object], *args: Any) -> None:
    """Make a call that must raise."""
    try:
        call(*args)
    except kind:
        return
    raise AssertionError(f"{call} did not raise {kind.__name__}")


def settings(_: Place) -> Iterator[Kind]:
    """Yield calls that need no server: one for each type of argument and result."""
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    path = Path("/nonexistent/keys")
    yield Kind("a bool that is returned", h.aio_is_created)
    yield Kind("an int that is returned", h.get_tls)
    yield Kind("a flag mask that is returned", h.get_handshake_flags)
    yield Kind("a text that is returned", h.connection_state)
    yield Kind("a text that is returned and freed", h.get_export_name)
    yield Kind("a list item that is returned", partial(h.get_meta_context, 0))
    yield Kind("a bool that is passed", partial(h.set_full_info, True))
    yield Kind("an int that is passed", partial(h.set_uri_allow_transports, 1))
    yield Kind("a pointer that is passed and returned", partial(h.set_private_data, 1 << 40))
    yield Kind("a text that is passed", partial(h.set_export_name, "größe \udcff"))
    yield Kind("a path that is passed", partial(h.set_tls_psk_file, path))

    def contexts() -> None:
        h.clear_meta_contexts()
        h.add_meta_context("base:allocation")

    yield Kind("a list that is filled and cleared", contexts)
    yield Kind("a callback that is replaced", partial(h.set_debug_callback, nothing))
    yield Kind("a callback that is cleared", h.clear_debug_callback)


def buffers(place: Place) -> Iterator[Kind]:
    """Yield operations of nbd.Buffer."""
    data = bytearray(4096)
    buffer = nbd.Buffer.from_bytearray(data)
    d = place.connect()
    yield Kind("Buffer(4096)", partial(nbd.Buffer, 4096))
    yield Kind("Buffer(1 MiB)", partial(nbd.Buffer, MIB), share=20)
    yield Kind("Buffer.from_bytearray", partial(nbd.Buffer.from_bytearray, data))
    yield Kind("Buffer.from_buffer", partial(nbd.Buffer.from_buffer, data))
    yield Kind("Buffer.to_bytearray", buffer.to_bytearray)
    yield Kind("Buffer.to_buffer", buffer.to_buffer)
    yield Kind("Buffer.is_zero", buffer.is_zero)
    yield Kind("Buffer[3:9]", lambda: buffer[3:9])
    yield Kind("Buffer that was read into", lambda: fresh_reads(d), BATCH, share=2)


def fresh_reads(d: nbd.NBD) -> None:
    """Read into Buffers that are dropped at once."""
    for _ in range(BATCH):
        d.aio_pread(nbd.Buffer(4096), 0, retire)
    drain(d)


def commands(place: Place) -> Iterator[Kind]:
    """Yield the commands that wait for their reply."""
    d = place.connect()
    data = bytes(512)
    yield Kind("pread", partial(d.pread, 512, 0))
    yield Kind("pread of 1 MiB", partial(d.pread, MIB, 0), share=100)
    yield Kind("pread_structured", partial(d.pread_structured, 512, 0, nothing))
    yield Kind("pwrite", partial(d.pwrite, data, 0))
    yield Kind("pwrite of a bytearray", partial(d.pwrite, bytearray(512), 0), share=4)
    yield Kind("block_status", partial(d.block_status, MIB, 0, nothing))
    if hasattr(d, "block_status_64"):
        yield Kind("block_status_64", partial(d.block_status_64, MIB, 0, nothing))
    yield Kind("flush", d.flush)
    yield Kind("zero", partial(d.zero, 512, 0), share=4)
    yield Kind("trim", partial(d.trim, 512, 0), share=4)
    yield Kind("cache", partial(d.cache, 512, 0), share=4)
    yield Kind("get_size", d.get_size)
    yield Kind("can_trim", d.can_trim)
    yield Kind("get_uri", d.get_uri)
    yield Kind("poll without waiting", partial(d.poll, 0))


def batch(d: nbd.NBD, issue: Callable[[], object]) -> Callable[[], None]:
    """Return a function that issues many commands and waits for all of them."""

    def once() -> None:
        for _ in range(BATCH):
            issue()
        drain(d)

    return once


def batch_of_cookies(d: nbd.NBD, issue: Callable[[], int]) -> Callable[[], None]:
    """Return the same for commands retired by cookie, including failed ones."""

    def once() -> None:
        cookies = [issue() for _ in range(BATCH)]
        drain(d)
        for cookie in cookies:
            with suppress(nbd.Error):
                assert d.aio_command_completed(cookie)

    return once


def commands_in_flight(place: Place) -> Iterator[Kind]:
    """Yield the commands that do not wait."""
    d = place.connect()
    room, data = bytearray(512), bytes(512)
    extents = partial(d.aio_block_status, MIB, 0)
    chunks = partial(d.aio_pread_structured, room, 0)
    issues: dict[str, Callable[[], int]] = {
        "aio_pread": partial(d.aio_pread, room, 0, retire),
        "aio_pread_structured": partial(chunks, nothing, retire),
        "aio_pwrite": partial(d.aio_pwrite, data, 0, retire),
        "aio_block_status": partial(extents, nothing, retire),
        "aio_flush": partial(d.aio_flush, retire),
        "aio_zero": partial(d.aio_zero, 512, 0, retire),
    }
    for name, issue in issues.items():
        yield Kind(name, batch(d, issue), BATCH)
    by_cookie: dict[str, Callable[[], int]] = {
        "aio_pread, no completion": partial(d.aio_pread, room, 0),
        "aio_pread, completion that does not retire": partial(d.aio_pread, room, 0, nothing),
        "aio_pread_structured, no completion": partial(chunks, nothing),
        "aio_block_status, no completion": partial(extents, nothing),
    }
    for name, issue in by_cookie.items():
        yield Kind(name, batch_of_cookies(d, issue), BATCH, share=4)


def many_names(wire: Wire) -> None:
    """Serve long lists of exports and contexts, again and again."""
    replies = {
        OPT_LIST: (REP_SERVER, counted(b"export") + b"description"),
        OPT_LIST_META: (REP_META_CONTEXT, struct.pack(">I", 0) + b"base:allocation"),
    }
    wire.greet()
    while True:
        code = wire.option().code
        if code in replies:
            kind, payload = replies[code]
            header = struct.pack(">QIII", OPTION_REPLY_MAGIC, code, kind, len(payload))
            wire.send((header + payload) * NAMES)
        wire.answer(code, REP_ACK)


def callbacks(place: Place) -> Iterator[Kind]:
    """Yield each kind of callback, with each thing that it may do besides returning."""
    h, d = nbd.NBD(), place.connect()
    h.set_debug_callback(nothing)
    h.set_debug(True)
    yield Kind("debug", h.get_tls)
    with Connection(many_names, bound=TIMEOUT) as peer, nbd.NBD() as opt:
        opt.set_opt_mode(True)
        opt.connect_socket(peer.fileno())
        yield Kind("list", partial(opt.opt_list, nothing), NAMES)
        yield Kind("context", partial(opt.opt_list_meta_context, nothing), NAMES)
    room = bytearray(512)
    read = partial(d.aio_pread_structured, room, 0)
    yield Kind("errno that is changed", batch(d, partial(read, change_errno, retire)), BATCH)
    kept: list[Any] = [None]

    def keep(view: memoryview, *_: object) -> None:
        kept[0] = view

    yield Kind("view that is kept", partial(d.pread_structured, 512, 0, keep), share=4)

    def ask(*_: object) -> None:
        expect(nbd.Error, d.get_size)
        h.get_tls()

    yield Kind("call from inside", batch(d, partial(read, ask, retire)), BATCH, share=4)


def failing_callbacks(place: Place) -> Iterator[Kind]:
    """Yield the exceptions that callbacks raise, and the other ways in which they fail."""
    d = place.connect()
    sys.unraisablehook = nothing
    failures = {"-1": fail, "an exception": raise_it, "no C int": return_too_much}
    for name, callback in failures.items():
        read = partial(d.aio_pread_structured, bytearray(512), 0, callback)
        map_it = partial(d.aio_block_status, MIB, 0, callback)
        complete = partial(d.aio_flush, callback)
        yield Kind(f"chunk: {name}", batch_of_cookies(d, read), BATCH, share=8)
        yield Kind(f"extent: {name}", batch_of_cookies(d, map_it), BATCH, share=8)
        yield Kind(f"completion: {name}", batch_of_cookies(d, complete), BATCH, share=8)
    wait = raising(nbd.Error, d.pread_structured, 512, 0, raise_it)
    yield Kind("chunk: the cause of an nbd.Error", wait, share=8)


def errors(place: Place) -> Iterator[Kind]:
    """Yield the ways in which a call can fail."""
    h, closed = nbd.NBD(), nbd.NBD()
    any_h: Any = h
    closed.close()
    room, strided = bytearray(512), memoryview(bytes(512))[::2]
    yield Kind("nbd.Error", raising(nbd.Error, h.get_size))
    yield Kind("nbd.Error of a read", raising(nbd.Error, h.pread, 512, 0))
    yield Kind("nbd.Error with a callback", raising(nbd.Error, h.aio_pread, room, 0, retire))
    two = raising(nbd.Error, h.aio_pread_structured, room, 0, nothing, retire)
    yield Kind("nbd.Error with two callbacks", two)
    yield Kind("ClosedHandle", raising(nbd.ClosedHandle, closed.get_size))
    late = raising(nbd.ClosedHandle, closed.aio_pread, room, 0, retire)
    yield Kind("ClosedHandle with a callback", late)
    yield Kind("TypeError for an int", raising(TypeError, any_h.set_tls, "x"))
    yield Kind("TypeError for a text", raising(TypeError, any_h.set_export_name, b"x"))
    yield Kind("TypeError for a buffer", raising(TypeError, any_h.pwrite, 7, 0))
    yield Kind("TypeError for a callback", raising(TypeError, any_h.aio_flush, 7))
    after = raising(TypeError, any_h.aio_pread, room, 0, retire, "x")
    yield Kind("TypeError behind a callback", after)
    yield Kind("OverflowError", raising(OverflowError, h.aio_pread, room, 1 << 64, retire))
    yield Kind("ValueError", raising(ValueError, h.set_export_name, "a\0b"))
    yield Kind("BufferError", raising(BufferError, h.pwrite, strided, 0))
    yield Kind("TypeError for a copy", raising(TypeError, h.__reduce_ex__, 2))
    yield Kind("MemoryError", raising(MemoryError, nbd.Buffer, 1 << 62))
    d = place.connect(place.failing)
    yield Kind("EIO of a read", raising(nbd.Error, d.pread, 512, 0), share=8)
    reads = batch_of_cookies(d, partial(d.aio_pread, room, 0))
    yield Kind("EIO reported to a cookie", reads, BATCH, share=8)
    reported = batch(d, partial(d.aio_pread, room, 0, retire))
    yield Kind("EIO reported to a completion", reported, BATCH, share=8)
    writes = batch_of_cookies(d, partial(d.aio_pwrite, room, 0, nothing))
    yield Kind("EIO reported to both", writes, BATCH, share=8)


def dropping(make: Callable[[], object], number: int = DROPS) -> Callable[[], None]:
    """Return a function that makes many objects, drops each, and collects garbage."""

    def once() -> None:
        for _ in range(number):
            make()
        collect_garbage()

    return once


def close_in_flight(place: Place) -> None:
    """Close a handle with commands of all kinds in flight."""
    h = place.connect()
    h.aio_pread(bytearray(512), 0, retire)
    h.aio_pread(nbd.Buffer(512), 0)
    h.aio_pread_structured(bytearray(512), 0, nothing, nothing)
    h.aio_block_status(MIB, 0, nothing)
    h.close()


def cycle() -> None:
    """Make a handle in a reference cycle, which only the garbage collector frees."""
    h: Any = nbd.NBD()
    h.itself = h
    h.callback = lambda *_: h
    h.set_debug_callback(nothing)


def hung_up() -> None:
    """Make a handle whose server disconnects at once."""
    ours, its = socket.socketpair()
    its.close()
    with nbd.NBD() as h:
        expect(nbd.Error, h.connect_socket, ours.detach())


def negotiating(place: Place) -> None:
    """Make a handle that is closed while it negotiates."""
    with nbd.NBD() as h:
        h.set_opt_mode(True)
        h.connect_unix(place.disk)
        h.opt_list(nothing)


def subprocess_of_its_own() -> None:
    """Make a handle that starts its own server."""
    with nbd.NBD() as h:
        h.connect_command(["nbdkit", "-s", "--exit-with-parent", "null", "1M"])


def bad_command() -> None:
    """Make a handle whose server exits at once."""
    with nbd.NBD() as h:
        expect(nbd.Error, h.connect_command, ["true"])


class Broken(nbd.NBD):
    """A handle whose __init__ fails."""

    def __init__(self) -> None:
        """Raise."""
        super().__init__()
        raise Raised


def nowhere() -> None:
    """Make a handle that finds no server."""
    with nbd.NBD() as h:
        expect(nbd.Error, h.connect_unix, "/nonexistent/socket")


def lives(place: Place) -> Iterator[Kind]:
    """Yield the ways in which a handle can be used and end."""
    yield Kind("made, closed", lambda: nbd.NBD().close())
    yield Kind("made, dropped", dropping(nbd.NBD), DROPS)
    yield Kind("made, half", dropping(raising(Raised, Broken)), DROPS)
    yield Kind("made, dropped in a cycle", dropping(cycle), DROPS, share=4)
    yield Kind("no server", nowhere, share=4)
    yield Kind("server that hangs up", hung_up, share=10)
    yield Kind("connected, closed", lambda: place.connect().close(), share=50)
    drop = dropping(place.connect, CONNECTED_DROPS)
    yield Kind("connected, dropped", drop, CONNECTED_DROPS, share=50)
    yield Kind("closed with commands in flight", partial(close_in_flight, place), share=50)
    yield Kind("closed while it negotiates", partial(negotiating, place), share=50)
    yield Kind("server of its own", subprocess_of_its_own, share=4000)
    yield Kind("command that ends at once", bad_command, share=2000)


GROUPS = {
    group.__name__.replace("_", " "): group
    for group in (
        settings,
        buffers,
        commands,
        commands_in_flight,
        callbacks,
        failing_callbacks,
        errors,
        lives,
    )
}


# --- the program ------------------------------------------------------------------------------


def repeat(once: Callable[[], object], times: int) -> None:
    """Call a function this many times."""
    for _ in range(times):
        once()


def growth(kind: Kind, calls: int) -> tuple[int, int]:
    """Repeat a kind; return how many bytes each call leaked, and the number of calls."""
    times = max(calls // kind.calls, 1)
    least, limit = 1 << 62, SLACK + times * kind.calls
    repeat(kind.once, max(times // 5, 1))
    collect_garbage()
    held, made = resident(), 0
    while made < STRETCHES and least > limit:
        repeat(kind.once, times)
        collect_garbage()
        before, held = held, resident()
        least = min(least, held - before)
        made += 1
    each = 0 if least <= limit else -(-least // (times * kind.calls))
    return each, made * times * kind.calls


def program(group: str, place: Place) -> None:
    """Repeat the kinds of a group, and print the figures."""
    nbd.Buffer(4 * MIB)  # imports ctypes; libffi then keeps a descriptor open
    files, handles, calls = descriptors(), len(open_handles), 0
    for kind in GROUPS[group](place):
        each, made = growth(kind, max(CALLS // kind.share, 1))
        show(f"leaks, {group}: bytes for each of {kind.name}", each)
        calls += made
    del kind
    collect_garbage()
    show(f"leaks, {group}: calls", calls)
    show(f"leaks, {group}: entries in the registry", registered())
    show(f"leaks, {group}: exceptions that wait", len(nbd._binding.errors.pending))
    show(f"leaks, {group}: handles more than before", len(open_handles) - handles)
    show(f"leaks, {group}: descriptors more than before", descriptors() - files)


if __name__ == "__main__":
    program(sys.argv[1], Place(*sys.argv[2:]))
