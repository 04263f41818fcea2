# SPDX-License-Identifier: LGPL-2.0-or-later
"""List the exports of a server, with the size and the description of each.

In option mode, a connection stops before it opens an export.  The program lists the names, requests
information about each of them, and disconnects without opening any.

    python list_exports.py                    # three files, served by nbdkit
    python list_exports.py nbd://localhost
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbd


def list_names(h: nbd.NBD) -> list[tuple[str, str]]:
    """Return the name and the description of every export that the server lists."""
    found: list[tuple[str, str]] = []
    h.opt_list(lambda name, description: found.append((name, description)))
    return found


def describe(h: nbd.NBD, name: str) -> str:
    """Request information about one export, and return a description of it."""
    h.set_export_name(name)
    try:
        h.opt_info()
    except nbd.Error as error:
        return f"not available: {error.string}"
    access = "read-only" if h.is_read_only() else "writable"
    return f"{h.get_size()} bytes, {access}"


def list_exports(h: nbd.NBD) -> None:
    """Print a line for each export of the server that the handle is connected to."""
    for name, description in list_names(h):
        # A name may contain anything; repr() keeps control characters from the terminal.
        print(f"{name!r}: {describe(h, name)}" + (f": {description!r}" if description else ""))
    h.opt_abort()


def main() -> None:
    """List the exports of the server at the URI in the argument, or of nbdkit."""
    with tempfile.TemporaryDirectory() as folder, nbd.NBD() as h:
        h.set_opt_mode(True)
        if len(sys.argv) > 1:
            h.connect_uri(sys.argv[1])
        else:
            for name, size in (("boot", 2**20), ("data", 2**30), ("swap", 2**28)):
                with Path(folder, name).open("wb") as file:
                    file.truncate(size)
            h.connect_command(["nbdkit", "-s", "--exit-with-parent", "file", f"dir={folder}"])
        list_exports(h)


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
