"""TLS credentials that are wrong in some way, made from those of servers.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from support import servers

EXPIRED = """
cn = localhost
dns_name = localhost
ip_address = 127.0.0.1
activation_date = "2019-01-01 00:00:00"
expiration_date = "2020-01-01 00:00:00"
tls_www_server
signing_key
"""

ELSEWHERE = """
cn = elsewhere.example
dns_name = elsewhere.example
tls_www_server
signing_key
"""

ONLY_AUTHORITY = ("ca-cert.pem",)


def with_server(good: Path, folder: Path, template: str) -> Path:
    """Copy good certificates, but with a different certificate for the server.

    Args:
        good: The folder of the good certificates; their authority also signs the new one.
        folder: A folder that does not exist yet.
        template: The content of the server's certificate, as a certtool template.
    """
    shutil.copytree(good, folder)
    (folder / "template").write_text(template)
    servers.run(
        *("certtool", "--generate-certificate", "--template", str(folder / "template")),
        *("--load-privkey", str(folder / "server-key.pem")),
        *("--load-ca-certificate", str(folder / "ca-cert.pem")),
        *("--load-ca-privkey", str(folder / "ca-key.pem")),
        *("--outfile", str(folder / "server-cert.pem")),
    )
    return folder


def some_of(good: Path, folder: Path, names: tuple[str, ...] = ONLY_AUTHORITY) -> Path:
    """Copy some files to a new folder; by default those of a client without a key of its own."""
    folder.mkdir()
    for name in names:
        shutil.copy(good / name, folder)
    return folder


def key_of(psk: Path) -> str:
    """Return the secret in a file of pre-shared keys, as it is written there."""
    return psk.read_text().strip().partition(":")[2]


def qemu_x509(folder: Path, verify: bool = False) -> list[str]:
    """Return qemu-nbd's options for these certificates."""
    kind = f"tls-creds-x509,id=tls0,endpoint=server,dir={folder},sanity-check=off"
    return ["--object", f"{kind},verify-peer={'on' if verify else 'off'}", "--tls-creds=tls0"]


def qemu_psk(psk: Path) -> list[str]:
    """Return qemu-nbd's options for a file of pre-shared keys, which must be called keys.psk."""
    kind = f"tls-creds-psk,id=tls0,endpoint=server,dir={psk.parent}"
    return ["--object", kind, "--tls-creds=tls0"]
