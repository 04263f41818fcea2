"""A server that breaks the protocol gets nbd.Error or a value from the client, in time.

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
    CLISERV_MAGIC,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_NAME,
    NBDMAGIC,
    OPT_GO,
    OPT_LIST,
    OPT_LIST_META,
    OPT_STARTTLS,
    REP_ACK,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    SIZE,
    Connection,
    Request,
    Script,
    Wire,
    counted,
    data,
    export_info,
    extents,
    failure,
    hole,
    wide_extents,
)

import nbd

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1
UNKNOWN_INFO = 999

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
Extents = list[tuple[str, int, Any, int]]


@pytest.fixture(autouse=True)
def misbehaviour(figure: Figure) -> Iterator[None]:
    """Record the number of ways to misbehave."""
    yield
    figure("hostile servers: misbehaviours", 1)


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


def drop_by_drop(wire: Wire) -> None:
    """Send a greeting one byte at a time, and then nothing."""
    for byte in NBDMAGIC + IHAVEOPT:
        wire.send(bytes([byte]))


def answers_another_option(wire: Wire) -> None:
    """Reply to an option that the client never sent."""
    wire.answer(99, REP_ACK)


def acks_go_with_payload(wire: Wire) -> None:
    """Grant the request to go, with a payload that an ACK must not have."""
    wire.answer(OPT_GO, REP_INFO, export_info())
    wire.answer(OPT_GO, REP_ACK, b"payload")


def hangs_up_in_a_reply(wire: Wire) -> None:
    """Announce a longer option reply than is sent."""
    wire.greet()
    wire.wait_for(OPT_GO)
    wire.answer(OPT_GO, REP_INFO, b"\0", length=12)


BAD_HANDSHAKES: dict[str, Script] = {
    "nothing": sends(),
    "wrong-magic": stays(b"NOTMAGIC", bytes(200)),
    "http": stays(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "wrong-version": stays(NBDMAGIC, b"\xff" * 200),
    "short-magic": sends(NBDMAGIC[:5]),
    "no-handshake-flags": sends(NBDMAGIC, IHAVEOPT),
    "drop-by-drop-then-nothing": drop_by_drop,
    "oldstyle-garbage": stays(NBDMAGIC, b"\0", CLISERV_MAGIC, b"\xff" * 140),
    "oldstyle-short": sends(NBDMAGIC, b"\0", CLISERV_MAGIC, bytes(20)),
    "option-reply-with-wrong-magic": on_go(REP_ACK, magic=0x1234),
    "reply-to-option-never-sent": on_option(OPT_GO, answers_another_option),
    "unknown-reply-type": on_go(77),
    "unknown-error-type": on_go(REP_ERROR + 99),
    "error-reply-of-4-GiB": on_go(REP_ERR_UNKNOWN, length=U32_MAX),
    "info-of-4-GiB": on_go(REP_INFO, length=U32_MAX),
    "ack-of-4-GiB": on_go(REP_ACK, length=U32_MAX),
    "ack-with-payload": on_option(OPT_GO, acks_go_with_payload),
    "info-of-nothing": on_go(REP_INFO),
    "info-cut-short": on_go(REP_INFO, bytes(3)),
    "info-too-long": on_go(REP_INFO, export_info() + b"more"),
    "export-without-flags": on_go(REP_INFO, export_info(flags=0)),
    "block-size-cut-short": on_go(REP_INFO, struct.pack(">HH", INFO_BLOCK_SIZE, 0)),
    "hangs-up-in-a-reply": hangs_up_in_a_reply,
    "tls-required": on_go(REP_ERR_TLS_REQD),
    **{f"error-{name}": on_go(REP_ERR_POLICY, text) for name, text in MESSAGES.items()},
}


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


@pytest.mark.parametrize("script", BAD_HANDSHAKES.values(), ids=BAD_HANDSHAKES.keys())
def test_bad_handshake_is_an_error(h: nbd.NBD, script: Script) -> None:
    refused(h, script)


def endless_information(wire: Wire) -> None:
    """Send information about the export for ever."""
    wire.greet()
    wire.wait_for(OPT_GO)
    while True:
        wire.answer(OPT_GO, REP_INFO, struct.pack(">H", UNKNOWN_INFO) + bytes(1000))


def test_endless_handshake_ends_with_its_connection(h: nbd.NBD) -> None:
    refused(h, endless_information, bound=0.5, silent=True)


def test_silence_before_the_handshake_ends_with_its_connection(h: nbd.NBD) -> None:
    refused(h, Wire.linger, bound=0.5, silent=True)


def test_flood_of_unknown_information_is_skipped(h: nbd.NBD) -> None:
    noise = [struct.pack(">H", UNKNOWN_INFO) + bytes(1000)] * 2000
    assert connect_informed(h, [*noise, export_info(12345)]).get_size() == 12345


def connect_informed(h: nbd.NBD, info: list[bytes]) -> nbd.NBD:
    """Connect to a server that sends this information about its export and disconnects."""
    with Connection(lambda wire: wire.negotiate(info=info)) as peer:
        connect(h, peer)
    return h


def test_size_zero_is_a_value(h: nbd.NBD) -> None:
    assert connect_informed(h, [export_info(0)]).get_size() == 0


def test_largest_size_is_a_value(h: nbd.NBD) -> None:
    assert connect_informed(h, [export_info((1 << 63) - 1)]).get_size() == (1 << 63) - 1


@pytest.mark.parametrize("size", [1 << 63, U64_MAX - 3, U64_MAX - 2, U64_MAX - 1, U64_MAX])
def test_size_that_no_int64_holds_is_an_error(h: nbd.NBD, size: int) -> None:
    connect_informed(h, [export_info(size)])
    with pytest.raises(nbd.Error, match="get_size"):
        h.get_size()


def test_size_of_an_oldstyle_server_that_no_int64_holds_is_an_error(h: nbd.NBD) -> None:
    greeting = NBDMAGIC, b"\0", CLISERV_MAGIC, struct.pack(">QI", U64_MAX, 1), bytes(124)
    with Connection(stays(*greeting)) as peer:
        connect(h, peer)
        with pytest.raises(nbd.Error, match="get_size"):
            h.get_size()


@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 5, 7), (1 << 31, 1, 1), (512, 512, 1)])
def test_block_sizes_that_make_no_sense_are_ignored(
    h: nbd.NBD, sizes: tuple[int, int, int]
) -> None:
    connect_informed(h, [export_info(), struct.pack(">HIII", INFO_BLOCK_SIZE, *sizes)])
    kinds = nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM
    assert [h.get_block_size(kind) for kind in kinds] == [0, 0, 0]


def test_an_export_sent_twice_has_the_last_size(h: nbd.NBD) -> None:
    assert connect_informed(h, [export_info(1000), export_info(2000)]).get_size() == 2000


def test_an_export_without_information_has_a_size_or_is_an_error(h: nbd.NBD) -> None:
    with Connection(lambda wire: wire.negotiate(info=[])) as peer, suppress(nbd.Error):
        connect(h, peer)
        assert h.get_size() >= 0


def test_information_that_is_not_utf8_is_text(h: nbd.NBD) -> None:
    h.set_full_info(True)
    name = struct.pack(">H", INFO_NAME) + NOT_UTF8
    description = struct.pack(">H", INFO_DESCRIPTION) + NOT_UTF8
    connect_informed(h, [export_info(), name, description])
    assert h.get_canonical_export_name() == NOT_UTF8_STR
    assert h.get_export_description() == NOT_UTF8_STR


def test_name_that_is_not_utf8_reaches_server_and_error(h: nbd.NBD) -> None:
    asked: list[bytes] = []

    def script(wire: Wire) -> None:
        wire.greet()
        asked.append(wire.wait_for(OPT_GO).payload)
        wire.answer(OPT_GO, REP_ERR_UNKNOWN, NOT_UTF8)
        wire.linger()

    h.set_export_name(NOT_UTF8_STR)
    message = refused(h, script)
    assert counted(NOT_UTF8) in asked[0]
    assert NOT_UTF8_STR in message


def test_debug_messages_that_are_not_utf8_are_text(h: nbd.NBD) -> None:
    messages: list[str] = []
    h.set_export_name(NOT_UTF8_STR)
    h.set_debug_callback(lambda function, message: messages.append(message))
    h.set_debug(True)
    refused(h, on_go(REP_ERR_UNKNOWN, NOT_UTF8))
    assert messages
    assert all(isinstance(message, str) for message in messages)


# --- opt mode ---------------------------------------------------------------------------------


def lists(*entries: bytes, last: int = REP_ACK) -> Script:
    """Return a script that replies to a request for the list of exports."""

    def script(wire: Wire) -> None:
        wire.greet()
        wire.wait_for(OPT_LIST)
        for entry in entries:
            wire.answer(OPT_LIST, REP_SERVER, entry)
        wire.answer(OPT_LIST, last, NOT_UTF8 if last > REP_ERROR else b"")
        wire.linger()

    return script


def exports(h: nbd.NBD, script: Script) -> list[tuple[str, str]]:
    """Return the exports that a script lists."""
    found: list[tuple[str, str]] = []
    h.set_opt_mode(True)
    with Connection(script) as peer:
        connect(h, peer)
        h.opt_list(lambda name, description: found.append((name, description)))
    return found


def test_listed_export_that_is_not_utf8_is_text(h: nbd.NBD) -> None:
    script = lists(counted(NOT_UTF8) + NOT_UTF8)
    assert exports(h, script) == [(NOT_UTF8_STR, NOT_UTF8_STR)]


def test_listed_export_ends_at_nul(h: nbd.NBD) -> None:
    assert exports(h, lists(counted(b"a\0b") + b"c\0d")) == [("a", "c")]


def test_listed_export_of_the_longest_name_is_whole(h: nbd.NBD) -> None:
    assert exports(h, lists(counted(b"n" * 4096) + b"d" * 4096)) == [("n" * 4096, "d" * 4096)]


def test_exports_listed_twice_or_in_thousands_all_arrive(h: nbd.NBD) -> None:
    assert exports(h, lists(*[counted(b"same")] * 3000)) == [("same", "")] * 3000


BAD_LISTS: dict[str, Script] = {
    "name-longer-than-its-reply": lists(counted(b"name")[:-1]),
    "name-of-4-GiB": lists(struct.pack(">I", U32_MAX) + b"name"),
    "error-after-an-entry": lists(counted(b"name"), last=REP_ERR_POLICY),
    "information-in-place-of-entries": lists(last=REP_INFO),
    "unknown-reply": lists(last=77),
}


@pytest.mark.parametrize("script", BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_bad_list_is_an_error(h: nbd.NBD, script: Script) -> None:
    with pytest.raises(nbd.Error, match=r"^nbd_opt_list: ."):
        exports(h, script)


def test_name_that_is_too_long_is_skipped_or_an_error(h: nbd.NBD) -> None:
    with suppress(nbd.Error):
        assert exports(h, lists(counted(b"n" * 5000), counted(b"next"))) == [("next", "")]


def contexts(h: nbd.NBD, *replies: bytes) -> list[str]:
    """Return the names of the meta contexts that a server lists."""
    found: list[str] = []

    def script(wire: Wire) -> None:
        wire.greet()
        while (option := wire.option()).code != OPT_LIST_META:
            wire.answer(option.code, REP_ACK if option.code == 8 else REP_ERR_UNSUP)
        for reply in replies:
            wire.answer(OPT_LIST_META, REP_META_CONTEXT, reply)
        wire.answer(OPT_LIST_META, REP_ACK)
        wire.linger()

    h.set_opt_mode(True)
    with Connection(script) as peer:
        connect(h, peer)
        h.opt_list_meta_context(found.append)
    return found


def test_listed_context_that_is_not_utf8_is_text(h: nbd.NBD) -> None:
    assert contexts(h, struct.pack(">I", 0) + b"x:" + NOT_UTF8) == ["x:" + NOT_UTF8_STR]


def test_listed_context_ends_at_nul(h: nbd.NBD) -> None:
    assert contexts(h, struct.pack(">I", 0) + b"x:a\0b") == ["x:a"]


@pytest.mark.parametrize("reply", [b"", bytes(3), bytes(4), bytes(4) + b"x:" * 50000])
def test_listed_context_of_a_bad_length_is_an_error(h: nbd.NBD, reply: bytes) -> None:
    with pytest.raises(nbd.Error, match=r"^nbd_opt_list_meta_context: ."):
        contexts(h, reply)


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


# --- TLS --------------------------------------------------------------------------------------


def agrees_then(*parts: bytes) -> Script:
    """Return a script that agrees to TLS and then sends something else."""

    def script(wire: Wire) -> None:
        wire.greet()
        wire.wait_for(OPT_STARTTLS)
        wire.answer(OPT_STARTTLS, REP_ACK)
        wire.send(*parts)
        wire.linger()

    return script


def strips_tls(wire: Wire) -> None:
    """Refuse TLS, as an attacker between client and server would, and serve without it."""
    wire.negotiate()
    wire.linger()


def refuses_tls(kind: int) -> Script:
    """Return a script that refuses TLS with a message that is not text."""
    return on_option(OPT_STARTTLS, lambda wire: wire.answer(OPT_STARTTLS, kind, NOT_UTF8))


def agrees_with_payload(wire: Wire) -> None:
    """Agree to TLS with a payload that an ACK must not have."""
    wire.answer(OPT_STARTTLS, REP_ACK, b"payload")


def newstyle_without_options(wire: Wire) -> None:
    """Offer the first version of newstyle, which cannot start TLS."""
    wire.greet(0)
    wire.linger()


NO_TLS: dict[str, Script] = {
    "garbage": agrees_then(b"garbage" * 100),
    "plaintext-goes-on": agrees_then(struct.pack(">QIII", hostile.OPTION_REPLY_MAGIC, 8, 1, 0)),
    "refused": refuses_tls(REP_ERR_POLICY),
    "unknown-to-server": refuses_tls(REP_ERR_UNSUP),
    "unknown-reply": refuses_tls(77),
    "agreed-with-payload": on_option(OPT_STARTTLS, agrees_with_payload),
    "stripped": strips_tls,
    "newstyle-without-options": newstyle_without_options,
    "oldstyle": stays(NBDMAGIC, b"\0", CLISERV_MAGIC, bytes(140)),
}


@pytest.mark.parametrize("script", NO_TLS.values(), ids=NO_TLS.keys())
def test_server_without_tls_is_refused_where_tls_is_required(h: nbd.NBD, script: Script) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    refused(h, script)


def test_garbage_for_tls_is_refused_where_tls_is_allowed(h: nbd.NBD) -> None:
    h.set_tls(nbd.TLS_ALLOW)
    assert "TLS" in refused(h, agrees_then(b"garbage" * 100))


def test_stripped_tls_is_reported_where_tls_is_allowed(h: nbd.NBD) -> None:
    h.set_tls(nbd.TLS_ALLOW)
    with Connection(strips_tls) as peer:
        connect(h, peer)
        assert h.get_tls_negotiated() is False


def test_silence_in_the_tls_handshake_ends_with_its_connection(h: nbd.NBD) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    refused(h, agrees_then(), bound=0.5, silent=True)


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
