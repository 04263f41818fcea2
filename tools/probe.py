# SPDX-License-Identifier: LGPL-2.0-or-later
"""What an installed nbd says of itself, and whether it reads: run by the interpreter that has it.

Usage: python probe.py [URI...]; without a URI it starts nbdkit.  Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import nbd


def connected(uri: str | None) -> nbd.NBD:
    """A handle that is connected to a URI, or to an nbdkit of its own."""
    h = nbd.NBD()
    if uri is None:
        h.connect_command(["nbdkit", "-s", "--exit-with-parent", "pattern", "1M"])
    else:
        h.set_uri_allow_local_file(True)  # a file of pre-shared keys
        h.connect_uri(uri)
    return h


def first_bytes(uri: str | None) -> str:
    """Read nbdkit's pattern where it is not zero: each 8 bytes hold their own offset."""
    with connected(uri) as h:
        data = h.pread(16, 65536)
        h.shutdown()
    if data != bytes.fromhex("00000000000100000000000000010008"):
        sys.exit(f"{uri}: read {data.hex()}")
    return data.hex()


def libnbd_file() -> str:
    """The file that libnbd was loaded from."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/libnbd" in line}
    (path,) = {p for p in paths if os.path.basename(p).startswith("libnbd")}
    return path


def main() -> None:
    """Print the findings."""
    uris: list[str | None] = list(sys.argv[1:]) or [None]
    read = [first_bytes(uris[0])]
    read_at = time.time()
    read += [first_bytes(uri) for uri in uris[1:]]
    command = [sys.executable, "-m", "nbd", "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    findings = {
        "module": nbd.__file__,
        "libnbd": nbd.__version__,
        "libnbd_file": libnbd_file(),
        "version": version,
        "read": read,
        "read_at": read_at,
    }
    print(json.dumps(findings))


if __name__ == "__main__":
    main()
