# SPDX-License-Identifier: LGPL-2.0-or-later
"""What an installed nbd says of itself, and what it can do: run by the interpreter that has it.

Usage: probe.py               Start an nbdkit and read from it.
       probe.py URIS          Read from servers: JSON, as servers.py makes it.
       probe.py trust URI     Read from a server whose certificate the system's authorities signed.

Prints one line of JSON; the status is 1 if something does not work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import nbd

GIB = 1 << 30

# nbdkit's pattern where it is not zero: each 8 bytes hold their own offset.
PATTERN = bytes.fromhex("00000000000100000000000000010008")

# Methods that libnbd does not have.
OURS = {"close", "gettimeout", "pread_into", "settimeout"}


def read_from(uri: str) -> None:
    """Read nbdkit's pattern."""
    with nbd.NBD() as h:
        h.set_uri_allow_local_file(True)  # a file of pre-shared keys
        h.connect_uri(uri)
        read_pattern(h, uri)


def read_from_command() -> None:
    """Read the pattern of an nbdkit that runs as a child."""
    with nbd.NBD() as h:
        h.connect_command(["nbdkit", "-s", "--exit-with-parent", "pattern", "1M"])
        read_pattern(h, "nbdkit")


def read_pattern(h: nbd.NBD, what: str) -> None:
    """Read, compare, and end the connection."""
    data = h.pread(len(PATTERN), 65536)
    if data != PATTERN:
        sys.exit(f"{what}: read {data.hex()}")
    h.shutdown()


def read_large_extents(uri: str) -> list[tuple[int, int]]:
    """The extents of a sparse disk of 6 GiB that has data at 5 GiB, asked for at once."""
    entries: list[tuple[int, int]] = []
    h: Any = nbd.NBD()  # of a libnbd that is newer than that of the type checker
    with h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_uri(uri)
        if not h.get_extended_headers_negotiated():
            sys.exit(f"{uri}: no extended headers")
        h.block_status_64(6 * GIB, 0, lambda name, offset, found, error: entries.extend(found))
        h.shutdown()
    if entries[0] != (5 * GIB, nbd.STATE_HOLE | nbd.STATE_ZERO):
        sys.exit(f"{uri}: {entries}")
    return entries


def libnbd_file() -> str:
    """The file that libnbd was loaded from."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/libnbd" in line}
    (path,) = {p for p in paths if os.path.basename(p).startswith("libnbd")}
    return path


def findings() -> dict[str, object]:
    """What it says of itself."""
    command = [sys.executable, "-m", "nbd", "--version"]
    return {
        "module": nbd.__file__,
        "libnbd": nbd.__version__,
        "libnbd_file": libnbd_file(),
        "methods": len({name for name in dir(nbd.NBD) if name[0] != "_"} - OURS),
        "version": subprocess.run(command, capture_output=True, text=True, check=True).stdout,
    }


def main(arguments: Sequence[str]) -> None:
    """Do as the usage says."""
    if arguments[:1] == ["trust"]:
        read_from(arguments[1])
        return
    uris = json.loads(arguments[0]) if arguments else {}
    if not uris:
        read_from_command()
    for kind in uris.keys() & {"tcp"}:
        read_from(uris[kind])
    read_at = time.time()
    for kind in uris.keys() & {"unix", "psk"}:
        read_from(uris[kind])
    extents = read_large_extents(uris["qemu"]) if uris else []
    print(json.dumps({**findings(), "extents": extents, "read_at": read_at}))


if __name__ == "__main__":
    main(sys.argv[1:])
