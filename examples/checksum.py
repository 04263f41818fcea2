# SPDX-License-Identifier: LGPL-2.0-or-later
"""Print the SHA-256 checksum of a disk, as sha256sum does for a file.

nbd.open reads ahead, so that the server works while the program computes.

    python checksum.py                        # a disk that nbdkit generates
    python checksum.py nbd://localhost
"""

from __future__ import annotations

import hashlib
import sys

import nbd

SERVER = ["nbdkit", "-s", "--exit-with-parent", "pattern", "64M"]
BLOCK = 1024 * 1024  # bytes read at once


def main() -> None:
    """Print the checksum of the disk at the URI in the argument, or of a disk of nbdkit."""
    digest = hashlib.sha256()
    with nbd.open(sys.argv[1] if len(sys.argv) > 1 else SERVER) as disk:
        while data := disk.read(BLOCK):
            digest.update(data)
        print(f"{digest.hexdigest()}  {disk.tell()} bytes")


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
