"""Every way to connect: connect_* and aio_connect_*, TLS, and the errors."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path
from typing import Any, Callable

import pytest
from support.handles import run_until
from support.servers import NbdServer, Server, StartServer, program
from support.sizes import MIB

import nbd

NOBODY = 3  # a vsock address with no machine, or at least no server
MEMORY = ["--exit-with-parent", "memory", "1M"]


@pytest.fixture
def tcp_server(nbdkit: StartServer) -> Server:
    """Return an nbdkit with an empty disk of 1 MiB on a TCP port of 127.0.0.1."""
    return nbdkit("memory", "1M", tcp=True)


def connected_socket(server: Server) -> int:
    """Return the descriptor of a socket connected to the server."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(server.socket)
    return sock.detach()


def test_connect_uri_by_unix_socket(server: Server, h: nbd.NBD) -> None:
    h.connect_uri(server.uri)
    assert h.get_size() == MIB


def test_connect_uri_by_tcp(tcp_server: Server, h: nbd.NBD) -> None:
    h.connect_uri(tcp_server.uri)
    assert h.get_size() == MIB


def test_connect_uri_sets_the_export_name(server: Server, h: nbd.NBD) -> None:
    h.connect_uri(f"nbd+unix:///some%20export?socket={server.socket}")
    assert h.get_export_name() == "some export"


def test_connect_unix(server: Server, h: nbd.NBD) -> None:
    h.connect_unix(server.socket)
    assert h.get_size() == MIB


def test_connect_tcp(tcp_server: Server, h: nbd.NBD) -> None:
    h.connect_tcp("127.0.0.1", str(tcp_server.port))
    assert h.get_size() == MIB


def test_connect_tcp_by_name(tcp_server: Server, h: nbd.NBD) -> None:
    try:
        socket.getaddrinfo("localhost", tcp_server.port)
    except OSError as reason:
        pytest.skip(f"localhost has no address here ({reason}): /etc/hosts should give one")
    h.connect_tcp("localhost", str(tcp_server.port))
    assert h.get_size() == MIB


def test_connect_tcp_by_ipv6(nbdkit: StartServer, h: nbd.NBD) -> None:
    h.connect_tcp("::1", str(nbdkit("memory", "1M", tcp=True, host="::1").port))
    assert h.get_size() == MIB


def test_connect_socket(server: Server, h: nbd.NBD) -> None:
    h.connect_socket(connected_socket(server))
    assert h.get_size() == MIB


def test_connect_socket_hands_the_descriptor_over(server: Server, h: nbd.NBD) -> None:
    descriptor = connected_socket(server)
    h.connect_socket(descriptor)
    assert h.aio_get_fd() == descriptor
    h.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_connect_command(h: nbd.NBD) -> None:
    h.connect_command([program("nbdkit"), "-s", *MEMORY])
    assert h.get_size() == MIB


def test_connect_systemd_socket_activation(h: nbd.NBD) -> None:
    h.connect_systemd_socket_activation([program("nbdkit"), *MEMORY])
    assert h.get_size() == MIB


def test_connect_systemd_socket_activation_of_qemu_nbd(dirty_qcow2: Path, h: nbd.NBD) -> None:
    h.connect_systemd_socket_activation([program("qemu-nbd"), "-f", "qcow2", str(dirty_qcow2)])
    assert h.get_size() == MIB


def test_connect_command_to_nbd_server(nbd_server: Callable[..., NbdServer], h: nbd.NBD) -> None:
    h.connect_command(nbd_server().argv)
    assert (h.get_size(), h.is_read_only()) == (MIB, False)


def test_connect_socket_to_nbd_server(nbd_server: Callable[..., NbdServer], h: nbd.NBD) -> None:
    process, sock = nbd_server("-r").start()
    with process:
        h.connect_socket(sock.detach())
        assert (h.get_size(), h.is_read_only()) == (MIB, True)
        h.close()


def test_connect_vsock_reports_a_missing_server(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        h.connect_vsock(NOBODY, 0xFFFFFFF0)


def test_aio_connect_vsock_reports_a_missing_server(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):  # noqa: PT012 - the call or a later step may be what fails
        h.aio_connect_vsock(NOBODY, 0xFFFFFFF0)
        run_until(h, h.aio_is_ready)


def test_aio_connect_uri(server: Server, h: nbd.NBD) -> None:
    h.aio_connect_uri(server.uri)
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_unix(server: Server, h: nbd.NBD) -> None:
    h.aio_connect_unix(server.socket)
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_tcp(tcp_server: Server, h: nbd.NBD) -> None:
    h.aio_connect_tcp("127.0.0.1", str(tcp_server.port))
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_socket(server: Server, h: nbd.NBD) -> None:
    h.aio_connect_socket(connected_socket(server))
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_command(h: nbd.NBD) -> None:
    h.aio_connect_command([program("nbdkit"), "-s", *MEMORY])
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_systemd_socket_activation(h: nbd.NBD) -> None:
    h.aio_connect_systemd_socket_activation([program("nbdkit"), *MEMORY])
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_takes_the_path_of_a_unix_socket(server: Server, h: nbd.NBD) -> None:
    h.aio_connect(server.socket)
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_takes_host_and_port(tcp_server: Server, h: nbd.NBD) -> None:
    h.aio_connect(("127.0.0.1", tcp_server.port))
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_takes_an_ipv6_address(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M", tcp=True, host="::1")
    h.aio_connect(("::1", server.port, 0, 0))
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_takes_what_getaddrinfo_gives(tcp_server: Server, h: nbd.NBD) -> None:
    found = socket.getaddrinfo("127.0.0.1", tcp_server.port, type=socket.SOCK_STREAM)
    address: Any = found[0][4]
    h.aio_connect(address)
    run_until(h, h.aio_is_ready)
    assert h.get_size() == MIB


def test_aio_connect_is_connecting_until_it_is_ready(server: Server, h: nbd.NBD) -> None:
    h.aio_connect_unix(server.socket)
    assert h.aio_is_connecting()
    assert not h.aio_is_created()
    run_until(h, h.aio_is_ready)
    assert not h.aio_is_connecting()


def test_connect_without_a_socket_is_enoent(h: nbd.NBD, tmp_sock: str) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.connect_unix(tmp_sock)
    assert caught.value.errnum == errno.ENOENT


def test_connect_without_a_listener_is_econnrefused(h: nbd.NBD, tmp_sock: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(tmp_sock)
        with pytest.raises(nbd.Error) as caught:
            h.connect_unix(tmp_sock)
    assert caught.value.errnum == errno.ECONNREFUSED


def test_connect_to_a_path_too_long_for_a_socket_fails(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        h.connect_unix("/" + 200 * "x")


def test_connect_to_a_port_without_a_server_is_econnrefused(h: nbd.NBD) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(nbd.Error) as caught:
            h.connect_tcp("127.0.0.1", str(bound.getsockname()[1]))
    assert caught.value.errnum == errno.ECONNREFUSED


def test_connect_to_a_program_that_is_not_there_fails(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        h.connect_command(["/nonexistent/server"])


def test_connect_to_a_program_that_ends_at_once_fails(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        h.connect_command(["/bin/false"])


def test_connect_uri_with_an_unknown_scheme_is_einval(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri("gopher://localhost")
    assert caught.value.errnum == errno.EINVAL


def test_connect_twice_fails(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.connect_unix("/nowhere")
    assert caught.value.errnum == errno.EINVAL


def test_a_handle_whose_connection_failed_cannot_connect_again(
    server: Server, h: nbd.NBD, tmp_sock: str
) -> None:
    with pytest.raises(nbd.Error):
        h.connect_unix(tmp_sock)
    with pytest.raises(nbd.Error):
        h.connect_unix(server.socket)


def test_uri_transports_can_be_restricted(server: Server, h: nbd.NBD) -> None:
    h.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_TCP)
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri(server.uri)
    assert caught.value.errnum == errno.EPERM


def test_uri_tls_can_be_forbidden(server: Server, h: nbd.NBD) -> None:
    h.set_uri_allow_tls(nbd.TLS_DISABLE)
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri(server.uri.replace("nbd+", "nbds+"))
    assert caught.value.errnum == errno.EPERM


def test_uri_local_files_are_forbidden_by_default(
    nbdkit: StartServer, h: nbd.NBD, psk: Path
) -> None:
    server = nbdkit("memory", "1M", tls="require", psk=psk)
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri(f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={psk}")
    assert caught.value.errnum == errno.EPERM


def test_uri_with_keys_from_a_local_file(nbdkit: StartServer, h: nbd.NBD, psk: Path) -> None:
    server = nbdkit("memory", "1M", tls="require", psk=psk)
    h.set_uri_allow_local_file(True)
    h.connect_uri(f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={psk}")
    assert h.get_tls_negotiated()
    assert h.get_tls_username() == "alice"


def test_tls_by_pre_shared_key(nbdkit: StartServer, h: nbd.NBD, psk: Path) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_username("alice")
    h.set_tls_psk_file(str(psk))
    h.connect_unix(nbdkit("memory", "1M", tls="require", psk=psk).socket)
    assert h.get_tls_negotiated()
    assert h.pread(512, 0) == bytes(512)


def test_tls_by_certificate(nbdkit: StartServer, h: nbd.NBD, certificates: Path) -> None:
    server = nbdkit("memory", "1M", tls="require", certificates=certificates, tcp=True)
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    h.connect_tcp("127.0.0.1", str(server.port))
    assert h.get_tls_negotiated()
    assert h.pread(512, 0) == bytes(512)


def test_a_certificate_for_another_host_is_refused(
    nbdkit: StartServer, h: nbd.NBD, certificates: Path
) -> None:
    server = nbdkit("memory", "1M", tls="require", certificates=certificates, tcp=True)
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    with pytest.raises(nbd.Error):
        h.connect_tcp("127.0.0.2", str(server.port))


def test_peer_verification_can_be_switched_off(
    nbdkit: StartServer, h: nbd.NBD, certificates: Path
) -> None:
    server = nbdkit("memory", "1M", tls="require", certificates=certificates)
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    h.set_tls_verify_peer(False)
    h.connect_unix(server.socket)
    assert (h.get_tls_negotiated(), h.get_tls_verify_peer()) == (True, False)


def test_tls_that_is_required_and_not_offered_fails(server: Server, h: nbd.NBD, psk: Path) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_psk_file(str(psk))
    with pytest.raises(nbd.Error):
        h.connect_unix(server.socket)


def test_tls_that_is_allowed_and_not_offered_is_not_used(
    server: Server, h: nbd.NBD, psk: Path
) -> None:
    h.set_tls(nbd.TLS_ALLOW)
    h.set_tls_psk_file(str(psk))
    h.connect_unix(server.socket)
    assert not h.get_tls_negotiated()


def test_no_tls_where_the_server_requires_it_fails(
    nbdkit: StartServer, h: nbd.NBD, psk: Path
) -> None:
    with pytest.raises(nbd.Error):
        h.connect_unix(nbdkit("memory", "1M", tls="require", psk=psk).socket)


def test_the_server_of_connect_command_can_be_killed(h: nbd.NBD) -> None:
    h.connect_command([program("nbdkit"), "-s", *MEMORY])
    h.kill_subprocess(signal.SIGKILL)
    with pytest.raises(nbd.Error):
        h.pread(512, 0)


def test_there_is_no_server_to_kill_without_connect_command(disk: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        disk.kill_subprocess(signal.SIGTERM)
    assert caught.value.errnum == errno.ESRCH


@pytest.mark.parametrize(
    "addr",
    [
        pytest.param(42, id="number"),
        pytest.param(None, id="None"),
        pytest.param((), id="empty"),
        pytest.param(("127.0.0.1",), id="host alone"),
        pytest.param(("127.0.0.1", "10809"), id="port as text"),
        pytest.param((2130706433, 10809), id="host as number"),
    ],
)
def test_aio_connect_refuses_an_invalid_address(h: nbd.NBD, addr: Any) -> None:
    with pytest.raises(TypeError):
        h.aio_connect(addr)
    assert h.aio_is_created()


@pytest.mark.parametrize("port", [-1, 1 << 16, 1 << 64])
def test_aio_connect_refuses_a_port_out_of_range(h: nbd.NBD, port: int) -> None:
    with pytest.raises((OverflowError, ValueError)):
        h.aio_connect(("127.0.0.1", port))


def test_aio_connect_refuses_a_path_too_long_for_a_socket(h: nbd.NBD) -> None:
    with pytest.raises((nbd.Error, OSError, ValueError)):
        h.aio_connect("/" + 200 * "x")
