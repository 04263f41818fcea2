"""The calls of a handle that wait for a server, and the ways to stop them."""

from __future__ import annotations

import errno
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Callable

import pytest

import nbd
from support.figures import Figure
from support.servers import Server
from support.signals import SHORT, Stop, alarm

Call = Callable[[Any], object]

BLOCK = 512

#: The commands of a connected handle.
COMMANDS: dict[str, Call] = {
    "block_status": lambda h: h.block_status(65536, 0, lambda *extents: 0),
    "block_status_64": lambda h: h.block_status_64(65536, 0, lambda *extents: 0),
    "block_status_filter": lambda h: h.block_status_filter(
        65536, 0, [nbd.CONTEXT_BASE_ALLOCATION], lambda *extents: 0
    ),
    "cache": lambda h: h.cache(BLOCK, 0),
    "flush": lambda h: h.flush(),
    "pread": lambda h: h.pread(BLOCK, 0),
    "pread_into": lambda h: h.pread_into(bytearray(BLOCK), 0),
    "pread_structured": lambda h: h.pread_structured(BLOCK, 0, lambda *chunk: 0),
    "pwrite": lambda h: h.pwrite(bytes(BLOCK), 65536),
    "trim": lambda h: h.trim(BLOCK, 65536),
    "zero": lambda h: h.zero(BLOCK, 65536),
}

#: The calls that wait for any event, and the one that ends the connection.
OTHERS: dict[str, Call] = {
    "poll": lambda h: h.poll(-1),
    "poll2": lambda h: h.poll2(-1, -1),
    "shutdown": lambda h: h.shutdown(),
}

#: The calls of a handle that is negotiating.
OPTIONS: dict[str, Call] = {
    "opt_extended_headers": lambda h: h.opt_extended_headers(),
    "opt_go": lambda h: h.opt_go(),
    "opt_info": lambda h: h.opt_info(),
    "opt_list": lambda h: h.opt_list(lambda *export: 0),
    "opt_list_meta_context": lambda h: h.opt_list_meta_context(lambda name: 0),
    "opt_list_meta_context_queries": lambda h: h.opt_list_meta_context_queries(
        ["base:"], lambda name: 0
    ),
    "opt_set_meta_context": lambda h: h.opt_set_meta_context(lambda name: 0),
    "opt_set_meta_context_queries": lambda h: h.opt_set_meta_context_queries(
        ["base:"], lambda name: 0
    ),
    "opt_starttls": lambda h: h.opt_starttls(),
    "opt_structured_reply": lambda h: h.opt_structured_reply(),
}

#: The calls that wait but are in no table, and why.
UNTRIED = {
    "opt_abort": "libnbd does not wait for its answer",
    "connect_vsock": "there is no vsock server here",
}


def connect_socket(h: nbd.NBD, server: Server) -> None:
    """Give the handle a socket that is connected to the server."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.socket)
        h.connect_socket(sock.detach())


def connect_tcp(h: nbd.NBD, server: Server) -> None:
    """Connect to a port that listens and never accepts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        h.connect_tcp("127.0.0.1", str(listener.getsockname()[1]))


def connect_systemd(h: nbd.NBD, server: Server) -> None:
    """Start a server that never accepts, and end it afterwards."""
    try:
        h.connect_systemd_socket_activation(["sleep", "600"])
    finally:
        h.kill_subprocess(signal.SIGTERM)


#: The ways to connect a handle, to a server that is stopped or never answers.
CONNECTS: dict[str, Callable[[nbd.NBD, Server], object]] = {
    "connect_command": lambda h, server: h.connect_command(["sh", "-c", "cat >/dev/null"]),
    "connect_socket": connect_socket,
    "connect_systemd_socket_activation": connect_systemd,
    "connect_tcp": connect_tcp,
    "connect_unix": lambda h, server: h.connect_unix(server.socket),
    "connect_uri": lambda h, server: h.connect_uri(server.uri),
}


def in_this_libnbd(table: dict[str, Any]) -> list[Any]:
    """Return test parameters for the calls of a table that the libnbd in use has."""
    return [
        pytest.param(*item, id=item[0], marks=pytest.mark.needs(item[0])) for item in table.items()
    ]


def orphans(h: nbd.NBD) -> int:
    """Return how many commands of a handle were abandoned and have no reply yet."""
    return int(nbd._binding.shim.lib.nbdshim_orphans(h._h))


def reap(h: nbd.NBD) -> None:
    """Receive the late replies of the server."""
    while orphans(h):
        h.poll(-1)


def time_out(h: nbd.NBD, name: str, call: Callable[[], object], figure: Figure) -> None:
    """Make a call that must time out, and record how late it does."""
    h.settimeout(SHORT)
    start = time.monotonic()
    with pytest.raises(nbd.Timeout) as caught:
        call()
    late = time.monotonic() - start - SHORT
    h.settimeout(None)
    assert caught.value.errnum == errno.ETIMEDOUT
    assert caught.value.string.startswith(f"nbd_{name}: ")
    assert f"{SHORT} seconds" in caught.value.string
    figure(f"{name}: milliseconds from the deadline to nbd.Timeout", f"{late * 1000:.1f}")


def interrupt(name: str, call: Callable[[], object], figure: Figure) -> None:
    """Make a call that a signal handler must stop, and record how quickly it does."""
    raised: list[float] = []

    def handler(number: int, frame: FrameType | None) -> None:
        raised.append(time.monotonic())
        raise Stop

    with alarm(handler), pytest.raises(Stop):
        call()
    late = time.monotonic() - raised[0]
    figure(f"{name}: milliseconds from the signal to the exception", f"{late * 1000:.1f}")


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Pause a server inside the block."""
    server.pause()
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            server.resume()
