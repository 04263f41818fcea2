"""Scripts of servers that misbehave, and connections to them, for support.hostile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import nbd
from support import hostile
from support.hostile import (
    BLOCK,
    OPT_GO,
    Connection,
    Request,
    Script,
    Wire,
)

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1
PATTERN = b"pattern." * (BLOCK // 8)
NOT_UTF8 = b"caf\xe9 \xff\xfe"
NOT_UTF8_STR = "caf\udce9 \udcff\udcfe"
# Bytes, including NUL, that a server may send instead of a readable message.
MESSAGES = {
    "no-message": b"",
    "not-utf8": NOT_UTF8,
    "holding-nul": b"before\0after",
    "longest-string": b"\xff" * 4096,
    "too-long": b"m" * 60000,
}
Reply = Callable[[Wire, Request], None]


def sends(*parts: bytes) -> Script:
    """Return a script that sends bytes and disconnects."""
    return lambda wire: wire.send(*parts)


def stays(*parts: bytes) -> Script:
    """Return a script that sends bytes and stays connected."""

    def script(wire: Wire) -> None:
        wire.send(*parts)
        wire.linger()

    return script


def on_option(code: int, reply: Script) -> Script:
    """Return a script that greets, and replies to one option only."""

    def script(wire: Wire) -> None:
        wire.greet()
        wire.wait_for(code)
        reply(wire)
        wire.linger()

    return script


def on_go(kind: int, payload: bytes = b"", **lies: int) -> Script:
    """Return a script that answers the request to go with one reply."""
    return on_option(OPT_GO, lambda wire: wire.answer(OPT_GO, kind, payload, **lies))


def on_request(reply: Reply, **handshake: Any) -> Script:
    """Return a script that replies to one request after a handshake, and stays connected."""

    def script(wire: Wire) -> None:
        wire.negotiate(**handshake)
        reply(wire, wire.request())
        wire.linger()

    return script


def chunks(*sent: tuple[int, bytes]) -> Reply:
    """Return a reply of these chunks, the last of which has the DONE flag."""

    def reply(wire: Wire, request: Request) -> None:
        for number, (kind, payload) in enumerate(sent, 1):
            wire.chunk(request, kind, payload, done=number == len(sent))

    return reply


def connect(h: nbd.NBD, peer: Connection) -> None:
    """Connect a handle to the script's socket, which the handle then owns."""
    h.connect_socket(peer.fileno())


def refused(h: nbd.NBD, script: Script, bound: float = hostile.BOUND, silent: bool = False) -> str:
    """Connect to a server that must be refused; return the error, which must name this call."""
    with Connection(script, bound, silent) as peer:
        with pytest.raises(nbd.Error, match=r"^nbd_connect_socket: .") as caught:
            connect(h, peer)
        assert not h.aio_is_ready()
    return str(caught.value)
