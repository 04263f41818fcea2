"""Every call that a callback makes on its own handle is refused, and none waits for ever."""

from __future__ import annotations

import errno
from typing import Any, Callable

import pytest
from support import checkout  # noqa: F401 - finds the generator
from support.figures import Figure
from support.handles import NO_CALLS, drain
from support.methods import METHODS, call_with_anything
from support.servers import StartServer
from support.sizes import MIB

import nbd
from generator.calls import LOCK_FREE

Callback = Callable[..., object]


def flush(h: nbd.NBD, callback: Callback) -> None:
    """Run a completion callback."""
    h.aio_flush(callback)
    drain(h)


CONNECTED: dict[str, Callable[[nbd.NBD, Callback], object]] = {
    "chunk": lambda h, callback: h.pread_structured(512, 0, callback),
    "extent": lambda h, callback: h.block_status(MIB, 0, callback),
    "completion": flush,
}
NEGOTIATING: dict[str, Callable[[nbd.NBD, Callback], object]] = {
    "list": lambda h, callback: h.opt_list(callback),
    "context": lambda h, callback: h.opt_list_meta_context(callback),
}


def outcome(h: nbd.NBD, name: str) -> object:
    """Call a method; return the errno of its nbd.Error, or None if it returned."""
    try:
        call_with_anything(h, name)
    except nbd.Error as error:
        return error.errnum
    return None


def calls_from_inside(h: nbd.NBD, run: Callable[[nbd.NBD, Callback], object]) -> dict[str, object]:
    """Call every method from inside a callback, and return how each ended."""
    found: dict[str, object] = {}

    def callback(*_: object) -> None:
        for name in METHODS:
            if name not in found:
                found[name] = outcome(h, name)

    run(h, callback)
    return found


def check(found: dict[str, object], lock_free: frozenset[str] = frozenset()) -> None:
    """Check that all calls were refused except those that take no lock."""
    assert list(found) == METHODS
    assert {name for name in found if found[name] != errno.EDEADLK} <= lock_free | NO_CALLS


@pytest.mark.parametrize("run", CONNECTED.values(), ids=CONNECTED)
def test_every_call_from_inside_a_callback_is_refused(
    disk: nbd.NBD, figure: Figure, run: Callable[[nbd.NBD, Callback], object]
) -> None:
    found = calls_from_inside(disk, run)
    check(found, frozenset(LOCK_FREE))
    assert disk.pread(4, 0) == bytes(4)
    figure("calls from inside a callback: refused, or need no lock", len(found))


@pytest.mark.parametrize("run", NEGOTIATING.values(), ids=NEGOTIATING)
def test_every_call_from_inside_a_callback_of_an_option_is_refused(
    nbdkit: StartServer,
    h: nbd.NBD,
    figure: Figure,
    run: Callable[[nbd.NBD, Callback], object],
) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    found = calls_from_inside(h, run)
    check(found, frozenset(LOCK_FREE))
    h.opt_go()
    assert h.pread(4, 0) == bytes(4)
    figure("calls from inside a callback: refused, or need no lock", len(found))


def test_every_call_from_inside_a_debug_callback_is_refused(h: nbd.NBD, figure: Figure) -> None:
    def get(h: Any, callback: Callback) -> None:
        h.set_debug_callback(callback)
        h.set_debug(True)
        h.set_debug(False)

    found = calls_from_inside(h, get)
    check(found)
    assert h.get_tls() == nbd.TLS_DISABLE
    figure("calls from inside a callback: refused, or need no lock", len(found))
