"""A server that breaks the protocol of replies gets nbd.Error or a value, in time.

Each case runs a script of support/hostile.py, whose watchdog bounds how long the client may wait.
Where versions of libnbd differ on whether a reply is fatal, both an error and a correct value pass.
A crash, a hang, another exception, or a write outside the caller's buffer never passes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from support import hostile
from support.figures import Figure
from support.hostile import (
    BLOCK,
    CHUNK_BLOCK_STATUS,
    CHUNK_BLOCK_STATUS_EXT,
    CHUNK_ERROR,
    CHUNK_ERROR_OFFSET,
    CHUNK_NONE,
    CHUNK_OFFSET_DATA,
    CHUNK_OFFSET_HOLE,
    SIZE,
    Connection,
    Request,
    Script,
    Wire,
    data,
    extents,
    failure,
    hole,
    wide_extents,
)
from support.hostile_scripts import (
    MESSAGES,
    NOT_UTF8,
    NOT_UTF8_STR,
    PATTERN,
    U32_MAX,
    U64_MAX,
    Reply,
    chunks,
    connect,
    on_request,
)

import nbd

Extents = list[tuple[str, int, Any, int]]


@pytest.fixture(autouse=True)
def misbehaviour(figure: Figure) -> Iterator[None]:
    """Record the number of ways to misbehave."""
    yield
    figure("hostile servers: misbehaviours", 1)


# --- replies to a read ------------------------------------------------------------------------


def without_payload(error: int) -> Reply:
    """Return a simple reply with an errno."""
    return lambda wire, request: wire.simple(request.cookie, error)


def hangs_up(reply: Reply) -> Reply:
    """Return a reply after which the server disconnects."""

    def last(wire: Wire, request: Request) -> None:
        reply(wire, request)
        raise hostile.HungUp

    return last


# Replies of a server without structured replies to a read of one block at 0.
BAD_SIMPLE_REPLIES: dict[str, Reply] = {
    "wrong-magic": lambda wire, request: wire.send(b"\1\2\3\4", bytes(BLOCK)),
    "wrong-cookie": lambda wire, request: wire.simple(request.cookie + 1, 0, PATTERN),
    "wrong-cookie-with-error": hangs_up(lambda wire, request: wire.simple(request.cookie + 1, 5)),
    "structured-though-refused": lambda wire, request: wire.chunk(
        request, CHUNK_OFFSET_DATA, data(0, PATTERN)
    ),
    "hangs-up-before-the-data": hangs_up(lambda wire, request: wire.simple(request.cookie)),
    "hangs-up-in-the-data": hangs_up(
        lambda wire, request: wire.simple(request.cookie, 0, PATTERN[:100])
    ),
    "hangs-up-in-the-header": hangs_up(lambda wire, request: wire.send(b"\x67\x44\x66")),
    "errno-unknown": without_payload(9999),
    "errno-negative": without_payload(1 << 31),
    "errno-largest": without_payload(U32_MAX),
}

# Replies of a server with structured replies to the same read.
BAD_CHUNKS: dict[str, Reply] = {
    "simple-reply": lambda wire, request: wire.simple(request.cookie, 0, PATTERN),
    "simple-error": lambda wire, request: wire.simple(request.cookie, 5),
    "wrong-cookie": lambda wire, request: wire.chunk(
        request, CHUNK_OFFSET_DATA, data(0, PATTERN), cookie=request.cookie + 7
    ),
    "cookie-0": lambda wire, request: wire.chunk(
        request, CHUNK_OFFSET_DATA, data(0, PATTERN), cookie=0
    ),
    "data-after-the-request": chunks((CHUNK_OFFSET_DATA, data(BLOCK, PATTERN))),
    "data-partly-outside": chunks((CHUNK_OFFSET_DATA, data(BLOCK // 2, PATTERN))),
    "data-at-the-end-of-uint64": chunks((CHUNK_OFFSET_DATA, data(U64_MAX - 255, PATTERN))),
    "data-longer-than-asked": chunks((CHUNK_OFFSET_DATA, data(0, PATTERN * 2))),
    "data-without-offset": chunks((CHUNK_OFFSET_DATA, b"abc")),
    "data-of-no-bytes": chunks((CHUNK_OFFSET_DATA, data(0, b""))),
    "data-twice": chunks(*[(CHUNK_OFFSET_DATA, data(0, PATTERN))] * 2),
    "data-overlapping": chunks(
        (CHUNK_OFFSET_DATA, data(0, PATTERN)),
        (CHUNK_OFFSET_DATA, data(BLOCK // 2, PATTERN[BLOCK // 2 :])),
    ),
    "data-missing": chunks((CHUNK_NONE, b"")),
    "data-incomplete": chunks((CHUNK_OFFSET_DATA, data(0, PATTERN[:256]))),
    "hole-outside": chunks((CHUNK_OFFSET_HOLE, hole(BLOCK, BLOCK))),
    "hole-of-4-GiB": chunks((CHUNK_OFFSET_HOLE, hole(0, U32_MAX))),
    "hole-of-no-bytes": chunks((CHUNK_OFFSET_HOLE, hole(0, 0))),
    "hole-without-length": chunks((CHUNK_OFFSET_HOLE, bytes(8))),
    "last-chunk-never-sent": hangs_up(
        lambda wire, request: wire.chunk(request, CHUNK_OFFSET_DATA, data(0, PATTERN), done=False)
    ),
    "none-that-is-not-the-last": chunks((CHUNK_NONE, b""), (CHUNK_NONE, b"")),
    "none-with-payload": chunks((CHUNK_NONE, b"abc")),
    "unknown-chunk": chunks((55, b"abc")),
    "unknown-error-chunk": chunks(((1 << 15) + 55, failure(5, b"message"))),
    "unknown-error-chunk-cut-short": chunks(((1 << 15) + 55, b"abc")),
    "chunk-of-4-GiB": lambda wire, request: wire.chunk(request, CHUNK_OFFSET_DATA, length=U32_MAX),
    "error-of-4-GiB": lambda wire, request: wire.chunk(request, CHUNK_ERROR, length=U32_MAX),
    "error-0": chunks((CHUNK_ERROR, failure(0))),
    "error-unknown": chunks((CHUNK_ERROR, failure(9999))),
    "error-cut-short": chunks((CHUNK_ERROR, b"abc")),
    "error-message-shorter-than-told": chunks((CHUNK_ERROR, failure(5, b"abc", length=60000))),
    "error-offset-outside": chunks(
        (CHUNK_ERROR_OFFSET, failure(5, b"abc") + struct.pack(">Q", 1 << 40))
    ),
    "error-offset-cut-short": chunks((CHUNK_ERROR_OFFSET, failure(5, b"abc") + b"123")),
    "extents": chunks((CHUNK_BLOCK_STATUS, extents(1, BLOCK, 0))),
    "extents-of-64-bits": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(1, BLOCK, 0))),
    **{
        f"message-{name}": chunks((CHUNK_ERROR, failure(5, text)))
        for name, text in MESSAGES.items()
    },
}

# Replies of a server with extended headers to the same read.
BAD_EXTENDED_CHUNKS: dict[str, Reply] = {
    "simple-reply": lambda wire, request: wire.simple(request.cookie),
    "chunk-of-2**64": lambda wire, request: wire.chunk(request, CHUNK_OFFSET_DATA, length=U64_MAX),
    "wrong-cookie": BAD_CHUNKS["wrong-cookie"],
    "data-partly-outside": BAD_CHUNKS["data-partly-outside"],
}


def pread(h: nbd.NBD) -> None:
    """Read a block."""
    h.pread(BLOCK, 0)


def pread_structured(h: nbd.NBD) -> None:
    """Make a structured read, and read every byte of every chunk."""

    def chunk(view: Any, offset: int, status: int, error: Any) -> None:
        assert offset >= 0
        assert len(bytes(view)) <= BLOCK

    h.pread_structured(BLOCK, 0, chunk)


def aio_pread(h: nbd.NBD) -> None:
    """Read a block into the middle of a buffer, and check that its end is reported exactly once.

    The error given to a completion is not checked: for missing data libnbd passes 0 there, and only
    aio_command_completed reports the error.
    """
    buf = bytearray(b"\xa5" * (3 * BLOCK))
    errors: list[int] = []
    middle = memoryview(buf)[BLOCK : 2 * BLOCK]
    cookie = h.aio_pread(middle, 0, completion=lambda error: errors.append(error.value))
    try:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    finally:
        assert len(errors) == 1
        assert buf[:BLOCK] == buf[2 * BLOCK :] == b"\xa5" * BLOCK


READS = [pread, pread_structured, aio_pread]


def fails(h: nbd.NBD, script: Script, command: Callable[[nbd.NBD], object]) -> None:
    """Check that a command fails with an error of its own."""
    with Connection(script) as peer:
        connect(h, peer)
        with pytest.raises(nbd.Error, match=r"^nbd_\w+: ."):
            command(h)
        assert h.aio_in_flight() == 0
        assert h.connection_state()


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("reply", BAD_SIMPLE_REPLIES.values(), ids=BAD_SIMPLE_REPLIES.keys())
def test_read_with_a_bad_simple_reply_fails(h: nbd.NBD, reply: Reply, read: Any) -> None:
    fails(h, on_request(reply, structured=False), read)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("reply", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_read_with_a_bad_chunk_fails(h: nbd.NBD, reply: Reply, read: Any) -> None:
    fails(h, on_request(reply), read)


@pytest.mark.needs("set_request_extended_headers")
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("reply", BAD_EXTENDED_CHUNKS.values(), ids=BAD_EXTENDED_CHUNKS.keys())
def test_read_with_a_bad_extended_chunk_fails(h: nbd.NBD, reply: Reply, read: Any) -> None:
    fails(h, on_request(reply, extended=True), read)


def test_data_before_the_request_fails(h: nbd.NBD) -> None:
    reply = chunks((CHUNK_OFFSET_DATA, data(0, PATTERN)))
    fails(h, on_request(reply), lambda h: h.pread(BLOCK, BLOCK))


def test_empty_chunk_before_the_data_does_not_harm_it(h: nbd.NBD) -> None:
    reply = chunks((CHUNK_OFFSET_DATA, data(0, b"")), (CHUNK_OFFSET_DATA, data(0, PATTERN)))
    with Connection(on_request(reply)) as peer:
        connect(h, peer)
        assert h.pread(BLOCK, 0) == PATTERN


@pytest.mark.parametrize("initialize", [True, False])
def test_bytes_that_the_server_left_out_are_zeroes_and_not_of_another_read(
    h: nbd.NBD, initialize: bool
) -> None:
    half = BLOCK // 2
    all_of_it = chunks((CHUNK_OFFSET_DATA, data(0, PATTERN)))
    half_of_it_twice = chunks(*[(CHUNK_OFFSET_DATA, data(0, PATTERN[:half]))] * 2)

    def replies(wire: Wire, request: Request) -> None:
        all_of_it(wire, request)
        half_of_it_twice(wire, wire.request())

    h.set_pread_initialize(initialize)
    with Connection(on_request(replies)) as peer:
        connect(h, peer)
        assert h.pread(BLOCK, 0) == PATTERN
        assert h.pread(BLOCK, 0) == PATTERN[:half] + bytes(half)


def test_second_reply_to_a_read_fails_the_next_command(h: nbd.NBD) -> None:
    def reply(wire: Wire, request: Request) -> None:
        wire.simple(request.cookie, 0, PATTERN)
        wire.simple(request.cookie, 0, PATTERN)

    with Connection(on_request(reply, structured=False)) as peer:
        connect(h, peer)
        assert h.pread(BLOCK, 0) == PATTERN
        with pytest.raises(nbd.Error):
            h.flush()


def unsolicited_simple(wire: Wire) -> None:
    """Reply to a request that was never made."""
    wire.negotiate(structured=False)
    wire.simple(12345)
    wire.linger()


def unsolicited_chunk(wire: Wire) -> None:
    """Send a chunk for a request that was never made."""
    wire.negotiate()
    wire.chunk(Request(0, 0, 12345, 0, BLOCK), CHUNK_OFFSET_DATA, data(0, PATTERN))
    wire.linger()


@pytest.mark.parametrize("script", [unsolicited_simple, unsolicited_chunk])
def test_unsolicited_reply_fails_the_next_command(h: nbd.NBD, script: Script) -> None:
    with Connection(script) as peer:
        connect(h, peer)
        with pytest.raises(nbd.Error):
            h.flush()


# --- replies to other commands ----------------------------------------------------------------


def takes_data(reply: Reply) -> Reply:
    """Return a reply that first receives the block to be written."""

    def script(wire: Wire, request: Request) -> None:
        wire.receive(request.count)
        reply(wire, request)

    return script


BAD_WRITE_REPLIES: dict[str, Reply] = {
    "data": takes_data(chunks((CHUNK_OFFSET_DATA, data(0, PATTERN)))),
    "hole": takes_data(chunks((CHUNK_OFFSET_HOLE, hole(0, BLOCK)))),
    "extents": takes_data(chunks((CHUNK_BLOCK_STATUS, extents(1, BLOCK, 0)))),
    "wrong-cookie": hangs_up(takes_data(lambda wire, request: wire.simple(request.cookie + 1))),
    "before-the-data": hangs_up(chunks((CHUNK_ERROR, failure(28, NOT_UTF8)))),
    "hangs-up": hangs_up(lambda wire, request: None),
}


@pytest.mark.parametrize("reply", BAD_WRITE_REPLIES.values(), ids=BAD_WRITE_REPLIES.keys())
def test_write_with_a_bad_reply_fails(h: nbd.NBD, reply: Reply) -> None:
    fails(h, on_request(reply), lambda h: h.pwrite(PATTERN, 0))


def test_flush_that_is_answered_with_a_hole_fails(h: nbd.NBD) -> None:
    fails(h, on_request(chunks((CHUNK_OFFSET_HOLE, hole(0, BLOCK)))), lambda h: h.flush())


def test_data_behind_a_reply_to_flush_fails_the_next_command(h: nbd.NBD) -> None:
    def reply(wire: Wire, request: Request) -> None:
        wire.simple(request.cookie, 0, PATTERN)

    def flush_then_read(h: nbd.NBD) -> None:
        h.flush()
        h.pread(BLOCK, 0)

    fails(h, on_request(reply), flush_then_read)


# --- extents ----------------------------------------------------------------------------------

ALLOCATION = 1
HALF = SIZE // 2

# Replies of a server to a request for the status of half of its export.
ODD_EXTENTS: dict[str, Reply] = {
    "of-no-bytes": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 0, 3))),
    "of-no-bytes-after-others": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512, 3, 0, 0))),
    "beyond-the-request": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, SIZE, 3))),
    "beyond-the-export": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 2 * SIZE, 3))),
    "4-GiB-twice": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, U32_MAX, 3, U32_MAX, 0))),
    "more-after-the-end": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, SIZE, 3, 512, 0))),
    "unaligned": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 1, 3, 510, 0))),
    "every-flag": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512, U32_MAX))),
    "50,000": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, *[512, 1] * 50000))),
    "context-never-negotiated": chunks((CHUNK_BLOCK_STATUS, extents(42, 512, 3))),
    "none": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION))),
    "no-chunk": chunks((CHUNK_NONE, b"")),
    "half-an-extent": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512))),
    "cut-short": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512, 3) + b"abc")),
    "context-cut-short": chunks((CHUNK_BLOCK_STATUS, b"abc")),
    "context-twice": chunks(*[(CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512, 3))] * 2),
    "simple-reply": lambda wire, request: wire.simple(request.cookie),
    "data": chunks((CHUNK_OFFSET_DATA, data(0, PATTERN))),
    "of-64-bits": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, 512, 3))),
    "error-with-bad-text": chunks((CHUNK_ERROR, failure(5, NOT_UTF8))),
}

# The same from a server with extended headers.
ODD_WIDE_EXTENTS: dict[str, Reply] = {
    "of-no-bytes": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, 0, 3))),
    "2**64": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, U64_MAX, 3))),
    "2**63-twice": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, *[1 << 63, 3] * 2))),
    "every-flag": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, 512, U64_MAX))),
    "fewer-than-told": chunks(
        (CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, 512, 3, claimed=5))
    ),
    "more-than-told": chunks(
        (CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, *[512, 3] * 2, claimed=1))
    ),
    "2**32-told": chunks(
        (CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION, 512, 3, claimed=U32_MAX))
    ),
    "none": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(ALLOCATION))),
    "context-never-negotiated": chunks((CHUNK_BLOCK_STATUS_EXT, wide_extents(9, 512, 3))),
    "of-32-bits": chunks((CHUNK_BLOCK_STATUS, extents(ALLOCATION, 512, 3))),
    "chunk-of-1-TiB": lambda wire, request: wire.chunk(
        request, CHUNK_BLOCK_STATUS_EXT, length=1 << 40
    ),
}


def allocation(h: nbd.NBD, reply: Reply, method: str, **handshake: Any) -> Extents:
    """Return the arguments of the extent callback; the command may fail."""
    found: Extents = []

    def extent(context: str, offset: int, entries: Any, error: Any) -> None:
        found.append((context, offset, list(entries), error.value))

    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    selected = {"contexts": [(ALLOCATION, b"base:allocation")], **handshake}
    with Connection(on_request(reply, **selected)) as peer:
        connect(h, peer)
        with suppress(nbd.Error):
            getattr(h, method)(HALF, 0, extent)
    return found


@pytest.mark.parametrize("reply", ODD_EXTENTS.values(), ids=ODD_EXTENTS.keys())
def test_odd_extents_arrive_as_pairs_or_not_at_all(h: nbd.NBD, reply: Reply) -> None:
    for context, offset, entries, error in allocation(h, reply, "block_status"):
        assert (context, offset) == (nbd.CONTEXT_BASE_ALLOCATION, 0)
        assert len(entries) % 2 == 0
        assert all(0 <= entry <= U32_MAX for entry in entries)
        assert error >= 0


@pytest.mark.needs("block_status_64")
@pytest.mark.parametrize("reply", ODD_WIDE_EXTENTS.values(), ids=ODD_WIDE_EXTENTS.keys())
def test_odd_wide_extents_arrive_as_pairs_or_not_at_all(h: nbd.NBD, reply: Reply) -> None:
    for context, offset, entries, error in allocation(h, reply, "block_status_64", extended=True):
        assert (context, offset) == (nbd.CONTEXT_BASE_ALLOCATION, 0)
        assert all(0 <= length <= U64_MAX and 0 <= flags <= U64_MAX for length, flags in entries)
        assert error >= 0


@pytest.mark.needs("block_status_64")
@pytest.mark.parametrize("reply", ODD_WIDE_EXTENTS.values(), ids=ODD_WIDE_EXTENTS.keys())
def test_odd_wide_extents_through_the_32_bit_call_fit_or_fail(h: nbd.NBD, reply: Reply) -> None:
    for _, _, entries, _ in allocation(h, reply, "block_status", extended=True):
        assert all(0 <= entry <= U32_MAX for entry in entries)


def test_context_never_asked_for_is_a_value_with_its_name(h: nbd.NBD) -> None:
    reply = chunks((CHUNK_BLOCK_STATUS, extents(7, 512, 3)))
    name = b"x:never-asked " + NOT_UTF8
    found = allocation(h, reply, "block_status", contexts=[(7, name)])
    assert [context for context, *_ in found] in ([], ["x:never-asked " + NOT_UTF8_STR])
    assert h.can_meta_context("x:never-asked " + NOT_UTF8_STR)
    assert not h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def test_context_selected_twice_is_one_context(h: nbd.NBD) -> None:
    reply = chunks(*[(CHUNK_BLOCK_STATUS, extents(number, 512, 3)) for number in (1, 2)])
    same = [(1, b"base:allocation"), (2, b"base:allocation")]
    found = allocation(h, reply, "block_status", contexts=same)
    assert {context for context, *_ in found} <= {nbd.CONTEXT_BASE_ALLOCATION}
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def test_contexts_with_one_number_are_distinguished_from_others(h: nbd.NBD) -> None:
    reply = chunks((CHUNK_BLOCK_STATUS, extents(1, 512, 3)))
    same = [(1, b"base:allocation"), (1, b"x:other")]
    found = allocation(h, reply, "block_status", contexts=same)
    assert {context for context, *_ in found} <= {nbd.CONTEXT_BASE_ALLOCATION, "x:other"}


# --- silence ----------------------------------------------------------------------------------


def half_a_reply(wire: Wire, request: Request) -> None:
    """Send half of the requested data."""
    wire.chunk(request, CHUNK_OFFSET_DATA, data(0, PATTERN[:100]), length=8 + BLOCK)


def test_half_a_reply_and_silence_ends_with_its_connection(h: nbd.NBD) -> None:
    with Connection(on_request(half_a_reply), bound=0.5, silent=True) as peer:
        connect(h, peer)
        with pytest.raises(nbd.Error, match=r"^nbd_pread: ."):
            h.pread(BLOCK, 0)


def test_half_a_reply_and_silence_leaves_poll_its_timeout(h: nbd.NBD) -> None:
    buf = nbd.Buffer(BLOCK)
    with Connection(on_request(half_a_reply)) as peer:
        connect(h, peer)
        cookie = h.aio_pread(buf, 0)
        while h.poll(50) != 0:
            assert not h.aio_command_completed(cookie)
        assert h.aio_in_flight() == 1
