# SPDX-License-Identifier: LGPL-2.0-or-later
"""Connect with TLS and a pre-shared key, so that nobody on the network can read or change the data.

Both sides have a file with the same line "name:key in hexadecimal digits", as psktool writes it.
TLS_REQUIRE is needed for security: with TLS_ALLOW, an attacker on the network can claim that the
server does not support TLS, and gets plain text.

    python tls_psk.py                         # nbdkit with a key made for it
    python tls_psk.py "nbds://alice@localhost/?tls-psk-file=keys.psk"
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from pathlib import Path

import nbd


def write_key(path: Path, user: str) -> None:
    """Write a new key for a user to a file that only the owner can read."""
    path.touch(mode=0o600)
    path.write_text(f"{user}:{secrets.token_hex(32)}\n")


def connect(h: nbd.NBD, server_keys: Path, client_keys: Path) -> None:
    """Start nbdkit with the keys in one file and connect to it with those in another."""
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_username("alice")
    h.set_tls_psk_file(client_keys)
    tls = ["--tls=require", f"--tls-psk={server_keys}"]
    h.connect_command(["nbdkit", "-s", "--exit-with-parent", *tls, "memory", "1M"])


def report(h: nbd.NBD) -> None:
    """Print the state of a connection, and shut it down."""
    print(f"{h.get_size()} bytes, TLS: {h.get_tls_negotiated()}, as {h.get_tls_username()}")
    h.shutdown()


def main() -> None:
    """Connect to the URI in the argument, or to an nbdkit with a new key."""
    if len(sys.argv) > 1:
        with nbd.NBD() as h:
            h.set_tls(nbd.TLS_REQUIRE)  # even if the URI begins with nbd:// and not nbds://
            h.set_uri_allow_local_file(True)  # the name of the key file comes from the user
            h.connect_uri(sys.argv[1])
            report(h)
        return
    with tempfile.TemporaryDirectory() as folder:
        keys, others = Path(folder, "keys.psk"), Path(folder, "others.psk")
        write_key(keys, "alice")
        write_key(others, "alice")
        with nbd.NBD() as h:
            connect(h, keys, keys)
            report(h)
        with nbd.NBD() as h:
            try:
                connect(h, keys, others)
            except nbd.Error as error:
                print(f"with another key: {error}")


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
