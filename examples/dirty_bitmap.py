# SPDX-License-Identifier: LGPL-2.0-or-later
"""Update a backup: copy only the parts that a dirty bitmap of qemu reports as written since.

The backup is a raw image.  The meta context qemu:dirty-bitmap:BITMAP reports which parts were
written after the bitmap was added.  qemu-nbd -B BITMAP and running virtual machines provide it.

    python dirty_bitmap.py                    # makes a disk, writes to it, and backs it up
    python dirty_bitmap.py nbd://localhost/disk BITMAP backup.img
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nbd

BLOCK = 1024 * 1024  # bytes read at once
CONTEXT = "qemu:dirty-bitmap:"
DIRTY = 1  # the flag of an extent in the meta contexts of dirty bitmaps


def back_up(h: nbd.NBD, context: str, target: Path) -> None:
    """Copy the dirty extents to the same offsets of the file."""
    with nbd.open(h) as disk, target.open("r+b") as file:
        file.truncate(h.get_size())
        for offset, length, flags in nbd.extents(h, context):
            if not flags & DIRTY:
                continue
            print(f"dirty: {length} bytes at {offset}", flush=True)
            disk.seek(offset)
            file.seek(offset)
            while length:
                length -= file.write(disk.read(min(BLOCK, length)))


def demonstrate(folder: Path) -> None:
    """Make a disk and an old backup of it, write to the disk, update the backup, and compare."""
    disk, backup = folder / "disk.qcow2", folder / "backup.img"
    backup.touch()  # the disk was empty
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
