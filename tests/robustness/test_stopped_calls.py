"""A timeout and a signal handler stop each waiting call of a handle, which can be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
from support import checkout  # noqa: F401 - finds the generator
from support.figures import Figure
from support.servers import Server, StartServer
from support.usage import registered
from support.waits import (
    BLOCK,
    COMMANDS,
    CONNECTS,
    OPTIONS,
    OTHERS,
    UNTRIED,
    Call,
    in_this_libnbd,
    interrupt,
    orphans,
    paused,
    reap,
    time_out,
)

import nbd
from generator.library import find_library
from generator.model import Waits
from generator.read import read
from generator.waiting import stoppable

DATA = bytes(range(256)) * (BLOCK // 256)

# stop(h, name, call, figure): the two ways to stop a call.
STOPS = {
    "timeout": time_out,
    "signal": lambda h, name, call, figure: interrupt(name, call, figure),
}
stops = pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
Stopping = Callable[[nbd.NBD, str, Callable[[], object], Figure], None]


def forget(name: str, value: object) -> None:
    """Record no figure."""


def connected(server: Server) -> nbd.NBD:
    """Return a handle whose disk begins with DATA."""
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(server.socket)
    h.pwrite(DATA, 0)
    return h


def negotiating(server: Server, option: str) -> nbd.NBD:
    """Return a handle in opt mode to which no option was granted yet."""
    h: Any = nbd.NBD()
    h.set_opt_mode(True)
    if option in ("opt_structured_reply", "opt_extended_headers"):
        h.set_request_structured_replies(False)
        h.set_request_extended_headers(False)
    h.connect_unix(server.socket)
    return h  # type: ignore[no-any-return]


def test_every_call_that_waits_is_in_a_table() -> None:
    functions = stoppable(read(find_library().header)).functions
    waiting = {f.name for f in functions if f.waits is not Waits.IN_LIBNBD}
    tried = {*COMMANDS, *OTHERS, *OPTIONS, *CONNECTS, *UNTRIED}
    assert {name for name in waiting if not name.startswith("aio_")} - tried == set()


@stops
@pytest.mark.parametrize(("name", "call"), in_this_libnbd(COMMANDS))
def test_a_command_is_stopped_and_the_handle_stays_usable(
    nbdkit: StartServer,
    qemu_nbd: StartServer,
    tmp_path: Path,
    figure: Figure,
    stop: Stopping,
    name: str,
    call: Call,
) -> None:
    if name == "block_status_filter":  # nbdkit lacks extended headers
        image = tmp_path / "image"
        image.write_bytes(bytes(1 << 20))
        server = qemu_nbd(image, "--format=raw")
    else:
        server = nbdkit("memory", "1M")
    with connected(server) as h:
        with paused(server):
            stop(h, name, lambda: call(h), figure)
            assert orphans(h) == 1
        call(h)
        assert h.pread(BLOCK, 0) == DATA
        reap(h)
        assert registered() == 0


@stops
@pytest.mark.parametrize(("name", "call"), in_this_libnbd(OTHERS))
def test_what_waits_for_the_connection_is_stopped_and_can_be_called_again(
    server: Server, figure: Figure, stop: Stopping, name: str, call: Call
) -> None:
    with connected(server) as h:
        with paused(server):
            stop(h, name, lambda: call(h), figure)
        h.shutdown()
        assert h.aio_is_closed()
        assert registered() == 0


@stops
@pytest.mark.parametrize(("name", "call"), in_this_libnbd(OPTIONS))
def test_an_option_is_stopped_and_the_next_finishes_it(
    server: Server, figure: Figure, stop: Stopping, name: str, call: Call
) -> None:
    with negotiating(server, name) as h:
        with paused(server):
            stop(h, name, lambda: call(h), figure)
            assert h.aio_is_connecting()
        if name != "opt_go":
            h.opt_go()
        assert h.pread(BLOCK, 0) == bytes(BLOCK)
        assert orphans(h) == 0
        assert registered() == 0


@stops
@pytest.mark.parametrize(("name", "connect"), in_this_libnbd(CONNECTS))
def test_a_connect_is_stopped(
    server: Server, figure: Figure, stop: Stopping, name: str, connect: Callable[..., object]
) -> None:
    h = nbd.NBD()
    with paused(server):
        stop(h, name, lambda: connect(h, server), figure)
        assert h.aio_is_connecting()
        h.close()


@stops
def test_a_connect_that_was_stopped_is_finished_by_the_next_call(
    server: Server, stop: Stopping
) -> None:
    connected(server).close()
    with nbd.NBD() as h:
        with paused(server):
            stop(h, "connect_unix", lambda: h.connect_unix(server.socket), forget)
        assert h.pread(BLOCK, 0) == DATA


@stops
def test_a_connect_that_was_stopped_and_fails_later_fails_the_next_call(
    nbdkit: StartServer, stop: Stopping
) -> None:
    server = nbdkit("eval", "get_size=echo 1M", "open=echo ENOENT >&2; exit 1")
    with nbd.NBD() as h:
        with paused(server):
            stop(h, "connect_unix", lambda: h.connect_unix(server.socket), forget)
        with pytest.raises(nbd.Error, match=r"^nbd_pread: "):
            h.pread(BLOCK, 0)
