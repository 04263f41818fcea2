"""Calls that libnbd 1.14 lacks; each is skipped if the libnbd in use lacks it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.handles import drain, finish, run_until
from support.servers import StartServer, program
from support.sizes import MIB

import nbd

# A type checker sees the methods of only one version of libnbd.
Handle = Any

BASE = nbd.CONTEXT_BASE_ALLOCATION
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
BITMAP = "qemu:dirty-bitmap:bitmap0"


@pytest.fixture
def opt(nbdkit: StartServer, h: Handle) -> Handle:
    """Return a handle that is negotiating, with no automatic negotiation before."""
    h.set_opt_mode(True)
    h.set_request_structured_replies(False)
    h.connect_unix(nbdkit("memory", "1M").socket)
    return h


@pytest.fixture
def extended(qemu_nbd: StartServer, dirty_qcow2: Path, h: Handle) -> Handle:
    """Return a handle with extended headers, base:allocation and a dirty bitmap, or skip."""
    h.add_meta_context(BASE)
    h.add_meta_context(BITMAP)
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2", "--bitmap=bitmap0").socket)
    if not h.get_extended_headers_negotiated():
        pytest.skip("this qemu-nbd has no extended headers")
    return h


# 64-bit extents


@pytest.mark.needs("block_status_64")
def test_block_status_64_gets_a_list_of_pairs(disk: Handle) -> None:
    disk.pwrite(b"x" * 32768, 65536)
    calls: list[Any] = []
    disk.block_status_64(MIB, 0, lambda *arguments: calls.append(arguments))
    ((context, offset, entries, error),) = calls
    assert (context, offset, error.value) == (BASE, 0, 0)
    assert entries == [(65536, HOLE), (32768, 0), (MIB - 98304, HOLE)]
    assert [type(entries), type(entries[0]), type(entries[0][0])] == [list, tuple, int]


@pytest.mark.needs("aio_block_status_64")
def test_aio_block_status_64_gets_the_same(disk: Handle) -> None:
    found: list[Any] = []
    errors: list[int] = []
    cookie = disk.aio_block_status_64(
        MIB,
        0,
        lambda context, offset, entries, error: found.append((context, offset, entries)),
        lambda error: errors.append(error.value),
    )
    finish(disk, cookie)
    assert (found, errors) == ([(BASE, 0, [(MIB, HOLE)])], [0])


@pytest.mark.needs("block_status_64")
def test_an_exception_in_an_extent64_callback_is_the_cause(disk: Handle) -> None:
    raised = ValueError("mine")

    def extent64(*arguments: Any) -> None:
        raise raised

    with pytest.raises(nbd.Error) as caught:
        disk.block_status_64(MIB, 0, extent64)
    assert caught.value.__cause__ is raised


@pytest.mark.needs("block_status_64")
def test_error_value_of_an_extent64_callback_is_the_errno(disk: Handle) -> None:
    def extent64(context: str, offset: int, entries: Any, error: Any) -> int:
        error.value = errno.ENOSPC
        return -1

    with pytest.raises(nbd.Error) as caught:
        disk.block_status_64(MIB, 0, extent64)
    assert caught.value.errnum == errno.ENOSPC


@pytest.mark.needs("block_status_64")
def test_block_status_64_raises_a_stop(disk: Handle) -> None:
    def extent64(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.block_status_64(MIB, 0, extent64)


@pytest.mark.needs("block_status_64")
def test_an_extent_of_more_than_32_bits(qemu_nbd: StartServer, tmp_path: Path, h: Handle) -> None:
    image = tmp_path / "huge.raw"
    with image.open("wb") as file:
        file.truncate(6 << 30)
    h.add_meta_context(BASE)
    h.connect_unix(qemu_nbd(image, "--format=raw").socket)
    if not h.get_extended_headers_negotiated():
        pytest.skip("this qemu-nbd has no extended headers")
    found: list[Any] = []
    h.block_status_64(
        6 << 30, 0, lambda context, offset, entries, error: found.append(list(entries))
    )
    assert found == [[(6 << 30, HOLE)]]


@pytest.mark.needs("get_extended_headers_negotiated")
def test_extended_headers_can_be_declined(
    qemu_nbd: StartServer, dirty_qcow2: Path, h: Handle
) -> None:
    h.set_request_extended_headers(False)
    h.connect_unix(qemu_nbd(dirty_qcow2, "--format=qcow2").socket)
    assert h.get_extended_headers_negotiated() is False
    assert h.get_structured_replies_negotiated() is True


@pytest.mark.needs("block_status_filter")
def test_block_status_filter_asks_for_some_contexts(extended: Handle) -> None:
    assert extended.can_block_status_payload()
    found: list[str] = []
    extended.block_status_filter(MIB, 0, [BITMAP], lambda context, *rest: found.append(context))
    assert found == [BITMAP]


@pytest.mark.needs("aio_block_status_filter")
def test_aio_block_status_filter_asks_for_some_contexts(extended: Handle) -> None:
    found: list[Any] = []
    cookie = extended.aio_block_status_filter(
        MIB, 0, [BASE], lambda context, offset, entries, error: found.append((context, entries[0]))
    )
    finish(extended, cookie)
    assert [context for context, _ in found] == [BASE]
    assert type(found[0][1]) is tuple


@pytest.mark.needs("block_status_filter")
def test_block_status_filter_refuses_an_unknown_context(extended: Handle) -> None:
    with pytest.raises(nbd.Error):
        extended.block_status_filter(MIB, 0, ["x:unknown"], print)


@pytest.mark.needs("block_status_filter")
@pytest.mark.parametrize("contexts", ["base:allocation", [1], None])
def test_block_status_filter_refuses_other_objects_than_lists_of_str(
    disk: Handle, contexts: Any
) -> None:
    with pytest.raises(TypeError):
        disk.block_status_filter(MIB, 0, contexts, print)


# negotiation


@pytest.mark.needs("opt_structured_reply")
def test_opt_structured_reply_negotiates(opt: Handle) -> None:
    assert opt.get_structured_replies_negotiated() is False
    assert opt.opt_structured_reply() is True
    assert opt.get_structured_replies_negotiated() is True


@pytest.mark.needs("aio_opt_structured_reply")
def test_aio_opt_structured_reply_negotiates(opt: Handle) -> None:
    errors: list[int] = []
    opt.aio_opt_structured_reply(lambda error: errors.append(error.value))
    run_until(opt, lambda: bool(errors))
    assert (errors, opt.get_structured_replies_negotiated()) == ([0], True)


@pytest.mark.needs("opt_extended_headers")
def test_opt_extended_headers_answers_whether(opt: Handle) -> None:
    answer = opt.opt_extended_headers()
    assert type(answer) is bool
    assert opt.get_extended_headers_negotiated() is answer


@pytest.mark.needs("opt_starttls")
def test_opt_starttls_negotiates_tls(nbdkit: StartServer, h: Handle, psk: Path) -> None:
    h.set_opt_mode(True)
    h.set_tls_username("alice")
    h.set_tls_psk_file(str(psk))
    h.connect_unix(nbdkit("memory", "1M", tls="on", psk=psk).socket)
    assert h.get_tls_negotiated() is False
    assert h.opt_starttls() is True
    assert h.get_tls_negotiated() is True


@pytest.mark.needs("opt_starttls")
def test_opt_starttls_without_tls_answers_false(opt: Handle) -> None:
    assert opt.opt_starttls() is False


@pytest.mark.needs("opt_set_meta_context")
def test_opt_set_meta_context_sets_those_that_were_added(opt: Handle) -> None:
    opt.opt_structured_reply()
    opt.add_meta_context(BASE)
    found: list[str] = []
    assert opt.opt_set_meta_context(found.append) == 1
    assert found == [BASE]
    assert opt.can_meta_context(BASE)


@pytest.mark.needs("opt_set_meta_context_queries")
def test_opt_set_meta_context_queries_sets_those_given(opt: Handle) -> None:
    opt.opt_structured_reply()
    found: list[str] = []
    assert opt.opt_set_meta_context_queries([BASE, "x:unknown"], found.append) == 1
    assert found == [BASE]


@pytest.mark.needs("opt_list_meta_context_queries")
def test_opt_list_meta_context_queries_lists_those_given(opt: Handle) -> None:
    opt.opt_structured_reply()
    found: list[str] = []
    assert opt.opt_list_meta_context_queries(["x:unknown"], found.append) == 0
    assert opt.opt_list_meta_context_queries([], found.append) >= 1
    assert BASE in found


@pytest.mark.needs("aio_opt_list_meta_context_queries")
def test_aio_opt_list_meta_context_queries(opt: Handle) -> None:
    opt.opt_structured_reply()
    found: list[str] = []
    errors: list[int] = []
    opt.aio_opt_list_meta_context_queries(
        [BASE], found.append, lambda error: errors.append(error.value)
    )
    run_until(opt, lambda: bool(errors))
    assert (found, errors) == ([BASE], [0])


@pytest.mark.needs("opt_list_meta_context_queries")
@pytest.mark.parametrize("queries", ["base:allocation", [b"x"], None])
def test_queries_refuse_other_objects_than_lists_of_str(opt: Handle, queries: Any) -> None:
    with pytest.raises(TypeError):
        opt.opt_list_meta_context_queries(queries, print)


@pytest.mark.needs("set_request_meta_context")
def test_meta_contexts_can_be_left_out(nbdkit: StartServer, h: Handle) -> None:
    h.set_request_meta_context(False)
    h.add_meta_context(BASE)
    h.connect_unix(nbdkit("memory", "1M").socket)
    with pytest.raises(nbd.Error):
        h.can_meta_context(BASE)


# settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        pytest.param(setting, value, marks=pytest.mark.needs(f"set_{setting}"), id=setting)
        for setting, value in [
            ("request_extended_headers", False),
            ("request_meta_context", False),
            ("socket_activation_name", "mine"),
            ("tls_hostname", "example.com"),
            ("tls_priority", "NORMAL"),
        ]
    ],
)
def test_a_later_setting_reads_back(h: Handle, setting: str, value: Any) -> None:
    getattr(h, f"set_{setting}")(value)
    assert getattr(h, f"get_{setting}")() == value


@pytest.mark.needs("set_socket_activation_name")
def test_the_server_sees_the_socket_activation_name(h: Handle, tmp_path: Path) -> None:
    script = tmp_path / "server"
    seen = tmp_path / "seen"
    nbdkit = program("nbdkit")
    script.write_text(
        f'#!/bin/sh\necho "$LISTEN_FDNAMES" >{seen}\nexec {nbdkit} --exit-with-parent null\n'
    )
    script.chmod(0o755)
    h.set_socket_activation_name("mine")
    h.connect_systemd_socket_activation([str(script)])
    assert seen.read_text() == "mine\n"


@pytest.mark.needs("set_tls_hostname")
def test_the_tls_hostname_is_what_the_certificate_is_for(
    nbdkit: StartServer, h: Handle, certificates: Path
) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    h.set_tls_hostname("localhost")
    h.connect_unix(nbdkit("memory", "1M", tls="require", certificates=certificates).socket)
    assert h.get_tls_negotiated()


# properties of a handle


@pytest.mark.needs("stats_bytes_sent")
def test_statistics_begin_at_zero(h: Handle) -> None:
    assert [
        h.stats_bytes_sent(),
        h.stats_chunks_sent(),
        h.stats_bytes_received(),
        h.stats_chunks_received(),
    ] == [0, 0, 0, 0]


@pytest.mark.needs("stats_bytes_sent")
def test_statistics_count_a_read(disk: Handle) -> None:
    sent, received = disk.stats_bytes_sent(), disk.stats_bytes_received()
    chunks = disk.stats_chunks_sent()
    disk.pread(65536, 0)
    assert disk.stats_bytes_sent() - sent < 100
    assert disk.stats_bytes_received() - received > 65536
    assert disk.stats_chunks_sent() - chunks == 1


@pytest.mark.needs("stats_bytes_sent")
def test_statistics_are_ints(disk: Handle) -> None:
    assert type(disk.stats_bytes_sent()) is int
    assert type(disk.stats_chunks_received()) is int


def test_get_uri_leads_back(nbdkit: StartServer, h: Handle) -> None:
    server = nbdkit("memory", "1M")
    h.connect_uri(server.uri)
    with nbd.NBD() as other:
        other.connect_uri(h.get_uri())
        assert other.get_size() == MIB


def test_get_uri_of_a_new_handle_is_an_error(h: Handle) -> None:
    with pytest.raises(nbd.Error):
        h.get_uri()


@pytest.mark.needs("is_uri")
@pytest.mark.parametrize(
    ("text", "answer"),
    [("nbd://localhost", True), ("nbds+unix:///?socket=/x", True), ("/dev/sda", False)],
)
def test_is_uri(h: Handle, text: str, answer: bool) -> None:
    assert h.is_uri(text) is answer


@pytest.mark.needs("get_handle_size")
def test_a_handle_has_a_size(h: Handle) -> None:
    assert h.get_handle_size() > 0


@pytest.mark.needs("get_version_extra")
def test_the_extra_version_is_a_str(h: Handle) -> None:
    assert type(h.get_version_extra()) is str


@pytest.mark.needs("get_subprocess_pid")
def test_the_subprocess_has_a_pid(h: Handle) -> None:
    h.connect_command([program("nbdkit"), "-s", "--exit-with-parent", "memory", "1M"])
    pid = h.get_subprocess_pid()
    assert (type(pid), pid > 1, pid != os.getpid()) == (int, True, True)
    os.kill(pid, 0)


@pytest.mark.needs("get_subprocess_pid")
def test_without_a_subprocess_there_is_no_pid(disk: Handle) -> None:
    with pytest.raises(nbd.Error):
        disk.get_subprocess_pid()


def test_the_greatest_payload(disk: Handle) -> None:
    if not hasattr(nbd, "SIZE_PAYLOAD"):
        pytest.skip(f"libnbd {disk.get_version()} has no LIBNBD_SIZE_PAYLOAD")
    assert disk.get_block_size(nbd.SIZE_PAYLOAD) > MIB


# poll2


@pytest.mark.needs("poll2")
def test_poll2_moves_the_handle(disk: Handle) -> None:
    reading, writing = os.pipe()
    try:
        disk.aio_pread(nbd.Buffer(512), 0, lambda error: 1)
        while disk.aio_in_flight():
            assert disk.poll2(reading, 20_000) >= 1
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.needs("poll2")
def test_poll2_wakes_up_for_another_descriptor(nbdkit: StartServer, h: Handle) -> None:
    h.connect_unix(nbdkit("memory", "1M", "--filter=delay", "rdelay=600").socket)
    h.aio_pread(bytearray(512), 0)
    reading, writing = os.pipe()
    try:
        assert h.poll2(reading, 1) == 0
        os.write(writing, b"x")
        assert h.poll2(reading, -1) >= 1
    finally:
        os.close(reading)
        os.close(writing)
    assert h.aio_in_flight() == 1


@pytest.mark.needs("poll2")
def test_poll2_waits_no_longer_than_its_time(disk: Handle) -> None:
    reading, writing = os.pipe()
    try:
        assert disk.poll2(reading, 1) == 0
    finally:
        os.close(reading)
        os.close(writing)
    drain(disk)
