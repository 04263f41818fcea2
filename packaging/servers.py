# SPDX-License-Identifier: LGPL-2.0-or-later
"""Servers for the verification of a wheel; they run in a root of their own, of a newer Debian."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from console import log_path, must
from roots import AS_ROOT, derived, entering

# The server inherits its socket as descriptor 3.  LISTEN_PID must be its process id: exec keeps it.
ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'

_PREPARE = """
set -e
cd "$1"
certtool --generate-privkey --key-type=ecdsa --outfile ca-key.pem
printf 'cn=test authority\nca\ncert_signing_key\n' >template
certtool --generate-self-signed --load-privkey ca-key.pem --template template --outfile ca-cert.pem
certtool --generate-privkey --key-type=ecdsa --outfile server-key.pem
printf 'cn=server\nip_address=127.0.0.1\ntls_www_server\nsigning_key\n' >template
certtool --generate-certificate --load-privkey server-key.pem --template template \
    --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem --outfile server-cert.pem
chmod -R a+rX .
"""


class Servers(NamedTuple):
    """The servers that a program in a root can connect to."""

    uris: list[str]  # over TCP, a Unix socket, and TLS with a pre-shared key
    x509: str  # the URI of a server with a certificate
    authority: str  # the certificate of the authority that signed that of x509


@contextmanager
def serving(root: Path, sock: socket.socket, command: Sequence[str]) -> Iterator[None]:
    """Run a server in a root on a socket."""
    with sock:
        sock.listen()
        with log_path("verify-servers").open("a") as log:
            process = subprocess.Popen(
                entering(root, ["/bin/sh", "-c", ACTIVATE, "sh", *command]),
                stdin=sock.fileno(),
                stdout=log,
                stderr=log,
            )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def new_folder(root: Path) -> Path:
    """Make a temporary folder in a root."""
    folder = Path(tempfile.mkdtemp(prefix="nbd-", dir=root / "tmp"))
    folder.chmod(0o755)
    return folder


def on_tcp() -> tuple[socket.socket, str]:
    """Return a socket, and its address for a URI."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, f"127.0.0.1:{sock.getsockname()[1]}"


@contextmanager
def servers(root: Path) -> Iterator[Servers]:
    """Run servers for a program that runs in a root."""
    home = derived("trixie", "servers", ("gnutls-bin", "nbdkit"))
    with ExitStack() as stack:
        inside, theirs = new_folder(root), new_folder(home)
        for folder in (inside, theirs):
            stack.callback(subprocess.run, [*AS_ROOT, "rm", "-rf", str(folder)], check=True)
        at = f"/{theirs.relative_to(home)}"
        prepare = entering(home, ["sh", "-c", _PREPARE, "sh", at])
        must(log_path("verify-servers"), prepare, "the certificates cannot be made")
        keys = f"alice:{os.urandom(32).hex()}\n"
        for folder in (inside, theirs):
            (folder / "keys.psk").write_text(keys)
        shutil.copyfile(theirs / "ca-cert.pem", inside / "ca-cert.pem")

        local = socket.socket(socket.AF_UNIX)
        # A path inside a root can be too long for a socket's address; one by a descriptor is short.
        descriptor = os.open(inside, os.O_PATH)
        local.bind(f"/proc/self/fd/{descriptor}/sock")
        os.close(descriptor)
        plain, tcp = on_tcp()
        with_keys, psk = on_tcp()
        with_certificates, x509 = on_tcp()
        pattern = ["pattern", "1M"]
        nbdkit = ["nbdkit", "--foreground"]
        for sock, command in (
            (local, [*nbdkit, *pattern]),
            (plain, [*nbdkit, *pattern]),
            (with_keys, [*nbdkit, "--tls=require", f"--tls-psk={at}/keys.psk", *pattern]),
            (with_certificates, [*nbdkit, "--tls=require", f"--tls-certificates={at}", *pattern]),
        ):
            stack.enter_context(serving(home, sock, command))
        visible = f"/{inside.relative_to(root)}"
        uris = [
            f"nbd://{tcp}",
            f"nbd+unix:///?socket={visible}/sock",
            f"nbds://alice@{psk}/?tls-psk-file={visible}/keys.psk",
        ]
        yield Servers(uris, f"nbds://{x509}", f"{visible}/ca-cert.pem")
