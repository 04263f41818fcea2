"""A self-contained wheel trusts the certificate authorities of the system on which it runs.

Such a wheel contains csrc/tls.c for that purpose. The tests compile it with a folder in front of
the paths where distributions keep their authorities, and load it before libnbd, as the wheel's shim
is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from support.checkout import CHECKOUT
from support.servers import TIMEOUT, StartServer, program
from support.servers import certificates as make_certificates

import nbd

DEBIAN = "etc/ssl/certs/ca-certificates.crt"
FEDORA = "etc/pki/tls/certs/ca-bundle.crt"
NEWER_FEDORA = "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"
ALPINE = "etc/ssl/cert.pem"
SUSE = "etc/ssl/ca-bundle.pem"

READ = """
import sys
import nbd
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
h.connect_tcp("localhost", sys.argv[1])
print(h.pread(8, 8).hex())
"""
EIGHT = "0000000000000008"  # the data of nbdkit's pattern plugin at 8

# Before 1.20, libnbd does not verify a certificate with these authorities (CVE-2024-7383).
pytestmark = pytest.mark.skipif(
    tuple(map(int, nbd.__version__.split(".")[:2])) < (1, 20),
    reason="libnbd before 1.20 does not verify here (CVE-2024-7383)",
)


class System(NamedTuple):
    """A server, the file with its authority, and a folder laid out like a root folder."""

    port: str
    authority: Path
    root: Path
    preloaded: Path

    def keep_authorities(self, authority: Path, at: str) -> None:
        """Install an authority's file where a distribution keeps it."""
        target = self.root / at
        target.parent.mkdir(parents=True)
        shutil.copy(authority, target)

    def read(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Read from the server, in a process that trusts what a self-contained wheel trusts."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SSL_CERT")}
        preload = " ".join(filter(None, [inherited.get("LD_PRELOAD"), str(self.preloaded)]))
        environ = {**inherited, "LD_PRELOAD": preload, **variables}
        command = [sys.executable, "-c", READ, self.port]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environ, cwd="/"
        )


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with another authority."""
    return make_certificates(tmp_path_factory.mktemp("pki")) / "ca-cert.pem"


@pytest.fixture
def system(nbdkit: StartServer, certificates: Path, tmp_path: Path) -> System:
    """Return a system whose root folder is still empty."""
    server = nbdkit("pattern", "1M", tcp=True, tls="require", certificates=certificates)
    root, preloaded = tmp_path / "root", tmp_path / "trust.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    subprocess.run(
        [
            *(program(compiler[0]), *compiler[1:], "-D_GNU_SOURCE", "-shared", "-fPIC"),
            *("-DNBDSHIM_BUNDLED", f'-DNBDSHIM_ROOT="{root}"'),
            *(str(CHECKOUT / "csrc" / "tls.c"), "-o", str(preloaded)),
            *("-Wl,--no-as-needed", "-l:libgnutls.so.30"),
        ],
        check=True,
    )
    return System(str(server.port), certificates / "ca-cert.pem", root, preloaded)


@pytest.mark.parametrize("place", [DEBIAN, FEDORA, NEWER_FEDORA, SUSE, ALPINE])
def test_the_authorities_of_every_distribution_are_found(system: System, place: str) -> None:
    system.keep_authorities(system.authority, place)
    done = system.read()
    assert (done.stdout.strip(), done.returncode) == (EIGHT, 0), done.stderr


def test_other_authorities_are_not_trusted(system: System, stranger: Path) -> None:
    system.keep_authorities(stranger, DEBIAN)
    done = system.read()
    assert done.returncode == 1
    assert "nbd.Error: nbd_connect_tcp: gnutls_handshake: " in done.stderr


def test_ssl_cert_file_has_precedence_over_the_systems_authorities(
    system: System, stranger: Path
) -> None:
    system.keep_authorities(stranger, DEBIAN)
    done = system.read(SSL_CERT_FILE=str(system.authority))
    assert (done.stdout.strip(), done.returncode) == (EIGHT, 0), done.stderr


def test_an_empty_ssl_cert_file_is_ignored(system: System) -> None:
    system.keep_authorities(system.authority, FEDORA)
    assert system.read(SSL_CERT_FILE="").stdout.strip() == EIGHT


def test_a_system_without_authorities_is_an_error_that_names_the_function(system: System) -> None:
    done = system.read()
    assert done.returncode == 1
    assert "gnutls_certificate_set_x509_system_trust" in done.stderr


def test_an_ssl_cert_file_that_is_missing_is_an_error_too(system: System) -> None:
    system.keep_authorities(system.authority, DEBIAN)
    done = system.read(SSL_CERT_FILE="/nonexistent/authorities.pem")
    assert done.returncode == 1
    assert "gnutls_certificate_set_x509_system_trust" in done.stderr
