"""What client and server negotiate: settings before connecting, opt mode, and the result."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from support.handles import run_until
from support.servers import Server, StartServer
from support.sizes import MIB

import nbd

BASE = nbd.CONTEXT_BASE_ALLOCATION

# An nbdkit with two exports, each with its own name, description and size.
EXPORTS = [
    "eval",
    r"list_exports=printf 'INTERLEAVED\none\nthe first\ntwo\nthe second\n'",
    "open=echo $3",
    "get_size=case $2 in one) echo 1M ;; two) echo 2M ;; *) echo EINVAL >&2; exit 1 ;; esac",
    'export_description=echo "about $2"',
    "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
]


@pytest.fixture
def exports(nbdkit: StartServer) -> Server:
    """Return a server with exports "one" (1 MiB) and "two" (2 MiB)."""
    return nbdkit(*EXPORTS)


def listed(handle: nbd.NBD) -> list[tuple[str, str]]:
    """Return the arguments of opt_list's callback."""
    found: list[tuple[str, str]] = []
    assert handle.opt_list(lambda *export: found.append(export)) == len(found)
    return found


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("debug", [True, False]),
        ("handle_name", ["mine", ""]),
        ("export_name", ["some export", "", "4096".rjust(4096)]),
        ("request_block_size", [False, True]),
        ("full_info", [True, False]),
        ("tls", [nbd.TLS_ALLOW, nbd.TLS_REQUIRE, nbd.TLS_DISABLE]),
        ("tls_verify_peer", [False, True]),
        ("tls_username", ["alice"]),
        ("request_structured_replies", [False, True]),
        ("handshake_flags", [0, nbd.HANDSHAKE_FLAG_MASK]),
        ("pread_initialize", [False, True]),
        ("strict_mode", [0, nbd.STRICT_BOUNDS, nbd.STRICT_MASK]),
        ("opt_mode", [True, False]),
        ("private_data", [1, (1 << 63) + 5, 0]),
    ],
)
def test_a_setting_reads_back(h: nbd.NBD, setting: str, values: list[Any]) -> None:
    for value in values:
        getattr(h, f"set_{setting}")(value)
        assert getattr(h, f"get_{setting}")() == value


def test_set_private_data_returns_the_old_value(h: nbd.NBD) -> None:
    assert [h.set_private_data(value) for value in (7, 8, 9)] == [0, 7, 8]


def test_an_unknown_tls_level_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.set_tls(3)
    assert caught.value.errnum == errno.EINVAL


def test_an_unknown_handshake_flag_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.set_handshake_flags(nbd.HANDSHAKE_FLAG_MASK + 1)
    assert caught.value.errnum == errno.EINVAL


def test_an_unknown_strict_flag_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.set_strict_mode(1 << 30)
    assert caught.value.errnum == errno.EINVAL


def test_an_export_name_longer_than_the_protocol_allows_is_refused(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.set_export_name(4097 * "x")
    assert caught.value.errnum == errno.ENAMETOOLONG


def test_meta_contexts_are_kept_in_order(h: nbd.NBD) -> None:
    h.add_meta_context(BASE)
    h.add_meta_context("x:y")
    assert h.get_nr_meta_contexts() == 2
    assert [h.get_meta_context(i) for i in range(2)] == [BASE, "x:y"]


def test_meta_contexts_can_be_cleared(h: nbd.NBD) -> None:
    h.add_meta_context(BASE)
    h.clear_meta_contexts()
    assert h.get_nr_meta_contexts() == 0


def test_a_meta_context_that_was_not_added_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.get_meta_context(0)
    assert caught.value.errnum == errno.EINVAL


def test_a_setting_is_refused_after_connecting(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.set_export_name("late")
    assert caught.value.errnum == errno.EINVAL


def test_the_protocol_is_fixed_newstyle(disk: nbd.NBD) -> None:
    assert disk.get_protocol() == "newstyle-fixed"


def test_the_protocol_is_newstyle_without_the_flag(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.set_handshake_flags(0)
    h.connect_unix(nbdkit("memory", "1M").socket)
    assert h.get_protocol() == "newstyle"


def test_the_protocol_is_oldstyle_if_the_server_speaks_that(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.connect_unix(nbdkit("-o", "memory", "1M").socket)
    assert h.get_protocol() == "oldstyle"


def test_structured_replies_are_negotiated(disk: nbd.NBD) -> None:
    assert disk.get_structured_replies_negotiated()
    assert disk.can_df()


def test_structured_replies_can_be_declined(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.set_request_structured_replies(False)
    h.connect_unix(nbdkit("memory", "1M").socket)
    assert not h.get_structured_replies_negotiated()
    assert not h.can_df()


def test_a_server_without_structured_replies(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("--no-sr", "memory", "1M").socket)
    assert not h.get_structured_replies_negotiated()


def test_a_meta_context_that_the_server_knows_is_available(disk: nbd.NBD) -> None:
    assert disk.can_meta_context(BASE)


def test_a_meta_context_that_the_server_does_not_know_is_not_available(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.add_meta_context("x:unknown")
    h.connect_unix(nbdkit("memory", "1M").socket)
    assert not h.can_meta_context("x:unknown")


def test_a_read_only_server_says_so(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("-r", "memory", "1M").socket)
    assert h.is_read_only()


def test_a_disk_has_the_features_of_nbdkit_memory(disk: nbd.NBD) -> None:
    can = {
        name: getattr(disk, name)()
        for name in dir(disk)
        if name.startswith("can_") and name not in ("can_meta_context", "can_block_status_payload")
    }
    assert can == {
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
    }


def test_a_server_without_trim_says_so(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("--filter=nozero", "memory", "1M").socket)
    assert not h.can_zero()
    assert not h.can_fast_zero()


def test_a_rotational_disk_says_so(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(
        nbdkit("eval", "get_size=echo 1M", "pread=exit 1", "is_rotational=exit 0").socket
    )
    assert h.is_rotational()


def test_block_sizes_are_those_of_the_server(nbdkit: StartServer, h: nbd.NBD) -> None:
    policy = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    h.connect_unix(nbdkit("--filter=blocksize-policy", "memory", "1M", *policy).socket)
    sizes = [nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM]
    assert [h.get_block_size(size) for size in sizes] == [512, 4096, 65536]


def test_block_sizes_are_zero_if_the_server_sends_none(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.set_request_block_size(False)
    policy = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    h.connect_unix(nbdkit("--filter=blocksize-policy", "memory", "1M", *policy).socket)
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 0


def test_an_unknown_block_size_type_is_einval(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.get_block_size(99)
    assert caught.value.errnum == errno.EINVAL


def test_the_size_of_a_huge_export(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_unix(nbdkit("memory", str((1 << 63) - 1)).socket)
    assert h.get_size() == (1 << 63) - 1


def test_an_export_is_chosen_by_name(exports: Server, h: nbd.NBD) -> None:
    h.set_export_name("two")
    h.connect_unix(exports.socket)
    assert h.get_size() == 2 * MIB


def test_an_unknown_export_fails(exports: Server, h: nbd.NBD) -> None:
    h.set_export_name("three")
    with pytest.raises(nbd.Error):
        h.connect_unix(exports.socket)


def test_full_info_has_canonical_name_and_description(exports: Server, h: nbd.NBD) -> None:
    h.set_full_info(True)
    h.set_export_name("one")
    h.connect_unix(exports.socket)
    assert h.get_canonical_export_name() == "one"
    assert h.get_export_description() == "about one"


def test_without_full_info_there_is_no_description(exports: Server, h: nbd.NBD) -> None:
    h.set_export_name("one")
    h.connect_unix(exports.socket)
    with pytest.raises(nbd.Error):
        h.get_export_description()


def test_opt_mode_stops_before_the_export_is_chosen(opt: nbd.NBD) -> None:
    assert opt.aio_is_negotiating()
    assert not opt.aio_is_ready()


def test_opt_go_makes_the_handle_ready(opt: nbd.NBD) -> None:
    opt.opt_go()
    assert opt.aio_is_ready()
    assert opt.pread(512, 0) == bytes(512)


def test_opt_abort_closes_the_connection(opt: nbd.NBD) -> None:
    opt.opt_abort()
    assert opt.aio_is_closed()


def test_opt_info_reports_the_size_before_opt_go(opt: nbd.NBD) -> None:
    opt.opt_info()
    assert opt.get_size() == MIB
    assert opt.aio_is_negotiating()


def test_size_is_unknown_before_opt_info(opt: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        opt.get_size()


def test_opt_info_of_one_export_after_the_other(exports: Server, h: nbd.NBD) -> None:
    h.set_opt_mode(True)
    h.connect_unix(exports.socket)
    sizes = []
    for name in ("one", "two"):
        h.set_export_name(name)
        h.opt_info()
        sizes.append(h.get_size())
    assert sizes == [MIB, 2 * MIB]


def test_opt_info_that_failed_leaves_the_handle_negotiating(exports: Server, h: nbd.NBD) -> None:
    h.set_opt_mode(True)
    h.connect_unix(exports.socket)
    h.set_export_name("three")
    with pytest.raises(nbd.Error):
        h.opt_info()
    h.set_export_name("two")
    h.opt_go()
    assert h.get_size() == 2 * MIB


def test_opt_list_calls_back_with_name_and_description(exports: Server, h: nbd.NBD) -> None:
    h.set_opt_mode(True)
    h.connect_unix(exports.socket)
    assert listed(h) == [("one", "the first"), ("two", "the second")]


def test_opt_list_of_a_server_with_a_default_export(opt: nbd.NBD) -> None:
    assert listed(opt) == [("", "")]


def test_opt_list_meta_context_calls_back_with_names(opt: nbd.NBD) -> None:
    found: list[str] = []
    assert opt.opt_list_meta_context(found.append) == len(found)
    assert BASE in found


def test_opt_list_meta_context_answers_the_contexts_that_were_added(opt: nbd.NBD) -> None:
    opt.add_meta_context("x:unknown")
    found: list[str] = []
    assert opt.opt_list_meta_context(found.append) == 0
    assert found == []


def test_options_are_refused_without_opt_mode(disk: nbd.NBD) -> None:
    for option in (disk.opt_go, disk.opt_info, disk.opt_abort):
        with pytest.raises(nbd.Error) as caught:
            option()
        assert caught.value.errnum == errno.EINVAL


def test_aio_opt_go(opt: nbd.NBD) -> None:
    opt.aio_opt_go()
    run_until(opt, opt.aio_is_ready)
    assert opt.get_size() == MIB


def test_aio_opt_go_calls_its_completion_once(opt: nbd.NBD) -> None:
    errors: list[int] = []
    opt.aio_opt_go(lambda error: errors.append(error.value))
    run_until(opt, opt.aio_is_ready)
    assert errors == [0]


def test_aio_opt_go_of_an_unknown_export_completes_with_an_error(
    exports: Server, h: nbd.NBD
) -> None:
    h.set_opt_mode(True)
    h.connect_unix(exports.socket)
    h.set_export_name("three")
    errors: list[int] = []
    h.aio_opt_go(lambda error: errors.append(error.value))
    run_until(h, lambda: bool(errors))
    assert errors[0] != 0


def test_aio_opt_info(opt: nbd.NBD) -> None:
    errors: list[int] = []
    opt.aio_opt_info(completion=lambda error: errors.append(error.value))
    run_until(opt, lambda: bool(errors))
    assert (errors, opt.get_size()) == ([0], MIB)


def test_aio_opt_abort(opt: nbd.NBD) -> None:
    opt.aio_opt_abort()
    run_until(opt, opt.aio_is_closed)
    assert not opt.aio_is_dead()


def test_aio_opt_list(exports: Server, h: nbd.NBD) -> None:
    h.set_opt_mode(True)
    h.connect_unix(exports.socket)
    found: list[str] = []
    errors: list[int] = []
    h.aio_opt_list(
        lambda name, description: found.append(name), lambda error: errors.append(error.value)
    )
    run_until(h, lambda: bool(errors))
    assert (found, errors) == (["one", "two"], [0])


def test_aio_opt_list_without_completion(opt: nbd.NBD) -> None:
    found: list[str] = []
    opt.aio_opt_list(lambda name, description: found.append(name))
    run_until(opt, lambda: bool(found))
    assert found == [""]


def test_aio_opt_list_meta_context(opt: nbd.NBD) -> None:
    found: list[str] = []
    errors: list[int] = []
    opt.aio_opt_list_meta_context(found.append, lambda error: errors.append(error.value))
    run_until(opt, lambda: bool(errors))
    assert errors == [0]
    assert BASE in found


def test_tls_can_be_negotiated_in_opt_mode(nbdkit: StartServer, h: nbd.NBD, psk: Path) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_username("alice")
    h.set_tls_psk_file(str(psk))
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M", tls="require", psk=psk).socket)
    assert h.get_tls_negotiated()
    assert listed(h) == [("", "")]
