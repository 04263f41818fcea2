"""TLS with certificates and with keys: who is accepted, and what a URI may ask for."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import servers, tls
from support.hostile import FATAL
from support.servers import StartServer

import nbd

SIZE = 1 << 20
DISK = "memory", str(SIZE)


# Before 1.20, libnbd checks the server's certificate only if it was given a folder with
# certificates and a host name (CVE-2024-7383).
VERIFIES_ALWAYS = tuple(map(int, nbd.NBD().get_version().split(".")[:2])) >= (1, 20)
verifies_always = pytest.mark.skipif(
    not VERIFIES_ALWAYS, reason="libnbd before 1.20 does not verify here (CVE-2024-7383)"
)


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    """End the process with a traceback if a handshake does not end."""
    faulthandler.dump_traceback_later(FATAL, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def expired(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return certificates in which the server's has expired."""
    return tls.with_server(certificates, tmp_path_factory.mktemp("pki") / "expired", tls.EXPIRED)


@pytest.fixture(scope="session")
def elsewhere(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return certificates in which the server's names another host."""
    folder = tmp_path_factory.mktemp("pki") / "elsewhere"
    return tls.with_server(certificates, folder, tls.ELSEWHERE)


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return certificates signed by a CA with the same name and another key."""
    return servers.certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def x509_server(
    request: pytest.FixtureRequest, nbdkit: StartServer, qemu_nbd: StartServer, tmp_path: Path
) -> StartServer:
    """Start a server on TCP with a folder of certificates: x509_server(folder, verify=True)."""

    def start_nbdkit(folder: Path, verify: bool = False) -> servers.Server:
        options = ["--tls-verify-peer"] if verify else []
        return nbdkit(*options, *DISK, tcp=True, tls="require", certificates=folder)

    def start_qemu_nbd(folder: Path, verify: bool = False) -> servers.Server:
        options = "--format=raw", *tls.qemu_x509(folder, verify)
        return qemu_nbd(raw_disk(tmp_path), *options, tcp=True)

    return start_nbdkit if request.param == "nbdkit" else start_qemu_nbd


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def psk_server(
    request: pytest.FixtureRequest,
    nbdkit: StartServer,
    qemu_nbd: StartServer,
    psk: Path,
    tmp_path: Path,
) -> servers.Server:
    """Return a server on a Unix socket that has alice's key of the fixture psk."""
    if request.param == "nbdkit":
        return nbdkit(*DISK, tls="require", psk=psk)
    return qemu_nbd(raw_disk(tmp_path), "--format=raw", *tls.qemu_psk(psk))


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server_in_the_clear(
    request: pytest.FixtureRequest, nbdkit: StartServer, qemu_nbd: StartServer, tmp_path: Path
) -> servers.Server:
    """Return a server on a Unix socket without TLS."""
    if request.param == "nbdkit":
        return nbdkit(*DISK)
    return qemu_nbd(raw_disk(tmp_path), "--format=raw")


def raw_disk(folder: Path) -> Path:
    """Make an empty disk."""
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    return path


def connect_x509(h: nbd.NBD, server: servers.Server, folder: Path | None) -> None:
    """Connect with certificates from a folder, or with the system's if it is None.

    It connects to the address, which the certificates also name: a minimal root cannot resolve
    localhost.
    """
    h.set_tls(nbd.TLS_REQUIRE)
    if folder is not None:
        h.set_tls_certificates(str(folder))
    h.connect_tcp("127.0.0.1", str(server.port))


def connect_psk(h: nbd.NBD, server: servers.Server, psk: Path, username: str = "alice") -> None:
    """Connect with a pre-shared key."""
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_psk_file(str(psk))
    h.set_tls_username(username)
    h.connect_unix(server.socket)


def check_data(h: nbd.NBD) -> None:
    """Check that the connection is encrypted, and that it reads back what it wrote."""
    assert h.get_tls_negotiated() is True
    data = os.urandom(SIZE)
    h.pwrite(data, 0)
    assert h.pread(SIZE, 0) == data


# --- X.509 ------------------------------------------------------------------------------------


def test_right_certificates_connect(
    h: nbd.NBD, x509_server: StartServer, certificates: Path
) -> None:
    connect_x509(h, x509_server(certificates), certificates)
    check_data(h)


def test_client_needs_no_certificate_if_the_server_does_not_ask(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, tmp_path: Path
) -> None:
    connect_x509(h, x509_server(certificates), tls.some_of(certificates, tmp_path / "client"))
    check_data(h)


def test_client_certificate_is_shown_to_a_server_that_asks(
    h: nbd.NBD, x509_server: StartServer, certificates: Path
) -> None:
    connect_x509(h, x509_server(certificates, verify=True), certificates)
    check_data(h)


def test_client_without_certificate_is_refused_by_a_server_that_asks(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, tmp_path: Path
) -> None:
    client = tls.some_of(certificates, tmp_path / "client")
    with pytest.raises(nbd.Error, match=r"gnutls|TLS"):
        connect_x509(h, x509_server(certificates, verify=True), client)


def test_client_certificate_of_another_authority_is_refused_by_a_server_that_asks(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, strangers: Path
) -> None:
    h.set_tls_verify_peer(False)
    with pytest.raises(nbd.Error, match=r"gnutls|TLS"):
        connect_x509(h, x509_server(certificates, verify=True), strangers)


def test_server_of_another_authority_is_refused(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, strangers: Path
) -> None:
    with pytest.raises(nbd.Error, match="certificate"):
        connect_x509(h, x509_server(strangers), certificates)
    assert not h.aio_is_ready()


def test_expired_certificate_is_refused(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, expired: Path
) -> None:
    with pytest.raises(nbd.Error, match="certificate"):
        connect_x509(h, x509_server(expired), certificates)


def test_certificate_of_another_host_is_refused(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, elsewhere: Path
) -> None:
    with pytest.raises(nbd.Error, match="certificate"):
        connect_x509(h, x509_server(elsewhere), certificates)


@pytest.mark.needs("set_tls_hostname")
def test_certificate_of_another_host_is_taken_where_that_is_the_name_to_expect(
    h: Any, x509_server: StartServer, certificates: Path, elsewhere: Path
) -> None:
    h.set_tls_hostname("elsewhere.example")
    connect_x509(h, x509_server(elsewhere), certificates)
    check_data(h)


def test_certificate_is_not_looked_at_where_the_peer_is_not_verified(
    h: nbd.NBD, x509_server: StartServer, certificates: Path, elsewhere: Path
) -> None:
    h.set_tls_verify_peer(False)
    connect_x509(h, x509_server(elsewhere), certificates)
    check_data(h)


@verifies_always
def test_certificate_that_the_system_does_not_know_is_refused(
    h: nbd.NBD, x509_server: StartServer, certificates: Path
) -> None:
    with pytest.raises(nbd.Error, match="certificate"):
        connect_x509(h, x509_server(certificates), None)


@verifies_always
def test_server_of_another_authority_is_refused_on_a_unix_socket(
    h: nbd.NBD, nbdkit: StartServer, certificates: Path, strangers: Path
) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    with pytest.raises(nbd.Error, match="certificate"):
        h.connect_unix(nbdkit(*DISK, tls="require", certificates=strangers).socket)


# --- pre-shared keys --------------------------------------------------------------------------


def test_right_key_connects(h: nbd.NBD, psk_server: servers.Server, psk: Path) -> None:
    connect_psk(h, psk_server, psk)
    check_data(h)


def test_key_made_by_psktool_connects(h: nbd.NBD, nbdkit: StartServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    servers.run("psktool", "--username=bob", f"--pskfile={keys}")
    connect_psk(h, nbdkit(*DISK, tls="require", psk=keys), keys, "bob")
    check_data(h)


def test_wrong_key_is_refused(
    h: nbd.NBD, psk_server: servers.Server, psk: Path, tmp_path: Path
) -> None:
    wrong = servers.psk_file(tmp_path / "wrong.psk")
    with pytest.raises(nbd.Error, match=r"gnutls|TLS") as caught:
        connect_psk(h, psk_server, wrong)
    keeps_secret([tls.key_of(wrong), tls.key_of(psk)], caught.value, h)


def test_user_whom_the_server_does_not_know_is_refused(
    h: nbd.NBD, psk_server: servers.Server, tmp_path: Path
) -> None:
    key = servers.psk_file(tmp_path / "mallory.psk", "mallory")
    with pytest.raises(nbd.Error, match=r"gnutls|TLS") as caught:
        connect_psk(h, psk_server, key, "mallory")
    keeps_secret([tls.key_of(key)], caught.value, h)


def test_a_user_without_a_key_is_an_error_that_names_the_user(
    h: nbd.NBD, psk_server: servers.Server, psk: Path
) -> None:
    with pytest.raises(nbd.Error, match="mallory") as caught:
        connect_psk(h, psk_server, psk, "mallory")
    keeps_secret([tls.key_of(psk)], caught.value, h)


def test_key_that_cannot_be_parsed_is_an_error_without_it(
    h: nbd.NBD, psk_server: servers.Server, tmp_path: Path
) -> None:
    key = tmp_path / "broken.psk"
    key.write_text("alice:this-is-not-hexadecimal\n")
    with pytest.raises(nbd.Error, match="gnutls") as caught:
        connect_psk(h, psk_server, key)
    keeps_secret([tls.key_of(key)], caught.value, h)


def test_key_file_that_is_not_there_is_an_error(h: nbd.NBD, psk_server: servers.Server) -> None:
    with pytest.raises(nbd.Error) as caught:
        connect_psk(h, psk_server, Path("/nonexistent/keys.psk"))
    assert caught.value.errno == "ENOENT"


def test_certificates_do_not_open_a_server_that_wants_a_key(
    h: nbd.NBD, psk_server: servers.Server, certificates: Path
) -> None:
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates(str(certificates))
    with pytest.raises(nbd.Error, match=r"gnutls|TLS"):
        h.connect_unix(psk_server.socket)


# --- TLS or not -------------------------------------------------------------------------------


def test_server_in_the_clear_is_refused_where_tls_is_required(
    h: nbd.NBD, server_in_the_clear: servers.Server, psk: Path
) -> None:
    with pytest.raises(nbd.Error, match="TLS") as caught:
        connect_psk(h, server_in_the_clear, psk)
    assert caught.value.errno == "ENOTSUP"


def test_a_server_without_tls_is_reported_where_tls_is_allowed(
    h: nbd.NBD, nbdkit: StartServer
) -> None:
    h.set_tls(nbd.TLS_ALLOW)
    h.connect_unix(nbdkit(*DISK).socket)
    assert h.get_tls_negotiated() is False


def test_server_with_tls_refuses_a_client_without(h: nbd.NBD, psk_server: servers.Server) -> None:
    with pytest.raises(nbd.Error, match="TLS"):
        h.connect_unix(psk_server.socket)


# --- what a URI may ask for -------------------------------------------------------------------


def uri_with_key(server: servers.Server, psk: Path) -> str:
    """Return the URI of a server with the file of the key."""
    return f"nbds+unix://alice@/?socket={server.socket}&tls-psk-file={psk}"


def not_permitted(h: nbd.NBD, uri: str) -> str:
    """Connect to a URI that is not allowed, and return the reason."""
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri(uri)
    assert caught.value.errno == "EPERM"
    assert h.aio_is_created()
    return caught.value.string


TRANSPORTS = {
    "nbd://127.0.0.1:1/": nbd.ALLOW_TRANSPORT_TCP,
    "nbd+unix:///?socket=/nonexistent/socket": nbd.ALLOW_TRANSPORT_UNIX,
    "nbd+vsock:///": nbd.ALLOW_TRANSPORT_VSOCK,
}


@pytest.mark.parametrize("uri", TRANSPORTS)
def test_transport_that_is_not_allowed_is_refused(h: nbd.NBD, uri: str) -> None:
    h.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_MASK & ~TRANSPORTS[uri])
    assert "transport" in not_permitted(h, uri)


def test_transport_that_alone_is_allowed_connects(h: nbd.NBD, nbdkit: StartServer) -> None:
    h.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_UNIX)
    h.connect_uri(nbdkit(*DISK).uri)
    assert h.get_size() == SIZE


def test_tls_that_is_not_allowed_is_refused(h: nbd.NBD) -> None:
    h.set_uri_allow_tls(nbd.TLS_DISABLE)
    assert "TLS" in not_permitted(h, "nbds+unix:///?socket=/nonexistent/socket")


def test_uri_in_the_clear_is_refused_where_tls_is_required(h: nbd.NBD) -> None:
    h.set_uri_allow_tls(nbd.TLS_REQUIRE)
    assert "TLS" in not_permitted(h, "nbd+unix:///?socket=/nonexistent/socket")


def test_uri_with_tls_connects_where_tls_is_required(
    h: nbd.NBD, nbdkit: StartServer, psk: Path
) -> None:
    h.set_uri_allow_tls(nbd.TLS_REQUIRE)
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri_with_key(nbdkit(*DISK, tls="require", psk=psk), psk))
    check_data(h)


def test_local_file_in_a_uri_is_refused_unless_allowed(
    h: nbd.NBD, nbdkit: StartServer, psk: Path
) -> None:
    uri = uri_with_key(nbdkit(*DISK, tls="require", psk=psk), psk)
    assert "tls-psk-file" in not_permitted(h, uri)
    h.set_uri_allow_local_file(False)
    not_permitted(h, uri)
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    assert h.get_tls_negotiated()


def test_certificates_in_a_uri_are_refused_unless_allowed(h: nbd.NBD, certificates: Path) -> None:
    uri = f"nbds://localhost:1/?tls-certificates={certificates}"
    assert "tls-certificates" in not_permitted(h, uri)


# --- secrets ----------------------------------------------------------------------------------


def keeps_secret(secrets: list[str], error: nbd.Error, h: nbd.NBD) -> None:
    """Check that neither an error nor a handle shows a secret."""
    shown = [str(error), repr(error), repr(error.args), repr(h), str(h)]
    assert not [one for one in shown for secret in secrets if secret in one]


def test_key_is_in_no_debug_message_and_no_uri(
    h: nbd.NBD, psk_server: servers.Server, psk: Path
) -> None:
    shown: list[str] = []
    h.set_debug_callback(lambda function, message: shown.append(message))
    h.set_debug(True)
    connect_psk(h, psk_server, psk)
    shown += [h.get_uri(), repr(h), str(h)]
    assert any("alice" in one for one in shown)
    assert not [one for one in shown if tls.key_of(psk) in one]


def test_password_in_a_uri_is_in_no_error(h: nbd.NBD) -> None:
    with pytest.raises(nbd.Error) as caught:
        h.connect_uri("nbds+unix://alice:hunter2@/?socket=/nonexistent/socket")
    keeps_secret(["hunter2"], caught.value, h)
