"""Credentials for TLS that are not in order, made from those that servers.py makes."""

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
    """Make a copy of good certificates in which the server's is a different one.

    Args:
        good: The folder of the good ones; their authority signs this one too.
        folder: A folder that does not exist yet.
        template: What the server's certificate says, in certtool's words.
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
    """Make a folder with copies of some files; without more names a client that has no own key."""
    folder.mkdir()
    for name in names:
        shutil.copy(good / name, folder)
    return folder


def key_of(psk: Path) -> str:
    """Return the secret that a file of pre-shared keys holds, as it stands there."""
    return psk.read_text().strip().partition(":")[2]


def qemu_x509(folder: Path, verify: bool = False) -> list[str]:
    """Return qemu-nbd's options for these certificates."""
    kind = f"tls-creds-x509,id=tls0,endpoint=server,dir={folder},sanity-check=off"
    return ["--object", f"{kind},verify-peer={'on' if verify else 'off'}", "--tls-creds=tls0"]


def qemu_psk(psk: Path) -> list[str]:
    """Return qemu-nbd's options for a file of pre-shared keys, which has to be called keys.psk."""
    kind = f"tls-creds-psk,id=tls0,endpoint=server,dir={psk.parent}"
    return ["--object", kind, "--tls-creds=tls0"]
