# SPDX-License-Identifier: LGPL-2.0-or-later
"""Keep a raw backup of a qcow2 disk: a full copy first, and then only what was written since.

Each run adds a dirty bitmap to the disk, in which qemu notes what is written from then on.  The
bitmap of the run before says what to copy now, and is removed once the backup is complete.  So a
run that fails loses nothing: the next one copies what both bitmaps have noted.  No other program
may have the disk open meanwhile.

    python backup_chain.py                    # makes a disk, and backs it up four times
    python backup_chain.py disk.qcow2 backup.img
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nbd

CONTEXT = "qemu:dirty-bitmap:"
DIRTY = 1  # the flag of an extent in the meta contexts of dirty bitmaps
PREFIX = "backup-"  # of our bitmaps; a number follows


def back_up(disk: Path, backup: Path) -> None:
    """Make the backup equal to the disk, and have the disk note what is written from now on."""
    old = numbers(disk)
    new = max(old, default=0) + 1
    qemu_img("bitmap", "--add", str(disk), f"{PREFIX}{new}")
    if old and backup.exists():
        copied = update(disk, backup, [f"{PREFIX}{number}" for number in old])
        print(f"incremental: {copied} bytes")
    else:
        copied = copy_all(disk, backup)
        print(f"full: {copied} bytes")
    for number in old:
        qemu_img("bitmap", "--remove", str(disk), f"{PREFIX}{number}")


def copy_all(disk: Path, backup: Path) -> int:
    """Copy the whole disk; a backup that exists is replaced when the copy is complete."""
    part = backup.with_name(backup.name + ".part")
    with serve(disk) as h:
        result = nbd.copy(h, part)
    part.replace(backup)
    return sum(result)


def update(disk: Path, backup: Path, bitmaps: list[str]) -> int:
    """Copy what was written since the oldest of the bitmaps was added."""
    dirty: list[nbd.Extent] = []
    with serve(disk, *bitmaps) as h:
        for name in bitmaps:
            dirty += (extent for extent in nbd.extents(h, CONTEXT + name) if extent.flags & DIRTY)
        return sum(nbd.copy(h, backup, ranges=dirty))  # each byte once


def serve(disk: Path, *bitmaps: str) -> nbd.NBD:
    """Start a qemu-nbd for the disk and these bitmaps; it ends when the handle is closed."""
    h = nbd.NBD()
    for context in (nbd.CONTEXT_BASE_ALLOCATION, *(CONTEXT + name for name in bitmaps)):
        h.add_meta_context(context)
    options = [f"--bitmap={name}" for name in bitmaps]
    h.connect_systemd_socket_activation(["qemu-nbd", "--format=qcow2", *options, str(disk)])
    return h


def numbers(disk: Path) -> list[int]:
    """Return the numbers of our bitmaps in the disk; the lowest is the oldest."""
    image = json.loads(qemu_img("info", "--output=json", str(disk)))
    bitmaps = image["format-specific"]["data"].get("bitmaps", [])
    names = [bitmap["name"] for bitmap in bitmaps]
    return sorted(int(name[len(PREFIX) :]) for name in names if name.startswith(PREFIX))


def qemu_img(*arguments: str) -> str:
    """Run qemu-img, which reports errors itself, and return its output."""
    command = ["qemu-img", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def demonstrate(folder: Path) -> None:
    """Back up a disk that is written to in between, and compare each time."""
    disk, backup = folder / "disk.qcow2", folder / "backup.img"
    qemu_img("create", "-q", "-f", "qcow2", str(disk), "64M")
    for run in range(4):
        with serve(disk) as h:
            h.pwrite(b"%d" % run * 1_000_000, run * 16 * 1024 * 1024)
        back_up(disk, backup)
        print(qemu_img("compare", "-f", "raw", "-F", "qcow2", str(backup), str(disk)), end="")


def main() -> None:
    """Back up the disk in the first argument, or demonstrate it with a new disk."""
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            demonstrate(Path(folder))
        return
    disk, backup = sys.argv[1:]
    back_up(Path(disk), Path(backup))


if __name__ == "__main__":
    try:
        main()
    except (nbd.Error, OSError, subprocess.CalledProcessError) as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
