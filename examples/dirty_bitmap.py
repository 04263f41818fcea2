# SPDX-License-Identifier: LGPL-2.0-or-later
"""Update a backup: copy only the parts that a dirty bitmap of qemu reports as written since.

The backup is a raw image.  The meta context qemu:dirty-bitmap:BITMAP reports which parts were
written after the bitmap was added.  qemu-nbd -B BITMAP and running virtual machines provide it.
backup_chain.py makes one backup after the other.

    python dirty_bitmap.py                    # makes a disk, writes to it, and backs it up
    python dirty_bitmap.py nbd://localhost/disk BITMAP backup.img
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nbd

CONTEXT = "qemu:dirty-bitmap:"
DIRTY = 1  # the flag of an extent in the meta contexts of dirty bitmaps


def back_up(h: nbd.NBD, context: str, backup: Path) -> None:
    """Copy the dirty extents to the same offsets of the backup."""
    dirty = [extent for extent in nbd.extents(h, context) if extent.flags & DIRTY]
    nbd.copy(h, backup, ranges=dirty)
    for extent in dirty:
        print(f"dirty: {extent.length} bytes at {extent.offset}", flush=True)


def demonstrate(folder: Path) -> None:
    """Make an empty disk, write to it, back up what was written, and compare."""
    disk, backup = folder / "disk.qcow2", folder / "backup.img"  # nbd.copy makes the backup
    qemu_img("create", "-q", "-f", "qcow2", str(disk), "64M")
    qemu_img("bitmap", "--add", str(disk), "new")
    with nbd.NBD() as h:
        h.connect_systemd_socket_activation(["qemu-nbd", "--format=qcow2", str(disk)])
        h.pwrite(b"one" * 10_000, 0)
        h.pwrite(b"two" * 1_000_000, 50_000_000)
        h.shutdown()
    with nbd.NBD() as h:
        h.add_meta_context(CONTEXT + "new")
        h.connect_systemd_socket_activation(
            ["qemu-nbd", "--format=qcow2", "--bitmap=new", str(disk)]
        )
        back_up(h, CONTEXT + "new", backup)
        h.shutdown()
    qemu_img("compare", "-f", "raw", "-F", "qcow2", str(backup), str(disk))


def qemu_img(*arguments: str) -> None:
    """Run qemu-img, which prints its own messages."""
    subprocess.run(["qemu-img", *arguments], check=True)


def main() -> None:
    """Back up the disk at the URI in the first argument, or demonstrate it with a new disk."""
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            demonstrate(Path(folder))
        return
    uri, bitmap, backup = sys.argv[1:]
    with nbd.connect(uri, contexts=[CONTEXT + bitmap]) as h:
        back_up(h, CONTEXT + bitmap, Path(backup))


if __name__ == "__main__":
    try:
        main()
    except nbd.Error as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
