# SPDX-License-Identifier: LGPL-2.0-or-later
"""Use an installed nbd, and print what it reports of itself.

Usage: probe.py               Start nbdkit and read from it.
       probe.py URIS          Read from servers; URIS is JSON, as servers.py writes it.
       probe.py trust URI     Read from a server whose certificate the system's authorities signed.

Run by the interpreter that has nbd.  Prints one line of JSON; the status is 1 if a read fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import nbd

# 16 bytes of nbdkit's pattern at 64 KiB: each 8 bytes hold their own offset.
PATTERN = bytes.fromhex("00000000000100000000000000010008")


def read_from(uri: str) -> None:
    """Read nbdkit's pattern."""
    with nbd.NBD() as h:
        h.set_uri_allow_local_file(True)  # a file of pre-shared keys
        h.connect_uri(uri)
        read_pattern(h, uri)


def read_from_command() -> None:
    """Read the pattern of an nbdkit that runs as a child process."""
    with nbd.NBD() as h:
        h.connect_command(["nbdkit", "-s", "--exit-with-parent", "pattern", "1M"])
        read_pattern(h, "nbdkit")


def read_pattern(h: nbd.NBD, what: str) -> None:
    """Read, compare, and shut the connection down."""
    data = h.pread(len(PATTERN), 65536)
    if data != PATTERN:
        sys.exit(f"{what}: read {data.hex()}")
    h.shutdown()


def libnbd_file() -> str:
    """Return the file that libnbd was loaded from."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/libnbd" in line}
    (path,) = {p for p in paths if os.path.basename(p).startswith("libnbd")}
    return path


def findings() -> dict[str, object]:
    """Return what nbd reports of itself."""
    command = [sys.executable, "-m", "nbd", "--version"]
    return {
        "module": nbd.__file__,
        "libnbd": nbd.__version__,
        "libnbd_file": libnbd_file(),
        "version": subprocess.run(command, capture_output=True, text=True, check=True).stdout,
    }


def main(arguments: Sequence[str]) -> None:
    """Read from what the arguments name."""
    if arguments[:1] == ["trust"]:
        read_from(arguments[1])
        return
    if arguments:
        for uri in json.loads(arguments[0]):
            read_from(uri)
    else:
        read_from_command()
    print(json.dumps(findings()))


if __name__ == "__main__":
    main(sys.argv[1:])
