"""Each row of the return table: the exact type of each result."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from support.servers import Server, StartServer

import nbd

TRUTHS = [
    "aio_is_closed",
    "aio_is_connecting",
    "aio_is_created",
    "aio_is_dead",
    "aio_is_negotiating",
    "aio_is_processing",
    "aio_is_ready",
    "can_cache",
    "can_df",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_zero",
    "get_debug",
    "get_full_info",
    "get_opt_mode",
    "get_pread_initialize",
    "get_request_block_size",
    "get_request_structured_replies",
    "get_structured_replies_negotiated",
    "get_tls_negotiated",
    "get_tls_verify_peer",
    "is_read_only",
    "is_rotational",
    "supports_tls",
    "supports_uri",
]

# These are newer than libnbd 1.14.
LATER_TRUTHS = [
    "can_block_status_payload",
    "get_extended_headers_negotiated",
    "get_request_extended_headers",
    "get_request_meta_context",
    "supports_vsock",
]

NUMBERS = [
    "aio_get_direction",
    "aio_get_fd",
    "aio_in_flight",
    "get_handshake_flags",
    "get_nr_meta_contexts",
    "get_private_data",
    "get_size",
    "get_strict_mode",
    "get_tls",
]

TEXTS = [
    "connection_state",
    "get_export_name",
    "get_handle_name",
    "get_package_name",
    "get_protocol",
    "get_version",
]

ACTIONS: list[tuple[str, Callable[[nbd.NBD], object]]] = [
    ("set_debug", lambda h: h.set_debug(False)),
    ("set_debug_callback", lambda h: h.set_debug_callback(print)),
    ("clear_debug_callback", lambda h: h.clear_debug_callback()),
    ("set_handle_name", lambda h: h.set_handle_name("x")),
    ("set_pread_initialize", lambda h: h.set_pread_initialize(True)),
    ("set_strict_mode", lambda h: h.set_strict_mode(0)),
    ("pwrite", lambda h: h.pwrite(b"x", 0)),
    ("zero", lambda h: h.zero(512, 0)),
    ("trim", lambda h: h.trim(512, 0)),
    ("cache", lambda h: h.cache(512, 0)),
    ("flush", lambda h: h.flush()),
    ("block_status", lambda h: h.block_status(512, 0, lambda *extent: 0)),
    ("aio_disconnect", lambda h: h.aio_disconnect()),
    ("shutdown", lambda h: h.shutdown()),
    ("close", lambda h: h.close()),
]


@pytest.mark.parametrize("name", TRUTHS)
def test_a_question_is_answered_with_a_bool(disk: nbd.NBD, name: str) -> None:
    assert type(getattr(disk, name)()) is bool


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in LATER_TRUTHS]
)
def test_a_question_of_a_later_libnbd_is_answered_with_a_bool(disk: nbd.NBD, name: str) -> None:
    assert type(getattr(disk, name)()) is bool


def test_can_meta_context_is_answered_with_a_bool(disk: nbd.NBD) -> None:
    answers = [disk.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), disk.can_meta_context("x:y")]
    assert [type(answer) for answer in answers] == [bool, bool]
    assert answers == [True, False]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_an_int_and_no_bool(disk: nbd.NBD, name: str) -> None:
    assert type(getattr(disk, name)()) is int


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_a_str(disk: nbd.NBD, name: str) -> None:
    assert type(getattr(disk, name)()) is str


@pytest.mark.parametrize(("name", "call"), ACTIONS, ids=[name for name, _ in ACTIONS])
def test_an_action_returns_none(
    disk: nbd.NBD, name: str, call: Callable[[nbd.NBD], object]
) -> None:
    assert call(disk) is None


CONNECTS: list[tuple[str, Callable[[nbd.NBD, Server], object]]] = [
    ("connect_unix", lambda h, server: h.connect_unix(server.socket)),
    ("connect_uri", lambda h, server: h.connect_uri(server.uri)),
    ("aio_connect", lambda h, server: h.aio_connect(server.socket)),
    ("aio_connect_unix", lambda h, server: h.aio_connect_unix(server.socket)),
    ("aio_connect_uri", lambda h, server: h.aio_connect_uri(server.uri)),
]


@pytest.mark.parametrize(("name", "call"), CONNECTS, ids=[name for name, _ in CONNECTS])
def test_connecting_returns_none(
    nbdkit: StartServer,
    h: nbd.NBD,
    name: str,
    call: Callable[[nbd.NBD, Server], object],
) -> None:
    assert call(h, nbdkit("memory", "1M")) is None


@pytest.mark.parametrize("option", ["opt_go", "opt_info", "opt_abort", "aio_opt_go"])
def test_an_option_returns_none(nbdkit: StartServer, h: nbd.NBD, option: str) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    assert getattr(h, option)() is None


def test_opt_list_returns_a_count(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    count = h.opt_list(lambda name, description: 0)
    assert (type(count), count) == (int, 1)


def test_aio_opt_list_returns_none(nbdkit: StartServer, h: Any) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    assert h.aio_opt_list(lambda name, description: 0) is None


def test_pread_returns_a_new_bytearray(disk: nbd.NBD) -> None:
    first, second = disk.pread(512, 0), disk.pread(512, 0)
    assert type(first) is bytearray
    assert first == second
    assert first is not second


def test_pread_structured_returns_a_bytearray(disk: nbd.NBD) -> None:
    data = disk.pread_structured(512, 0, lambda *chunk: 0)
    assert type(data) is bytearray
    assert data == bytes(512)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda h: h.aio_pread(bytearray(512), 0), id="aio_pread"),
        pytest.param(lambda h: h.aio_pwrite(bytes(512), 0), id="aio_pwrite"),
        pytest.param(lambda h: h.aio_flush(), id="aio_flush"),
        pytest.param(lambda h: h.aio_zero(512, 0), id="aio_zero"),
    ],
)
def test_an_aio_command_returns_a_positive_cookie(
    disk: nbd.NBD, command: Callable[[nbd.NBD], Any]
) -> None:
    cookies = [command(disk), command(disk)]
    assert [type(cookie) for cookie in cookies] == [int, int]
    assert 0 < cookies[0] < cookies[1]


def test_aio_command_completed_returns_a_bool(disk: nbd.NBD) -> None:
    cookie = disk.aio_flush()
    answers = [disk.aio_command_completed(cookie)]
    while not answers[-1]:
        disk.poll(-1)
        answers.append(disk.aio_command_completed(cookie))
    assert {type(answer) for answer in answers} == {bool}


def test_poll_returns_an_int(disk: nbd.NBD) -> None:
    disk.aio_flush()
    answer = disk.poll(-1)
    assert (type(answer), answer) == (int, 1)


def test_get_block_size_returns_an_int(disk: nbd.NBD) -> None:
    assert type(disk.get_block_size(nbd.SIZE_MINIMUM)) is int


def test_get_meta_context_returns_a_str(disk: nbd.NBD) -> None:
    assert disk.get_meta_context(0) == nbd.CONTEXT_BASE_ALLOCATION


def test_get_tls_username_returns_a_str(h: nbd.NBD) -> None:
    h.set_tls_username("alice")
    assert h.get_tls_username() == "alice"


def test_private_data_is_never_an_error(h: nbd.NBD) -> None:
    # The largest value has the same bits as -1, which other return types use for failure.
    greatest = (1 << 64) - 1
    h.set_private_data(greatest)
    assert h.set_private_data(0) == greatest
