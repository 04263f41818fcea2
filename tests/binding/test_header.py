"""Every function and constant of the installed libnbd.h is bound, and every function is called.

Each function is called in a state of the handle in which it can succeed. A proxy notes the name of
the method, so that no entry of the table can test another function than its own. If libnbd has a
function that the table lacks, the test fails, because nothing has tried that function.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Callable

import pytest
from support.handles import OWN_METHODS, drain
from support.servers import Server, StartServer, program

import nbd
from nbd._binding.build import BUNDLED

BASE = nbd.CONTEXT_BASE_ALLOCATION

# The package has no methods for these: it calls them itself, to make and close a handle, and to
# get the error of a call.
NO_METHODS = {"create", "close", "get_error", "get_errno"}


@cache
def header() -> str:
    """Return the text of the installed libnbd.h without comments, or an empty string."""
    folders = ["/usr/include"]
    if shutil.which("pkg-config"):
        found = subprocess.run(
            ["pkg-config", "--variable=includedir", "libnbd"], capture_output=True, text=True
        )
        folders = [found.stdout.strip(), *folders]
    for folder in folders:
        path = Path(folder, "libnbd.h")
        if folder and path.exists():
            return re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    return ""


def functions() -> list[str]:
    """Return the names of the functions in libnbd.h, without nbd_."""
    return re.findall(r"^extern [^;()]*?\bnbd_(\w+) *\(", header(), flags=re.MULTILINE)


def constants() -> dict[str, str]:
    """Return the constants in libnbd.h, without LIBNBD_, and their values as written there."""
    found = re.findall(r'^#define LIBNBD_(\w+) +("[^"]*"|\w+)$', header(), flags=re.MULTILINE)
    return {name: value for name, value in found if not name.startswith("HAVE_")}


@pytest.fixture(autouse=True)
def has_header() -> None:
    """Skip if libnbd.h is missing, or if libnbd came with the package and may differ from it."""
    if not header():
        pytest.skip("there is no libnbd.h (Debian package: libnbd-dev)")
    if BUNDLED:
        pytest.skip("libnbd came with the package, and libnbd.h may belong to another one")


def ignore(*arguments: Any) -> int:
    """Callback that accepts everything."""
    return 0


def read_buffer() -> nbd.Buffer:
    """Return memory for a read."""
    return nbd.Buffer(512)


class Called:
    """A proxy of a handle that notes the names of the methods that are called."""

    def __init__(self, handle: nbd.NBD) -> None:
        self.handle = handle
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.handle, name)


Call = Callable[[Any], Any]
NBDKIT = ["nbdkit", "--exit-with-parent", "memory", "1M"]
SERVE = ["nbdkit", "-s", "--exit-with-parent", "memory", "1M"]

# A new handle that is not connected.
CREATED: dict[str, Call] = {
    "set_debug": lambda h: h.set_debug(False),
    "get_debug": lambda h: h.get_debug(),
    "set_debug_callback": lambda h: h.set_debug_callback(ignore),
    "clear_debug_callback": lambda h: h.clear_debug_callback(),
    "stats_bytes_sent": lambda h: h.stats_bytes_sent(),
    "stats_chunks_sent": lambda h: h.stats_chunks_sent(),
    "stats_bytes_received": lambda h: h.stats_bytes_received(),
    "stats_chunks_received": lambda h: h.stats_chunks_received(),
    "set_handle_name": lambda h: h.set_handle_name("mine"),
    "get_handle_name": lambda h: h.get_handle_name(),
    "get_handle_size": lambda h: h.get_handle_size(),
    "set_private_data": lambda h: h.set_private_data(1),
    "get_private_data": lambda h: h.get_private_data(),
    "set_export_name": lambda h: h.set_export_name("mine"),
    "get_export_name": lambda h: h.get_export_name(),
    "set_request_block_size": lambda h: h.set_request_block_size(True),
    "get_request_block_size": lambda h: h.get_request_block_size(),
    "set_full_info": lambda h: h.set_full_info(True),
    "get_full_info": lambda h: h.get_full_info(),
    "set_tls": lambda h: h.set_tls(nbd.TLS_ALLOW),
    "get_tls": lambda h: h.get_tls(),
    "set_tls_certificates": lambda h: h.set_tls_certificates("/nowhere"),
    "set_tls_verify_peer": lambda h: h.set_tls_verify_peer(True),
    "get_tls_verify_peer": lambda h: h.get_tls_verify_peer(),
    "set_tls_username": lambda h: h.set_tls_username("alice"),
    "get_tls_username": lambda h: (h.set_tls_username("alice"), h.get_tls_username()),
    "set_tls_hostname": lambda h: h.set_tls_hostname("localhost"),
    "get_tls_hostname": lambda h: h.get_tls_hostname(),
    "set_tls_psk_file": lambda h: h.set_tls_psk_file("/nowhere"),
    "set_tls_priority": lambda h: h.set_tls_priority("NORMAL"),
    "get_tls_priority": lambda h: h.get_tls_priority(),
    "set_request_extended_headers": lambda h: h.set_request_extended_headers(True),
    "get_request_extended_headers": lambda h: h.get_request_extended_headers(),
    "set_request_structured_replies": lambda h: h.set_request_structured_replies(True),
    "get_request_structured_replies": lambda h: h.get_request_structured_replies(),
    "set_request_meta_context": lambda h: h.set_request_meta_context(True),
    "get_request_meta_context": lambda h: h.get_request_meta_context(),
    "set_handshake_flags": lambda h: h.set_handshake_flags(0),
    "get_handshake_flags": lambda h: h.get_handshake_flags(),
    "set_pread_initialize": lambda h: h.set_pread_initialize(True),
    "get_pread_initialize": lambda h: h.get_pread_initialize(),
    "set_strict_mode": lambda h: h.set_strict_mode(0),
    "get_strict_mode": lambda h: h.get_strict_mode(),
    "set_opt_mode": lambda h: h.set_opt_mode(True),
    "get_opt_mode": lambda h: h.get_opt_mode(),
    "add_meta_context": lambda h: h.add_meta_context(BASE),
    "get_nr_meta_contexts": lambda h: h.get_nr_meta_contexts(),
    "clear_meta_contexts": lambda h: h.clear_meta_contexts(),
    "set_uri_allow_transports": lambda h: h.set_uri_allow_transports(1),
    "set_uri_allow_tls": lambda h: h.set_uri_allow_tls(nbd.TLS_ALLOW),
    "set_uri_allow_local_file": lambda h: h.set_uri_allow_local_file(True),
    "set_uri_allow_tls_priority": lambda h: h.set_uri_allow_tls_priority(True),
    "set_socket_activation_name": lambda h: h.set_socket_activation_name("mine"),
    "get_socket_activation_name": lambda h: h.get_socket_activation_name(),
    "connect_command": lambda h: h.connect_command(SERVE),
    "connect_systemd_socket_activation": lambda h: h.connect_systemd_socket_activation(NBDKIT),
    "aio_connect_command": lambda h: h.aio_connect_command(SERVE),
    "aio_connect_systemd_socket_activation": (
        lambda h: h.aio_connect_systemd_socket_activation(NBDKIT)
    ),
    "aio_is_created": lambda h: h.aio_is_created(),
    "aio_is_connecting": lambda h: h.aio_is_connecting(),
    "aio_is_negotiating": lambda h: h.aio_is_negotiating(),
    "aio_is_ready": lambda h: h.aio_is_ready(),
    "aio_is_processing": lambda h: h.aio_is_processing(),
    "aio_is_dead": lambda h: h.aio_is_dead(),
    "aio_is_closed": lambda h: h.aio_is_closed(),
    "connection_state": lambda h: h.connection_state(),
    "get_package_name": lambda h: h.get_package_name(),
    "get_version": lambda h: h.get_version(),
    "get_version_extra": lambda h: h.get_version_extra(),
    "supports_tls": lambda h: h.supports_tls(),
    "supports_uri": lambda h: h.supports_uri(),
    "supports_vsock": lambda h: h.supports_vsock(),
    "is_uri": lambda h: h.is_uri("nbd://localhost"),
}

# A disk of 1 MiB, with base:allocation.
READY: dict[str, Call] = {
    "get_meta_context": lambda h: h.get_meta_context(0),
    "get_tls_negotiated": lambda h: h.get_tls_negotiated(),
    "get_structured_replies_negotiated": lambda h: h.get_structured_replies_negotiated(),
    "get_extended_headers_negotiated": lambda h: h.get_extended_headers_negotiated(),
    "get_canonical_export_name": lambda h: h.get_canonical_export_name(),
    "get_export_description": lambda h: h.get_export_description(),
    "is_read_only": lambda h: h.is_read_only(),
    "can_flush": lambda h: h.can_flush(),
    "can_fua": lambda h: h.can_fua(),
    "is_rotational": lambda h: h.is_rotational(),
    "can_trim": lambda h: h.can_trim(),
    "can_zero": lambda h: h.can_zero(),
    "can_fast_zero": lambda h: h.can_fast_zero(),
    "can_df": lambda h: h.can_df(),
    "can_block_status_payload": lambda h: h.can_block_status_payload(),
    "can_multi_conn": lambda h: h.can_multi_conn(),
    "can_cache": lambda h: h.can_cache(),
    "can_meta_context": lambda h: h.can_meta_context(BASE),
    "get_protocol": lambda h: h.get_protocol(),
    "get_size": lambda h: h.get_size(),
    "get_block_size": lambda h: h.get_block_size(nbd.SIZE_PREFERRED),
    "pread": lambda h: h.pread(512, 0),
    "pread_structured": lambda h: h.pread_structured(512, 0, ignore),
    "pwrite": lambda h: h.pwrite(bytes(512), 0),
    "shutdown": lambda h: h.shutdown(),
    "flush": lambda h: h.flush(),
    "trim": lambda h: h.trim(512, 0),
    "cache": lambda h: h.cache(512, 0),
    "zero": lambda h: h.zero(512, 0),
    "block_status": lambda h: h.block_status(512, 0, ignore),
    "block_status_64": lambda h: h.block_status_64(512, 0, ignore),
    "aio_pread": lambda h: h.aio_pread(read_buffer(), 0),
    "aio_pread_structured": lambda h: h.aio_pread_structured(read_buffer(), 0, ignore),
    "aio_pwrite": lambda h: h.aio_pwrite(bytes(512), 0),
    "aio_disconnect": lambda h: h.aio_disconnect(),
    "aio_flush": lambda h: h.aio_flush(),
    "aio_trim": lambda h: h.aio_trim(512, 0),
    "aio_cache": lambda h: h.aio_cache(512, 0),
    "aio_zero": lambda h: h.aio_zero(512, 0),
    "aio_block_status": lambda h: h.aio_block_status(512, 0, ignore),
    "aio_block_status_64": lambda h: h.aio_block_status_64(512, 0, ignore),
    "aio_get_fd": lambda h: h.aio_get_fd(),
    "aio_get_direction": lambda h: h.aio_get_direction(),
    "aio_notify_read": lambda h: h.aio_notify_read(),
    "aio_in_flight": lambda h: h.aio_in_flight(),
    "poll": lambda h: h.poll(0),
    "poll2": lambda h: h.poll2(h.aio_get_fd(), 0),
    "get_uri": lambda h: h.get_uri(),
}

# The same disk with a read in flight that is never answered.
BUSY: dict[str, Call] = {
    "aio_command_completed": lambda h: h.aio_command_completed(1),
    "aio_peek_command_completed": lambda h: h.aio_peek_command_completed(),
}

# Negotiating with the same server, before any option was sent.
NEGOTIATING: dict[str, Call] = {
    "opt_go": lambda h: h.opt_go(),
    "opt_abort": lambda h: h.opt_abort(),
    "opt_starttls": lambda h: h.opt_starttls(),
    "opt_extended_headers": lambda h: h.opt_extended_headers(),
    "opt_structured_reply": lambda h: h.opt_structured_reply(),
    "opt_list": lambda h: h.opt_list(ignore),
    "opt_info": lambda h: h.opt_info(),
    "opt_list_meta_context": lambda h: h.opt_list_meta_context(ignore),
    "opt_list_meta_context_queries": lambda h: h.opt_list_meta_context_queries([BASE], ignore),
    "opt_set_meta_context": lambda h: h.opt_set_meta_context(ignore),
    "opt_set_meta_context_queries": lambda h: h.opt_set_meta_context_queries([BASE], ignore),
    "aio_opt_go": lambda h: h.aio_opt_go(),
    "aio_opt_abort": lambda h: h.aio_opt_abort(),
    "aio_opt_starttls": lambda h: h.aio_opt_starttls(),
    "aio_opt_extended_headers": lambda h: h.aio_opt_extended_headers(),
    "aio_opt_structured_reply": lambda h: h.aio_opt_structured_reply(),
    "aio_opt_list": lambda h: h.aio_opt_list(ignore),
    "aio_opt_info": lambda h: h.aio_opt_info(),
    "aio_opt_list_meta_context": lambda h: h.aio_opt_list_meta_context(ignore),
    "aio_opt_list_meta_context_queries": (
        lambda h: h.aio_opt_list_meta_context_queries([BASE], ignore)
    ),
    "aio_opt_set_meta_context": lambda h: h.aio_opt_set_meta_context(ignore),
    "aio_opt_set_meta_context_queries": (
        lambda h: h.aio_opt_set_meta_context_queries([BASE], ignore)
    ),
}

# A server that listens on a Unix socket or a TCP port; the handle is new.
UNIX: dict[str, Callable[[Any, Server], object]] = {
    "connect_uri": lambda h, server: h.connect_uri(server.uri),
    "connect_unix": lambda h, server: h.connect_unix(server.socket),
    "connect_socket": lambda h, server: h.connect_socket(reached(server)),
    "aio_connect": lambda h, server: h.aio_connect(server.socket),
    "aio_connect_socket": lambda h, server: h.aio_connect_socket(reached(server)),
    "aio_connect_uri": lambda h, server: h.aio_connect_uri(server.uri),
    "aio_connect_unix": lambda h, server: h.aio_connect_unix(server.socket),
    "aio_notify_write": lambda h, server: (
        h.aio_connect_unix(server.socket),
        h.aio_notify_write(),
    ),
}

TCP: dict[str, Callable[[Any, Server], object]] = {
    "connect_tcp": lambda h, server: h.connect_tcp("127.0.0.1", str(server.port)),
    "aio_connect_tcp": lambda h, server: h.aio_connect_tcp("127.0.0.1", str(server.port)),
}

# These cannot succeed here: no virtual machine, a server without the extension.
FAILING: dict[str, Call] = {
    "connect_vsock": lambda h: h.connect_vsock(3, 0xFFFFFFF0),
    "aio_connect_vsock": lambda h: h.aio_connect_vsock(3, 0xFFFFFFF0),
    "kill_subprocess": lambda h: h.kill_subprocess(signal.SIGTERM),
    "get_subprocess_pid": lambda h: h.get_subprocess_pid(),
    "block_status_filter": lambda h: h.block_status_filter(512, 0, [BASE], ignore),
    "aio_block_status_filter": lambda h: h.aio_block_status_filter(512, 0, [BASE], ignore),
}

TABLES: list[dict[str, Any]] = [CREATED, READY, BUSY, NEGOTIATING, UNIX, TCP, FAILING]


def reached(server: Server) -> int:
    """Return the descriptor of a socket that is connected to the server."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(server.socket)
    return sock.detach()


def each(table: dict[str, Any]) -> pytest.MarkDecorator:
    """Run a test for each entry of a table; skip those that the libnbd in use lacks."""
    entries = [
        pytest.param(name, call, id=name, marks=pytest.mark.needs(name))
        for name, call in table.items()
    ]
    return pytest.mark.parametrize(("name", "call"), entries)


def test_libnbd_h_has_functions_and_constants() -> None:
    assert len(functions()) >= 120
    assert len(constants()) >= 30


def test_every_function_has_a_method() -> None:
    methods = set(dir(nbd.NBD))
    assert [name for name in functions() if name not in methods | NO_METHODS] == []


def test_every_method_has_a_function() -> None:
    methods = {name for name in dir(nbd.NBD) if not name.startswith("_")}
    assert methods - set(functions()) == OWN_METHODS


def test_every_function_is_in_one_table() -> None:
    listed = sorted(name for table in TABLES for name in table)
    assert len(listed) == len(set(listed))
    assert sorted(set(functions()) - NO_METHODS - set(listed)) == []


def test_every_constant_is_bound_with_its_value() -> None:
    for name, text in constants().items():
        value = text.strip('"') if text.startswith('"') else int(text.rstrip("U"), 0)
        assert getattr(nbd, name) == value, name


@each(CREATED)
def test_a_function_of_a_new_handle(h: nbd.NBD, name: str, call: Call) -> None:
    program("nbdkit")
    called = Called(h)
    call(called)
    assert name in called.names


@each(READY)
def test_a_function_of_a_connected_handle(
    nbdkit: StartServer, h: nbd.NBD, name: str, call: Call
) -> None:
    if name in ("get_canonical_export_name", "get_export_description"):
        h.set_full_info(True)
    h.add_meta_context(BASE)
    described = ["eval", "get_size=echo 1M", "pread=exit 1", "export_description=echo text"]
    plugin = described if name == "get_export_description" else ["memory", "1M"]
    h.connect_unix(nbdkit(*plugin).socket)
    called = Called(h)
    call(called)
    assert name in called.names
    if h.aio_is_ready() or h.aio_is_processing():
        drain(h)


@each(BUSY)
def test_a_function_of_a_busy_handle(
    nbdkit: StartServer, h: nbd.NBD, name: str, call: Call
) -> None:
    h.connect_unix(nbdkit("memory", "1M", "--filter=delay", "rdelay=600").socket)
    h.aio_pread(bytearray(512), 0)
    called = Called(h)
    call(called)
    assert name in called.names


@each(NEGOTIATING)
def test_a_function_of_a_negotiating_handle(
    nbdkit: StartServer, h: nbd.NBD, name: str, call: Call
) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    called = Called(h)
    call(called)
    assert name in called.names


@each(UNIX)
def test_a_function_that_connects_to_a_unix_socket(
    nbdkit: StartServer, h: nbd.NBD, name: str, call: Callable[[Any, Server], object]
) -> None:
    called = Called(h)
    call(called, nbdkit("memory", "1M"))
    assert name in called.names
    assert not h.aio_is_created()


@each(TCP)
def test_a_function_that_connects_to_a_tcp_port(
    nbdkit: StartServer, h: nbd.NBD, name: str, call: Callable[[Any, Server], object]
) -> None:
    called = Called(h)
    call(called, nbdkit("memory", "1M", tcp=True))
    assert called.names == {name}
    assert not h.aio_is_created()


@each(FAILING)
def test_a_function_that_has_no_chance_here(disk: nbd.NBD, name: str, call: Call) -> None:
    called = Called(disk)
    with pytest.raises(nbd.Error):
        call(called)
    assert called.names == {name}
