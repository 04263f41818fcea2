"""A server that breaks the protocol of the handshake gets nbd.Error or a value, in time.

Each case runs a script of support/hostile.py, whose watchdog bounds how long the client may wait.
Where versions of libnbd differ on whether a reply is fatal, both an error and a correct value pass.
A crash, a hang, another exception, or a write outside the caller's buffer never passes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from support import hostile
from support.figures import Figure
from support.hostile import (
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
    Connection,
    Script,
    Wire,
    counted,
    export_info,
)
from support.hostile_scripts import (
    MESSAGES,
    NOT_UTF8,
    NOT_UTF8_STR,
    U32_MAX,
    U64_MAX,
    connect,
    on_go,
    on_option,
    refused,
    sends,
    stays,
)

import nbd

UNKNOWN_INFO = 999


@pytest.fixture(autouse=True)
def misbehaviour(figure: Figure) -> Iterator[None]:
    """Record the number of ways to misbehave."""
    yield
    figure("hostile servers: misbehaviours", 1)


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
